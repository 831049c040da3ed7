"""The shortest ways of a call whose time is mostly what surrounds its arithmetic.

`plain_call`: plain fp32 logits on a CPU, a frozen teacher, no labels, the compiled module. One set of conditions stands
for every check of the tensors. `replayed_call`: a call of a kind that was checked and recorded before. Both allocate
what the loss and the gradient need alone. Where they do not apply the call goes through `ops.LossOperator`, which
checks, explains and computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, replay
from .family_options import KDOptions
from .ops import NoSecondDerivative, call_context
from .options import PLAIN_TYPES, MCLDOptions, is_observed

Options = TypeVar("Options")


def plain_call(
    student: Tensor,
    teacher: Tensor,
    options: Options,
    as_kernel: Callable[[Options], MCLDOptions | KDOptions | None],
    backend: str,
) -> Tensor | None:
    """The loss () with its gradient by the student; None where this way does not apply.

    Nothing is checked yet but the options. ``as_kernel`` gives them as those of a loss that the compiled module has,
    None where they are no case of one.
    """
    if torch.compiler.is_compiling():
        return None
    if type(student) not in PLAIN_TYPES or type(teacher) not in PLAIN_TYPES or is_observed(student):
        return None
    if (
        student.dtype is not torch.float32
        or teacher.dtype is not torch.float32
        or student.shape != teacher.shape
        or student.ndim != 2
        or student.numel() == 0
        or not (student.is_cpu and teacher.is_cpu)
        or not (student.layout is teacher.layout is torch.strided)
        or student.is_nested
        or teacher.is_nested
        or forward_ad._current_level >= 0
    ):
        return None
    with_grad = False
    if torch.is_grad_enabled():
        if teacher.requires_grad:
            return None
        with_grad = student.requires_grad
    kernel_options = as_kernel(options)
    if kernel_options is None:
        return None
    outputs = backends.plain_call(backend, student, teacher, kernel_options, with_grad)
    if outputs is None:
        return None
    return _PlainLoss.apply(student, outputs) if with_grad else outputs[0]  # type: ignore[no-any-return]


def replayed_call(student: Tensor, teacher: Tensor, target: Tensor | None, key: replay.Key) -> Tensor | None:
    """The loss () with its gradient by the student, of a call of kind ``key``; None where none was kept."""
    if (again := replay.find(key)) is None:
        return None
    tensors = (student, teacher) if target is None else (student, teacher, target)
    context = call_context(student.device)
    if context is None:
        outputs = again(tensors)
    else:
        with context:
            outputs = again(tensors)
    return outputs[0] if outputs[1] is None else _PlainLoss.apply(student, outputs)  # type: ignore[no-any-return]


class _PlainLoss(torch.autograd.Function):
    """The loss with its gradient by the student, both computed."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, outputs: tuple[Tensor, Tensor]) -> Tensor:
        ctx.save_for_backward(outputs[1], student)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient, student = ctx.saved_tensors
        # Grad mode is on in backward where a graph of it was asked for (create_graph=True).
        if torch.is_grad_enabled():
            gradient = NoSecondDerivative.apply(gradient, student)
        product = gradient * upstream
        return product if product.dtype is student.dtype else product.to(student.dtype), None
