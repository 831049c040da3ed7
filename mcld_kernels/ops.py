"""The boundary to PyTorch: one operator for each loss, its fake kernel and its autograd Function.

The operator returns the gradients together with the loss, computed in the same pass; backward only scales them.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from . import backends, distributed, replay
from .distributed import Ranks, RanksOptions
from .kernels import KernelSet, LossInputs, LossOutputs
from .options import acc_dtype, are_classes, grad_dtype, is_observed, is_readable, no_autocast

_LIBRARY = torch.library.Library("mcld_kernels", "DEF")
_OPERATORS: dict[str, LossOperator] = {}
_NO_CONTEXT = contextlib.nullcontext()
_TENSORS = ("student", "teacher", "target", "weight")
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
    extra: tuple[Tensor | None, ...] = ()  # the operator's further tensors, which get no gradient
    ranks: RanksOptions | None = None  # None: one process
    replay_key: replay.Key | None = None  # of a call that is to be kept for later ones

    @classmethod
    def of(cls, *args: Any) -> _Call:
        """The call from the arguments of an autograd Function: those up to teacher_grad, ranks, further tensors."""
        # Not by _make, which torch 2.6 cannot trace.
        return cls(*args[:9], extra=args[10:], ranks=args[9])  # type: ignore[misc]


class LossOperator:
    """The operator ``mcld_kernels::<name>`` of a loss between student and teacher logits, and its gradient.

    `LossOutputs.terms` is the gradient of the loss by ``weight``, the fourth tensor.

    Args:
        name: of the operator.
        options_type: a NamedTuple of plain values; its fields become arguments of the operator.
        num_terms: terms of the loss.
        compute: the loss from a kernel set and its inputs.
        flops: floating-point operations of a call, by batch, classes, options, and how many sides get a gradient.
        supported: the backends whose kernel sets ``compute`` can use.
        tensors: what the operator's schema calls student, teacher, target and weight.
        extra: names of further optional tensors, which get no gradient: the last arguments of the operator, and
            `LossInputs.extra`. With any, ``flops`` takes the number of candidates as a fifth argument.
        is_per_anchor: True for options with which loss and terms have shape (n,), one for each row of the student,
            False where both have shape (). A gradient by the teacher then needs "anchor_weight" (n,) in ``extra``,
            which multiplies each anchor's loss: backward calls the operator again with the upstream gradient as that
            weight.
        has_teacher_kernels: the kernels of every backend give the gradient by the teacher.
        compute_over_ranks: this rank's part of the loss over ranks. It defines a second operator,
            ``mcld_kernels::<name>_ranks``, which takes the name of the process group and runs the collectives.
    """

    def __init__(
        self,
        name: str,
        options_type: Any,
        num_terms: int,
        compute: Callable[[KernelSet, LossInputs], LossOutputs],
        flops: Callable[..., int],
        supported: tuple[str, ...] = ("torch", "triton", "cuda"),
        *,
        tensors: tuple[str, str, str, str] = _TENSORS,
        extra: tuple[str, ...] = (),
        is_per_anchor: Callable[[Any], bool] | None = None,
        has_teacher_kernels: bool = False,
        compute_over_ranks: Callable[[KernelSet, LossInputs, Ranks], LossOutputs] | None = None,
    ):
        self.name, self.num_terms, self._options_type, self._compute = name, num_terms, options_type, compute
        self.supported, self._extra, self._is_per_anchor = supported, extra, is_per_anchor
        self.can_be_per_anchor = is_per_anchor is not None
        self._has_teacher_kernels, self._has_classes = has_teacher_kernels, tensors == _TENSORS
        self._compute_over_ranks = compute_over_ranks
        hints = typing.get_type_hints(options_type)
        fields = ", ".join(f"{_schema_type(hints[field])} {field}" for field in options_type._fields)
        first, second, third, fourth = tensors
        further = "".join(f", Tensor? {tensor}=None" for tensor in extra)
        arguments = (
            f"Tensor {first}, Tensor {second}, Tensor? {third}, Tensor? {fourth}, {fields}, str backend, "
            "bool student_grad, bool teacher_grad"
        )
        self._operator = _define(name, arguments + further, self._implementation, self._fake)
        if compute_over_ranks is not None:
            arguments += ", str group, str gather, bool even"
            self._operator_over_ranks = _define(
                f"{name}_ranks", arguments + further, self._implementation_over_ranks, self._fake_over_ranks
            )
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
        extra: tuple[Tensor | None, ...] = (),
        ranks: RanksOptions | None = None,
        replay_key: replay.Key | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss () with its gradient, and the terms (num_terms,), for arguments that are already checked.

        labels_are_classes: as in `LossInputs`; None where it is not known yet. extra: the further tensors, all of them.
        ranks: over ranks, this rank's part of both. replay_key: `replay.call_key` of the arguments, or None.
        """
        student_grad, teacher_grad, weight_grad = needs_grad(student), needs_grad(teacher), needs_grad(weight)
        if student_grad or teacher_grad or weight_grad:
            is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
            if not (is_transformed or is_observed(student)):
                call = _Call(
                    self.name, student, teacher, target, weight, options, backend,
                    student_grad, teacher_grad, labels_are_classes, extra, ranks, replay_key,
                )  # fmt: skip
                terms: list[Tensor] = []
                return _EagerLoss.apply(self, call, terms, student, teacher, weight), terms[0]
            function = _TransformableLoss if is_transformed else _Loss
            outputs = function.apply(
                self.name, student, teacher, target, weight, options, backend, student_grad, teacher_grad, ranks, *extra
            )
            return outputs[0], outputs[1]
        call = _Call(
            self.name, student, teacher, target, weight, options, backend, False, False, labels_are_classes, extra,
            ranks, replay_key,
        )  # fmt: skip
        outputs = self.dispatch(call) if is_observed(student) else self.run(call)
        return outputs[0], outputs[1]

    def dispatch(self, call: _Call) -> Outputs:
        """`run` through PyTorch's dispatcher, for whoever traces or observes operators; a plain call saves its cost."""
        if not torch.compiler.is_compiling():
            self._tell_flop_counters()
        tensors = call.student, call.teacher, call.target, call.weight
        choices = call.backend, call.student_grad, call.teacher_grad
        if call.ranks is not None:
            choices = (*choices, *call.ranks)  # type: ignore[assignment]
        run = self._operator if call.ranks is None else self._operator_over_ranks
        return run(*tensors, *call.options, *choices, *call.extra)  # type: ignore[no-any-return]

    def _call(
        self, student: Tensor, teacher: Tensor, target: Any, weight: Any, *rest: Any, over_ranks: bool = False
    ) -> _Call:
        """The arguments of the operator by name. The dispatcher leaves out further tensors that are None."""
        ranks = None
        if over_ranks:
            first = len(self._options_type._fields) + 3
            ranks, rest = RanksOptions(*rest[first : first + 3]), (*rest[:first], *rest[first + 3 :])
        count = len(self._options_type._fields)
        fields = [tuple(field) if isinstance(field, list) else field for field in rest[:count]]
        extra = (*rest[count + 3 :], *[None] * (len(self._extra) - (len(rest) - count - 3)))
        options, choices = self._options_type(*fields), rest[count : count + 3]
        return _Call._make((self.name, student, teacher, target, weight, options, *choices, None, extra, ranks, None))

    def _implementation(self, *args: Any) -> Outputs:
        return self.run(self._call(*args))

    def _implementation_over_ranks(self, *args: Any) -> Outputs:
        return self.run(self._call(*args, over_ranks=True))

    def weighted(self, extra: tuple[Tensor | None, ...], upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The further tensors with ``upstream`` (n,) as "anchor_weight"."""
        place = self._extra.index("anchor_weight")
        return (*extra[:place], upstream, *extra[place + 1 :])

    def is_per_anchor(self, call: _Call) -> bool:
        """True where loss and terms have shape (n,)."""
        return self._is_per_anchor is not None and self._is_per_anchor(call.options)

    def run(self, call: _Call) -> Outputs:
        """Loss (), terms (num_terms,), gradients of the loss by student and teacher: (batch, classes), else (0,)."""
        loss, terms, student_grad, teacher_grad = self.evaluate(call)
        return (
            loss,
            terms,
            call.student.new_empty(0) if student_grad is None else student_grad,
            call.teacher.new_empty(0) if teacher_grad is None else teacher_grad,
        )

    def evaluate(self, call: _Call) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As `run`, with None for a gradient that is not asked for."""
        student, teacher = call.student, call.teacher
        needs_teacher_grad = call.teacher_grad and not self._has_teacher_kernels
        try:
            kernels = backends.kernel_set(call.backend, student, teacher, needs_teacher_grad, self.supported)
        except backends.BackendUnavailable as error:
            distributed.report(call.ranks, error)
            raise
        if (student.shape[0] == 0 or teacher.shape[0] == 0) and call.ranks is None:
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
                self._has_classes
                and _are_known_classes(call.target, student.shape[1], getattr(call.options, "ignore_index", -1))
                if call.labels_are_classes is None
                else call.labels_are_classes
            ),
            extra=dict(zip(self._extra, call.extra, strict=True)) if call.extra else {},
        )
        may_need_context = student.is_cuda or torch.is_autocast_enabled(student.device.type)
        with (call_context(student.device) if may_need_context else None) or _NO_CONTEXT:
            if call.ranks is not None:
                over_ranks = self._evaluate_over_ranks(call.ranks, kernels, inputs)
                if over_ranks is None:
                    return self._like(call, torch.zeros)
                outputs = over_ranks
            elif kernels.records_calls:
                outputs = kernels.run(self._compute, inputs)
                if call.replay_key is not None and (again := kernels.replay(self._compute, inputs)) is not None:
                    replay.keep(call.replay_key, again)
            else:
                outputs = self._compute(kernels, inputs)
        return outputs.loss, outputs.terms, outputs.student_grad, outputs.teacher_grad

    def _evaluate_over_ranks(self, options: RanksOptions, kernels: KernelSet, inputs: LossInputs) -> LossOutputs | None:
        """The loss over ranks, after their exchange. None for an empty global batch."""
        assert self._compute_over_ranks is not None
        rows, device = inputs.student.shape[0], inputs.student.device
        ranks = distributed.join(options, rows, _facts(kernels, inputs), device)
        if ranks.total == 0:
            return None
        return self._compute(kernels, inputs) if ranks.count == 1 else self._compute_over_ranks(kernels, inputs, ranks)

    def _tell_flop_counters(self) -> None:
        """Give the flop formula to the counters that are running.

        torch's registry would take it once for all, but importing it imports Triton, which takes long.
        """
        for mode in _python_dispatch._get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", mode)
            if isinstance(registry := getattr(counter, "flop_registry", None), dict):
                registry.setdefault(self._operator.overloadpacket, self._count_flops)
                if self._compute_over_ranks is not None:
                    registry.setdefault(self._operator_over_ranks.overloadpacket, self._count_flops_over_ranks)

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
        call = self._call(student, teacher, target, weight, *rest)
        batch, classes = getattr(student, "shape", student)
        arguments = batch, classes, call.options, call.student_grad + call.teacher_grad
        if not self._extra:
            return self._flops(*arguments)
        further = dict(zip(self._extra, call.extra, strict=True)).get("candidates")
        rows = [getattr(x, "shape", x)[0] for x in (teacher, further) if x is not None]
        return self._flops(*arguments, sum(rows))

    def _count_flops_over_ranks(self, student: Any, *rest: Any, out_val: Any = None, **_: Any) -> int:
        """This rank's share of the formula for the global batch, as if all ranks had as many rows."""
        call = self._call(student, *rest, over_ranks=True)
        assert call.ranks is not None
        count = distributed.resolve(call.ranks.group).size()
        batch, classes = getattr(student, "shape", student)
        arguments = batch * count, classes, call.options, call.student_grad + call.teacher_grad
        return self._flops(*arguments, *([batch * count] if self._extra else [])) // count

    def _fake(self, *args: Any) -> Outputs:
        return self._like(self._call(*args), torch.empty)

    def _fake_over_ranks(self, *args: Any) -> Outputs:
        return self._like(self._call(*args, over_ranks=True), torch.empty)

    def _like(self, call: _Call, make: Callable[..., Tensor]) -> Outputs:
        acc = acc_dtype(torch.promote_types(call.student.dtype, call.teacher.dtype))
        device = call.student.device
        student_grad, teacher_grad = (
            make(logits.shape, dtype=grad_dtype(logits.dtype), device=device) if needed else logits.new_empty(0)
            for logits, needed in ((call.student, call.student_grad), (call.teacher, call.teacher_grad))
        )
        rows = (call.student.shape[0],)
        if self._is_per_anchor is None:
            shapes: tuple[tuple[int, ...], ...] = (), (self.num_terms,)
        else:
            shapes = (rows, rows) if self.is_per_anchor(call) else ((), ())
        loss, terms = (make(shape, dtype=acc, device=device) for shape in shapes)
        return loss, terms, student_grad, teacher_grad


