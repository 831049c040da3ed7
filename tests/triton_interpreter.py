"""bf16 products, rounding to bf16 and tensor-core products of fp32 operands for Triton's interpreter.

The interpreter multiplies the bits of bf16 numbers as integers, truncates where a GPU rounds, and computes every fp32
product in fp32 whatever its precision. `faithful` is for tests only.
"""

from contextlib import contextmanager
from functools import wraps

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(handle) -> np.ndarray:
    """The operand of a product as numbers."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def bf16(value: np.ndarray) -> np.ndarray:
    """fp32 to the bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FC0, nearest).astype(np.uint16)


def tf32(value: np.ndarray) -> np.ndarray:
    """The upper 19 bits of an fp32 operand, which are all that a tensor core reads."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    return np.where(np.isfinite(value), (bits & 0xFFFFE000).view(np.float32), value)


def nearest_tf32(value: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32: the nearest tf32 number, ties away from zero."""
    bits = np.ascontiguousarray(value).view(np.uint32) + np.uint32(0x1000)
    return np.where(np.isfinite(value), (bits & 0xFFFFE000).view(np.float32), value)


def split(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An fp32 operand of tf32x3: the nearest tf32 number and what a tensor core reads of the rest."""
    big = nearest_tf32(value)
    with np.errstate(invalid="ignore"):
        return big, np.nan_to_num(tf32(value - big), nan=0.0)


def multiply(a: np.ndarray, b: np.ndarray, precision: object, dtype: np.dtype) -> np.ndarray:
    if a.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32:
        a, b = tf32(a), tf32(b)
    elif a.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32x3:
        (a, a_rest), (b, b_rest) = split(a), split(b)
        corrections = np.nan_to_num(np.matmul(a, b_rest) + np.matmul(a_rest, b), nan=0.0)
        return corrections + np.matmul(a, b)
    return np.matmul(a, b, dtype=dtype)


@contextmanager
def faithful():
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    @wraps(create_dot)
    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        is_bf16 = tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar)
        product = multiply(widen(a), widen(b), None if is_bf16 else input_precision, d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    @wraps(cast_impl)
    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(bf16(src.data), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    dot.multiplies_bf16 = True
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
    try:
        yield
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
