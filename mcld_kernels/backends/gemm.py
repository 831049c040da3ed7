"""Products by PyTorch's own library (cuBLAS on CUDA), where a backend takes them instead of a kernel of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def has_product(dtype: torch.dtype, stat: torch.dtype) -> bool:
    """Whether `product` can give a ``stat`` result from operands of ``dtype``: 16-bit operands need torch 2.8."""
    return dtype == stat or "dtype_out" in torch.ops.aten.mm.overloads()


def product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= a @ b. a (rows, contraction), b (contraction, columns), out (rows, columns), of any strides.

    fp32 operands keep to the float32 matmul precision; 16-bit ones are summed, and returned, in the dtype of ``out``.
    """
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
