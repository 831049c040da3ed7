"""Norms of rows and the normalised operand copy.

Fused: squares, norm, reciprocal, scaling, cast, padding and, for columns of logits, the transposition. Logits are
read twice and the copy is written once; no fp32 copy of the logits exists. Rows go one pass a program; columns (rows
of a transposed view) are long and adjacent in memory, so their squares are summed in parts, over a workspace that is
added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pipeline import Unit
from . import configs
from .common import ROWS, dot_precision, padded_depth, round_up, rounded, tl_dtype


@triton.jit
def _inverse(norm, eps):
    # Without direction 0; an overflow must show, so its inverse is NaN and not 0.
    inverse = tl.where(norm == float("inf"), float("nan"), 1.0 / norm)
    return tl.where(norm <= eps, 0.0, inverse)


@triton.jit(do_not_specialize=["n", "d"])
def normalise_rows_kernel(
    x,  # (n, d) any strides
    unit,  # (padded n, depth) operand dtype
    inverse,  # (n,)
    n,
    d,
    stride_n,
    stride_d,
    depth,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    source = x + rows.to(tl.int64)[:, None] * stride_n  # (BLOCK_R, 1)
    squares = tl.zeros((BLOCK_R, BLOCK_D), STAT)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        value = tl.load(source + columns.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(STAT)
        squares += value * value
    factor = _inverse(tl.sqrt(tl.sum(squares, 1)), eps)
    tl.store(inverse + rows, factor, mask=rows < n)
    target = unit + rows.to(tl.int64)[:, None] * depth
    for start in range(0, depth, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        value = tl.load(source + columns.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(STAT)
        value = tl.where(inside, value * factor[:, None], 0.0)
        tl.store(
            target + columns[None, :], rounded(value, unit.dtype.element_ty, PRECISION), mask=(columns < depth)[None, :]
        )


@triton.jit(do_not_specialize=["n", "d"])
def column_squares_kernel(
    x,  # (n, d) any strides
    partial,  # (splits, n)
    n,
    d,
    stride_n,
    stride_d,
    span,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    source = x + rows.to(tl.int64)[:, None] * stride_n
    squares = tl.zeros((BLOCK_R, BLOCK_D), STAT)
    for start in range(split * span, tl.minimum(split * span + span, d), BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        value = tl.load(source + columns.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(STAT)
        squares += value * value
    tl.store(partial + split.to(tl.int64) * n + rows, tl.sum(squares, 1), mask=rows < n)


@triton.jit(do_not_specialize=["n", "d", "splits"])
def normalise_columns_kernel(
    x,  # (n, d) any strides
    partial,  # (splits, n)
    unit,  # (padded n, depth) operand dtype
    inverse,  # (n,)
    n,
    d,
    stride_n,
    stride_d,
    depth,
    splits,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAT: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    square = tl.zeros((BLOCK_R,), STAT)
    for split in range(splits):
        square += tl.load(partial + tl.cast(split, tl.int64) * n + rows, mask=rows < n, other=0.0)
    factor = _inverse(tl.sqrt(square), eps)
    if tl.program_id(0) == 0:
        tl.store(inverse + rows, factor, mask=rows < n)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    source = x + rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    value = tl.load(source, mask=inside, other=0.0).to(STAT)
    value = tl.where(inside, value * factor[:, None], 0.0)
    target = unit + rows.to(tl.int64)[:, None] * depth + columns[None, :]
    tl.store(target, rounded(value, unit.dtype.element_ty, PRECISION), mask=(columns < depth)[None, :])


def normalise(x: Tensor, dtype: torch.dtype, eps: float, flash_depth: int) -> Unit:
    """Unit rows of a view x (n, d) of any strides, as a contiguous (padded n, depth) matrix of ``dtype``."""
    n, d = x.shape
    precision = dot_precision(dtype)
    stat = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    padded, depth = round_up(n, ROWS), padded_depth(d, flash_depth)
    unit = torch.empty(padded, depth, dtype=dtype, device=x.device)
    inverse = torch.empty(n, dtype=stat, device=x.device)
    if x.stride(0) == 1 and x.stride(1) != 1:
        launch = configs.columns(x.device)
        span = configs.span(d, launch.block_n)
        splits = triton.cdiv(d, span)
        partial = torch.empty(splits, n, dtype=stat, device=x.device)
        column_squares_kernel[(triton.cdiv(n, launch.block_m), splits)](
            x, partial, n, d, *x.stride(), span,
            BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, STAT=tl_dtype(stat), num_warps=launch.warps,
        )  # fmt: skip
        normalise_columns_kernel[(triton.cdiv(depth, launch.block_n), padded // launch.block_m)](
            x, partial, unit, inverse, n, d, *x.stride(), depth, splits, eps,
            BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, PRECISION=precision, STAT=tl_dtype(stat),
            num_warps=launch.warps,
        )  # fmt: skip
    else:
        launch = configs.rows(x.device, depth)
        normalise_rows_kernel[(padded // launch.block_m,)](
            x, unit, inverse, n, d, *x.stride(), depth, eps,
            BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, PRECISION=precision, STAT=tl_dtype(stat),
            num_warps=launch.warps,
        )  # fmt: skip
    return Unit(unit, inverse, n, d)
