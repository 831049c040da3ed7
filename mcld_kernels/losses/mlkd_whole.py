"""MLKD on a CPU where the matrix of both sides' rows fits a chunk: whole matrices, in closed form.

Here the number of operations is the cost. One GEMM gives the cosines of z = [s; t] (2 n, 2 n), whose blocks serve both
terms, and one the gradient by the student's unit rows, W z, W (n, 2 n). The formulas are those of `mlkd_correlation`;
positives are pairs of equal labels, by their mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..family_options import MLKDOptions
from ..kernels import KernelSet, LossInputs, LossOutputs, has_fixed_shift

_LARGEST_SIZE = 2048  # rows of a side: exponentials of similarities need no shift in fp32


def applies(kernels: KernelSet, inputs: LossInputs) -> bool:
    """True for a frozen teacher and temperatures at which one shift serves all rows, where the matrices fit."""
    options, n, dtype = inputs.options, inputs.student.shape[0], inputs.student.dtype
    return (
        inputs.student.device.type == "cpu"
        and kernels.operand_dtype(inputs.dtype) == dtype == inputs.teacher.dtype
        and dtype in (torch.float32, torch.float64)
        and not inputs.teacher_grad
        and 1 < n <= _LARGEST_SIZE
        and 6 * (2 * n) ** 2 * dtype.itemsize <= kernels.tuning.chunk_bytes
        and any(options.term_weight)
        and has_fixed_shift(dtype, min(options.correlation_temperature, options.supervised_temperature))
        and (inputs.target is None or not _has_bad_label(inputs.target, options.ignore_index))
    )


def _has_bad_label(target: Tensor, ignore_index: int) -> bool:
    # Traced calls come here unchecked; the path by chunks makes their term NaN.
    return bool(target.amin() < 0) and bool(((target < 0) & (target != ignore_index)).any())


def compute(inputs: LossInputs) -> LossOutputs:
    """Loss, terms and the student's gradient."""
    options: MLKDOptions = inputs.options
    n = inputs.student.shape[0]
    weights = options.term_weight
    if inputs.weight is not None:
        factors = inputs.weight.tolist()
        weights = (weights[0] * factors[0], weights[1] * factors[1], weights[2] * factors[2])
    correlation, alignment, supervised = (w != 0 for w in options.term_weight)
    logits = torch.stack((inputs.student, inputs.teacher))  # (2, n, C)
    norm = torch.linalg.vector_norm(logits, dim=2, keepdim=True)
    norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
    inv_norm = torch.threshold_(norm, options.eps, torch.inf).reciprocal_()
    z = logits.mul_(inv_norm).view(2 * n, -1)
    student, teacher = z[:n], z[n:]
    zero = logits.new_zeros(())
    terms = [zero, zero, zero]
    coefficients = None  # (n, columns) of the first rows of z in the gradient by the student's
    cosines = z @ z.T if correlation or supervised else zero
    if supervised:
        assert inputs.target is not None
        size = options.views * n
        terms[2], coefficients = _supervised(
            cosines[:size, :size], inputs.target, options, weights[2], n if inputs.student_grad else 0
        )
    if correlation:
        terms[0], more = _correlation(cosines, n, options.correlation_temperature, weights[0], inputs.student_grad)
        if coefficients is None:
            coefficients = more
        elif more is not None:
            coefficients[:, :n] += more
    gradient = None
    if inputs.student_grad:
        gradient = torch.zeros_like(student) if coefficients is None else coefficients @ z[: coefficients.shape[1]]
    if alignment:
        difference = student - teacher
        # A row without direction is zeros: of its 2 - 2 s . t the square holds 1 less.
        terms[1] = (difference.square().sum() + (inv_norm == 0).sum()).div_(n)
        if gradient is not None:
            gradient.add_(difference, alpha=2 * weights[1] / n)
    if gradient is not None:
        # Unit rows in the accumulator dtype have x . x = 1 up to rounding.
        gradient.addcmul_(student, (gradient * student).sum(1, keepdim=True), value=-1).mul_(inv_norm[0])
    stacked = torch.stack(terms)
    loss = sum((w * term for w, term, active in zip(weights, terms, options.term_weight, strict=True) if active), zero)
    return LossOutputs(loss=loss, terms=stacked, student_grad=gradient, teacher_grad=None)


def _correlation(
    cosines: Tensor, n: int, temperature: float, weight: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The term, and the coefficients (n, n) of the student's rows."""
    student, teacher = cosines[:n, :n], cosines[n:, n:]
    e = (teacher / temperature).exp_()
    e.diagonal().zero_()
    delta = (student - teacher).div_(temperature)
    total = e.sum(1)
    mean = (e * delta).sum(1).div_(total)
    delta.expm1_()
    ratio = (e * delta).sum(1).div_(total)  # (Zs - Zt) / Zt
    term = (ratio.log1p() - mean).mean()
    if not with_grad:
        return term, None
    inverse = (total * (1 + ratio)).reciprocal_()
    gap = -ratio * inverse  # 1 / Zs - 1 / Zt
    w = delta.mul_(inverse[:, None] + inverse).add_(gap[:, None] + gap)
    return term, w.mul_(e).mul_(weight / (n * temperature))


def _supervised(
    cosines: Tensor, target: Tensor, options: MLKDOptions, weight: float, rows: int
) -> tuple[Tensor, Tensor | None]:
    """The term over N rows, and the coefficients (rows, N) of all rows for the first ones; None for 0 rows."""
    temperature, views = options.supervised_temperature, options.views
    same = (target[:, None] == target) & (target != options.ignore_index)
    positives = same.to(cosines.dtype).repeat(views, views)  # each row with itself, too
    others = positives.sum(1).sub_(1)
    counted = others > 0
    others.clamp_(min=1)
    positive = ((cosines * positives).sum(1) - cosines.diagonal()).div_(others)
    e = (cosines / temperature).exp_()
    e.diagonal().zero_()
    total = e.sum(1)
    share = counted.to(total.dtype)  # (N,)
    share.div_(share.sum().clamp_(min=1))
    # Products with 0 instead of a selection: with two rows or more every sum is positive.
    term = ((total.log() - positive / temperature) * share).sum()
    if not rows:
        return term, None
    share = share.mul_(weight / temperature)
    factor = share / total
    w = e[:rows].mul_(factor[:rows, None] + factor)
    # The row's own part goes with the projection.
    return term, w.addcmul_(positives[:rows], (share / others)[:rows, None], value=-2)
