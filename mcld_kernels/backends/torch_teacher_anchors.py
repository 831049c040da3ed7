"""Teacher anchors against student rows on a CPU, of any size, by csrc/cpu/teacher_anchors.cpp.

CKD as released, and MCLD's instance-wise term with teacher anchors: fp32 logits of a frozen teacher, loss and gradient
in one pass that keeps no similarity matrix. Small calls keep the matrix (`torch_low_latency`) and are faster by it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from ..kernels import LossInputs, LossOutputs, has_fixed_shift
from .torch_contrast import PART
from .torch_low_latency import LowLatencyTuning, compiled_module, has_plain_fp32_memory, isa_index, weights_of


def mcld(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for a call of `mcld_loss`; None where this path does not apply."""
    options = inputs.options
    if (
        not tuning.compiled
        or not tuning.compiled_contrast
        or options.direction != "teacher"
        or options.active != (True, False, False)
        or options.mask_same_class
        or inputs.student.device.type != "cpu"
        or inputs.teacher_grad
        or inputs.student.shape != inputs.teacher.shape
        or inputs.student.numel() == 0
        or not has_plain_fp32_memory(inputs)
        or not has_fixed_shift(torch.float32, options.temperature[0])
        or (module := compiled_module()) is None
    ):
        return None
    isa = isa_index(tuning.isa)
    if tuning.isa is None and module.isas()[isa] == "baseline":
        return None  # PyTorch's GEMMs are three times as fast as those without AVX2
    return partial(_teacher_anchors, module=module, isa=isa)


@lru_cache(maxsize=256)
def _size(n: int, num_classes: int) -> int:
    """Floats of the workspace."""
    size: int = compiled_module().teacher_anchors_size(n, num_classes)
    return size


def _teacher_anchors(inputs: LossInputs, module: Any, isa: int) -> LossOutputs:
    student, teacher, options = inputs.student, inputs.teacher, inputs.options
    n, num_classes = student.shape
    # new_empty: torch's default device may be another one.
    work, loss, terms = student.new_empty(_size(n, num_classes)), student.new_empty(()), student.new_empty(3)
    gradient = student.new_empty((n, num_classes)) if inputs.student_grad else None
    module.teacher_anchors(
        isa, torch.get_num_threads(), student.data_ptr(), *student.stride(), teacher.data_ptr(), *teacher.stride(),
        n, num_classes, work.data_ptr(), 0 if gradient is None else gradient.data_ptr(), loss.data_ptr(),
        terms.data_ptr(), weights_of(inputs)[0], options.temperature[0], options.eps, PART,
    )  # fmt: skip
    return LossOutputs(loss=loss, terms=terms, student_grad=gradient, teacher_grad=None)
