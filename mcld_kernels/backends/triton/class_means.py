"""Class means and the cosines of positives.

Class means: the rows of a class are gathered through the labels' sorted order and added in that order, so nothing is
atomic and no B x B mask exists. Positives: both cosines of an anchor, with its partner and with its class mean, in
one read of the anchor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..labels import Labels
from ..pipeline import Unit
from . import configs
from .common import tl_dtype


@triton.jit
def class_means_kernel(
    unit,  # (padded n, depth)
    order,  # (n,) int64
    starts,  # (ranks + 1,) int64
    counts,  # (ranks,) int64
    means,  # (ranks, depth)
    depth,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAT: tl.constexpr,
):
    rank = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(starts + rank).to(tl.int32)
    last = tl.load(starts + rank + 1).to(tl.int32)
    total = tl.zeros((BLOCK_R, BLOCK_D), STAT)
    for start in range(first, last, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        rows = tl.load(order + place, mask=place < last, other=0)
        inside = (place < last)[:, None] & (columns < depth)[None, :]
        total += tl.load(unit + rows[:, None] * depth + columns[None, :], mask=inside, other=0.0).to(STAT)
    count = tl.maximum(tl.load(counts + rank), 1).to(STAT)
    mean = tl.sum(total, 0) / count
    tl.store(means + rank.to(tl.int64) * depth + columns, mean.to(means.dtype.element_ty), mask=columns < depth)


@triton.jit(do_not_specialize=["n", "m", "offset"])
def positives_kernel(
    a,  # (padded n, depth)
    k,  # (padded m, depth)
    means,  # (ranks, depth)
    rank,  # (n,) int64
    positive,  # (n,)
    by_label,  # (n,)
    n,
    m,
    offset,
    depth,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LABELS: tl.constexpr,
    STAT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    partners = rows + offset
    paired = (rows < n) & (partners >= 0) & (partners < m)
    total = tl.zeros((BLOCK_R, BLOCK_D), STAT)
    label_total = tl.zeros((BLOCK_R, BLOCK_D), STAT)
    if LABELS:
        classes = tl.load(rank + rows, mask=rows < n, other=0)
    for start in range(0, depth, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (columns < depth)[None, :]
        anchor = tl.load(a + rows.to(tl.int64)[:, None] * depth + columns[None, :], mask=inside, other=0.0).to(STAT)
        partner = k + partners.to(tl.int64)[:, None] * depth + columns[None, :]
        total += anchor * tl.load(partner, mask=paired[:, None] & inside, other=0.0).to(STAT)
        if LABELS:
            mean = means + classes[:, None] * depth + columns[None, :]
            label_total += anchor * tl.load(mean, mask=(rows < n)[:, None] & inside, other=0.0).to(STAT)
    tl.store(positive + rows, tl.sum(total, 1), mask=rows < n)
    if LABELS:
        tl.store(by_label + rows, tl.sum(label_total, 1), mask=rows < n)


def class_means(unit: Unit, labels: Labels, counts: Tensor) -> Tensor:
    """(ranks, depth): the sum of the rows of each rank divided by ``counts`` (ranks,)."""
    depth = unit.matrix.shape[1]
    means = torch.empty(counts.shape[0], depth, dtype=unit.inverse.dtype, device=unit.matrix.device)
    launch = configs.classes(means.device, depth)
    class_means_kernel[(counts.shape[0], triton.cdiv(depth, launch.block_n))](
        unit.matrix, labels.order, labels.starts, counts, means, depth,
        BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, STAT=tl_dtype(unit.inverse.dtype), num_warps=launch.warps,
    )  # fmt: skip
    return means


def positives(a: Unit, k: Unit, offset: int, means: Tensor | None, rank: Tensor | None) -> tuple[Tensor, Tensor]:
    """A_i . K_(i+offset) and A_i . M_rank(i), each (n,); without means both are the first."""
    positive = torch.empty_like(a.inverse)
    by_label = positive if means is None else torch.empty_like(positive)
    depth = a.matrix.shape[1]
    launch = configs.rows(a.matrix.device, depth)
    positives_kernel[(a.matrix.shape[0] // launch.block_m,)](
        a.matrix, k.matrix, means, rank, positive, by_label, a.n, k.n, offset, depth,
        BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, LABELS=means is not None, STAT=tl_dtype(positive.dtype),
        num_warps=launch.warps,
    )  # fmt: skip
    return positive, by_label
