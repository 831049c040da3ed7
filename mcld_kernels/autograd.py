"""The derivatives of the losses: a call's arguments, and autograd Functions that scale the gradients it computed.

Forward returns the gradients with the loss; backward multiplies them by the upstream gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import replay
from .distributed import RanksOptions
from .options import is_observed

if TYPE_CHECKING:
    from .ops import LossOperator

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
OPERATORS: dict[str, LossOperator] = {}  # by name, which is what the arguments of a Function can hold


_TWICE = "the fast backends of mcld_kernels cannot be differentiated twice; backend='reference' can, at its own cost"


class Call(NamedTuple):
    """The arguments of an operator: checked tensors, options and what to compute."""

    name: str
    student: Tensor
    teacher: Tensor
    target: Tensor | None
    weight: Tensor | None
    options: Any
    backend: str
    student_grad: bool
    teacher_grad: bool
    labels_are_classes: bool | None = None  # None: not known yet
    extra: tuple[Tensor | None, ...] = ()  # the operator's further tensors, which get no gradient
    ranks: RanksOptions | None = None  # None: one process
    replay_key: replay.Key | None = None  # of a call that is to be kept for later ones

    @classmethod
    def of(cls, *args: Any) -> Call:
        """The call from the arguments of an autograd Function: those up to teacher_grad, ranks, further tensors."""
        # Not by _make, which torch 2.6 cannot trace.
        return cls(*args[:9], extra=args[10:], ranks=args[9])  # type: ignore[misc]


class NoSecondDerivative(torch.autograd.Function):
    """The identity of a gradient that depends on ``inputs``; its own derivative raises instead of being lost."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(_TWICE)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(_TWICE)


def _save(ctx: Any, call: Call, outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Save what the derivatives need; returns it."""
    # The inputs that a second derivative is taken by; a constant may be an inference tensor, which cannot be saved.
    inputs = (x if x is not None and x.requires_grad else None for x in (call.student, call.teacher, call.weight))
    # A copy, since whoever logs the terms may change them in place.
    terms = outputs[1].clone() if call.weight is not None and outputs[1] is not None else None
    ctx.dtypes = (
        call.student.dtype if call.student_grad else None,
        call.teacher.dtype if call.teacher_grad else None,
        None if call.weight is None else call.weight.dtype,
    )
    saved = (outputs[2], outputs[3], terms, *inputs)
    operator = OPERATORS[call.name]
    ctx.call, ctx.is_per_anchor = None, operator.can_be_per_anchor and operator.is_per_anchor(call)
    if call.teacher_grad and ctx.is_per_anchor:
        # Backward computes the teacher's gradient, for the upstream gradient of each anchor.
        ctx.call = call.name, call.options, call.backend
        saved = (*saved, call.student, call.teacher, call.target, call.weight, *call.extra)
    ctx.save_for_backward(*saved)
    return saved


def _forward_call(operator: LossOperator, call: Call) -> Call:
    """The gradients that forward computes: where each anchor has a loss, the teacher's gradient is left to backward."""
    if not (call.teacher_grad and operator.is_per_anchor(call)):
        return call
    # Not by _replace, which torch 2.6 cannot trace.
    return Call(
        call.name, call.student, call.teacher, call.target, call.weight, call.options, call.backend,
        student_grad=call.student_grad, teacher_grad=False, labels_are_classes=call.labels_are_classes,
        extra=call.extra, ranks=call.ranks, replay_key=call.replay_key,
    )  # fmt: skip


def _forward(call: Call) -> Outputs:
    operator = OPERATORS[call.name]
    call = _forward_call(operator, call)
    return operator.dispatch(call) if is_observed(call.student) else operator.run(call)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    """Gradients by the arguments of a call."""
    student, teacher, weight = _gradients(ctx, upstream, (1, 2, 4))
    return None, student, teacher, None, weight, *[None] * (len(ctx.needs_input_grad) - 5)


def _gradients(ctx: Any, upstream: Tensor, indices: tuple[int, int, int]) -> list[Tensor | None]:
    """Gradients by student, teacher and weight, which are the inputs ``indices``."""
    saved = ctx.saved_tensors
    gradients, inputs = saved[:3], saved[3:6]
    results: list[Tensor | None] = []
    for i, (gradient, dtype, needed) in enumerate(zip(gradients, ctx.dtypes, indices, strict=True)):
        if dtype is None or not ctx.needs_input_grad[needed]:
            results.append(None)
            continue
        is_weighted = i == 1 and ctx.call is not None
        if is_weighted:
            gradient = _weighted_teacher_grad(ctx.call, saved[6:], upstream)
        # Grad mode is on in backward where a graph of it was asked for (create_graph=True).
        if torch.is_grad_enabled():
            gradient = NoSecondDerivative.apply(gradient, *inputs, upstream if is_weighted else None)
        if is_weighted:
            product = gradient
        elif upstream.ndim == 0:
            product = gradient * upstream
        else:
            product = gradient * upstream[:, None] if gradient.ndim == 2 else (gradient * upstream).sum()
        results.append(product if product.dtype == dtype else product.to(dtype))
    return results


def _weighted_teacher_grad(kept: tuple[str, Any, str], tensors: tuple[Any, ...], upstream: Tensor) -> Tensor:
    """The gradient by the teacher of the sum of each anchor's loss times ``upstream`` (n,)."""
    name, options, backend = kept
    student, teacher, target, weight, *extra = tensors
    operator = OPERATORS[name]
    with torch.no_grad():
        call = Call(
            name, student, teacher, target, weight, options, backend, False, True,
            extra=operator.weighted(tuple(extra), upstream),
        )  # fmt: skip
        return (operator.dispatch(call) if is_observed(student) else operator.run(call))[3]


def one_by_one(
    function: Callable[..., Outputs], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Outputs, tuple[int, ...]]:
    """The rule of ``function`` for torch.func.vmap: one call for each problem of the batch."""
    results = []
    for i in range(info.batch_size):
        taken = (
            arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims, strict=True)
        )
        results.append(function(*taken))
    loss, terms, student_grad, teacher_grad = (torch.stack(parts) for parts in zip(*results, strict=True))
    return (loss, terms, student_grad, teacher_grad), (0, 0, 0, 0)


class TracedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = Call.of(*args)
        outputs = _forward(call)
        _save(ctx, call, outputs)
        ctx.mark_non_differentiable(outputs[1])
        return outputs[0], outputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return _backward(ctx, upstream)


class EagerLoss(torch.autograd.Function):
    """The same for a plain call, which nothing observes: less is handed to autograd, and the terms go round it."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: LossOperator,
        call: Call,
        terms: list[Tensor],
        student: Tensor,
        teacher: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        outputs = operator.evaluate(_forward_call(operator, call) if call.teacher_grad else call)
        _save(ctx, call, outputs)
        terms.append(outputs[1])
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, None, None, *_gradients(ctx, upstream, (3, 4, 5))


class TransformableLoss(torch.autograd.Function):
    """The same for torch.func and forward-mode AD: what the derivatives need are outputs."""

    @staticmethod
    def forward(*args: Any) -> Outputs:
        return _forward(Call.of(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.save_for_forward(*_save(ctx, Call.of(*inputs), output))
        ctx.loss_dtype = output[0].dtype
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return _backward(ctx, upstream)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        *gradients, student, teacher, weight = ctx.saved_tensors[:6]
        if ctx.call is not None and tangents[2] is not None:
            raise NotImplementedError(
                "the fast backends of mcld_kernels have no forward-mode derivative of each anchor's loss by the "
                "candidates; reduction='mean' has, and so has backend='reference'"
            )
        parts = []
        for gradient, dtype, index in zip(gradients, ctx.dtypes, (1, 2, 4), strict=True):
            if dtype is not None and tangents[index] is not None:
                product = (
                    NoSecondDerivative.apply(gradient, student, teacher, weight).to(ctx.loss_dtype) * tangents[index]
                )
                if ctx.is_per_anchor:
                    parts.append(product.sum(1) if product.ndim == 2 else product)
                else:
                    parts.append(product.sum())
        return sum(parts[1:], parts[0]), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Outputs, tuple[int, ...]]:
        return one_by_one(TransformableLoss.apply, info, in_dims, *args)
