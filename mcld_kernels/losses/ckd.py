r"""CKD, contrastive knowledge distillation: functions, module and the composition from contrasts (arXiv 2404.14109).

With unit rows s_i, t_i of student and teacher logits (n, C) and temperature tau there are two forms:

negatives="teacher", as the released code has it: teacher rows are anchors, student rows candidates, positives on the
diagonal. It is MCLD's instance-wise term with `direction="teacher"`, and `infonce.contrast` computes it.

negatives="student", as the paper's summary states it: the negatives of student row i are the other student rows, its
positive is its teacher row. With e_ij = exp(s_i . s_j / tau), neg_sum_i = sum_{j != i} e_ij and
Z_i = neg_sum_i + exp(s_i . t_i / tau),

    L_i     = log1p(neg_sum_i / exp(s_i . t_i / tau)),    q_i = neg_sum_i / Z_i,
    dL/ds_i = (sum_{j != i} e_ij (1 / Z_i + 1 / Z_j) s_j - q_i t_i) / (tau n),
    dL/dt_i = -q_i s_i / (tau n),

since every student row is an anchor and a candidate of all others; `KernelSet.self_contrast` gives the sum.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import reference
from ..distributed import Gather, RanksOptions, ranks_options, report
from ..family_options import (
    CKDOptions,
    CKDTerms,
    Negatives,
    check_gather,
    check_inputs,
    ckd_as_mcld,
    ckd_options,
)
from ..infonce import Anchors, GradBuffer, Side, contrast
from ..kernels import (
    AnchorTerms,
    GradCoefficients,
    GradEpilogueArgs,
    KernelSet,
    LossInputs,
    LossOutputs,
    TermWeight,
    UnitRows,
)
from ..ops import LossOperator
from ..options import Backend, check_backend
from ..plain_call import plain_call
from .ckd_ranks import compute_over_ranks
from .mcld import mcld_terms
from .module_options import Option
from .module_over_ranks import ModuleOverRanks

# Constants of the released code (github.com/wencheng-zhu/CKD), by data set.
PRESETS = MappingProxyType(
    {
        "cifar100": MappingProxyType({"temperature": 1.0, "weight": 100.0}),
        "imagenet": MappingProxyType({"temperature": 1.0, "weight": 10.0}),
    }
)


def ckd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    weight: float | Tensor = 10.0,
    negatives: Negatives = "teacher",
    eps: float = 1e-12,
    backend: Backend = "auto",
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> Tensor:
    r"""Contrastive knowledge distillation: a student row is to resemble its teacher row more than others do.

    In eager PyTorch, with unit rows and ``negatives="teacher"``, then with ``negatives="student"``::

        s, t = F.normalize(student), F.normalize(teacher)
        positives = torch.arange(len(s))
        loss = weight * F.cross_entropy(t @ s.T / temperature, positives)

        similarities = torch.where(torch.eye(len(s), dtype=torch.bool), s @ t.T, s @ s.T) / temperature
        loss = weight * F.cross_entropy(similarities, positives)

    Source: "CKD: Contrastive Knowledge Distillation from A Sample-Wise Perspective", arXiv 2404.14109. The default
    constants are the released code's for ImageNet; ``mcld_kernels.losses.ckd.PRESETS`` has those for CIFAR-100 too.

    Args:
        student: logits, or any embeddings, (batch, classes), float16, bfloat16, float32 or float64, any strides.
        teacher: the same shape and device. If it requires grad it gets its gradient, from backends "torch" and
            "reference".
        target: accepted and not used, so that losses can be exchanged for one another: no term reads labels, and a row
            without a class takes part as any other.
        temperature: > 0.
        weight: >= 0, the factor of the loss. 0 removes the term and its cost. A tensor of shape () on the logits'
            device can change without recompiling and gets its gradient.
        negatives: "teacher" as the released code has it (teacher rows as anchors, student rows as candidates), or
            "student" as the paper's summary states it (the other student rows are the negatives).
        eps: a row with L2 norm <= eps has no direction: it is normalised to zeros and gets no gradient.
        backend: "auto" (the fastest that can run), "reference", "torch", "triton" or "cuda".
        process_group, gather, even: as for :func:`mcld_kernels.mcld_loss`; the mean over the ranks is the loss of the
            global batch. ``gather="ring"`` is for ``negatives="teacher"`` alone.

    Returns:
        Tensor of shape (), float64 for float64 logits and float32 otherwise; 0 for an empty batch and for one row. The
        gradient has the logits' dtype.

    Raises:
        ValueError: shapes, devices, values or options do not fit.
        TypeError: a dtype or type does not fit.
        NotImplementedError: ``gather="ring"`` over ranks, with ``negatives="student"``.
        RuntimeError: a collective failed: a rank has ended, or ran other code until the group's timeout.
        mcld_kernels.backends.BackendUnavailable: the backend asked for cannot run; the message says why.
    """
    options, weight_tensor, ranks = _arguments(temperature, weight, negatives, eps, process_group, gather, even)
    if ranks is None and weight_tensor is None:
        if (loss := plain_call(student, teacher, options, ckd_as_mcld, backend)) is not None:
            return loss
    if ranks is not None or backend == "reference":
        return evaluate(student, teacher, weight_tensor, options, backend, ranks).loss
    check_inputs(student, teacher, weight_tensor, backend)
    return _OPERATOR(student, teacher, None, weight_tensor, options, backend)[0]


def ckd_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    weight: float | Tensor = 10.0,
    negatives: Negatives = "teacher",
    eps: float = 1e-12,
    backend: Backend = "auto",
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> CKDTerms:
    """:func:`ckd_loss` and its part: ``CKDTerms(loss, contrast)``, each of shape ().

    ``loss`` is what :func:`ckd_loss` returns, with its gradient; ``contrast`` is unweighted and detached, for logging.
    Arguments and errors as :func:`ckd_loss`.
    """
    options, weight_tensor, ranks = _arguments(temperature, weight, negatives, eps, process_group, gather, even)
    return evaluate(student, teacher, weight_tensor, options, backend, ranks)


def _arguments(
    temperature: Any, weight: Any, negatives: Any, eps: Any, process_group: Any, gather: Any, even: Any
) -> tuple[CKDOptions, Tensor | None, RanksOptions | None]:
    """The options, the weight tensor (1,) if one came, and how to run over ranks; all ranks raise if one refuses."""
    ranks = ranks_options(process_group, gather, even)
    try:
        options, tensor = ckd_options(temperature=temperature, weight=weight, negatives=negatives, eps=eps)
        check_ring(ranks, options)
    except (NotImplementedError, TypeError, ValueError) as error:
        report(ranks, error)
        raise
    return options, tensor, ranks


def check_ring(ranks: RanksOptions | None, options: CKDOptions) -> None:
    """Refuse the ring where there is no such form."""
    if options.negatives == "student":
        check_gather(ranks, 'CKD with negatives="student"')


def _teacher_form_over_ranks(
    student: Tensor, teacher: Tensor, weight: Tensor | None, options: CKDOptions, backend: str, ranks: RanksOptions
) -> CKDTerms:
    """negatives="teacher" over ranks: MCLD's instance-wise term with teacher anchors."""
    terms = mcld_terms(
        student,
        teacher,
        temperature=options.temperature,
        weight=(options.term_weight, 0.0, 0.0),
        direction="teacher",
        eps=options.eps,
        backend=backend,  # type: ignore[arg-type]
        process_group=ranks.group,
        gather=ranks.gather,
        even=ranks.even,
    )
    loss = terms.loss if weight is None else weight[0].to(terms.loss.dtype) * terms.loss
    return CKDTerms(loss, terms.instance)


