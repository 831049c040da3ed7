"""What the kernel families share: padding, dtypes and the constants of base-2 exponentials."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import float32_precision

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)

# Unit rows are padded to a multiple of ROWS and, past the flash kernel's depths, DEPTH columns: every tile of a
# contraction divides them, so no load of an operand needs a mask.
ROWS = 128
DEPTH = 128

# fp16 holds exponentials times 2^14: the largest is then 2^14 and what lies 2^38 below it still counts.
HEADROOM = 14.0

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


class Negated(NamedTuple):
    """The geometry of one contrast, for the launchers."""

    temperature: float
    offset: int  # the positive of row i is column i + offset
    same: tuple[Tensor, Tensor] | None  # labels of rows and columns; equal ones are dropped


def tl_dtype(dtype: torch.dtype) -> Any:
    return _TL[dtype]


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def padded_depth(d: int, flash_depth: int) -> int:
    """Columns of a unit matrix: a power of two for the flash kernel, which takes a row as one tile, else a multiple."""
    power = max(32, triton.next_power_of_2(d))
    return power if power <= flash_depth else round_up(d, DEPTH)


def headroom(dtype: torch.dtype) -> float:
    """log2 of the factor that exponentials of operand ``dtype`` carry."""
    return HEADROOM if dtype == torch.float16 else 0.0


def fixed_maximum(dtype: torch.dtype, temperature: float) -> bool:
    """Whether exponentials shifted by 1 / temperature, the largest possible, keep the smallest, exp(-2 / temperature).

    fp32 and bf16 have normal numbers down to exp(-87), and the products with unit rows should be normal too. fp16 with
    its headroom: 2^14 exp(-20) is 2^-15, a subnormal number of 10 bits, still more than bf16 has.
    """
    return 2 / temperature <= (20.0 if dtype == torch.float16 else 80.0)


def dot_precision(dtype: torch.dtype) -> str:
    """input_precision of a dot of operands of ``dtype``; for fp32 it follows torch's float32 matmul precision."""
    if dtype == torch.float32:
        return "tf32x3" if float32_precision() == "highest" else "tf32"
    return "ieee"


@triton.jit
def rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of ``dtype``. Tensor cores cut tf32 operands off towards zero: round them first, unbiased."""
    if PRECISION == "tf32":
        # Half a unit of the 13 bits that are cut off is added to the magnitude; the bits of a NaN must not overflow.
        bits = x.to(tl.int32, bitcast=True)
        x = tl.where(x == x, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)
