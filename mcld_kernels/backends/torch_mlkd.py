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
    isa_index,
    labels_of,
    module_for_whole_calls,
    weights_of,
    whole_call,
)

# Multiply-adds of the cosines up to which the compiled module's own GEMMs are as fast as PyTorch's.
_LARGEST_GEMM = {"baseline": 1 << 20, "avx2": 1 << 26, "avx512": 1 << 27}


def mlkd(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for a frozen teacher and temperatures at which one shift serves all rows; None for other calls."""
    options, target = inputs.options, inputs.target
    n, num_classes = inputs.student.shape
    if (
        not any(options.term_weight)
        or not 1 < n <= LARGEST_SIZE // 2
        or not has_fixed_shift(torch.float32, min(options.correlation_temperature, options.supervised_temperature))
        or (module := module_for_whole_calls(inputs, tuning)) is None
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
    options = inputs.options
    n, num_classes = inputs.student.shape
    correlation, alignment, supervised = (w != 0 for w in options.term_weight)
    call = whole_call(inputs, isa, layout.size, labels_of(inputs.target if supervised else None))
    arguments = (
        *call.arguments, *weights_of(inputs), correlation, alignment, supervised, options.views, options.ignore_index,
        options.correlation_temperature, options.supervised_temperature, options.eps,
    )  # fmt: skip
    if takes_gemms:
        module.mlkd(module.MLKD_ALL_STEPS, *arguments)
    else:
        columns = 0
        if correlation or supervised:
            columns = n * (options.views if supervised else 1)
        shape = _sides(options) * n, num_classes
        _steps(module, arguments, call.work, layout, shape, n, columns, inputs.student_grad)
    return call.outputs


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
