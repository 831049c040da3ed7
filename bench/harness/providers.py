"""The providers: each names the cases that it can run, predicts its memory, and takes one step of a case."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import importlib
import importlib.util
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness import closed_form, peers, plain
from bench.harness.cases import Case
from bench.harness.losses import LOSSES, Result
from mcld_kernels import backends
from mcld_kernels.calibrate import hopper_unsupported_reason

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # student (B, C), teacher (B, C), target (B,) -> ()
Step = Callable[[], Result]


@dataclass(frozen=True)
class Provider:
    """``make(case, student, teacher, target)`` gives a step.

    ``unsupported_reason(case, student, teacher)`` is None if it can run; ``extra_bytes`` estimates from above the
    memory that a step takes beside its inputs.
    """

    name: str
    title: str
    make: Callable[[Case, Tensor, Tensor, Tensor], Step]
    unsupported_reason: Callable[[Case, Tensor, Tensor], str | None]
    extra_bytes: Callable[[Case], int]


def autograd_step(loss_fn: LossFn, case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
    """A step of a differentiable loss. Without backward the student needs no gradient, so nothing is saved for one."""
    if not case.backward:
        return lambda: (loss_fn(student, teacher, target), None)
    leaf = student.detach().clone().requires_grad_()

    def step() -> Result:
        loss = loss_fn(leaf, teacher, target)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return step


def backend_unsupported_reason(name: str, hopper: bool, student: Tensor, teacher: Tensor) -> str | None:
    """The reason why a backend has no speed for these logits; None if it has one."""
    reason = backends.unsupported_reason(name, student, teacher, False)
    if reason is None and name in ("triton", "cuda") and student.device.type == "cpu":
        return "interpreted or emulated on a CPU: its time is not a speed"
    if reason is None and hopper:
        return hopper_unsupported_reason(student, teacher)
    return reason


def _always(case: Case, student: Tensor, teacher: Tensor) -> str | None:
    return None


def _eager_bytes(case: Case) -> int:
    return LOSSES[case.loss].eager_bytes(case)


def _reference(case: Case, *tensors: Tensor) -> Step:
    loss, options = LOSSES[case.loss], LOSSES[case.loss].options(case)
    return autograd_step(lambda s, t, y: loss.reference(s, t, y, **options), case, *tensors)


def _compiled(case: Case, *tensors: Tensor) -> Step:
    torch.compiler.reset()  # one shape, one program: no recompilation limit, no dynamic shapes from the case before
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # torch's own, of itself
    loss, options = LOSSES[case.loss], LOSSES[case.loss].options(case)
    compiled = torch.compile(loss.reference, dynamic=False)
    return autograd_step(lambda s, t, y: compiled(s, t, y, **options), case, *tensors)


def _backend(name: str, title: str, hopper: bool = False, shown: str | None = None, **fields: Any) -> Provider:
    """A backend; "cuda" with its Hopper kernels is the provider "hopper". ``fields`` of its Tuning."""

    def make(case: Case, *tensors: Tensor) -> Step:
        loss, options = LOSSES[case.loss], LOSSES[case.loss].options(case)
        function = functools.partial(loss.function, backend=name, **options)
        if name == "torch" and not fields:  # as a user calls it: a tuning keeps a small call off its shortest way
            return autograd_step(function, case, *tensors)
        # One tuning for all calls, so that they are replayed as a user's are: a replay is of one `tuned` alone.
        with backends.tuned(hopper=hopper, **fields):
            context = contextvars.copy_context()
        return autograd_step(functools.partial(context.run, function), case, *tensors)

    def unsupported_reason(case: Case, student: Tensor, teacher: Tensor) -> str | None:
        return backend_unsupported_reason(name, hopper, student, teacher)

    # Half copies of the inputs, vectors, one chunk; a chunk's budget is the backend's own, 544 MiB at most by default.
    shown = shown or ("hopper" if hopper else name)
    return Provider(shown, title, make, unsupported_reason, lambda case: case.matrix_bytes(0, 0) + (768 << 20))


def _closed_form(name: str, title: str, attend: closed_form.Attend, matrices: float) -> Provider:
    def make(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
        return lambda: closed_form.loss_and_gradient(case, student, teacher, target, attend)

    def unsupported_reason(case: Case, student: Tensor, teacher: Tensor) -> str | None:
        if case.loss != "mcld":
            return "computes MCLD only"
        return closed_form.attention_unsupported_reason(name, case, student.device)

    return Provider(name, title, make, unsupported_reason, lambda case: case.matrix_bytes(matrices, matrices))


def _library() -> Provider:
    """MCLD in closed form, the other losses as lines with autograd."""
    closed = _closed_form("library", "library calls alone", closed_form.matrix, 4.0)

    def make(case: Case, *tensors: Tensor) -> Step:
        if case.loss == "mcld":
            return closed.make(case, *tensors)
        return autograd_step(plain.LINES[case.loss](case), case, *tensors)

    def unsupported_reason(case: Case, student: Tensor, teacher: Tensor) -> str | None:
        return None if case.loss == "mcld" or case.loss in plain.LINES else "has no lines for this loss"

    def extra_bytes(case: Case) -> int:
        return closed.extra_bytes(case) if case.loss == "mcld" else _eager_bytes(case)

    return Provider("library", closed.title, make, unsupported_reason, extra_bytes)


def _peer(peer: peers.Peer) -> Provider:
    def make(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
        loss_fn = peer.build(case.temperature)
        return autograd_step(lambda s, t, y: loss_fn(s, t), case, student, teacher, target)

    def unsupported_reason(case: Case, student: Tensor, teacher: Tensor) -> str | None:
        if case.loss != "mcld" or case.terms != ("instance",):
            return "computes the instance-wise term alone (--terms instance)"
        if peer.cuda_only and student.device.type != "cuda":
            return "needs a CUDA device"
        return _import_reason(peer.module)

    def extra_bytes(case: Case) -> int:
        return peer.extra_bytes(case.batch) + case.matrix_bytes(0, 0)

    return Provider(peer.name, peer.title, make, unsupported_reason, extra_bytes)


def _embedding_peer(peer: peers.EmbeddingPeer) -> Provider:
    def make(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
        build, _ = peer.losses[case.loss]
        return autograd_step(build(case.temperature, case.batch), case, student, teacher, target)

    def unsupported_reason(case: Case, student: Tensor, teacher: Tensor) -> str | None:
        if case.loss not in peer.losses:
            return f"computes {' and '.join(peer.losses)} alone"
        return _import_reason(peer.module, peer.prepare)

    def extra_bytes(case: Case) -> int:
        matrices = peer.losses[case.loss][1] if case.loss in peer.losses else 0
        return int(4 * (matrices * case.batch * case.columns + 4 * (case.batch + case.columns) * case.classes))

    return Provider(peer.name, peer.title, make, unsupported_reason, extra_bytes)


def _import_reason(module: str, prepare: Callable[[], object] | None = None) -> str | None:
    """The reason why a foreign package cannot be imported, after ``prepare``; None if it can."""
    try:
        if prepare is not None and importlib.util.find_spec(module.partition(".")[0]) is not None:
            prepare()
        importlib.import_module(module)
    except Exception as fault:  # whatever a foreign package raises on import is the reason to show
        return f"cannot import {module}: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}"
    return None


@functools.cache
def all_providers() -> dict[str, Provider]:
    """Every provider by name, in the table's order: ``reference`` first, since the others are compared with it."""
    providers = [
        Provider("reference", "mcld_kernels.reference, eager", _reference, _always, _eager_bytes),
        Provider("compile", "mcld_kernels.reference under torch.compile", _compiled, _always, _eager_bytes),
        _library(),
        _backend("torch", "closed-form gradient by row chunks"),
        _backend("triton", "Triton kernels"),
        _backend("cuda", "CUDA C++ kernels, the portable ones alone"),
        _backend("cuda", "CUDA C++ kernels, the Hopper ones where they can", hopper=True),
        _closed_form("sdpa", "PyTorch's flash attention, Q = anchors, K = V = candidates", closed_form.flash, 0.0),
        _closed_form("cudnn", "cuDNN's attention, Q = anchors, K = V = candidates", closed_form.cudnn, 0.0),
        *(_peer(peer) for peer in peers.PEERS),
        *(_embedding_peer(peer) for peer in peers.EMBEDDING_PEERS),
    ]
    return {provider.name: provider for provider in providers}


