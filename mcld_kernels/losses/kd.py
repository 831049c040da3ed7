r"""Knowledge distillation by the KL divergence of softened probabilities (Hinton et al., arXiv 1503.02531).

With p = softmax(T / t) and q = softmax(S / t) over the classes, temperature t and batch size B,

    L = (t^2 / B) sum_i sum_k p_ik (log p_ik - log q_ik),    dL/dS = (t / B) (q - p),
    dL/dT_ik = (t / B) p_ik (log p_ik - log q_ik - KL_i).

fp32 logits of a CPU take a compiled kernel, row by row. All others take the classes by chunks: a pass each gives the
log-sum-exp of both sides, the divergence and the gradient. Nothing but the gradient has the size of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import reference
from ..family_options import KDOptions
from ..kernels import KernelSet, LossInputs, LossOutputs, slices
from ..ops import LossOperator
from ..options import Backend, check_backend, check_logits, check_positive, grad_dtype
from ..plain_call import plain_call


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    backend: Backend = "auto",
) -> Tensor:
    r"""Knowledge distillation: temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature)).

    In eager PyTorch::

        F.kl_div(
            F.log_softmax(student / temperature, 1),
            F.log_softmax(teacher / temperature, 1),
            reduction="batchmean",
            log_target=True,
        ) * temperature**2

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        student: logits, (batch, classes), float16, bfloat16, float32 or float64, any strides.
        teacher: logits of the same shape and device. It gets its gradient if it requires grad.
        target: labels, accepted and not used, so that losses can be exchanged for one another.
        temperature: > 0.
        backend: "auto", "torch" or "reference"; the other backends have no kernels for this loss.

    Returns:
        Tensor of shape (), float64 for float64 logits and float32 otherwise; 0 for an empty batch. The gradient has
        the logits' dtype.

    Raises:
        ValueError: shapes, devices or the temperature do not fit.
        TypeError: a dtype or type does not fit.
        mcld_kernels.backends.BackendUnavailable: the backend requested cannot run; the message says why.
    """
    check_backend(backend)
    options = KDOptions(temperature=check_positive("temperature", temperature))
    if (loss := plain_call(student, teacher, options, _as_kernel, backend)) is not None:
        return loss
    check_logits(student, teacher)
    if backend == "reference":
        return reference.kd.evaluate(student, teacher, options.temperature)
    return _OPERATOR(student, teacher, None, None, options, backend)[0]


class KDLoss(nn.Module):
    """:func:`mcld_kernels.kd_loss` with its options kept.

    Shapes:
        student, teacher: (batch, classes); output: ().
    """

    def __init__(self, *, temperature: float = 4.0, backend: Backend = "auto"):
        super().__init__()
        check_backend(backend)
        self.temperature, self.backend = temperature, backend

    @property
    def temperature(self) -> float:
        """The temperature; assign one for a schedule."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_positive("temperature", value)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        return kd_loss(student, teacher, target, temperature=self.temperature, backend=self.backend)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, backend={self.backend!r}"


def compute(kernels: KernelSet, inputs: LossInputs) -> LossOutputs:
    """Loss and gradients: row by row where the kernel set has it, else by chunks of classes."""
    if (low_latency := kernels.kd_low_latency(inputs)) is not None:
        return low_latency(inputs)
    student, teacher, temperature = inputs.student, inputs.teacher, inputs.options.temperature
    (n, num_classes), acc = student.shape, inputs.acc_dtype
    # A chunk holds some four temporaries of its size.
    chunks = slices(num_classes, max(1, kernels.tuning.chunk_bytes // (4 * n * acc.itemsize)))

    log_q_of, log_p_of = (_LogSoftmax(logits, temperature, acc, chunks) for logits in (student, teacher))
    divergence = student.new_zeros(n, 1, dtype=acc)
    for chunk in chunks:
        log_p, log_q = log_p_of(chunk), log_q_of(chunk)
        divergence += _weighted_difference(log_p, log_q).sum(1, keepdim=True)
    loss = divergence.sum() * (temperature**2 / n)
    grads = [
        torch.empty(logits.shape, dtype=grad_dtype(logits.dtype), device=logits.device) if needed else None
        for logits, needed in ((student, inputs.student_grad), (teacher, inputs.teacher_grad))
    ]
    for chunk in chunks if inputs.student_grad or inputs.teacher_grad else ():
        log_p, log_q = log_p_of(chunk), log_q_of(chunk)
        if grads[0] is not None:
            grads[0][:, chunk] = (log_q.exp() - log_p.exp()).mul_(temperature / n)
        if grads[1] is not None:
            grads[1][:, chunk] = (_weighted_difference(log_p, log_q) - log_p.exp() * divergence).mul_(temperature / n)
    return LossOutputs(loss=loss, terms=loss[None].clone(), student_grad=grads[0], teacher_grad=grads[1])


class _LogSoftmax:
    """log softmax(logits / temperature) over the classes (n, C), a chunk of classes at a time."""

    def __init__(self, logits: Tensor, temperature: float, acc: torch.dtype, chunks: list[slice]):
        self.logits, self.temperature, self.acc = logits, temperature, acc
        # Less the largest first, as the rounding of an exponent is relative to its size.
        self.peak = logits.amax(1, keepdim=True).to(acc) / temperature
        total = torch.zeros_like(self.peak)
        for chunk in chunks:
            total += self._exponents(chunk).exp_().sum(1, keepdim=True)
        self.log_sum = total.log()

    def __call__(self, chunk: slice) -> Tensor:
        return self._exponents(chunk).sub_(self.log_sum)

    def _exponents(self, chunk: slice) -> Tensor:
        return (self.logits[:, chunk].to(self.acc) / self.temperature).sub_(self.peak)


def _weighted_difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q); 0 where p is 0 and log p = -inf."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q))


def _as_kernel(options: KDOptions) -> KDOptions:
    return options


def _flops(batch: int, classes: int, options: KDOptions, grads: int) -> int:
    """Some ten operations an element for the loss, and for each gradient."""
    return 10 * (1 + grads) * batch * classes


_OPERATOR = LossOperator("kd", KDOptions, num_terms=1, compute=compute, flops=_flops, supported=("torch",))
