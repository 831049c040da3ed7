"""MCLD on a CPU where a similarity matrix fits one chunk: whole-matrix operations in closed form.

Here the number of dispatched operations is the cost, not their memory. The formulas are those of `infonce`, written for
the negatives; one GEMM gives the gradient by the unit rows, because the coefficients of partners and class means are
written into the matrix of exponentials:

    W_ij = c e_ij / (neg_sum_i + e_ii) (j != i),   W_ii = -c neg_sum_i / (neg_sum_i + e_ii),   g = W K,   c = weight / (n t)

and, for label positives with weight c', W gains c' (identity - R), where row i of R averages the rows of i's label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import LossInputs, LossOutputs
from ..options import MCLDOptions

# exp(a) of similarities a without a shift, and ratios of sums of them, stay inside fp32: exp(80) x 4096 = 2e38.
_LARGEST_SIMILARITY = 40.0
_LARGEST_SIZE = 4096


def mcld(inputs: LossInputs, chunk_bytes: int) -> LossOutputs | None:
    """Loss, terms and gradient with student anchors and a frozen teacher; None where this path does not apply."""
    options: MCLDOptions = inputs.options
    if not _applies(inputs, options, chunk_bytes):
        return None
    instance, sample, category = options.active
    logits = torch.stack((inputs.student, inputs.teacher))  # (2, n, C)
    square = logits.square()
    terms: list[Tensor | None] = [None, None, None]
    grad = None
    weight: list[float | Tensor] = list(options.term_weight)
    if inputs.weight is not None:
        scaled = inputs.weight.to(logits.dtype)
        weight = [w * factor for w, factor in zip(scaled.unbind(), options.term_weight, strict=True)]
    if instance or sample:
        unit, inv_norm = _l2_normalize(logits, square, 2, options.eps)
        target = inputs.target if sample else None
        temperature = options.temperature[0 if instance else 1]
        row_weight = (weight[0] if instance else 0.0), weight[1] if sample else 0.0
        row_terms, grad = _rows(unit, inv_norm, target, temperature, row_weight, inputs.student_grad)
        terms[0], terms[1] = row_terms[0] if instance else None, row_terms[1]
    if category:
        unit, inv_norm = _l2_normalize(logits, square, 1, options.eps)
        terms[2], grad = _columns(unit, inv_norm, options.temperature[2], weight[2], grad, inputs.student_grad)
    zero = next(term for term in terms if term is not None).new_zeros(()) if None in terms else None
    stacked = torch.stack([zero if term is None else term for term in terms])  # type: ignore[misc]
    if inputs.weight is None:
        loss = _weighted(terms, options.term_weight)
    else:
        loss = _weighted(terms, weight)
    return LossOutputs(loss=loss, terms=stacked, student_grad=grad, teacher_grad=None)


def _applies(inputs: LossInputs, options: MCLDOptions, chunk_bytes: int) -> bool:
    student, teacher = inputs.student, inputs.teacher
    n, num_classes = student.shape
    instance, sample, category = options.active
    rows = instance or sample
    size = max(n if rows else 0, num_classes if category else 0)
    return (
        student.device.type == "cpu"
        and student.dtype == teacher.dtype
        and student.dtype in (torch.float32, torch.float64)
        and student.shape == teacher.shape
        and not inputs.teacher_grad
        and any(options.active)
        and (options.direction == "student" or not rows)
        and not (instance and options.mask_same_class)
        and not (category and options.present_only)
        and not (instance and sample and options.temperature[0] != options.temperature[1])
        and (not sample or inputs.labels_are_classes)
        and size <= _LARGEST_SIZE
        and size * size * student.itemsize <= chunk_bytes
        and all(
            1 / temperature <= _LARGEST_SIMILARITY
            for temperature, active in zip(options.temperature, options.active, strict=True)
            if active
        )
    )


def _weighted(terms: list[Tensor | None], weight: object) -> Tensor:
    total: Tensor | None = None
    for term, factor in zip(terms, weight, strict=True):  # type: ignore[call-overload]
        if term is not None:
            part = term if isinstance(factor, float) and factor == 1.0 else term * factor
            total = part if total is None else total + part
    assert total is not None
    return total


def _l2_normalize(logits: Tensor, square: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """Unit vectors along ``dim`` of both sides (2, n, C), and the student's 1 / norm, broadcastable to (n, C)."""
    norm = square.sum(dim, keepdim=True).sqrt_()
    norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
    inv_norm = norm.reciprocal().masked_fill_(norm <= eps, 0.0)
    return logits * inv_norm, inv_norm[0]


