"""The terms and the loss from each anchor's part of them: all sums in one program, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import tl_dtype
from .configs import Configs

MAX_TERMS = 3  # that the kernel has accumulators for


@triton.jit
def _weighted(total, term_weight, weight, stride):
    if weight is not None:
        term_weight = tl.load(weight + stride) * term_weight
    return total * term_weight


# The alignment of width and stride lets the loads be wide.
@triton.jit(do_not_specialize=["weight_stride"])
def reduce_terms_kernel(
    per_anchor,  # (rows, width)
    weight,  # (terms,) or None
    loss,  # ()
    terms,  # (3,)
    width,
    stride,
    weight_stride,
    term_weight_0,
    term_weight_1,
    term_weight_2,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,  # the term of each row, two bits each
    ACTIVE: tl.constexpr,  # the terms that have a row, one bit each
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    first = tl.zeros((BLOCK,), ACC)
    second = tl.zeros((BLOCK,), ACC)
    third = tl.zeros((BLOCK,), ACC)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        for row in tl.static_range(ROWS):
            source = per_anchor + tl.cast(row, tl.int64) * stride
            value = tl.load(source + columns, mask=columns < width, other=0.0)
            if (TERMS >> (2 * row)) & 3 == 0:
                first += value
            elif (TERMS >> (2 * row)) & 3 == 1:
                second += value
            else:
                third += value
    total_0, total_1, total_2 = tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)
    tl.store(terms, total_0)
    tl.store(terms + 1, total_1)
    tl.store(terms + 2, total_2)
    total = tl.zeros((), ACC)
    if ACTIVE & 1:
        total += _weighted(total_0, term_weight_0, weight, 0)
    if ACTIVE & 2:
        total += _weighted(total_1, term_weight_1, weight, weight_stride)
    if ACTIVE & 4:
        total += _weighted(total_2, term_weight_2, weight, 2 * weight_stride)
    tl.store(loss, total)


def reduce_terms(
    per_anchor: Tensor, terms: tuple[int, ...], term_weight: tuple[float, ...], weight: Tensor | None, configs: Configs
) -> tuple[Tensor, Tensor]:
    """As `KernelSet.reduce_terms`, for at most MAX_TERMS terms."""
    loss, values = per_anchor.new_empty(()), per_anchor.new_empty(MAX_TERMS)
    launch = configs.vectors("reduce_terms")
    reduce_terms_kernel[(1,)](
        per_anchor, weight, loss, values, per_anchor.shape[1], per_anchor.stride(0),
        0 if weight is None else weight.stride(0), *term_weight, *(0.0,) * (MAX_TERMS - len(term_weight)),
        ROWS=len(terms), TERMS=sum(term << 2 * row for row, term in enumerate(terms)),
        ACTIVE=sum(1 << term for term in set(terms)), BLOCK=launch.block_n, ACC=tl_dtype(per_anchor.dtype),
        num_warps=launch.warps,
    )  # fmt: skip
    return loss, values[: len(term_weight)]
