"""`info_nce` with frozen candidates on a CPU, in closed form.

fp32 with diagonal positives takes the compiled module: the mean over few pairs, without a learned temperature, is the
instance-wise term of MCLD and takes csrc/cpu/low_latency.cpp, all else `torch_contrast`, of any size.

What they do not serve takes torch operations where the similarity matrix fits one chunk; the number of dispatched
operations is their cost. One matrix E (n, m) holds first the similarities and at last the coefficients W of the
candidates, row i up to a factor f_i that the last step applies:

    dL_i/dA_i = f_i (W K)_i / temperature
    diagonal:  W_ij = exp(a_ij - shift_i) (j != i+o),   W_i,i+o = -neg_sum_i,   f_i = q_i / neg_sum_i
    label:     W_ij = exp(a_ij - lse_i) - w_ij,                                 f_i = 1, or 0 without a positive
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..info_nce_options import InfoNCEOptions, info_nce_as_mcld, needs_labels
from ..kernels import LossInputs, LossOutputs, has_fixed_shift
from ..options import check_positive
from . import torch_contrast
from .torch_low_latency import LARGEST_SIZE, LowLatencyTuning, compiled_module, mcld


def info_nce(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for frozen candidates and hard labels; None where neither path applies."""
    anchors, candidates = inputs.student, inputs.teacher
    target, theirs = inputs.target, inputs.extra["candidate_target"]
    if (
        tuning.scales_by_temperature
        or anchors.device.type != "cpu"
        or inputs.teacher_grad
        or anchors.dtype != candidates.dtype
        or anchors.dtype not in (torch.float32, torch.float64)
        or (target is not None and target.is_floating_point())
        or (theirs is not None and theirs.is_floating_point())
        # A bad label must show, which these paths do not look for.
        or (needs_labels(inputs.options) and not inputs.labels_are_classes)
    ):
        return None
    if tuning.compiled and anchors.shape == candidates.shape and compiled_module() is not None:
        as_mcld = _as_mcld(inputs)
        if as_mcld is not None and (function := mcld(as_mcld, tuning)) is not None:
            return lambda _: _without_terms(function(as_mcld))
    if (one_pass := torch_contrast.info_nce(inputs, tuning)) is not None:
        return one_pass
    n, m = anchors.shape[0], candidates.shape[0]
    fits = max(n, m) <= LARGEST_SIZE and n * m * anchors.itemsize <= tuning.chunk_bytes
    return _info_nce if fits else None


def _as_mcld(inputs: LossInputs) -> LossInputs | None:
    """The call as one of `mcld_loss` with the instance-wise term alone; None where it is none."""
    options: InfoNCEOptions = inputs.options
    if inputs.weight is not None:
        options = options._replace(temperature=check_positive("temperature", float(inputs.weight)))
    as_mcld = info_nce_as_mcld(options)
    if as_mcld is None:
        return None
    return LossInputs(
        student=inputs.student,
        teacher=inputs.teacher,
        target=None,
        weight=None,
        options=as_mcld,
        student_grad=inputs.student_grad,
        teacher_grad=False,
    )


def _without_terms(outputs: LossOutputs) -> LossOutputs:
    return dataclasses.replace(outputs, terms=torch.zeros_like(outputs.loss))


