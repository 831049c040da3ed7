"""Indexed labels of one side with fewer classes than rows, whose class index is then the class itself.

One launch indexes and counts the labels; a second, made when a class mean first needs it, orders the rows by class.
Every class compares all rows with itself and keeps its own: labels are few bytes, and neither an atomic nor a sort is
needed, so the order is that of a stable sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import labels as labelling
from ...labels import Labels
from .common import tl_dtype
from .configs import Configs


@triton.jit(do_not_specialize=["n", "ignore_index", "num_classes"])
def index_labels_kernel(
    target,  # (n,) int64, any stride
    key,  # (n,) int64
    class_index,  # (n,) int64
    valid,  # (n,) bool
    poison,  # ()
    mean_factor,  # ()
    n,
    stride,
    ignore_index,
    num_classes,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A single program, so that it knows the number of valid rows at its end."""
    counted = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < n
        label = tl.load(target + rows.to(tl.int64) * stride, mask=inside, other=0)
        keep = inside & (label != ignore_index)
        # A bad label is clamped, so that no kernel reads out of bounds; the poison makes its terms NaN.
        clamped = tl.minimum(tl.maximum(label, 0), num_classes - 1)
        counted += keep.to(tl.int32)
        bad += (keep & (label != clamped)).to(tl.int32)
        tl.store(key + rows, tl.where(keep, clamped, -1 - rows), mask=inside)
        tl.store(class_index + rows, tl.where(keep, clamped, num_classes), mask=inside)
        tl.store(valid + rows, keep, mask=inside)
    factor = tl.where(tl.max(bad, 0) > 0, float("nan"), tl.full((), 1.0, ACC))
    tl.store(poison, factor)
    tl.store(mean_factor, factor / tl.maximum(tl.sum(counted, 0), 1).to(ACC))


@triton.jit(do_not_specialize=["n", "num_classes"])
def class_order_kernel(
    class_index,  # (n,) int64
    counts,  # (num_classes,) int64
    starts,  # (num_classes + 1,) int64
    order,  # (n,) int64
    n,
    num_classes,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Order the rows of BLOCK_C classes: a class starts behind the rows of all lower classes."""
    own = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lower = tl.zeros((BLOCK_C, BLOCK_R), tl.int32)
    equal = tl.zeros((BLOCK_C, BLOCK_R), tl.int32)
    for start in range(0, n, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        # Rows past the end are above every class, and above the one past the last, which ends `starts`.
        index = tl.load(class_index + rows, mask=rows < n, other=num_classes + BLOCK_C).to(tl.int32)
        lower += (index[None, :] < own[:, None]).to(tl.int32)
        equal += (index[None, :] == own[:, None]).to(tl.int32)
    place = tl.sum(lower, 1)
    count = tl.sum(equal, 1)
    tl.store(counts + own, count, mask=own < num_classes)
    tl.store(starts + own, place, mask=own <= num_classes)
    if tl.sum(count, 0) > 0:
        for start in range(0, n, BLOCK_R):
            rows = start + tl.arange(0, BLOCK_R)
            index = tl.load(class_index + rows, mask=rows < n, other=num_classes + BLOCK_C).to(tl.int32)
            is_own = (index[None, :] == own[:, None]) & (rows < n)[None, :]
            ones = is_own.to(tl.int32)
            matches = tl.sum(ones, 1)
            if tl.sum(matches, 0) > 0:
                to = place[:, None] + tl.cumsum(ones, 1) - 1
                tl.store(order + to, tl.broadcast_to(rows[None, :], (BLOCK_C, BLOCK_R)), mask=is_own)
                place += matches


@dataclass(frozen=True, kw_only=True)
class ComparedLabels(Labels):
    """Labels whose rows are ordered by comparing them with every class, when a table is first read."""

    configs: Configs

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        n, classes, device = self.class_index.shape[0], self.num_classes_present, self.class_index.device
        counts, starts, order = (
            torch.empty(length, dtype=torch.int64, device=device) for length in (classes, classes + 1, n)
        )
        launch = self.configs.vectors("class_order")
        class_order_kernel[(triton.cdiv(classes + 1, launch.block_m),)](
            self.class_index, counts, starts, order, n, classes,
            BLOCK_C=launch.block_m, BLOCK_R=launch.block_n, num_warps=launch.warps,
        )  # fmt: skip
        return counts, starts, order

    @cached_property
    def counts(self) -> Tensor:
        return self._tables[0]

    @cached_property
    def starts(self) -> Tensor:
        return self._tables[1]

    @cached_property
    def order(self) -> Tensor:
        return self._tables[2]


def index_labels(
    sides: tuple[Tensor, ...], ignore_index: int, num_classes: int, dtype: torch.dtype, configs: Configs
) -> tuple[Labels, ...]:
    """As `labels.index_labels`."""
    target = sides[0]
    n, device = target.shape[0], target.device
    if len(sides) > 1 or num_classes >= n:
        # Two sides share poison and class indices; with more classes than rows only those present are numbered: a sort.
        return labelling.index_labels(sides, ignore_index, num_classes, dtype)
    key, class_index = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(2))
    valid = torch.empty(n, dtype=torch.bool, device=device)
    poison, mean_factor = (torch.empty((), dtype=dtype, device=device) for _ in range(2))
    launch = configs.vectors("index_labels")
    index_labels_kernel[(1,)](
        target, key, class_index, valid, poison, mean_factor, n, target.stride(0), ignore_index, num_classes,
        BLOCK=launch.block_n, ACC=tl_dtype(dtype), num_warps=launch.warps,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "key": key,
        "valid": valid,
        "class_index": class_index,
        "class_id": class_index,
        "poison": poison,
        "num_classes_present": num_classes + 1,
        "num_classes": num_classes,
    }
    compares = configs.compares(n, num_classes + 1)
    labels = ComparedLabels(configs=configs, **fields) if compares else Labels(**fields)
    return (labelling.with_tables(labels, mean_factor=mean_factor),)
