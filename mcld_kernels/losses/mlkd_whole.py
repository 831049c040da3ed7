"""MLKD on a CPU where the matrix of both sides' rows fits a chunk: whole matrices, in closed form.

Here the number of operations is the cost. One GEMM gives the cosines of z = [s; t] (2 n, 2 n), whose blocks serve both
terms, and one the gradient by the student's unit rows, W z, W (n, 2 n). Where the student's rows are enough, z = s. The
formulas are those of `mlkd_correlation`; positives are pairs of equal labels, by their mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..family_options import MLKDOptions
from ..kernels import KernelSet, LossInputs, LossOutputs, has_fixed_shift
from ..labels import has_bad_label
from .mlkd_correlation import has_small_student, log_ratio, student_factors

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
        and (
            inputs.target is None or inputs.labels_are_classes or not has_bad_label(inputs.target, options.ignore_index)
        )
    )


def compute(inputs: LossInputs) -> LossOutputs:
    """Loss, terms and the student's gradient."""
    options: MLKDOptions = inputs.options
    n, with_grad = inputs.student.shape[0], inputs.student_grad
    weights = options.term_weight
    if inputs.weight is not None:
        factors = inputs.weight.tolist()
        weights = (weights[0] * factors[0], weights[1] * factors[1], weights[2] * factors[2])
    correlation, alignment, supervised = (w != 0 for w in options.term_weight)
    # The supervised term of one view needs no teacher.
    sides = (inputs.student, inputs.teacher) if correlation or alignment or options.views == 2 else (inputs.student,)
    logits = torch.stack(sides)  # (2, n, C), or (1, n, C)
    norm = torch.linalg.vector_norm(logits, dim=2, keepdim=True)
    norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
    inv_norm = torch.threshold_(norm, options.eps, torch.inf).reciprocal_()
    z = logits.mul_(inv_norm).flatten(0, 1)
    student = z[:n]
    terms: list[Tensor | None] = [None, None, None]
    coefficients = None  # (n, columns) of the first rows of z in the gradient by the student's
    if correlation or supervised:
        temperature = options.correlation_temperature if correlation else options.supervised_temperature
        similarities = torch.addmm(inv_norm.view(-1, 1), z, z.T, beta=0, alpha=1 / temperature)
        if supervised:
            terms[2], coefficients = _supervised(similarities, temperature, inputs, weights[2])
        if correlation:
            terms[0], more = _correlation(similarities, n, temperature, weights[0], with_grad)
            if coefficients is None:
                coefficients = more
            elif more is not None:
                coefficients[:, :n] += more
    gradient = None
    if with_grad:
        gradient = torch.zeros_like(student) if coefficients is None else coefficients @ z[: coefficients.shape[1]]
    if alignment:
        difference = student - z[n:]
        # A row without direction is zeros: of its 2 - 2 s . t the square holds 1 less.
        missing = 2 * n - int(torch.count_nonzero(inv_norm))
        terms[1] = difference.square().sum().add_(missing).div_(n)
        if gradient is not None:
            gradient.add_(difference, alpha=2 * weights[1] / n)
    if gradient is not None:
        # Unit rows in the accumulator dtype have x . x = 1 up to rounding.
        gradient.addcmul_(student, (gradient * student).sum(1, keepdim=True), value=-1).mul_(inv_norm[0])
    stacked = torch.stack([logits.new_zeros(()) if term is None else term for term in terms])
    loss = torch.dot(stacked, stacked.new_tensor(weights))
    return LossOutputs(loss=loss, terms=stacked, student_grad=gradient, teacher_grad=None)


def _correlation(
    similarities: Tensor, n: int, temperature: float, weight: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The term, and the coefficients (n, n) of the student's rows. similarities: (2 n, 2 n), at ``temperature``."""
    student, teacher = similarities[:n, :n], similarities[n:, n:]
    e = teacher.exp()
    e.diagonal().zero_()
    delta = student - teacher
    total = e.sum(1)
    mean = (e * delta).sum(1).div_(total)
    delta.expm1_()
    ratio = (e * delta).sum(1).div_(total)  # (Zs - Zt) / Zt
    of_student = None
    if has_small_student(ratio):
        of_student = student.exp()
        of_student.diagonal().zero_()
    sums = total, ratio, None if of_student is None else of_student.sum(1)
    term = log_ratio(*sums).sub_(mean).mean()
    if not with_grad:
        return term, None
    inverse, gap, alone = student_factors(*sums)
    w = delta.mul_(inverse[:, None] + inverse).add_(gap[:, None] + gap).mul_(e)
    if of_student is not None and alone is not None:
        w.addcmul_(of_student, alone[:, None] + alone)
    return term, w.mul_(weight / (n * temperature))


def _supervised(
    similarities: Tensor, temperature: float, inputs: LossInputs, weight: float
) -> tuple[Tensor, Tensor | None]:
    """The term over N rows, and the coefficients (n, N) of all rows for the student's; None without a gradient.

    similarities: (2 n, 2 n), at ``temperature``, which need not be this term's; loses its diagonal.
    """
    options, target = inputs.options, inputs.target
    assert target is not None
    views, n, own = options.views, target.shape[0], options.supervised_temperature
    similarities = similarities[: views * n, : views * n]
    same = target[:, None] == target
    if not inputs.labels_are_classes:
        same &= target != options.ignore_index
    pairs = same.to(similarities.dtype)  # (n, n) of rows of one view: each with itself, too
    others = pairs.sum(1).mul_(views).sub_(1)
    counted = None  # every row: its other view is a positive
    if views == 1 or not inputs.labels_are_classes:
        counted = others > 0
        others.clamp_(min=1)
    similarities.diagonal().zero_()  # no row is its own positive
    positive = (similarities.view(views, n, views, n) * pairs[:, None]).sum((2, 3)).div_(others)
    if temperature == own:
        e = similarities.exp()
    else:
        positive.mul_(temperature / own)
        e = (similarities * (temperature / own)).exp_()
    e.diagonal().zero_()
    total = e.sum(1)
    # The logarithm of a sum that is all but its positive is small only as one of a ratio.
    value = total.view(views, n).mul(positive.neg_().exp_()).log_()
    if counted is None:
        share = total.new_full((1,), 1 / (views * n))
        term = value.mean()
    else:
        share = counted.to(total.dtype)  # (n,)
        share.div_(share.sum().mul_(views).clamp_(min=1))
        # Products with 0 instead of a selection: with two rows or more every sum is positive.
        term = (value * share).sum()
    if not inputs.student_grad:
        return term, None
    share = share.mul_(weight / own)
    factor = share.div(total.view(views, n)).view(-1)
    w = e[:n].mul_(factor[:n, None] + factor)
    w.view(n, views, n).addcmul_(pairs[:, None], share.div(others)[:, None, None], value=-2)
    w.diagonal().zero_()  # the projection would drop a row's own part, but not its rounding
    return term, w
