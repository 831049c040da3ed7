"""The backends: their names, the reasons why one cannot run, and the choice of ``backend="auto"``."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ..family_options import KDOptions
from ..kernels import KernelSet
from ..options import BACKENDS, MCLDOptions
from . import cuda, timings, torch, triton
from .environment import raw_values

_MODULES: dict[str, Any] = {
    "torch": torch,
    "triton": triton,
    "cuda": cuda,
}  # each has TUNING, kernel_set and the two reasons
NAMES = BACKENDS[1:]
_GIVE_TEACHER_GRADIENT = ("reference", "torch")
_WARNED: set[str] = set()


class _Fields(dict[str, Any]):
    """Fields of a Tuning, given by one `tuned`: hashed and compared by identity."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


_TUNING: ContextVar[_Fields] = ContextVar("mcld_kernels_tuning", default=_Fields())  # noqa: B039


class BackendUnavailable(RuntimeError):
    """A backend that was requested by name cannot run; the message says why."""


def available() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, on whatever device they are for."""
    return tuple(name for name in NAMES if unavailable_reason(name) is None)


def unavailable_reason(name: str) -> str | None:
    """The reason for which backend ``name`` cannot run on this machine, whatever the logits; None if it can."""
    return None if name == "reference" else _MODULES[name].unavailable_reason()  # type: ignore[no-any-return]


def explain(student: Tensor, teacher: Tensor) -> dict[str, str]:
    """For each backend: ``"can run"`` with these logits (batch, classes), or the reason why it cannot.

    Where a table of this GPU's timings sets fields of the backend's Tuning, they follow: ``"can run, with ..."``.

    >>> mcld_kernels.backends.explain(torch.randn(8, 10), torch.randn(8, 10))["torch"]
    'can run'
    """
    return {
        name: unsupported_reason(name, student, teacher, teacher.requires_grad)
        or "can run" + tuning_text(name, student, teacher)
        for name in NAMES
    }


def tuning_text(name: str, student: Tensor, teacher: Tensor) -> str:
    """The fields that the timings set for a backend, in words: ", with field=value by the measured table", or ""."""
    fields = timings.tuning(name, student, teacher)
    if not fields:
        return ""
    shown = ", ".join(f"{field}={value}" for field, value in sorted(fields.items()))
    return f", with {shown} by the measured table"


def unsupported_reason(name: str, student: Tensor, teacher: Tensor, teacher_grad: bool) -> str | None:
    """The reason for which backend ``name`` cannot run with these logits; None if it can."""
    if teacher_grad and name not in _GIVE_TEACHER_GRADIENT:
        return (
            "it gives no gradient by the teacher, and this teacher requires grad: detach the teacher, "
            "or use backend 'torch' or 'reference' (mutual learning)"
        )
    return None if name == "reference" else _MODULES[name].unsupported_reason(student, teacher)  # type: ignore[no-any-return]


def choose(name: str, student: Tensor, teacher: Tensor, teacher_grad: bool, supported: tuple[str, ...] = NAMES) -> str:
    """The backend to run: ``name`` itself or, for "auto", the fastest that can. Raises BackendUnavailable.

    ``supported``: the backends that have the kernels of the loss.
    """
    if name == "auto":
        # On the CPU only "torch" is fast: the interpreter and the host build of the kernels are there to test them.
        return _fastest(student, teacher, teacher_grad, supported) if student.is_cuda else "torch"
    if name not in supported:
        raise BackendUnavailable(
            f"backend {name!r} cannot run: it has no kernels for this loss; use {' or '.join(map(repr, supported))}"
        )
    reason = unsupported_reason(name, student, teacher, teacher_grad)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run: {reason}; backend='auto' takes one that can")
    return name


def _fastest(student: Tensor, teacher: Tensor, teacher_grad: bool, supported: tuple[str, ...]) -> str:
    """The first backend of `preference` that can run; "torch" where none can, with a warning, once for each reason."""
    reasons = {}
    for name in preference(student, teacher):
        if name in supported:
            reasons[name] = unsupported_reason(name, student, teacher, teacher_grad)
            if reasons[name] is None:
                return name
    # A teacher that requires grad takes "torch" by design.
    if reasons and not teacher_grad:
        text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        if text not in _WARNED:
            _WARNED.add(text)
            warnings.warn(
                f"backend='auto' takes 'torch' on {student.device}, without fused kernels ({text}). "
                "backend='torch' takes it without this warning",
                stacklevel=2,
            )
    return "torch"


def preference(student: Tensor, teacher: Tensor) -> tuple[str, ...]:
    """CUDA backends for these logits (batch, classes), the fastest first by the timings of this GPU.

    Without timings Triton comes first, because its compiler is the better tested of the two; what the timings do not
    name comes last.
    """
    # On Blackwell (10.x, 11.0) that order has another reason: Triton's products are tcgen05.mma there, those of "cuda"
    # mma.sync, which has a fraction of that rate.
    return tuple(dict.fromkeys((*(timings.order(student, teacher) or ()), "triton", "cuda")))


def kernel_set(
    name: str, student: Tensor, teacher: Tensor, teacher_grad: bool = False, supported: tuple[str, ...] = NAMES
) -> KernelSet:
    """The kernels of backend ``name`` ("auto": the fastest) for these logits. Raises BackendUnavailable."""
    chosen = choose(name, student, teacher, teacher_grad, supported)
    module = _MODULES[chosen]
    # Inside `tuned` nothing but its fields holds, so that a measurement means the same with a table and without.
    fields = _overrides(module) if _TUNING.get() else timings.tuning(chosen, student, teacher)
    return module.kernel_set(student, teacher, **fields)  # type: ignore[no-any-return]


def settings(student: Tensor) -> Hashable:
    """The state, beside tensors and precision, that the choice of "auto" and the kernel set of "cuda" depend on."""
    return (
        _TUNING.get(),
        cuda.extension.load()[0],
        timings.in_use(student),
        raw_values("MCLD_CHUNK_MB", "MCLD_HOPPER", "TRITON_INTERPRET"),
    )


def plain_call(
    name: str, student: Tensor, teacher: Tensor, options: MCLDOptions | KDOptions, with_grad: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Loss () and gradient (n, C) of a small call whose inputs need no check; None where no backend has a short way.

    The logits (n, C), n C > 0, are plain fp32 tensors of the CPU, the teacher is frozen, and no term reads labels.
    """
    if (name != "auto" and name != "torch") or _TUNING.get():
        return None
    return torch.plain_call(student, teacher, options, with_grad)


@contextlib.contextmanager
def tuned(**fields: Any) -> Iterator[None]:
    """Give ``fields`` of a backend's Tuning to the kernel sets made inside: for tests and measurements."""
    token = _TUNING.set(_Fields(_TUNING.get(), **fields))
    try:
        yield
    finally:
        _TUNING.reset(token)


def _overrides(module: Any) -> dict[str, Any]:
    """The fields given by `tuned` that this backend's Tuning has."""
    given = _TUNING.get()
    if not given:
        return {}
    known = {field.name for field in dataclasses.fields(module.TUNING)}
    return {name: value for name, value in given.items() if name in known}