def call_context(device: torch.device) -> contextlib.AbstractContextManager[None] | None:
    """The context that a call on ``device`` needs: that device current and autocast off. None where both are so."""
    kind = device.type
    is_elsewhere = kind == "cuda" and device.index != torch.cuda.current_device()
    has_autocast = torch.is_autocast_enabled(kind)
    return _call_context(device, is_elsewhere, has_autocast) if is_elsewhere or has_autocast else None


@contextlib.contextmanager
def _call_context(device: torch.device, is_elsewhere: bool, has_autocast: bool) -> Iterator[None]:
    with (
        torch.cuda.device(device) if is_elsewhere else _NO_CONTEXT,
        no_autocast(device) if has_autocast else _NO_CONTEXT,
    ):
        yield


def _define(name: str, arguments: str, implementation: Callable[..., Outputs], fake: Callable[..., Outputs]) -> Any:
    """The operator ``mcld_kernels::<name>``."""
    _LIBRARY.define(f"{name}({arguments}) -> {_OUTPUTS}")
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"mcld_kernels::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.mcld_kernels, name).default

    def vmap(*args: Any) -> Any:
        return _one_by_one(operator, *args)

    # PyTorch without a rule does the same, with a warning.
    torch.library.register_vmap(f"mcld_kernels::{name}", vmap, lib=_LIBRARY)
    return operator


