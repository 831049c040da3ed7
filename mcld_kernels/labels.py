"""What the kernels need to know of the labels, computed on their device and without reading a value back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Labels(NamedTuple):
    """The labels of one side's n rows.

    A *rank* numbers the classes that occur on either side, so tables by rank have at most min(rows, C + 1) rows.
    """

    same: Tensor  # (n,) int64: the label, or a negative number that equals no other where the label is ignored
    valid: Tensor  # (n,) bool: not ignored
    rank: Tensor  # (n,) int64: the rank of the row's class; ignored rows share the last one
    order: Tensor  # (n,) int64: rows by rank, ties by row, so that sums over a class have a fixed order
    starts: Tensor  # (ranks + 1,) int64: where each rank begins in `order`
    present: Tensor  # (C,) bool: the classes that occur
    poison: Tensor  # () 1, or NaN if a label of either side is out of range

    @property
    def counts(self) -> Tensor:
        """Rows of each rank, (ranks,) int64."""
        return self.starts[1:] - self.starts[:-1]


def describe(sides: tuple[Tensor, ...], ignore_index: int, classes: int, dtype: torch.dtype) -> tuple[Labels, ...]:
    """Describe the labels of each side, (n,) int64, with common ranks. ``dtype`` is that of ``poison``."""
    target = torch.cat(sides) if len(sides) > 1 else sides[0]
    valid = target != ignore_index
    bad = valid & ((target < 0) | (target >= classes))
    poison = torch.where(bad.any(), torch.nan, 1.0).to(dtype)
    # Bad labels are clamped, so that no kernel reads out of bounds; the poison makes their terms NaN.
    clamped = target.clamp(0, classes - 1)
    kinds = torch.where(valid, clamped, classes)  # ignored rows sort last
    ordered, order = kinds.sort(stable=True)
    steps = torch.zeros_like(ordered)
    steps[1:] = ordered[1:] != ordered[:-1]
    ranks = torch.empty_like(order).scatter_(0, order, steps.cumsum(0))
    rows = torch.arange(target.shape[0], device=target.device)
    same = torch.where(valid, clamped, -1 - rows)
    edges = torch.arange(min(target.shape[0], classes + 1) + 1, device=target.device)

    def one(part: slice) -> Labels:
        rank = ranks[part]
        ordered, order = rank.sort(stable=True)
        present = torch.zeros(classes + 1, dtype=torch.bool, device=target.device).index_fill_(0, kinds[part], True)
        starts = torch.searchsorted(ordered, edges)
        return Labels(same[part], valid[part], rank, order, starts, present[:classes], poison)

    first, described = 0, []
    for side in sides:
        described.append(one(slice(first, first + side.shape[0])))
        first += side.shape[0]
    return tuple(described)