def _negatives(e: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities (n, n) become exponentials without the diagonal, in place; exp of the diagonal, neg_sum, loss."""
    positive = diagonal.exp()
    e.exp_()
    diagonal.zero_()
    neg_sum = e.sum(1)
    return positive, neg_sum, (neg_sum / positive).log1p_()


def _rows(
    unit: Tensor,
    inv_norm: Tensor,
    target: Tensor | None,
    temperature: float,
    weight: tuple[float | Tensor, float | Tensor],
    with_grad: bool,
) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """Instance- and sample-wise terms, and the gradient (n, C) by the student. target: (n,) for the sample-wise term."""
    student, teacher = unit.unbind()
    n = student.shape[0]
    e = torch.addmm(inv_norm, student, teacher.T, beta=0, alpha=1 / temperature)  # (n, n)
    diagonal = e.diagonal()
    gap = mean_matrix = class_means = None
    if target is not None:
        if _by_classes(*student.shape):
            class_means = _class_means(teacher, target)  # (n, C)
            label_positive = torch.linalg.vecdot(student, class_means) / temperature
        else:
            same = (target.unsqueeze(1) == target).to(e.dtype)
            mean_matrix = same.div_(same.sum(1, keepdim=True))  # (n, n)
            label_positive = torch.linalg.vecdot(e, mean_matrix)
        gap = (diagonal - label_positive).sum()
    positive, neg_sum, losses = _negatives(e, diagonal)
    instance = losses.sum() / n
    sample = None if gap is None else instance + gap / n
    if not with_grad:
        return (instance, sample), None
    coefficient = (weight[0] + weight[1]) / (n * temperature)
    label_coefficient = weight[1] / (n * temperature)
    factor = coefficient / positive.add_(neg_sum)
    e.mul_(factor.unsqueeze(1))
    diagonal.addcmul_(factor, neg_sum, value=-1)
    if target is not None:
        diagonal.add_(label_coefficient)
    if mean_matrix is not None:
        e.sub_(mean_matrix.mul_(label_coefficient))
    gradient = torch.mm(e, teacher)
    if class_means is not None:
        gradient.sub_(class_means.mul_(label_coefficient))
    # Unit rows in the accumulator dtype have x . x = 1 up to rounding.
    gradient.addcmul_(student, torch.linalg.vecdot(gradient, student).unsqueeze(1), value=-1)
    return (instance, sample), gradient.mul_(inv_norm)


def _by_classes(n: int, num_classes: int) -> bool:
    """True where two GEMMs with one-hot labels, n x C x C, cost less than some passes over an n x n matrix."""
    return num_classes * num_classes <= 16 * n


def _class_means(rows: Tensor, target: Tensor) -> Tensor:
    """The mean of the rows with each row's label: (n, C)."""
    one_hot = (target.unsqueeze(1) == torch.arange(rows.shape[1])).to(rows.dtype)  # (n, C)
    sums = torch.mm(one_hot.T, rows)
    return sums.div_(one_hot.sum(0).clamp_(min=1).unsqueeze(1))[target]


def _columns(
    unit: Tensor,
    inv_norm: Tensor,
    temperature: float,
    weight: float | Tensor,
    row_grad: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The category-wise term; its gradient (n, C) by the student is added to ``row_grad``, in place."""
    student, teacher = unit.unbind()
    num_classes = student.shape[1]
    e = torch.addmm(inv_norm, student.T, teacher, beta=0, alpha=1 / temperature)  # (C, C)
    diagonal = e.diagonal()
    positive, neg_sum, losses = _negatives(e, diagonal)
    category = losses.sum() / num_classes
    if not with_grad:
        return category, None
    factor = (weight / (num_classes * temperature)) / positive.add_(neg_sum)
    e.mul_(factor.unsqueeze(1))
    diagonal.addcmul_(factor, neg_sum, value=-1)
    gradient = torch.mm(teacher, e.T)
    gradient.addcmul_(student, torch.linalg.vecdot(gradient, student, dim=0), value=-1)
    return category, gradient.mul_(inv_norm) if row_grad is None else row_grad.addcmul_(gradient, inv_norm)
