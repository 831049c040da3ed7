"""out = a @ b, or out + a @ b, with sums in the accumulator dtype.

It is the second product of the two-product path where the library's GEMM is not the choice, and the first one where
its tiles are too few: a split-k product, whose parts the similarity kernel adds in order. Every size is padded to whole
tiles, so nothing is masked. Operands may be transposed views: nothing is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gemm
from .common import round_up, tl_dtype
from .configs import Configs, Launch


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP rows of tiles at a time, so that neighbours share operands in L2."""
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inner = pid % (GROUP * tiles_n)
    return group * GROUP + inner % height, inner // height


@triton.jit
def product_kernel(
    a,  # (rows, contraction)
    b,  # (contraction, columns)
    out,  # (splits, rows, columns), contiguous
    rows,
    columns,
    contraction,
    a_stride_m,
    a_stride_k,
    b_stride_k,
    b_stride_n,
    span,  # of the contraction, a split's part
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), rows // BLOCK_M, columns // BLOCK_N, GROUP)
    m = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    split = tl.program_id(1)
    for start in range(split * span, tl.minimum(split * span + span, contraction), BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_tile = tl.load(a + m[:, None] * a_stride_m + k[None, :] * a_stride_k)
        b_tile = tl.load(b + k[:, None] * b_stride_k + n[None, :] * b_stride_n)
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision=PRECISION, out_dtype=ACC)
    target = out + (split.to(tl.int64) * rows + m)[:, None] * columns + n[None, :]
    if ACCUMULATE:
        accumulator += tl.load(target)
    tl.store(target, accumulator)


def product(a: Tensor, b: Tensor, out: Tensor, configs: Configs, *, accumulate: bool = False) -> None:
    """out (+)= a @ b. out (rows, columns) is contiguous, a and b are not necessarily; all sizes are padded."""
    if configs.library_product(a, out.dtype):
        gemm.gemm(a, b, out, accumulate)
        return
    launch = configs.product(a.dtype)
    _launch(a, b, out[None], launch, round_up(a.shape[1], launch.block_k), accumulate, configs)


def split_k_product(
    a: Tensor, b: Tensor, acc_dtype: torch.dtype, launch: Launch, splits: int, configs: Configs
) -> Tensor:
    """(at most splits, rows, columns): a @ b is the sum over the first dimension."""
    span = round_up(triton.cdiv(a.shape[1], splits), launch.block_k)
    out = torch.empty(triton.cdiv(a.shape[1], span), a.shape[0], b.shape[1], dtype=acc_dtype, device=a.device)
    _launch(a, b, out, launch, span, False, configs)
    return out


def _launch(a: Tensor, b: Tensor, out: Tensor, launch: Launch, span: int, accumulate: bool, configs: Configs) -> None:
    splits, rows, columns = out.shape
    grid = (rows // launch.block_m * (columns // launch.block_n), splits)
    product_kernel[grid](
        a, b, out, rows, columns, a.shape[1], *a.stride(), *b.stride(), span,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP=8, ACCUMULATE=accumulate,
        PRECISION=configs.precision(a.dtype), ACC=tl_dtype(out.dtype), num_warps=launch.warps,
        num_stages=launch.stages,
    )  # fmt: skip