def evaluate(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    options: CKDOptions,
    backend: str,
    ranks: RanksOptions | None = None,
) -> CKDTerms:
    """Check the tensors and run a backend. weight: (1,) or None."""
    try:
        check_inputs(student, teacher, weight, backend)
    except (TypeError, ValueError) as error:
        report(ranks, error)
        raise
    if ranks is not None and options.negatives == "teacher":
        return _teacher_form_over_ranks(student, teacher, weight, options, backend, ranks)
    if backend == "reference":
        return reference.ckd.evaluate(student, teacher, weight, options, ranks)
    loss, terms = _OPERATOR(student, teacher, None, weight, options, backend, ranks=ranks)
    return CKDTerms(loss, *terms.unbind())


class CKDLoss(ModuleOverRanks):
    """:func:`mcld_kernels.ckd_loss` with its options kept. The method has no warm-up.

    Args:
        temperature, weight, negatives, eps, backend, process_group, gather, even: as for :func:`mcld_kernels.ckd_loss`.
            ``weight`` as a tensor becomes a buffer, or a parameter if it is one. Every option can be assigned.

    Shapes:
        student, teacher: (batch, classes); target: (batch,), not used; output: ().
    """

    temperature = Option[float]()
    negatives = Option[Negatives]()
    eps = Option[float]()
    _check_options = staticmethod(ckd_options)

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        weight: float | Tensor = 10.0,
        negatives: Negatives = "teacher",
        eps: float = 1e-12,
        backend: Backend = "auto",
        process_group: dist.ProcessGroup | str | None = None,
        gather: Gather = "all",
        even: bool = False,
    ):
        super().__init__(process_group, gather, even)
        check_backend(backend)
        self.backend = backend
        self.options, _ = ckd_options(temperature=temperature, weight=weight, negatives=negatives, eps=eps)
        self._check_ranks(self.ranks, self.options)
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight if isinstance(weight, Tensor) else None)

    def _check_ranks(self, ranks: RanksOptions | None, options: Any) -> None:
        check_ring(ranks, options)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        if self.weight is None and self.ranks is None:
            if (loss := plain_call(student, teacher, self.options, ckd_as_mcld, self.backend)) is not None:
                return loss
        return self.terms(student, teacher, target).loss

    def terms(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> CKDTerms:
        """The loss and its term, as :func:`mcld_kernels.ckd_terms`."""
        weight = None if self.weight is None else self.weight.reshape(1)
        return evaluate(student, teacher, weight, self.options, self.backend, self.ranks)

    def extra_repr(self) -> str:
        options = self.options
        weight = options.term_weight if self.weight is None else self.weight.detach()
        shown = f"temperature={options.temperature:g}, weight={weight}, negatives={options.negatives!r}"
        return f"{shown}, eps={options.eps:g}, {self._shown_ranks()}backend={self.backend!r}"


def compute(kernels: KernelSet, inputs: LossInputs) -> LossOutputs:
    """Loss, term and gradients of a call."""
    options: CKDOptions = inputs.options
    student, teacher, acc = inputs.student, inputs.teacher, inputs.acc_dtype
    student_grad, teacher_grad = GradBuffer(student, inputs.student_grad), GradBuffer(teacher, inputs.teacher_grad)
    if options.term_weight == 0:
        terms = student.new_zeros(1, dtype=acc)
        return LossOutputs(
            loss=terms.sum(), terms=terms, student_grad=student_grad.result(), teacher_grad=teacher_grad.result()
        )
    if (low_latency := kernels.ckd_low_latency(inputs)) is not None:
        return low_latency(inputs)
    operand = kernels.operand_dtype(inputs.dtype)
    unit = kernels.l2_normalize(student, operand, options.eps), kernels.l2_normalize(teacher, operand, options.eps)
    weight = None if inputs.weight is None else inputs.weight.to(acc)
    per_anchor = student.new_empty(1, student.shape[0], dtype=acc)
    term = TermWeight(
        term=0,
        positives="diagonal",
        constant=1 / student.shape[0],
        term_weight=options.term_weight,
        weight=None if weight is None else weight[0],
    )
    if options.negatives == "teacher":
        sides = Side(unit=unit[0], grad=student_grad), Side(unit=unit[1], grad=teacher_grad)
        anchors = Anchors(side=sides[1], weights=(term,), per_anchor=per_anchor)
        contrast(kernels, anchors, sides[0], temperature=options.temperature)
    else:
        _contrast_students(kernels, inputs, unit, term, per_anchor, student_grad, teacher_grad)
    loss, terms = kernels.reduce_terms(per_anchor, (0,), (options.term_weight,), weight)
    return LossOutputs(loss=loss, terms=terms, student_grad=student_grad.result(), teacher_grad=teacher_grad.result())


def _contrast_students(
    kernels: KernelSet,
    inputs: LossInputs,
    unit: tuple[UnitRows, UnitRows],
    term: TermWeight,
    per_anchor: Tensor,
    student_grad: GradBuffer,
    teacher_grad: GradBuffer,
) -> None:
    """negatives="student": each anchor's part of the term, and the gradients."""
    student, teacher = unit
    temperature = inputs.options.temperature
    positive, _ = kernels.positive_cosines(student, teacher, 0, None, None)
    terms = AnchorTerms(
        positive=positive, label_positive=positive, temperature=temperature, weights=(term,), per_anchor=per_anchor
    )
    pass_ = kernels.self_contrast(student, temperature, student_grad.needed)
    parts = []
    for sums in pass_.chunks():
        coefficients = kernels.loss_epilogue(terms, sums)
        parts.append(coefficients.partner)
        if student_grad.needed:
            pass_.add(sums, coefficients)
    partner = parts[0] if len(parts) == 1 else torch.cat(parts)
    for side, other, grad in ((student, teacher, student_grad), (teacher, student, teacher_grad)):
        if not grad.needed:
            continue
        product = pass_.product() if side is student else torch.zeros_like(side.rows[: side.n], dtype=positive.dtype)
        kernels.grad_epilogue(
            GradEpilogueArgs(
                out=grad.view(False),
                unit=side,
                rows=slice(0, side.n),
                product=product,
                coefficients=GradCoefficients(partner=partner, product=torch.ones_like(partner), class_mean=None),
                partner=other,
                offset=0,
                class_means=None,
                class_index=None,
                accumulate=False,
            )
        )
        grad.is_written = True


def _flops(batch: int, classes: int, options: CKDOptions, grads: int) -> int:
    """2 n n d for the similarities and as many for each gradient; half of both passes' similarities by symmetry."""
    if options.term_weight == 0:
        return 0
    product = 2 * batch * batch * classes
    if options.negatives == "teacher":
        return (1 + grads) * product
    return 2 * product if grads else product // 2


_OPERATOR = LossOperator(
    "ckd", CKDOptions, num_terms=1, compute=compute, flops=_flops, compute_over_ranks=compute_over_ranks
)
