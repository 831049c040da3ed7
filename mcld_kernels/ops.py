"""The boundary to PyTorch: one operator for each loss, its fake kernel and its autograd Function.

The operator returns the gradients together with the loss, computed in the same pass; backward only scales them.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from . import backends
from .kernels import KernelSet, LossInputs, LossOutputs
from .options import acc_dtype, grad_dtype, is_readable, no_autocast

_LIBRARY = torch.library.Library("mcld_kernels", "DEF")
_OPERATORS: dict[str, LossOperator] = {}
_TENSORS = "Tensor student, Tensor teacher, Tensor? target, Tensor? weight"
_OUTPUTS = "(Tensor loss, Tensor terms, Tensor student_grad, Tensor teacher_grad)"
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class _Call(NamedTuple):
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


class LossOperator:
    """The operator ``mcld_kernels::<name>`` of a loss between student and teacher logits, and its gradient.

    Args:
        name: of the operator.
        options_type: a NamedTuple of plain values; its fields become arguments of the operator.
        num_terms: terms of the loss.
        compute: the loss from a kernel set and its inputs.
        flops: floating-point operations of a call, by batch, classes, options and whether a gradient is computed.
        supported: the backends whose kernel sets ``compute`` can use.
    """

    def __init__(
        self,
        name: str,
        options_type: Any,
        num_terms: int,
        compute: Callable[[KernelSet, LossInputs], LossOutputs],
        flops: Callable[[int, int, Any, bool], int],
        supported: tuple[str, ...] = ("torch", "triton", "cuda"),
    ):
        self.name, self.num_terms, self._options_type, self._compute = name, num_terms, options_type, compute
        self.supported = supported
        hints = typing.get_type_hints(options_type)
        fields = ", ".join(f"{_schema_type(hints[field])} {field}" for field in options_type._fields)
        _LIBRARY.define(
            f"{name}({_TENSORS}, {fields}, str backend, bool student_grad, bool teacher_grad) -> {_OUTPUTS}"
        )
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, self._implementation, key)
        qualified = f"mcld_kernels::{name}"
        torch.library.register_fake(qualified, self._fake, lib=_LIBRARY)
        self._operator = getattr(torch.ops.mcld_kernels, name).default
        _OPERATORS[name] = self
        self._flops = flops

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        options: Any,
        backend: str,
        labels_are_classes: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss () with its gradient, and the terms (num_terms,), for arguments that are already checked.

        labels_are_classes: as in `LossInputs`; None where it is not known yet.
        """
        student_grad, teacher_grad, weight_grad = _needs_grad(student), _needs_grad(teacher), _needs_grad(weight)
        if student_grad or teacher_grad or weight_grad:
            is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
            if not (is_transformed or _is_observed(student)):
                call = _Call(
                    self.name, student, teacher, target, weight, options, backend,
                    student_grad, teacher_grad, labels_are_classes,
                )  # fmt: skip
                terms: list[Tensor] = []
                return _EagerLoss.apply(self, call, terms, student, teacher, weight), terms[0]
            function = _TransformableLoss if is_transformed else _Loss
            outputs = function.apply(
                self.name, student, teacher, target, weight, options, backend, student_grad, teacher_grad
            )
            return outputs[0], outputs[1]
        call = _Call(self.name, student, teacher, target, weight, options, backend, False, False, labels_are_classes)
        outputs = self.dispatch(call) if _is_observed(student) else self.run(call)
        return outputs[0], outputs[1]

    def dispatch(self, call: _Call) -> Outputs:
        """`run` through PyTorch's dispatcher, for whoever traces or observes operators; a plain call saves its cost."""
        if not torch.compiler.is_compiling():
            self._tell_flop_counters()
        tensors = call.student, call.teacher, call.target, call.weight
        choices = call.backend, call.student_grad, call.teacher_grad
        return self._operator(*tensors, *call.options, *choices)  # type: ignore[no-any-return]

    def _implementation(self, student: Tensor, teacher: Tensor, target: Any, weight: Any, *rest: Any) -> Outputs:
        fields = [tuple(field) if isinstance(field, list) else field for field in rest[:-3]]
        call = _Call(self.name, student, teacher, target, weight, self._options_type(*fields), *rest[-3:])
        return self.run(call)

    def run(self, call: _Call) -> Outputs:
        """Loss (), terms (num_terms,), gradients of the loss by student and teacher: (batch, classes), else (0,)."""
        student, teacher = call.student, call.teacher
        kernels = backends.kernel_set(call.backend, student, teacher, call.teacher_grad, self.supported)
        if student.shape[0] == 0:
            return self._like(call, torch.zeros)
        inputs = LossInputs(
            student=student,
            teacher=teacher,
            target=call.target,
            weight=call.weight,
            options=call.options,
            student_grad=call.student_grad,
            teacher_grad=call.teacher_grad,
            labels_are_classes=(
                _are_classes(call.target, student.shape[1], getattr(call.options, "ignore_index", -1))
                if call.labels_are_classes is None
                else call.labels_are_classes
            ),
        )
        device = student.device
        if device.type == "cuda" or torch.is_autocast_enabled(device.type):
            on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
            with on_device, no_autocast(device):
                outputs = self._compute(kernels, inputs)
        else:
            outputs = self._compute(kernels, inputs)
        student_grad = student.new_empty(0) if outputs.student_grad is None else outputs.student_grad
        teacher_grad = teacher.new_empty(0) if outputs.teacher_grad is None else outputs.teacher_grad
        return outputs.loss, outputs.terms, student_grad, teacher_grad

    def _tell_flop_counters(self) -> None:
        """Give the flop formula to the counters that are running.

        torch's registry would take it once for all, but importing it imports Triton, which takes long.
        """
        for mode in _python_dispatch._get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", mode)
            if isinstance(registry := getattr(counter, "flop_registry", None), dict):
                registry.setdefault(self._operator.overloadpacket, self._count_flops)

    def _count_flops(
        self,
        student: Any,
        teacher: Any,
        target: Any,
        weight: Any,
        *rest: Any,
        out_val: Any = None,
        **_: Any,
    ) -> int:
        """The formula, as torch's flop counters call it: with tensors or with their shapes."""
        batch, classes = getattr(student, "shape", student)
        return self._flops(batch, classes, self._options_type(*rest[:-3]), bool(rest[-2] or rest[-1]))

    def _fake(self, student: Tensor, teacher: Tensor, target: Any, weight: Any, *rest: Any) -> Outputs:
        return self._like(_Call(self.name, student, teacher, target, weight, None, *rest[-3:]), torch.empty)

    def _like(self, call: _Call, make: Callable[..., Tensor]) -> Outputs:
        acc = acc_dtype(torch.promote_types(call.student.dtype, call.teacher.dtype))
        device = call.student.device
        student_grad, teacher_grad = (
            make(logits.shape, dtype=grad_dtype(logits.dtype), device=device) if needed else logits.new_empty(0)
            for logits, needed in ((call.student, call.student_grad), (call.teacher, call.teacher_grad))
        )
        loss, terms = make((), dtype=acc, device=device), make((self.num_terms,), dtype=acc, device=device)
        return loss, terms, student_grad, teacher_grad


