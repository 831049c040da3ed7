"""Class means and the cosines of positives.

Class means: the rows of a class are gathered through the labels' order and added in that order, so nothing is atomic
and no B x B mask exists. Positives: both cosines of an anchor, with its partner and with its class mean, in one read
of the anchor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels import UnitRows
from ...labels import Labels
from .common import tl_dtype
from .configs import Configs


@triton.jit
def class_means_kernel(
    unit,  # (padded n, pitch)
    order,  # (n,) int64
    starts,  # (classes + 1,) int64
    counts,  # (classes,) int64
    means,  # (classes, pitch)
    pitch,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    own = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(starts + own).to(tl.int32)
    last = tl.load(starts + own + 1).to(tl.int32)
    total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for start in range(first, last, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        rows = tl.load(order + place, mask=place < last, other=0)
        inside = (place < last)[:, None] & (columns < pitch)[None, :]
        total += tl.load(unit + rows[:, None] * pitch + columns[None, :], mask=inside, other=0.0).to(ACC)
    count = tl.maximum(tl.load(counts + own), 1).to(ACC)
    mean = tl.sum(total, 0) / count
    tl.store(means + own.to(tl.int64) * pitch + columns, mean.to(means.dtype.element_ty), mask=columns < pitch)


@triton.jit(do_not_specialize=["n", "m", "offset"])
def positive_cosines_kernel(
    anchors,  # (padded n, pitch)
    candidates,  # (padded m, pitch)
    means,  # (classes, pitch)
    class_index,  # (n,) int64
    positive,  # (n,)
    label_positive,  # (n,)
    n,
    m,
    offset,
    pitch,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLASS_MEANS: tl.constexpr,
    ACC: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    partners = rows + offset
    paired = (rows < n) & (partners >= 0) & (partners < m)
    total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    label_total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    if CLASS_MEANS:
        own = tl.load(class_index + rows, mask=rows < n, other=0)
    source = anchors + rows.to(tl.int64)[:, None] * pitch
    for start in range(0, pitch, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (columns < pitch)[None, :]
        anchor = tl.load(source + columns[None, :], mask=inside, other=0.0).to(ACC)
        partner = candidates + partners.to(tl.int64)[:, None] * pitch + columns[None, :]
        total += anchor * tl.load(partner, mask=paired[:, None] & inside, other=0.0).to(ACC)
        if CLASS_MEANS:
            mean = means + own[:, None] * pitch + columns[None, :]
            label_total += anchor * tl.load(mean, mask=(rows < n)[:, None] & inside, other=0.0).to(ACC)
    tl.store(positive + rows, tl.sum(total, 1), mask=rows < n)
    if CLASS_MEANS:
        tl.store(label_positive + rows, tl.sum(label_total, 1), mask=rows < n)


def class_means(unit: UnitRows, labels: Labels, counts: Tensor, configs: Configs) -> Tensor:
    """As `KernelSet.class_means`: (classes, pitch)."""
    pitch = unit.rows.shape[1]
    means = torch.empty(counts.shape[0], pitch, dtype=unit.inv_norm.dtype, device=unit.rows.device)
    launch = configs.class_means(pitch)
    class_means_kernel[(counts.shape[0], triton.cdiv(pitch, launch.block_n))](
        unit.rows, labels.order, labels.starts, counts, means, pitch,
        BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, ACC=tl_dtype(unit.inv_norm.dtype), num_warps=launch.warps,
    )  # fmt: skip
    return means


def positive_cosines(
    anchors: UnitRows,
    candidates: UnitRows,
    offset: int,
    means: Tensor | None,
    class_index: Tensor | None,
    configs: Configs,
) -> tuple[Tensor, Tensor]:
    """As `KernelSet.positive_cosines`."""
    positive = torch.empty_like(anchors.inv_norm)
    label_positive = positive if means is None else torch.empty_like(positive)
    padded, pitch = anchors.rows.shape
    launch = configs.rows(pitch)
    positive_cosines_kernel[(padded // launch.block_m,)](
        anchors.rows, candidates.rows, means, class_index, positive, label_positive,
        anchors.n, candidates.n, offset, pitch,
        BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, CLASS_MEANS=means is not None, ACC=tl_dtype(positive.dtype),
        num_warps=launch.warps,
    )  # fmt: skip
    return positive, label_positive
