"""What the kernels need to know of the labels, for one side with fewer classes than rows, where a rank is the class.

One launch describes the rows and counts them; a second, made when a class mean first asks for it, orders them by rank.
Every rank scans all rows and keeps its own: labels are few bytes, and neither an atomic nor a sort is needed, so the
order is that of a stable sort.
"""

from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import labels as labelling
from ..labels import Labels
from . import configs
from .common import tl_dtype


@triton.jit(do_not_specialize=["n", "ignore_index", "classes"])
def describe_kernel(
    target,  # (n,) int64, any stride
    same,  # (n,) int64
    rank,  # (n,) int64
    valid,  # (n,) bool
    poison,  # ()
    share,  # ()
    n,
    stride,
    ignore_index,
    classes,
    BLOCK: tl.constexpr,
    STAT: tl.constexpr,
):
    """A single program, which knows at its end what it has counted."""
    counted = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < n
        label = tl.load(target + rows.to(tl.int64) * stride, mask=inside, other=0)
        keep = inside & (label != ignore_index)
        # A bad label is clamped, so that no kernel reads out of bounds; the poison makes its terms NaN.
        clamped = tl.minimum(tl.maximum(label, 0), classes - 1)
        counted += keep.to(tl.int32)
        bad += (keep & (label != clamped)).to(tl.int32)
        tl.store(same + rows, tl.where(keep, clamped, -1 - rows), mask=inside)
        tl.store(rank + rows, tl.where(keep, clamped, classes), mask=inside)
        tl.store(valid + rows, keep, mask=inside)
    factor = tl.where(tl.max(bad, 0) > 0, float("nan"), tl.full((), 1.0, STAT))
    tl.store(poison, factor)
    tl.store(share, factor / tl.maximum(tl.sum(counted, 0), 1).to(STAT))


@triton.jit(do_not_specialize=["n", "ranks"])
def scan_kernel(
    rank,  # (n,) int64
    counts,  # (ranks,) int64
    starts,  # (ranks + 1,) int64
    order,  # (n,) int64
    n,
    ranks,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The places of BLOCK_C ranks: as many rows come before a rank as are of lower ones."""
    own = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lower = tl.zeros((BLOCK_C, BLOCK_R), tl.int32)
    equal = tl.zeros((BLOCK_C, BLOCK_R), tl.int32)
    for start in range(0, n, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        # What lies past the end is above every rank, and above the one past the last, which ends `starts`.
        found = tl.load(rank + rows, mask=rows < n, other=ranks + BLOCK_C).to(tl.int32)
        lower += (found[None, :] < own[:, None]).to(tl.int32)
        equal += (found[None, :] == own[:, None]).to(tl.int32)
    place = tl.sum(lower, 1)
    count = tl.sum(equal, 1)
    tl.store(counts + own, count, mask=own < ranks)
    tl.store(starts + own, place, mask=own <= ranks)
    if tl.sum(count, 0) > 0:
        for start in range(0, n, BLOCK_R):
            rows = start + tl.arange(0, BLOCK_R)
            found = tl.load(rank + rows, mask=rows < n, other=ranks + BLOCK_C).to(tl.int32)
            mine = (found[None, :] == own[:, None]) & (rows < n)[None, :]
            taken = mine.to(tl.int32)
            matches = tl.sum(taken, 1)
            if tl.sum(matches, 0) > 0:
                to = place[:, None] + tl.cumsum(taken, 1) - 1
                tl.store(order + to, tl.broadcast_to(rows[None, :], (BLOCK_C, BLOCK_R)), mask=mine)
                place += matches


class ScannedLabels(Labels):
    """Labels whose rows are put in order by the scan, at the first question about it."""

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        n, device = self.rank.shape[0], self.rank.device
        counts, starts, order = (
            torch.empty(length, dtype=torch.int64, device=device) for length in (self.ranks, self.ranks + 1, n)
        )
        launch = configs.vectors(device, "scan")
        scan_kernel[(triton.cdiv(self.ranks + 1, launch.block_m),)](
            self.rank, counts, starts, order, n, self.ranks,
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


def describe(sides: tuple[Tensor, ...], ignore_index: int, classes: int, dtype: torch.dtype) -> tuple[Labels, ...]:
    """As `labels.describe`."""
    target = sides[0]
    n, device = target.shape[0], target.device
    if len(sides) > 1 or classes >= n:
        # Two sides share poison and ranks; with more classes than rows, ranks number what occurs, which takes a sort.
        return labelling.describe(sides, ignore_index, classes, dtype)
    same, rank = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(2))
    valid = torch.empty(n, dtype=torch.bool, device=device)
    poison, share = (torch.empty((), dtype=dtype, device=device) for _ in range(2))
    launch = configs.vectors(device, "describe")
    describe_kernel[(1,)](
        target, same, rank, valid, poison, share, n, target.stride(0), ignore_index, classes,
        BLOCK=launch.block_n, STAT=tl_dtype(dtype), num_warps=launch.warps,
    )  # fmt: skip
    ranks = classes + 1
    kind = ScannedLabels if configs.scans(n, ranks) else Labels
    return (labelling.ready(kind(same, valid, rank, rank, poison, ranks, classes), share=share),)
