r"""MLKD, multi-level knowledge distillation: functions, module and composition (arXiv 2012.00573).

The definitions are those of `reference.mlkd`; s_i, t_i are unit rows. Alignment is |s_i - t_i|^2. The supervised term
contrasts the N rows z = [s; t] (or z = s) with one another, `KernelSet.self_contrast`:

    L_i = logsumexp_{j != i} a_ij - positive_i,    positive_i = mean of a_ij over the other rows of i's label,
    dL/dz_i = (sum_{j != i} (c_i p_ij + c_j p_ji) z_j - 2 c_i n_i / (n_i - 1) m_i) / tau,

with c_i = 1 / (number of anchors) where i is one, else 0, and m_i the mean of the n_i rows of i's label, which includes
z_i: the projection of the normalization drops that part. The correlation needs two symmetric matrices at once and is in
`mlkd_correlation`, which takes the supervised term along.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends, reference
from ..distributed import Gather, RanksOptions, ranks_options, report
from ..family_options import (
    MLKDOptions,
    MLKDTerms,
    Views,
    check_gather,
    check_inputs,
    check_mlkd_target,
    mlkd_options,
)
from ..kernels import GradCoefficients, GradEpilogueArgs, KernelSet, LossInputs, LossOutputs, UnitRows
from ..ops import LossOperator
from ..options import Backend, check_backend, grad_dtype
from . import mlkd_whole
from .mlkd_correlation import Rows, correlate, of_anchors
from .mlkd_parts import align, find_positives
from .mlkd_ranks import compute_over_ranks
from .module_options import Option
from .module_over_ranks import ModuleOverRanks

# Constants of the released code, weights of (correlation, alignment, supervised), by data set.
PRESETS = MappingProxyType(
    {
        name: MappingProxyType(
            {"correlation_temperature": 0.5, "supervised_temperature": 0.07, "weight": weight, "views": 2}
        )
        for name, weight in (("cifar100", (50.0, 20.0, 1.0)), ("imagenet", (20.0, 10.0, 0.5)))
    }
)


def mlkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    correlation_temperature: float = 0.5,
    supervised_temperature: float = 0.07,
    weight: Sequence[float] | Tensor = (50.0, 20.0, 1.0),
    views: Views = 2,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: Backend = "auto",
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> Tensor:
    r"""Multi-level knowledge distillation: alignment of rows, correlation among rows, and supervised contrast.

    In eager PyTorch, with unit rows, the default weights, and softmax and log-sum-exp over the other rows::

        s, t = F.normalize(student), F.normalize(teacher)
        others = ~torch.eye(len(s), dtype=torch.bool)
        p, q = (
            (x @ x.T / correlation_temperature)[others].view(len(s), -1).log_softmax(1) for x in (t, s)
        )
        correlation = F.kl_div(q, p, reduction="batchmean", log_target=True)
        alignment = (2 - 2 * (s * t).sum(1)).mean()
        z, y = torch.cat((s, t)), torch.cat((target, target))
        others = ~torch.eye(len(z), dtype=torch.bool)
        log_p = (z @ z.T / supervised_temperature)[others].view(len(z), -1).log_softmax(1)
        same = (y[:, None] == y)[others].view(len(z), -1)
        supervised = -((log_p * same).sum(1) / same.sum(1)).mean()
        loss = 50 * correlation + 20 * alignment + supervised

    Source: "Multi-level Knowledge Distillation via Knowledge Alignment and Correlation", arXiv 2012.00573. Its official
    code works on features behind projectors and on four views of each image; applied to logits, or to any embeddings,
    with one view each of student and teacher, this is an adaptation. The constants are the official code's.

    The correlation has no kernel in backends "triton" and "cuda", which refuse the loss unless its weight is 0: it is
    bound by its GEMMs, 89 % of its time at B = 4096, C = 1000 in fp32 on one CPU thread, which the library runs at its
    own speed.

    Args:
        student: logits or embeddings, (batch, classes), float16, bfloat16, float32 or float64, any strides.
        teacher: the same shape and device. If it requires grad it gets its gradient, from backends "torch" and
            "reference".
        target: labels, (batch,), int64, >= 0 or ``ignore_index``; needed by the supervised term. They are compared with
            one another alone, and may exceed the number of classes.
        correlation_temperature: > 0, of the softmax over the other rows.
        supervised_temperature: > 0, of the supervised contrast.
        weight: three numbers >= 0 (correlation, alignment, supervised). 0 removes a term and its cost. A tensor of
            shape (3,) on the logits' device can change without recompiling and gets its gradient.
        views: 2: the supervised term contrasts the 2 batch rows of both sides; 1: the student's rows alone.
        ignore_index: label of rows without a class. They stay candidates, and rows of the other terms, but are no
            anchor of the supervised term and of the same class as no row.
        eps: a row with L2 norm <= eps has no direction: it is normalised to zeros and gets no gradient.
        backend: "auto", "torch" or "reference"; without the correlation also "triton" or "cuda".
        process_group, gather, even: as for :func:`mcld_kernels.mcld_loss`; the mean over the ranks is the loss of the
            global batch. ``gather`` must be "all": rows do not travel around the ranks here.

    Returns:
        Tensor of shape (), float64 for float64 logits and float32 otherwise. The gradient has the logits' dtype. An
        empty batch, and a term without anchors, give 0.

    Raises:
        ValueError: shapes, devices, values or options do not fit, labels are missing, soft, or negative.
        TypeError: a dtype or type does not fit.
        NotImplementedError: ``gather="ring"`` over ranks.
        RuntimeError: a collective failed: a rank has ended, or ran other code until the group's timeout.
        mcld_kernels.backends.BackendUnavailable: the backend asked for cannot run; the message says why.
    """
    return mlkd_terms(
        student,
        teacher,
        target,
        correlation_temperature=correlation_temperature,
        supervised_temperature=supervised_temperature,
        weight=weight,
        views=views,
        ignore_index=ignore_index,
        eps=eps,
        backend=backend,
        process_group=process_group,
        gather=gather,
        even=even,
    ).loss


def mlkd_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    correlation_temperature: float = 0.5,
    supervised_temperature: float = 0.07,
    weight: Sequence[float] | Tensor = (50.0, 20.0, 1.0),
    views: Views = 2,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: Backend = "auto",
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> MLKDTerms:
    """:func:`mlkd_loss` and its parts: ``MLKDTerms(loss, correlation, alignment, supervised)``, each of shape ().

    ``loss`` is what :func:`mlkd_loss` returns, with its gradient; the terms are unweighted and detached, for logging. A
    term with weight 0 is not computed and reads 0. Arguments and errors as :func:`mlkd_loss`.
    """
    ranks = ranks_options(process_group, gather, even)
    try:
        options, weight_tensor = mlkd_options(
            correlation_temperature=correlation_temperature,
            supervised_temperature=supervised_temperature,
            weight=weight,
            views=views,
            ignore_index=ignore_index,
            eps=eps,
        )
        check_gather(ranks, "MLKD")
    except (NotImplementedError, TypeError, ValueError) as error:
        report(ranks, error)
        raise
    return evaluate(student, teacher, target, weight_tensor, options, backend, ranks)


def evaluate(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    options: MLKDOptions,
    backend: str,
    ranks: RanksOptions | None = None,
) -> MLKDTerms:
    """Check the tensors and run a backend. weight: (3,) or None."""
    used = target if options.term_weight[2] != 0 else None
    try:
        check_inputs(student, teacher, weight, backend)
        labels_are_classes = check_mlkd_target(target, student, options)
        if options.term_weight[0] != 0 and backend not in ("torch", "reference"):
            # Only torch operations compute the correlation.
            backend = "torch" if backend == "auto" else backends.choose(backend, student, teacher, False, ("torch",))
    except (TypeError, ValueError, backends.BackendUnavailable) as error:
        report(ranks, error)
        raise
    if backend == "reference":
        return reference.mlkd.evaluate(student, teacher, used, weight, options, ranks)
    loss, terms = _OPERATOR(student, teacher, used, weight, options, backend, labels_are_classes, ranks=ranks)
    return MLKDTerms(loss, *terms.unbind())


class MLKDLoss(ModuleOverRanks):
    """:func:`mcld_kernels.mlkd_loss` with its options kept. The method has no warm-up.

    Args:
        correlation_temperature, supervised_temperature, weight, views: as for :func:`mcld_kernels.mlkd_loss`.
            ``weight`` as a tensor becomes a buffer, or a parameter if it is one.
        ignore_index, eps, backend, process_group, gather, even: as for :func:`mcld_kernels.mlkd_loss`.
            Every option can be assigned.

    Shapes:
        student, teacher: (batch, classes); target: (batch,) int64; output: ().
    """

    correlation_temperature = Option[float]()
    supervised_temperature = Option[float]()
    views = Option[Views]()
    ignore_index = Option[int]()
    eps = Option[float]()
    _check_options = staticmethod(mlkd_options)

    def __init__(
        self,
        *,
        correlation_temperature: float = 0.5,
        supervised_temperature: float = 0.07,
        weight: Sequence[float] | Tensor = (50.0, 20.0, 1.0),
        views: Views = 2,
        ignore_index: int = -100,
        eps: float = 1e-12,
        backend: Backend = "auto",
        process_group: dist.ProcessGroup | str | None = None,
        gather: Gather = "all",
        even: bool = False,
    ):
        super().__init__(process_group, gather, even)
        check_backend(backend)
        self.backend = backend
        self.options, _ = mlkd_options(
            correlation_temperature=correlation_temperature,
            supervised_temperature=supervised_temperature,
            weight=weight,
            views=views,
            ignore_index=ignore_index,
            eps=eps,
        )
        self._check_ranks(self.ranks, self.options)
        self._hold_weight(weight)

    def _check_ranks(self, ranks: RanksOptions | None, options: Any) -> None:
        check_gather(ranks, "MLKD")

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        return self.terms(student, teacher, target).loss

    def terms(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> MLKDTerms:
        """The loss and its three terms, as :func:`mcld_kernels.mlkd_terms`."""
        return evaluate(student, teacher, target, self.weight, self.options, self.backend, self.ranks)

    def extra_repr(self) -> str:
        shown = self.options._asdict()
        term_weight = shown.pop("term_weight")
        shown["weight"] = term_weight if self.weight is None else self.weight.detach()
        parts = [f"{name}={value!r}" for name, value in shown.items()]
        return ", ".join([*parts, f"{self._shown_ranks()}backend={self.backend!r}"])


def compute(kernels: KernelSet, inputs: LossInputs) -> LossOutputs:
    """Loss, terms and gradients of a call."""
    if (low_latency := kernels.mlkd_low_latency(inputs)) is not None:
        return low_latency(inputs)
    if mlkd_whole.applies(kernels, inputs):
        return mlkd_whole.compute(inputs)
    options: MLKDOptions = inputs.options
    student, teacher, acc = inputs.student, inputs.teacher, inputs.acc_dtype
    factors: Sequence[Tensor | float] = options.term_weight
    if inputs.weight is not None:
        factors = [w * f for w, f in zip(inputs.weight.to(acc).unbind(), options.term_weight, strict=True)]
    correlation, alignment, supervised = (w != 0 for w in options.term_weight)
    zero = student.new_zeros((), dtype=acc)
    terms = [zero, zero, zero]
    grads = [
        torch.zeros(logits.shape, dtype=grad_dtype(logits.dtype), device=logits.device) if needed else None
        for logits, needed in ((student, inputs.student_grad), (teacher, inputs.teacher_grad))
    ]
    operand = kernels.operand_dtype(inputs.dtype)
    if supervised and not correlation:
        terms[2] = _contrast(kernels, inputs, operand, factors[2], grads)
    if correlation:
        unit = kernels.l2_normalize(student, operand, options.eps), kernels.l2_normalize(teacher, operand, options.eps)
        positives = None
        if supervised:
            both = UnitRows(
                rows=torch.cat([x.rows for x in unit[: options.views]]),
                inv_norm=torch.cat([x.inv_norm for x in unit[: options.views]]),
                n=student.shape[0] * options.views,
                d=student.shape[1],
            )
            assert inputs.target is not None
            positives = find_positives(kernels, inputs.target, options, both)
        terms[0], terms[2] = correlate(
            Rows(*unit), options, factors[0], factors[2], positives, grads, kernels.tuning.chunk_bytes
        )
    if alignment:
        terms[1] = align(kernels, inputs, factors[1], grads, student.shape[0])
    loss = zero
    for factor, term, active in zip(factors, terms, options.term_weight, strict=True):
        if active:
            loss = loss + factor * term
    return LossOutputs(loss=loss, terms=torch.stack(terms), student_grad=grads[0], teacher_grad=grads[1])


def _contrast(
    kernels: KernelSet, inputs: LossInputs, operand: torch.dtype, weight: Tensor | float, grads: list[Tensor | None]
) -> Tensor:
    """The supervised term; writes its gradients."""
    options, n = inputs.options, inputs.student.shape[0]
    logits = torch.cat((inputs.student, inputs.teacher)) if options.views == 2 else inputs.student
    unit = kernels.l2_normalize(logits, operand, options.eps)
    temperature = options.supervised_temperature
    assert inputs.target is not None
    positives = find_positives(kernels, inputs.target, options, unit)
    partner = positives.counted * (positives.factor * weight / temperature)  # (N,)
    with_grad = grads[0] is not None or (options.views == 2 and grads[1] is not None)
    pass_ = kernels.self_contrast(unit, temperature, with_grad)
    per_anchor = torch.empty_like(partner)
    for sums in pass_.chunks():
        rows = sums.rows
        value = sums.neg_lse - positives.cosine[rows] / temperature
        per_anchor[rows] = of_anchors(value, positives.counted[rows])
        if with_grad:
            of_rows = GradCoefficients(partner=partner[rows], product=partner[rows] * sums.inv_neg_sum, class_mean=None)
            pass_.add(sums, of_rows)
    if with_grad:
        pull = partner * positives.pull
        whole = grads[0] if grads[1] is None else logits.new_empty(logits.shape, dtype=inputs.acc_dtype)
        assert whole is not None
        rows = slice(0, whole.shape[0])
        kernels.grad_epilogue(
            GradEpilogueArgs(
                out=whole,
                unit=unit,
                rows=rows,
                product=pass_.product()[rows],
                # The partner's own part cancels: what is left is - pull x class mean.
                coefficients=GradCoefficients(
                    partner=pull[rows], product=torch.ones_like(pull[rows]), class_mean=pull[rows]
                ),
                partner=unit,
                offset=0,
                class_means=positives.means,
                class_index=positives.class_index,
                accumulate=False,
            )
        )
        if grads[1] is not None:
            for grad, part in zip(grads, whole.split(n), strict=False):
                if grad is not None:
                    grad.copy_(part)
    return per_anchor.sum() * positives.factor


def _flops(batch: int, classes: int, options: MLKDOptions, grads: int) -> int:
    """Products alone, half of a symmetric matrix's: see `mlkd_correlation`, and `KernelSet.self_contrast`."""
    correlation, alignment, supervised = (w != 0 for w in options.term_weight)
    square = batch**2 * classes
    total = 10 * batch * classes if alignment else 0
    if not correlation:
        if not supervised:
            return total
        return total + (4 if grads else 1) * options.views**2 * square
    cross = 2 if supervised and options.views == 2 else 0  # similarities of student and teacher rows
    similarities = 2 + cross
    return total + (2 * similarities + grads * (2 + cross) if grads else similarities) * square


_OPERATOR = LossOperator(
    "mlkd", MLKDOptions, num_terms=3, compute=compute, flops=_flops, compute_over_ranks=compute_over_ranks
)
