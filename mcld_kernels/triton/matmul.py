"""out = a @ b, or out + a @ b, with an fp32 result: the second product of long rows where the library's is not the
choice.

Every size is padded to whole tiles, so nothing is masked. ``a`` may be a transposed view: nothing is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import dot_precision, tl_dtype


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP rows of tiles at a time, so that neighbours share operands in L2."""
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inner = pid % (GROUP * tiles_n)
    return group * GROUP + inner % height, inner // height


@triton.jit
def matmul_kernel(
    a,  # (rows, contraction)
    b,  # (contraction, columns), contiguous rows
    out,  # (rows, columns), contiguous rows
    rows,
    columns,
    contraction,
    a_stride_m,
    a_stride_k,
    b_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    STAT: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), rows // BLOCK_M, columns // BLOCK_N, GROUP)
    m = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), STAT)
    for start in range(0, contraction, BLOCK_K):
        depth = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_tile = tl.load(a + m[:, None] * a_stride_m + depth[None, :] * a_stride_k)
        b_tile = tl.load(b + depth[:, None] * b_stride + n[None, :])
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision=PRECISION, out_dtype=STAT)
    target = out + m[:, None] * out_stride + n[None, :]
    if ADD:
        accumulator += tl.load(target)
    tl.store(target, accumulator)


def has_library_product(dtype: torch.dtype, stat: torch.dtype) -> bool:
    """Whether torch.mm can give a ``stat`` result from operands of ``dtype``."""
    return dtype == stat or "dtype_out" in torch.ops.aten.mm.overloads()


def library_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= a @ b through torch. Keeps to the float32 matmul precision."""
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, library: bool) -> None:
    """out (+)= a @ b. a: (rows, contraction) of any strides; b, out: contiguous rows; all sizes padded."""
    if library:
        library_product(a, b, out, add)
        return
    precision = dot_precision(a.dtype)
    launch = configs.product(out.device, a.dtype, precision)
    rows, columns = out.shape
    grid = (triton.cdiv(rows, launch.block_m) * triton.cdiv(columns, launch.block_n),)
    matmul_kernel[grid](
        a, b, out, rows, columns, a.shape[1], *a.stride(), b.stride(0), out.stride(0),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP=8,
        ADD=add, PRECISION=precision, STAT=tl_dtype(out.dtype), num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
