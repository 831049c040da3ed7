"""MLKD on a CPU where the matrix of both sides' rows fits a chunk, by csrc/cpu/mlkd.cpp.

It takes fp32 logits of a frozen teacher: a small call whole, a larger one with torch's GEMMs between its steps. What it
does not serve goes to `losses.mlkd_whole`, in torch operations, or by chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..family_options import MLKDOptions
from ..kernels import LossInputs, LossOutputs, has_fixed_shift
from ..labels import has_bad_label
from .torch_low_latency import (
    LARGEST_SIZE,
    LowLatencyTuning,
    compiled_module,
    has_plain_fp32_memory,
    isa_index,
    weights_of,
)

# Multiply-adds of the cosines up to which the compiled module's own GEMMs are as fast as PyTorch's.
_LARGEST_GEMM = {"baseline": 1 << 20, "avx2": 1 << 26, "avx512": 1 << 27}


def mlkd(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for a frozen teacher and temperatures at which one shift serves all rows; None for other calls."""
    options, target = inputs.options, inputs.target
    n, num_classes = inputs.student.shape
    if (
        not tuning.compiled
        or inputs.student.device.type != "cpu"
        or inputs.teacher_grad
        or inputs.teacher.dtype != torch.float32
        or not has_plain_fp32_memory(inputs)
        or not any(options.term_weight)
        or not 1 < n <= LARGEST_SIZE // 2
        or not has_fixed_shift(torch.float32, min(options.correlation_temperature, options.supervised_temperature))
        or (module := compiled_module()) is None
    ):
        return None
    layout = _layout(n, num_classes, _sides(options))
    if 4 * layout.size > tuning.chunk_bytes:
        return None
    # Traced calls come unchecked; the path by chunks makes their term NaN.
    if target is not None and not inputs.labels_are_classes and has_bad_label(target, options.ignore_index):
        return None
    isa = isa_index(tuning.isa)
    most = _LARGEST_GEMM[module.isas()[isa]] if tuning.compiled_gemm is None else tuning.compiled_gemm
    takes_gemms = (_sides(options) * n) ** 2 * num_classes <= most
    return partial(_mlkd, module=module, isa=isa, layout=layout, takes_gemms=takes_gemms)


class _Layout(NamedTuple):
    """The workspace of a call, sizes and offsets in floats."""

    size: int
    pitch: int
    matrix_pitch: int
    rows: int
    cosines: int
    weights: int
    product: int


@lru_cache(maxsize=256)
def _layout(n: int, num_classes: int, sides: int) -> _Layout:
    return _Layout(**compiled_module().mlkd_layout(n, num_classes, sides))


def _sides(options: MLKDOptions) -> int:
    """1 where the student's rows are enough, as in csrc/cpu/mlkd.h."""
    return 2 if options.term_weight[0] or options.term_weight[1] or options.views == 2 else 1


def _mlkd(inputs: LossInputs, module: Any, isa: int, layout: _Layout, takes_gemms: bool) -> LossOutputs:
    student, teacher, target, options = inputs.student, inputs.teacher, inputs.target, inputs.options
    n, num_classes = student.shape
    correlation, alignment, supervised = (w != 0 for w in options.term_weight)
    # new_empty: torch's default device may be another one.
    work, loss, terms = student.new_empty(layout.size), student.new_empty(()), student.new_empty(3)
    gradient = student.new_empty((n, num_classes)) if inputs.student_grad else None
    arguments = (
        isa, torch.get_num_threads(), student.data_ptr(), *student.stride(), teacher.data_ptr(), *teacher.stride(),
        *((target.data_ptr(), target.stride(0)) if supervised and target is not None else (0, 0)), n, num_classes,
        work.data_ptr(), 0 if gradient is None else gradient.data_ptr(), loss.data_ptr(), terms.data_ptr(),
        *weights_of(inputs), correlation, alignment, supervised, options.views, options.ignore_index,
        options.correlation_temperature, options.supervised_temperature, options.eps,
    )  # fmt: skip
    if takes_gemms:
        module.mlkd(module.MLKD_ALL_STEPS, *arguments)
    else:
        columns = 0
        if correlation or supervised:
            columns = n * (options.views if supervised else 1)
        _steps(module, arguments, work, layout, (_sides(options) * n, num_classes), n, columns, gradient is not None)
    return LossOutputs(loss=loss, terms=terms, student_grad=gradient, teacher_grad=None)


def _steps(
    module: Any,
    arguments: tuple[Any, ...],
    work: Tensor,
    layout: _Layout,
    shape: tuple[int, int],
    n: int,
    columns: int,
    with_grad: bool,
) -> None:
    """The steps of a call with GEMMs by torch. shape: of z. columns: of the weights; 0 without products."""
    count, num_classes = shape
    module.mlkd(module.MLKD_NORMALIZE, *arguments)
    if columns:
        z = work.as_strided(shape, (layout.pitch, 1), layout.rows)
        torch.mm(z, z.T, out=work.as_strided((count, count), (layout.matrix_pitch, 1), layout.cosines))
        module.mlkd(module.MLKD_SUMS, *arguments)
        if with_grad:
            weights = work.as_strided((n, columns), (layout.matrix_pitch, 1), layout.weights)
            product = work.as_strided((n, num_classes), (layout.pitch, 1), layout.product)
            torch.mm(weights, z[:columns], out=product)
    module.mlkd(module.MLKD_FINISH, *arguments)
