"""GEMMs of PyTorch's library (cuBLAS on CUDA, oneDNN or MKL on a CPU) with sums in the accumulator dtype."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def has_gemm(operand_dtype: torch.dtype, acc_dtype: torch.dtype) -> bool:
    """True if `gemm` gives ``acc_dtype`` results from these operands on CUDA: 16-bit operands need torch 2.10.

    torch 2.8 and 2.9 have the overload, but raise for an accumulator of another dtype than the operands.
    """
    if operand_dtype == acc_dtype:
        return True
    return _release() >= (2, 10) and "dtype_out" in torch.ops.aten.mm.overloads()


@cache
def keeps_sums() -> bool:
    """True if torch.mm with ``out_dtype`` gives the fp32 sums of 16-bit operands on a GPU: from torch 2.8 on.

    For AMD's GPUs 2.8 and 2.9 have the overload, but raise (pytorch/pytorch pull request 162600).
    """
    return hasattr(torch.ops.aten.mm, "dtype") and (torch.version.hip is None or _release() >= (2, 10))


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def gemm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (+)= a @ b. a (rows, contraction), b (contraction, columns), out (rows, columns), of any strides.

    fp32 operands keep to the float32 matmul precision; 16-bit ones are summed, and returned, in the dtype of ``out``.
    """
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of `gemm` in ``dtype``, in a new contiguous tensor."""
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)
