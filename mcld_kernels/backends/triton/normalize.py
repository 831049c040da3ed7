"""L2 normalization of rows into padded operands.

Fused: squares, norm, reciprocal, scaling, cast, padding and, for columns of logits, the transposition. Logits are
read twice and the operands are written once; no fp32 copy of the logits exists. Rows take one pass a program. Columns
(rows of a transposed view) are long and adjacent in memory, so their squares are summed in parts, which go to a
workspace and are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels import UnitRows
from .common import round_up, tl_dtype, to_operand
from .configs import ROWS, Configs


@triton.jit
def _reciprocal(norm, eps):
    # 0 for norm <= eps; NaN for a norm that overflows, which must show.
    inv_norm = tl.where(norm == float("inf"), float("nan"), 1.0 / norm)
    return tl.where(norm <= eps, 0.0, inv_norm)


@triton.jit(do_not_specialize=["n", "d"])
def l2_normalize_rows_kernel(
    x,  # (n, d) any strides
    unit,  # (padded n, pitch) operand dtype
    inv_norm,  # (n,)
    n,
    d,
    stride_n,
    stride_d,
    pitch,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    source = x + rows.to(tl.int64)[:, None] * stride_n  # (BLOCK_R, 1)
    squares = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        value = tl.load(source + columns.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(ACC)
        squares += value * value
    factor = _reciprocal(tl.sqrt(tl.sum(squares, 1)), eps)
    tl.store(inv_norm + rows, factor, mask=rows < n)
    target = unit + rows.to(tl.int64)[:, None] * pitch
    for start in range(0, pitch, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        value = tl.load(source + columns.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(ACC)
        value = tl.where(inside, value * factor[:, None], 0.0)
        operand = to_operand(value, unit.dtype.element_ty, PRECISION)
        tl.store(target + columns[None, :], operand, mask=(columns < pitch)[None, :])


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
    ACC: tl.constexpr,
):
    """partial[split, row] = sum of squares over the split's columns of x."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    source = x + rows.to(tl.int64)[:, None] * stride_n
    squares = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for start in range(split * span, tl.minimum(split * span + span, d), BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        value = tl.load(source + columns.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(ACC)
        squares += value * value
    tl.store(partial + split.to(tl.int64) * n + rows, tl.sum(squares, 1), mask=rows < n)


@triton.jit(do_not_specialize=["n", "d", "splits"])
def l2_normalize_columns_kernel(
    x,  # (n, d) any strides
    partial,  # (splits, n)
    unit,  # (padded n, pitch) operand dtype
    inv_norm,  # (n,)
    n,
    d,
    stride_n,
    stride_d,
    pitch,
    splits,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    # Tiles of a row first, all on one axis: a grid's second one ends at 65,535.
    tiles = tl.cdiv(pitch, BLOCK_D)
    tile = tl.program_id(0) % tiles
    rows = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    square = tl.zeros((BLOCK_R,), ACC)
    for split in range(splits):
        square += tl.load(partial + tl.cast(split, tl.int64) * n + rows, mask=rows < n, other=0.0)
    factor = _reciprocal(tl.sqrt(square), eps)
    if tile == 0:
        tl.store(inv_norm + rows, factor, mask=rows < n)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    source = x + rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    value = tl.load(source, mask=inside, other=0.0).to(ACC)
    value = tl.where(inside, value * factor[:, None], 0.0)
    target = unit + rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    tl.store(target, to_operand(value, unit.dtype.element_ty, PRECISION), mask=(columns < pitch)[None, :])


def operand_shape(n: int, d: int, operand_dtype: torch.dtype, configs: Configs) -> tuple[int, int]:
    """The padded shape of operands (n, d)."""
    return round_up(n, ROWS), configs.pitch(d, operand_dtype)


def rounded(unit: UnitRows, configs: Configs) -> UnitRows:
    """The rows as `to_operand` rounds them, where that is not their dtype's own rounding."""
    rows = unit.rows
    if configs.precision(rows.dtype) != "tf32":
        return unit
    bits = (rows.view(torch.int32) + 0x1000) & -0x2000
    rows = torch.where(rows.isnan(), rows, bits.view(torch.float32))
    return UnitRows(rows=rows, inv_norm=unit.inv_norm, n=unit.n, d=unit.d)


def l2_normalize(x: Tensor, operand_dtype: torch.dtype, eps: float, configs: Configs) -> UnitRows:
    """As `KernelSet.l2_normalize`; the rows are a contiguous (padded n, pitch) tensor."""
    n, d = x.shape
    precision = configs.precision(operand_dtype)
    acc = torch.promote_types(torch.promote_types(x.dtype, operand_dtype), torch.float32)
    padded, pitch = operand_shape(n, d, operand_dtype, configs)
    unit = torch.empty(padded, pitch, dtype=operand_dtype, device=x.device)
    inv_norm = torch.empty(n, dtype=acc, device=x.device)
    if x.stride(0) == 1 and x.stride(1) != 1:
        launch = configs.columns()
        span = configs.span(d, launch.block_n)
        splits = triton.cdiv(d, span)
        partial = torch.empty(splits, n, dtype=acc, device=x.device)
        column_squares_kernel[(triton.cdiv(n, launch.block_m), splits)](
            x, partial, n, d, *x.stride(), span,
            BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, ACC=tl_dtype(acc), num_warps=launch.warps,
        )  # fmt: skip
        l2_normalize_columns_kernel[(triton.cdiv(pitch, launch.block_n) * (padded // launch.block_m),)](
            x, partial, unit, inv_norm, n, d, *x.stride(), pitch, splits, eps,
            BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, PRECISION=precision, ACC=tl_dtype(acc),
            num_warps=launch.warps,
        )  # fmt: skip
    else:
        launch = configs.rows(pitch)
        l2_normalize_rows_kernel[(padded // launch.block_m,)](
            x, unit, inv_norm, n, d, *x.stride(), pitch, eps,
            BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, PRECISION=precision, ACC=tl_dtype(acc),
            num_warps=launch.warps,
        )  # fmt: skip
    return UnitRows(rows=unit, inv_norm=inv_norm, n=n, d=d)
