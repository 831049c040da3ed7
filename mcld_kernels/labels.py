"""What the kernels need to know of the labels, computed on their device and without reading a value back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

Described = TypeVar("Described", bound="Labels")


@dataclass(frozen=True)
class Labels:
    """The labels of one side's n rows.

    A *rank* numbers the classes: the class itself, or, with more classes than rows, only those that occur on either
    side. Tables by rank have at most min(rows of both sides, C + 1) rows.
    """

    same: Tensor  # (n,) int64: the label, or a negative number that equals no other where the label is ignored
    valid: Tensor  # (n,) bool: not ignored
    rank: Tensor  # (n,) int64: the rank of the row's class; ignored rows share one
    kinds: Tensor  # (n,) int64: the class, C where ignored
    poison: Tensor  # () 1, or NaN if a label of either side is out of range
    ranks: int
    classes: int

    @cached_property
    def counts(self) -> Tensor:
        """Rows of each rank, (ranks,) int64."""
        return self.rank.new_zeros(self.ranks).index_add_(0, self.rank, torch.ones_like(self.rank))

    @cached_property
    def share(self) -> Tensor:
        """A row's part in a mean over the rows with a class, (): poison / their number."""
        return self.poison / self.valid.sum().clamp(min=1)

    @cached_property
    def present(self) -> Tensor:
        """The classes that occur, (C,) bool."""
        occurs = torch.zeros(self.classes + 1, dtype=torch.bool, device=self.kinds.device)
        return occurs.index_fill_(0, self.kinds, True)[: self.classes]

    @cached_property
    def order(self) -> Tensor:
        """Rows by rank, ties by row, so that sums over a class have a fixed order: (n,) int64."""
        return self.rank.argsort(stable=True)

    @cached_property
    def starts(self) -> Tensor:
        """Where each rank begins in `order`: (ranks + 1,) int64."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])


def ready(
    labels: Described,
    *,
    counts: Tensor | None = None,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    share: Tensor | None = None,
) -> Described:
    """Give ``labels`` the tables that a kernel has computed, so that they are not computed again. Returns them."""
    tables = {"counts": counts, "order": order, "starts": starts, "share": share}
    # A cached property looks in the instance's dictionary first.
    vars(labels).update({name: table for name, table in tables.items() if table is not None})
    return labels


def describe(sides: tuple[Tensor, ...], ignore_index: int, classes: int, dtype: torch.dtype) -> tuple[Labels, ...]:
    """Describe the labels of each side, (n,) int64, with common ranks. ``dtype`` is that of ``poison``."""
    target = torch.cat(sides) if len(sides) > 1 else sides[0]
    valid = target != ignore_index
    # Bad labels are clamped, so that no kernel reads out of bounds; the poison makes their terms NaN.
    clamped = target.clamp(0, classes - 1)
    bad = valid & (target != clamped)
    poison = torch.where(bad.any(), torch.nan, 1.0).to(dtype)
    kinds = torch.where(valid, clamped, classes)
    rows = target.shape[0]
    rank = kinds if classes < rows else _dense_ranks(kinds)
    same = torch.where(valid, clamped, torch.arange(-1, -1 - rows, -1, device=target.device))
    sizes = [side.shape[0] for side in sides]
    parts = zip(same.split(sizes), valid.split(sizes), rank.split(sizes), kinds.split(sizes), strict=True)
    return tuple(Labels(s, v, r, k, poison, min(rows, classes + 1), classes) for s, v, r, k in parts)


def _dense_ranks(kinds: Tensor) -> Tensor:
    """Number the distinct values of ``kinds`` (n,) from 0, in their order: (n,) int64."""
    ordered, order = kinds.sort(stable=True)
    steps = torch.zeros_like(ordered)
    steps[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, steps.cumsum(0))
