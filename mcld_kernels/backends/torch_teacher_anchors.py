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
from .torch_low_latency import (
    LowLatencyTuning,
    compiled_module,
    isa_index,
    module_for_whole_calls,
    weights_of,
    whole_call,
)


def mcld(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for a call of `mcld_loss`; None where this path does not apply."""
    options = inputs.options
    if (
        not tuning.compiled_contrast
        or options.direction != "teacher"
        or options.active != (True, False, False)
        or options.mask_same_class
        or inputs.student.shape != inputs.teacher.shape
        or inputs.student.numel() == 0
        or not has_fixed_shift(torch.float32, options.temperature[0])
        or (module := module_for_whole_calls(inputs, tuning)) is None
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
    options = inputs.options
    call = whole_call(inputs, isa, _size(*inputs.student.shape))
    module.teacher_anchors(*call.arguments, weights_of(inputs)[0], options.temperature[0], options.eps, PART)
    return call.outputs