def _needs_grad(tensor: Tensor | None) -> bool:
    """True where a derivative by the tensor may be asked for, in reverse or in forward mode."""
    if tensor is None:
        return False
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _are_classes(target: Tensor | None, num_classes: int, ignore_index: int) -> bool:
    """True where every label is known to be a class. Labels on a GPU are not read: that would synchronize."""
    if target is None or 0 <= ignore_index < num_classes or not is_readable(target):
        return False
    low, high = torch.aminmax(target)
    return int(low) >= 0 and int(high) < num_classes


def _schema_type(hint: Any) -> str:
    """The schema's word for a field's type."""
    if typing.get_origin(hint) is Literal:
        return "str"
    if typing.get_origin(hint) is tuple:
        return "float[]"
    return {float: "float", bool: "bool", int: "int", str: "str"}[hint]


def _is_observed(tensor: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or tensor.device.type not in ("cpu", "cuda")
        or type(tensor) not in (Tensor, torch.nn.Parameter)
    )


class _NoSecondDerivative(torch.autograd.Function):
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


_TWICE = "the fast backends of mcld_kernels cannot be differentiated twice; backend='reference' can, at its own cost"


def _save(ctx: Any, call: _Call, outputs: Outputs) -> tuple[Tensor | None, ...]:
    """Save what the derivatives need; returns it."""
    # The inputs that a second derivative is taken by; a constant may be an inference tensor, which cannot be saved.
    inputs = (x if x is not None and x.requires_grad else None for x in (call.student, call.teacher, call.weight))
    # A copy, since whoever logs the terms may change them in place.
    terms = outputs[1].clone() if call.weight is not None else None
    ctx.dtypes = (
        call.student.dtype if call.student_grad else None,
        call.teacher.dtype if call.teacher_grad else None,
        None if call.weight is None else call.weight.dtype,
    )
    saved = (outputs[2], outputs[3], terms, *inputs)
    ctx.save_for_backward(*saved)
    return saved


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    """Gradients by the arguments of a call."""
    student, teacher, weight = _gradients(ctx, upstream, (1, 2, 4))
    return None, student, teacher, None, weight, None, None, None, None


