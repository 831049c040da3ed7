"""The boundary to PyTorch: one operator for all fast backends, and the autograd Function around it.

The operator returns the gradients together with the loss, computed in the same pass; backward only scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .arguments import Options, stat_dtype
from .pipeline import Call, gradient_dtype


@torch.library.custom_op("mcld_kernels::mcld", mutates_args=())
def mcld(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: Sequence[float],
    scale: Sequence[float],
    direction: str,
    mask_same_class: bool,
    present_only: bool,
    ignore_index: int,
    eps: float,
    backend: str,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), terms (3,), gradients of the loss by student and teacher: (batch, classes), or (0,) if not wanted."""
    t, w = tuple(temperature), tuple(scale)
    triples = (t[0], t[1], t[2]), (w[0], w[1], w[2])
    chosen = Options(*triples, direction, mask_same_class, present_only, ignore_index, eps)
    name = backends.choose(backend, student, teacher, teacher_grad)
    if student.shape[0] == 0:
        return _like(student, teacher, student_grad, teacher_grad, torch.zeros)
    with torch.autocast(student.device.type, enabled=False):
        call = Call(student, teacher, target, weight, chosen, student_grad, teacher_grad)
        result = backends.implementation(name)(call)
    by_student = student.new_empty(0) if result.student is None else result.student
    by_teacher = teacher.new_empty(0) if result.teacher is None else result.teacher
    return result.loss, result.terms, by_student, by_teacher


@mcld.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: Sequence[float],
    scale: Sequence[float],
    direction: str,
    mask_same_class: bool,
    present_only: bool,
    ignore_index: int,
    eps: float,
    backend: str,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(student, teacher, student_grad, teacher_grad, torch.empty)


def _like(
    student: Tensor, teacher: Tensor, student_grad: bool, teacher_grad: bool, make: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stat = stat_dtype(torch.promote_types(student.dtype, teacher.dtype))
    gradients = []
    for logits, wanted in ((student, student_grad), (teacher, teacher_grad)):
        if wanted:
            gradients.append(make(logits.shape, dtype=gradient_dtype(logits.dtype), device=logits.device))
        else:
            gradients.append(logits.new_empty(0))
    return (
        make((), dtype=stat, device=student.device),
        make((3,), dtype=stat, device=student.device),
        gradients[0],
        gradients[1],
    )


class _MCLD(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        chosen: Options,
        backend: str,
        student_grad: bool,
        teacher_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        loss, terms, by_student, by_teacher = _call(
            student, teacher, target, weight, chosen, backend, student_grad, teacher_grad
        )
        ctx.save_for_backward(by_student, by_teacher, terms)
        ctx.dtypes = student.dtype, teacher.dtype, None if weight is None else weight.dtype
        ctx.wanted = student_grad, teacher_grad, weight is not None
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        by_student, by_teacher, terms = ctx.saved_tensors
        student, teacher, weight = (
            _once((gradient.detach() * upstream.detach()).to(dtype)) if wanted else None
            for gradient, dtype, wanted in zip((by_student, by_teacher, terms), ctx.dtypes, ctx.wanted, strict=True)
        )
        return student, teacher, None, weight, None, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that must not be differentiated again.

    torch's once_differentiable is silent where the upstream gradient is a constant: a gradient penalty would lose its
    part.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError(
            "the fast backends of mcld_loss cannot be differentiated twice; backend='reference' can, at its own cost"
        )


def _once(gradient: Tensor) -> Tensor:
    # Grad mode is on in backward where a graph of it was asked for (create_graph=True).
    return _Once.apply(gradient.requires_grad_()) if torch.is_grad_enabled() else gradient


def _call(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    chosen: Options,
    backend: str,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return mcld(
        student,
        teacher,
        target,
        weight,
        chosen.temperature,
        chosen.scale,
        chosen.direction,
        chosen.mask_same_class,
        chosen.present_only,
        chosen.ignore_index,
        chosen.eps,
        backend,
        student_grad,
        teacher_grad,
    )


def evaluate(
    student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None, chosen: Options, backend: str
) -> tuple[Tensor, Tensor]:
    """The loss () with its gradient, and the terms (3,), for arguments that are already checked."""
    enabled = torch.is_grad_enabled()
    student_grad, teacher_grad = enabled and student.requires_grad, enabled and teacher.requires_grad
    weight_grad = enabled and weight is not None and weight.requires_grad
    if student_grad or teacher_grad or weight_grad:
        return _MCLD.apply(student, teacher, target, weight, chosen, backend, student_grad, teacher_grad)
    loss, terms, _, _ = _call(student, teacher, target, weight, chosen, backend, False, False)
    return loss, terms