def _info_nce(inputs: LossInputs) -> LossOutputs:
    options: InfoNCEOptions = inputs.options
    anchors, candidates, n = inputs.student, inputs.teacher, inputs.student.shape[0]
    temperature = options.temperature
    if inputs.weight is not None:
        temperature = check_positive("temperature", float(inputs.weight))
    inv_norm = None
    if options.normalize:
        if anchors.shape == candidates.shape:
            rows, inv_norms = _unit_rows(torch.stack((anchors, candidates)), options.eps)
            (anchors, candidates), inv_norm = rows.unbind(), inv_norms[0]
        else:
            (anchors, inv_norm), (candidates, _) = (_unit_rows(x, options.eps) for x in (anchors, candidates))
    unread = anchors[:1, :1] if inv_norm is None else inv_norm  # an addmm of beta 0 asks for it
    e = torch.addmm(unread, anchors, candidates.T, beta=0, alpha=1 / temperature)  # (n, m)
    same = _same_labels(inputs) if needs_labels(options) else None
    with_grad = inputs.student_grad or options.temperature_grad
    count = n
    if options.positives == "label":
        assert same is not None
        values, factor, count = _label(e, same, with_grad)
    else:
        fixed = options.normalize and has_fixed_shift(e.dtype, temperature)
        values, factor = (_diagonal if fixed else _diagonal_with_shift)(e, options.offset, same, with_grad)

    constant = 1 / max(count, 1) if options.reduction == "mean" else 1.0
    if options.reduction == "none":
        loss = values
    elif options.reduction == "mean" and count == n:
        loss = values.mean()
    else:
        loss = values.sum().mul_(constant)
    gradient, by_temperature = None, torch.zeros_like(loss)
    if factor is not None:
        factor = factor.unsqueeze(1)
        gradient = torch.addmm(unread, e, candidates, beta=0, alpha=constant / temperature)
        if inv_norm is not None or options.temperature_grad:
            radial = (gradient * anchors).sum(1, keepdim=True)  # before the factor
            if options.temperature_grad:
                by_anchor = (radial * factor).squeeze(1).mul_(-1 / temperature)
                by_temperature = by_anchor if options.reduction == "none" else by_anchor.sum()
            if inv_norm is not None:
                # Unit rows in the accumulator dtype have x . x = 1 up to rounding.
                gradient.addcmul_(anchors, radial, value=-1)
                factor = factor * inv_norm
        gradient.mul_(factor)
    return LossOutputs(
        loss=loss,
        terms=by_temperature,
        student_grad=gradient if inputs.student_grad else None,
        teacher_grad=None,
    )


def _unit_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of x (..., n, d) divided by their L2 norm, and 1 / norm (..., n, 1), 0 for a norm <= eps."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
    inv_norm = torch.threshold_(norm, eps, torch.inf).reciprocal_()
    return x * inv_norm, inv_norm


def _same_labels(inputs: LossInputs) -> Tensor:
    """The pairs of one label, (n, m) bool."""
    target, theirs = inputs.target, inputs.extra["candidate_target"]
    assert target is not None
    ours = target.unsqueeze(1)
    same = ours == (target if theirs is None else theirs)
    return same.logical_and_(ours != inputs.options.ignore_index)


def _diagonal(e: Tensor, offset: int, same: Tensor | None, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Each anchor's loss (n,) and factor (n,), where exponentials need no shift; ``e`` becomes W."""
    diagonal = e.diagonal(offset)
    positive = diagonal.exp()
    if same is not None:
        e.masked_fill_(same, -torch.inf)
    e.exp_()
    diagonal.zero_()
    neg_sum = e.sum(1)
    values = (neg_sum / positive).log1p_()
    if not with_grad:
        return values, None
    diagonal.copy_(neg_sum).neg_()
    return values, positive.add_(neg_sum).reciprocal_()


def _diagonal_with_shift(e: Tensor, offset: int, same: Tensor | None, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The same with each row's maximum over the negatives as its shift."""
    diagonal = e.diagonal(offset)
    # Log-sum-exp less a positive of +inf is NaN; beside it all negatives would seem to be 0.
    positive = diagonal.nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=-torch.inf)
    if same is not None:
        e.masked_fill_(same, -torch.inf)
    diagonal.fill_(-torch.inf)
    shift = e.amax(1, keepdim=True).clamp_(min=torch.finfo(e.dtype).min)
    neg_sum = e.sub_(shift).exp_().sum(1)
    gap = neg_sum.log().add_(shift.squeeze(1)).sub_(positive)
    values = torch.logaddexp(gap, gap.new_zeros(()))
    if not with_grad:
        return values, None
    diagonal.copy_(neg_sum).neg_()
    return values, torch.where(neg_sum == 0, 0.0, gap.sigmoid_().div_(neg_sum))


def _label(e: Tensor, same: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None, int]:
    """Each anchor's loss (n,) and factor (n,), and the number of anchors with a positive; ``e`` becomes W."""
    share = same.to(e.dtype)
    positives = share.sum(1, keepdim=True)
    counted = (positives != 0).to(e.dtype)
    share.div_(positives.clamp_(min=1))
    lse = e.logsumexp(1, keepdim=True)
    values = (lse - (e * share).sum(1, keepdim=True)).mul_(counted).squeeze(1)
    count = int(counted.sum())
    if not with_grad:
        return values, None, count
    e.sub_(lse).exp_().sub_(share)
    return values, counted.squeeze(1), count
