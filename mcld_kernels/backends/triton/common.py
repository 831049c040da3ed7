"""Dtypes, padding and base-2 exponentials: what several kernel files use."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)

# fp16 holds exponentials times 2^14: the largest is then 2^14, and what lies 2^38 below it still counts.
HEADROOM = 14.0

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def tl_dtype(dtype: torch.dtype) -> Any:
    return _TL[dtype]


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def headroom(operand_dtype: torch.dtype) -> float:
    """log2 of the factor that exponentials of ``operand_dtype`` carry."""
    return HEADROOM if operand_dtype == torch.float16 else 0.0


@triton.jit
def to_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of ``dtype``. Tensor cores truncate tf32 operands: round them first, without a bias."""
    if PRECISION == "tf32":
        # Half a unit of the 13 bits that are cut off is added to the magnitude; the bits of a NaN must not overflow.
        bits = x.to(tl.int32, bitcast=True)
        x = tl.where(x == x, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)
