"""InfoNCE of embeddings in eager PyTorch.

Anchors A (n, d), candidates K (m, d), by default divided by the L2 norm of each row, a_ij = A_i . K_j / temperature:

    L_i = logsumexp_j(a_ij) - positive_i

diagonal: positive_i = a_i,i+offset; label: positive_i = sum_j w_ij a_ij, with w_ij = [y_i = y_j] or, for soft labels Y
(n, C), <Y_i, Y_j>, both divided by their sum over j. An anchor with label positives counts where that sum is not 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..info_nce_options import InfoNCEOptions, Reduction, check_info_nce_inputs, info_nce_options
from ..kernels import Positives
from ..options import acc_dtype, no_autocast
from .mcld import similarities, unit_rows


def evaluate(
    anchors: Tensor,
    candidates: Tensor,
    anchor_target: Tensor | None,
    candidate_target: Tensor | None,
    temperature: Tensor | None,
    options: InfoNCEOptions,
) -> Tensor:
    """The loss for arguments that are already checked. ``temperature``: () in place of the options'."""
    dtype = torch.promote_types(anchors.dtype, candidates.dtype)
    acc, n = acc_dtype(dtype), anchors.shape[0]
    with no_autocast(anchors.device):
        rows, others = anchors.to(acc), candidates.to(acc)
        if options.normalize:
            rows, others = unit_rows(rows, options.eps), unit_rows(others, options.eps)
        t: Any = options.temperature if temperature is None else temperature.to(acc)
        if isinstance(t, Tensor):
            t = torch.where(t > 0, t, torch.nan).to(rows.device)
        a = similarities(rows, others, dtype, t)  # (n, m)
        if options.positives == "label":
            assert anchor_target is not None
            theirs = anchor_target if candidate_target is None else candidate_target
            weights = positive_weights(anchor_target, theirs, options.ignore_index, acc)  # (n, m)
            total = weights.sum(1)
            if a.shape[1] == 0:
                return _reduce(a.sum(1) + rows.sum(1) * 0, total > 0, options.reduction)
            share = weights / torch.where(total == 0, 1.0, total)[:, None]
            return _reduce(a.logsumexp(1) - (share * a).sum(1), (total > 0) | total.isnan(), options.reduction)
        positive = a.diagonal(options.offset)[:n]
        if options.mask_same_class:
            assert anchor_target is not None
            theirs = anchor_target if candidate_target is None else candidate_target
            (hard, valid, poison), (other_hard, other_valid, other_poison) = (
                classes(target, options.ignore_index, acc) for target in (anchor_target, theirs)
            )
            for target in (anchor_target, theirs):
                poison = poison * poison_of_classes(target, (anchor_target, theirs), options.ignore_index, acc)
            same = (hard[:, None] == other_hard) & valid[:, None] & other_valid
            same.diagonal(options.offset)[:n].fill_(False)
            positive = positive * (poison * other_poison)
            a = a.masked_fill(same, -torch.inf)
        return _reduce(a.logsumexp(1) - positive, None, options.reduction)


def classes(target: Tensor, ignore_index: int, acc: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Class and validity of each row, (n,), and 1, or NaN if a label is bad. Of soft labels: the largest weight's."""
    poison = torch.ones((), dtype=acc, device=target.device)
    if target.is_floating_point():
        total = target.to(acc).sum(1)
        bad = ((total - 1).abs() > 1e-2) & (total != 0) | (target < 0).any(1) | total.isnan()
        hard = target.argmax(1)
        return hard, (total != 0) & (hard != ignore_index), poison.masked_fill(bad.any(), torch.nan)
    valid = target != ignore_index
    return target, valid, poison.masked_fill((valid & (target < 0)).any(), torch.nan)


def positive_weights(ours: Tensor, theirs: Tensor, ignore_index: int, acc: torch.dtype) -> Tensor:
    """How far candidate j shares the classes of anchor i: (n, m), 0 or 1 for hard labels. NaN for bad labels."""
    (hard, valid, poison), (other_hard, other_valid, other_poison) = (
        classes(target, ignore_index, acc) for target in (ours, theirs)
    )
    if ours.is_floating_point() or theirs.is_floating_point():
        num_classes = next(target.shape[1] for target in (ours, theirs) if target.is_floating_point())
        spread = [
            target.to(acc) if target.is_floating_point() else (classes_[:, None] == _range(num_classes, target)).to(acc)
            for target, classes_ in ((ours, hard), (theirs, other_hard))
        ]
        shared = spread[0] @ spread[1].T
        for target in (ours, theirs):
            poison = poison * poison_of_classes(target, (ours, theirs), ignore_index, acc)
    else:
        shared = (hard[:, None] == other_hard).to(acc)
    return shared * valid[:, None] * other_valid * poison * other_poison


def poison_of_classes(target: Tensor, targets: tuple[Tensor, Tensor], ignore_index: int, acc: torch.dtype) -> Tensor:
    """1, or NaN if hard labels beside soft ones are none of their classes."""
    poison = torch.ones((), dtype=acc, device=target.device)
    num_classes = next((side.shape[1] for side in targets if side.is_floating_point()), None)
    if num_classes is None or target.is_floating_point():
        return poison
    return poison.masked_fill(((target >= num_classes) & (target != ignore_index)).any(), torch.nan)


def _range(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


def _reduce(values: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    if counted is not None:
        values = values * counted
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.sum() / (max(values.shape[0], 1) if counted is None else counted.sum().clamp(min=1))


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positives: Positives = "diagonal",
    offset: int = 0,
    anchor_target: Tensor | None = None,
    candidate_target: Tensor | None = None,
    mask_same_class: bool = False,
    normalize: bool = True,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    eps: float = 1e-12,
) -> Tensor:
    """InfoNCE, shape () or (n,). Arguments and errors as :func:`mcld_kernels.info_nce`."""
    options, tensor = info_nce_options(
        temperature=temperature,
        positives=positives,
        offset=offset,
        mask_same_class=mask_same_class,
        normalize=normalize,
        reduction=reduction,
        ignore_index=ignore_index,
        eps=eps,
    )
    check_info_nce_inputs(anchors, candidates, anchor_target, candidate_target, tensor, options)
    return evaluate(anchors, candidates, anchor_target, candidate_target, tensor, options)
