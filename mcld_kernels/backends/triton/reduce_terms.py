"""The terms and the loss from what every anchor adds to them: all sums in one program, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import tl_dtype


@triton.jit
def _weighted(total, factor, weight, stride):
    if weight is not None:
        factor = tl.load(weight + stride) * factor
    return total * factor


# The alignment of width and stride lets the loads be wide.
@triton.jit(do_not_specialize=["weight_stride"])
def totals_kernel(
    values,  # (parts, width)
    weight,  # (3,) or None
    loss,  # ()
    terms,  # (3,)
    width,
    stride,
    weight_stride,
    scale_0,
    scale_1,
    scale_2,
    PARTS: tl.constexpr,
    TERMS: tl.constexpr,  # the parts' terms, two bits each
    ACTIVE: tl.constexpr,  # the terms that have a part, one bit each
    BLOCK: tl.constexpr,
    STAT: tl.constexpr,
):
    first = tl.zeros((BLOCK,), STAT)
    second = tl.zeros((BLOCK,), STAT)
    third = tl.zeros((BLOCK,), STAT)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        for part in tl.static_range(PARTS):
            row = values + tl.cast(part, tl.int64) * stride
            value = tl.load(row + columns, mask=columns < width, other=0.0)
            if (TERMS >> (2 * part)) & 3 == 0:
                first += value
            elif (TERMS >> (2 * part)) & 3 == 1:
                second += value
            else:
                third += value
    total_0, total_1, total_2 = tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)
    tl.store(terms, total_0)
    tl.store(terms + 1, total_1)
    tl.store(terms + 2, total_2)
    found = tl.zeros((), STAT)
    if ACTIVE & 1:
        found += _weighted(total_0, scale_0, weight, 0)
    if ACTIVE & 2:
        found += _weighted(total_1, scale_1, weight, weight_stride)
    if ACTIVE & 4:
        found += _weighted(total_2, scale_2, weight, 2 * weight_stride)
    tl.store(loss, found)


def totals(
    values: Tensor, terms: tuple[int, ...], scale: tuple[float, ...], weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `pipeline.Kernels.totals`."""
    loss, found = torch.empty((), dtype=values.dtype, device=values.device), values.new_empty(3)
    launch = configs.vectors(values.device, "totals")
    totals_kernel[(1,)](
        values, weight, loss, found, values.shape[1], values.stride(0), 0 if weight is None else weight.stride(0),
        *scale,
        PARTS=len(terms), TERMS=sum(term << 2 * part for part, term in enumerate(terms)),
        ACTIVE=sum(1 << term for term in set(terms)), BLOCK=launch.block_n, STAT=tl_dtype(values.dtype),
        num_warps=launch.warps,
    )  # fmt: skip
    return loss, found