def tuned_backend(name: str) -> Provider:
    """The provider of "backend:field=value+field=value". Raises ValueError for what no Tuning has."""
    shown, _, text = name.partition(":")
    known = {"triton": "triton", "cuda": "cuda", "hopper": "cuda", "torch": "torch"}
    if shown not in known:
        raise ValueError(f"{name}: only {', '.join(known)} have tuning fields")
    tuning = importlib.import_module(f"mcld_kernels.backends.{known[shown]}").TUNING
    types = typing.get_type_hints(tuning)
    fields: dict[str, Any] = {}
    for item in text.split("+"):
        field, _, value = item.partition("=")
        if types.get(field) in (int, int | None) and value.lstrip("-").isdecimal():
            fields[field] = int(value)
        elif types.get(field) in (bool, bool | None) and value in ("True", "False"):
            fields[field] = value == "True"
        else:
            numbers = [key for key, kind in types.items() if kind in (int, int | None, bool, bool | None)]
            raise ValueError(f"{name}: write field=value with a whole number, or True or False; {', '.join(numbers)}")
    if fields.pop("hopper", None) is not None:
        raise ValueError(f"{name}: the providers cuda and hopper differ by the field hopper")
    required = {field.name: 0 for field in dataclasses.fields(tuning) if field.default is dataclasses.MISSING}
    try:
        tuning(**required | fields)
    except ValueError as fault:
        raise ValueError(f"{name}: {fault}") from None
    return _backend(known[shown], f"{shown} with {text}", hopper=shown == "hopper", shown=name, **fields)


def choose(names: str | None) -> list[Provider]:
    """The providers of a comma-separated list, in the table's order; all for None. Unknown names raise ValueError.

    "hopper:hopper_skew=2" is the provider with fields of its backend's Tuning, joined by "+", and follows the others.
    """
    known = all_providers()
    if names is None:
        return list(known.values())
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    known = known | {name: tuned_backend(name) for name in chosen if ":" in name}  # all_providers keeps its own
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise ValueError(f"unknown provider {', '.join(unknown) or '(none given)'}; known: {', '.join(known)}")
    return [provider for name, provider in known.items() if name in chosen]