def _gradients(ctx: Any, upstream: Tensor, indices: tuple[int, int, int]) -> list[Tensor | None]:
    """Gradients by student, teacher and weight, which are the inputs ``indices``."""
    *gradients, student, teacher, weight = ctx.saved_tensors
    results: list[Tensor | None] = []
    for gradient, dtype, needed in zip(gradients, ctx.dtypes, indices, strict=True):
        if dtype is None or not ctx.needs_input_grad[needed]:
            results.append(None)
            continue
        # Grad mode is on in backward where a graph of it was asked for (create_graph=True).
        if torch.is_grad_enabled():
            gradient = _NoSecondDerivative.apply(gradient, student, teacher, weight)
        product = gradient * upstream
        results.append(product if product.dtype == dtype else product.to(dtype))
    return results


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = _Call(*args)
        operator = _OPERATORS[call.name]
        outputs = operator.dispatch(call) if _is_observed(call.student) else operator.run(call)
        _save(ctx, call, outputs)
        ctx.mark_non_differentiable(outputs[1])
        return outputs[0], outputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return _backward(ctx, upstream)


class _EagerLoss(torch.autograd.Function):
    """The same for a plain call, which nothing observes: less is handed to autograd, and the terms go round it."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: LossOperator,
        call: _Call,
        terms: list[Tensor],
        student: Tensor,
        teacher: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        outputs = operator.run(call)
        _save(ctx, call, outputs)
        terms.append(outputs[1])
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, None, None, *_gradients(ctx, upstream, (3, 4, 5))


class _TransformableLoss(torch.autograd.Function):
    """The same for torch.func and forward-mode AD: what the derivatives need are outputs."""

    @staticmethod
    def forward(*args: Any) -> Outputs:
        call = _Call(*args)
        operator = _OPERATORS[call.name]
        return operator.dispatch(call) if _is_observed(call.student) else operator.run(call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.save_for_forward(*_save(ctx, _Call(*inputs), output))
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return _backward(ctx, upstream)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        *gradients, student, teacher, weight = ctx.saved_tensors
        parts = [
            (_NoSecondDerivative.apply(gradient, student, teacher, weight) * tangents[index]).sum()
            for gradient, dtype, index in zip(gradients, ctx.dtypes, (1, 2, 4), strict=True)
            if dtype is not None and tangents[index] is not None
        ]
        return sum(parts[1:], parts[0]), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Outputs, tuple[int, ...]]:
        """One call for each problem of the batch."""
        results = []
        for i in range(info.batch_size):
            taken = (
                arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, in_dims, strict=True)
            )
            results.append(_TransformableLoss.apply(*taken))
        loss, terms, student_grad, teacher_grad = (torch.stack(parts) for parts in zip(*results, strict=True))
        return (loss, terms, student_grad, teacher_grad), (0, 0, 0, 0)
