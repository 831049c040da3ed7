"""CLKD on a CPU where copies of the logits and the class matrix fit one chunk: a call whole in csrc/cpu/clkd.cpp.

It takes fp32 logits of a frozen teacher, and the correlation by its (C, C) matrix. Other calls go by chunks, in torch
operations: some forty in three passes, which are the time of a call with few classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from ..family_options import CLKDOptions
from ..kernels import LossInputs, LossOutputs
from .torch_low_latency import (
    LARGEST_SIZE,
    LowLatencyTuning,
    compiled_module,
    has_plain_fp32_memory,
    isa_index,
    weights_of,
)

# Multiply-adds of a product of the correlation up to which the compiled module is the faster one.
_LARGEST_GEMM = {"baseline": 1 << 24, "avx2": 1 << 26, "avx512": 1 << 31}
# With more classes than these, and than four times the rows, (B, B) matrices are faster by their fewer flop.
_LARGEST_WIDE = 512


def clkd(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for a frozen teacher; None where this path does not apply."""
    if (
        not tuning.compiled
        or inputs.student.device.type != "cpu"
        or inputs.teacher_grad
        or inputs.teacher.dtype != torch.float32
        or not has_plain_fp32_memory(inputs)
        or (module := compiled_module()) is None
    ):
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
    student, teacher = inputs.student, inputs.teacher
    n, num_classes = student.shape
    # new_empty: torch's default device may be another one.
    work, loss, terms = student.new_empty(size), student.new_empty(()), student.new_empty(3)
    gradient = student.new_empty((n, num_classes)) if inputs.student_grad else None
    module.clkd(
        isa, torch.get_num_threads(), student.data_ptr(), *student.stride(), teacher.data_ptr(), *teacher.stride(),
        n, num_classes, work.data_ptr(), 0 if gradient is None else gradient.data_ptr(), loss.data_ptr(),
        terms.data_ptr(), *_constants(inputs.options, weights_of(inputs), n, num_classes),
    )  # fmt: skip
    return LossOutputs(loss=loss, terms=terms, student_grad=gradient, teacher_grad=None)
