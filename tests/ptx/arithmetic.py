"""Arithmetic of single instructions on arrays of threads; operations of warps take whole warps in order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray


def put(x: Array, lanes: Array, values: Array) -> Array:
    """x with ``values`` at ``lanes``: a new array, since another register may be the same one."""
    x = x.copy()
    x[lanes] = values
    return x


def join(parts: tuple[Array, ...], dtype: type) -> Array:
    """Parts side by side in a word, the first in the low bits. A part may be a scalar."""
    return np.stack(np.broadcast_arrays(*parts), -1).view(dtype).reshape(-1)


def add_rz(x: Array, y: Array) -> Array:
    """The sum rounded towards zero."""
    return toward_zero(x.astype(np.float64) + y)


def toward_zero(exact: Array) -> Array:
    """fp64 as fp32, rounded towards zero."""
    nearest = exact.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)


def fma_rn(x: Array, y: Array, z: Array) -> Array:
    """x y + z; the product is exact, the sum is rounded to fp64 and then to fp32."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def fma_rm(x: Array, y: Array, z: Array) -> Array:
    """The same, rounded down."""
    exact = x.astype(np.float64) * y + z
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def minimum(x: Array, y: Array) -> Array:
    """The smaller one; of a NaN and a number, the number."""
    return np.fmin(x, y)


def maximum(x: Array, y: Array) -> Array:
    return np.fmax(x, y)


def reciprocal(x: Array) -> Array:
    return np.float32(1) / x


def exp2(x: Array) -> Array:
    """2 to the power x. Subnormal results are 0, as with .ftz."""
    result = np.exp2(x.astype(np.float64))
    return np.where(result < 2.0**-126, 0, result).astype(np.float32)


def div(x: Array, y: Array) -> Array:
    """The quotient of integers, rounded towards zero."""
    quotient = x // y
    return quotient + ((x % y != 0) & ((x < 0) != (y < 0))).astype(quotient.dtype)


def rem(x: Array, y: Array) -> Array:
    """The remainder of `div`."""
    return x - div(x, y) * y


def shl(x: Array, amount: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    return np.where(amount < bits, x << np.minimum(amount, bits - 1).astype(x.dtype), x.dtype.type(0))


def shr(x: Array, amount: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(amount, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(amount < bits, shifted, x.dtype.type(0))


def popc(x: Array) -> Array:
    return np.unpackbits(x.view(np.uint8).reshape(-1, 4), axis=1).sum(1).astype(np.uint32)


def clz(x: Array) -> Array:
    bits = np.unpackbits(x.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.where(bits.any(1), bits.argmax(1), 32).astype(np.uint32)


def saturate(x: Array) -> Array:
    """To [0, 1]; NaN gives 0."""
    return np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1)))


def tf32(x: Array) -> Array:
    """The bits of fp32 rounded to tf32, to nearest, ties away from zero; the low 13 bits are 0."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def bf16(x: Array) -> Array:
    """The bits of bf16, to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f16(x: Array) -> Array:
    """The bits of fp16, to nearest even."""
    return x.astype(np.float16).view(np.uint16)


def shuffle(mode: str, x: Array, by: Array, clamp: Array) -> tuple[Array, Array]:
    """shfl.sync: each lane's value of another lane, or its own where that is outside, and whether it is inside."""
    values = x.reshape(-1, 32)
    lane = np.arange(32, dtype=np.int64)[None, :]
    by, clamp = (np.broadcast_to(part, x.shape).reshape(-1, 32).astype(np.int64) for part in (by, clamp))
    segment, by = clamp >> 8 & 31, by & 31
    first, last = lane & segment, lane & segment | clamp & 31 & ~segment
    source = {"bfly": lane ^ by, "down": lane + by, "up": lane - by, "idx": first | by & ~segment}[mode]
    inside = source >= last if mode == "up" else source <= last
    source = np.where(inside, source, lane)
    return np.take_along_axis(values, source, 1).reshape(-1), inside.reshape(-1)


def ballot(x: Array) -> Array:
    """Of each warp a bit a lane, in every lane."""
    bits = np.packbits(x.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)
    return np.broadcast_to(bits, (len(bits), 32)).reshape(-1).copy()


def reduce_warp(function: np.ufunc, x: Array) -> Array:
    """The sum, or another function, of the lanes of each warp, in every lane."""
    result = function.reduce(x.reshape(-1, 32), axis=1, keepdims=True, dtype=x.dtype)
    return np.broadcast_to(result, (len(result), 32)).reshape(-1).copy()


def match_any(x: Array) -> Array:
    """The lanes of the warp with the same value, a bit each."""
    values = x.reshape(-1, 32)
    equal = values[:, :, None] == values[:, None, :]
    return np.packbits(equal, axis=2, bitorder="little").view(np.uint32).reshape(-1)
