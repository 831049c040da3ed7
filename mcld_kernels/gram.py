"""Products of rows with one another, by chunks of a symmetric matrix.

A Gram matrix is symmetric: a chunk of rows `rows` takes the columns from its first row on, and what it holds right of
its diagonal block serves the mirrored entries too. That halves the flop of the first product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.gemm import keeps_sums
from .kernels import slices

_LEAST_CHUNKS = 8  # the diagonal blocks are computed whole: 1/8 more than half of the matrix
_LEAST_ROWS = 128  # of a chunk, where the budget allows it: a GEMM of fewer rows is slow
# A CPU's GEMM with few columns adds its products to the total one by one, so that the error grows with the batch;
# of wider ones the library adds in blocks.
_FEW_COLUMNS = 64
_ROWS_OF_SUM = 256
_ROWS_OF_COPY = 4096  # of 16-bit rows in the accumulator dtype


def trapezoids(n: int, budget_rows: int) -> list[tuple[slice, slice]]:
    """Chunks (rows, columns) of at most ``budget_rows`` rows that cover the upper triangle of an n x n matrix."""
    step = max(1, min(budget_rows, max(_LEAST_ROWS, -(-n // _LEAST_CHUNKS))))
    return [(rows, slice(rows.start, n)) for rows in slices(n, step)]


def mm(a: Tensor, b: Tensor, acc_dtype: torch.dtype) -> Tensor:
    """a @ b in the accumulator dtype."""
    if a.dtype == acc_dtype:
        return torch.mm(a, b)
    if a.is_cuda and keeps_sums():
        return torch.mm(a, b, out_dtype=acc_dtype)  # keeps the fp32 sums; torch before 2.8 rounds them
    return torch.mm(a, b).to(acc_dtype)


def add_mm(total: Tensor, a: Tensor, b: Tensor, *, keeps_sums: bool = False) -> None:
    """total += a @ b for a matrix ``a`` in the dtype of ``total`` and operands ``b``, whose dtype the product takes.

    keeps_sums: the rounding of its sums would show. A CPU's GEMM of 16-bit operands rounds them; of those in the dtype
    of ``total`` it does not, at half the speed.
    """
    if keeps_sums and total.is_cpu and b.dtype != total.dtype:
        for part in slices(b.shape[0], _ROWS_OF_COPY):
            total.addmm_(a[:, part], b[part].to(total.dtype))
        return
    if b.dtype == total.dtype:
        if total.is_cpu and b.shape[1] <= _FEW_COLUMNS and b.shape[0] > _ROWS_OF_SUM:
            for part in slices(b.shape[0], _ROWS_OF_SUM):
                total += torch.mm(a[:, part], b[part])
        else:
            total.addmm_(a, b)
        return
    if b.dtype == torch.float16:  # coefficients of a large batch are below its range: the largest becomes 1
        peak = a.abs().amax().clamp(min=torch.finfo(a.dtype).tiny)
        total.addcmul_(mm((a / peak).to(b.dtype), b, total.dtype), peak)
        return
    total += mm(a.to(b.dtype), b, total.dtype)


def similarities(a: Tensor, b: Tensor, temperature: float, out: Tensor) -> Tensor:
    """a_i . b_j / temperature into ``out`` (rows of a, rows of b), accumulator dtype."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b.T, beta=0, alpha=1 / temperature, out=out)
    return out.copy_(mm(a, b.T, out.dtype)).mul_(1 / temperature)
