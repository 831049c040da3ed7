"""CLKD on a CPU where copies of the logits and the class matrix fit one chunk: a call whole in csrc/cpu/clkd.cpp.

It takes fp32 logits of a frozen teacher, and the correlation by its (C, C) matrix. Other calls go by chunks, in torch
operations: some forty in three passes, which are the time of a call with few classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from ..family_options import CLKDOptions
from ..kernels import LossInputs, LossOutputs
from .torch_low_latency import (
    LARGEST_SIZE,
    LowLatencyTuning,
    compiled_module,
    isa_index,
    module_for_whole_calls,
    weights_of,
    whole_call,
)

# Multiply-adds of a product of the correlation up to which the compiled module is the faster one.
_LARGEST_GEMM = {"baseline": 1 << 24, "avx2": 1 << 26, "avx512": 1 << 31}
# With more classes than these, and than four times the rows, (B, B) matrices are faster by their fewer flop.
_LARGEST_WIDE = 512


def clkd(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for a frozen teacher; None where this path does not apply."""
    module = module_for_whole_calls(inputs, tuning)
    if module is None:
        return None
    n, num_classes = inputs.student.shape
    isa = isa_index(tuning.isa)
    most = _LARGEST_GEMM[module.isas()[isa]] if tuning.compiled_gemm is None else tuning.compiled_gemm
    with_gram = inputs.options.term_weight[2] != 0
    is_wide = num_classes > max(_LARGEST_WIDE, 4 * n) and tuning.compiled_gemm is None
    if n > LARGEST_SIZE or (with_gram and (is_wide or n * num_classes**2 > most)):
        return None
    size = _size(n, num_classes)
    if 4 * size > tuning.chunk_bytes:
        return None
    return partial(_clkd, module=module, isa=isa, size=size)


@lru_cache(maxsize=256)
def _size(n: int, num_classes: int) -> int:
    """Floats of the workspace."""
    size: int = compiled_module().clkd_size(n, num_classes)
    return size


@lru_cache(maxsize=256)
def _constants(options: CLKDOptions, weight: tuple[float, ...], n: int, num_classes: int) -> tuple[Any, ...]:
    """The last arguments of the compiled module."""
    is_mean = options.reduction == "mean"
    elements = n * num_classes
    return (
        *weight,
        *(w != 0 for w in options.term_weight),
        1 / (elements if is_mean else n),
        1 / (elements if is_mean else num_classes),
        1 / (max(num_classes - 1, 1) ** 2 * num_classes**2),
        options.eps,
    )


def _clkd(inputs: LossInputs, module: Any, isa: int, size: int) -> LossOutputs:
    call = whole_call(inputs, isa, size)
    module.clkd(*call.arguments, *_constants(inputs.options, weights_of(inputs), *inputs.student.shape))
    return call.outputs