def _one_by_one(
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


def _facts(kernels: KernelSet, inputs: LossInputs) -> dict[str, Any]:
    """The values that the ranks must agree in: the collectives of a call, and their shapes, follow from it."""
    dtype = kernels.operand_dtype(inputs.dtype)
    pitch = kernels.operand_shape(1, inputs.student.shape[1], dtype)[1]
    operands = f"{dtype} with pitch {pitch} and chunks of {kernels.tuning.chunk_bytes} bytes"
    common = distributed.same_on_all_ranks(
        inputs.student, inputs.teacher, inputs.target, inputs.weight, inputs.options, operands
    )
    further = {name: None if x is None else list(x.shape) for name, x in inputs.extra.items()}
    gradients = {"student gradient": inputs.student_grad, "teacher gradient": inputs.teacher_grad}
    return {**common, **further, **gradients}


def needs_grad(tensor: Tensor | None) -> bool:
    """True where a derivative by the tensor may be asked for, in reverse or in forward mode."""
    if tensor is None:
        return False
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _are_known_classes(target: Tensor | None, num_classes: int, ignore_index: int) -> bool:
    """True where every label is known to be a class. Labels on a GPU are not read: that would synchronize."""
    if target is None or target.numel() == 0 or target.dtype != torch.int64 or not is_readable(target):
        return False
    low, high = (int(bound) for bound in torch.aminmax(target))
    return are_classes((low, high), num_classes, ignore_index)


def _schema_type(hint: Any) -> str:
    """The schema's word for a field's type."""
    if typing.get_origin(hint) is Literal:
        return "str"
    if typing.get_origin(hint) is tuple:
        return "float[]"
    return {float: "float", bool: "bool", int: "int", str: "str"}[hint]


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


_TWICE = "the fast backends of mcld_kernels cannot be differentiated twice; backend='reference' can, at its own cost"


def _save(ctx: Any, call: _Call, outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
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
    operator = _OPERATORS[call.name]
    ctx.call, ctx.is_per_anchor = None, operator.can_be_per_anchor and operator.is_per_anchor(call)
    if call.teacher_grad and ctx.is_per_anchor:
        # Backward computes the teacher's gradient, for the upstream gradient of each anchor.
        ctx.call = call.name, call.options, call.backend
        saved = (*saved, call.student, call.teacher, call.target, call.weight, *call.extra)
    ctx.save_for_backward(*saved)
    return saved


def _forward_call(operator: LossOperator, call: _Call) -> _Call:
    """The gradients that forward computes: where each anchor has a loss, the teacher's gradient is left to backward."""
    if not (call.teacher_grad and operator.is_per_anchor(call)):
        return call
    # Not by _replace, which torch 2.6 cannot trace.
    return _Call(
        call.name, call.student, call.teacher, call.target, call.weight, call.options, call.backend,
        student_grad=call.student_grad, teacher_grad=False, labels_are_classes=call.labels_are_classes,
        extra=call.extra, ranks=call.ranks, replay_key=call.replay_key,
    )  # fmt: skip


def _forward(call: _Call) -> Outputs:
    operator = _OPERATORS[call.name]
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
    operator = _OPERATORS[name]
    with torch.no_grad():
        call = _Call(
            name, student, teacher, target, weight, options, backend, False, True,
            extra=operator.weighted(tuple(extra), upstream),
        )  # fmt: skip
        return (operator.dispatch(call) if is_observed(student) else operator.run(call))[3]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = _Call.of(*args)
        outputs = _forward(call)
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
        outputs = operator.evaluate(_forward_call(operator, call) if call.teacher_grad else call)
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
        return _forward(_Call.of(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.save_for_forward(*_save(ctx, _Call.of(*inputs), output))
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
        return _one_by_one(_TransformableLoss.apply, info, in_dims, *args)
