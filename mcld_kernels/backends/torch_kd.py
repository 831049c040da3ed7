"""Knowledge distillation of fp32 logits on a CPU by the compiled module, row by row (csrc/cpu/softmax_kl.cpp).

Of any size: a row takes one pair of exponentials for each class, in the cache, where the chunks of classes of
`losses.kd` take two pairs and torch operations. A gradient by the teacher costs one more pass over the row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..family_options import KDOptions
from ..kernels import LossInputs, LossOutputs, is_in_memory
from .torch_low_latency import LowLatencyTuning, compiled_module, has_plain_fp32_memory, isa_index

# The reciprocal and the square of the temperature are then normal numbers of fp32, far inside its range.
_TEMPERATURES = 2.0**-40, 2.0**40


def kd(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function; None where this path does not apply."""
    if (
        not (tuning.low_latency and tuning.compiled and inputs.student.is_cpu and has_plain_fp32_memory(inputs))
        or (module := compiled_module()) is None
        or not _takes_temperature(inputs.options.temperature)
    ):
        return None
    return partial(_kd, module=module, isa=isa_index(tuning.isa))


def plain_call(
    student: Tensor, teacher: Tensor, options: KDOptions, with_grad: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Loss and gradient of a call with the default tuning, without terms; None where this path does not apply.

    The logits (n, C), n C > 0, are plain fp32 tensors of the CPU.
    """
    module = compiled_module()
    if module is None or not is_in_memory(student, teacher) or not _takes_temperature(options.temperature):
        return None
    loss, gradient = student.new_empty(()), student.new_empty(student.shape) if with_grad else None
    _run(module, isa_index(None), student, teacher, loss, gradient, options.temperature)
    return loss, gradient


def _takes_temperature(temperature: float) -> bool:
    return _TEMPERATURES[0] <= temperature <= _TEMPERATURES[1]


def _kd(inputs: LossInputs, module: Any, isa: int) -> LossOutputs:
    student, teacher = inputs.student, inputs.teacher
    loss, terms = student.new_empty(()), student.new_empty(1)
    grads = [
        logits.new_empty(logits.shape) if needed else None
        for logits, needed in ((student, inputs.student_grad), (teacher, inputs.teacher_grad))
    ]
    _run(module, isa, student, teacher, loss, grads[0], inputs.options.temperature, grads[1], terms)
    return LossOutputs(loss=loss, terms=terms, student_grad=grads[0], teacher_grad=grads[1])


def _run(
    module: Any,
    isa: int,
    student: Tensor,
    teacher: Tensor,
    loss: Tensor,
    student_grad: Tensor | None,
    temperature: float,
    teacher_grad: Tensor | None = None,
    terms: Tensor | None = None,
) -> None:
    shape, threads = student.shape, torch.get_num_threads()
    work = student.new_empty(module.softmax_kl_size(*shape, threads))
    module.softmax_kl(
        isa, threads, student.data_ptr(), *student.stride(), teacher.data_ptr(), *teacher.stride(), *shape,
        work.data_ptr(), 0 if student_grad is None else student_grad.data_ptr(),
        0 if teacher_grad is None else teacher_grad.data_ptr(), loss.data_ptr(),
        0 if terms is None else terms.data_ptr(), temperature,
    )  # fmt: skip
