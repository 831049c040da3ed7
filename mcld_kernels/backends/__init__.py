"""Which backends can run here, why the others cannot, and which one ``backend="auto"`` takes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from . import measured
from .pipeline import Call, Result

NAMES = ("reference", "torch", "triton", "cuda")
# The backends behind the operator (all but the reference), best first for CUDA tensors.
_MODULES = {"cuda": "mcld_kernels.cuda", "triton": "mcld_kernels.triton", "torch": "mcld_kernels.blocked"}
_GIVE_TEACHER_GRADIENT = ("reference", "torch")


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot do it here; the message says why."""


def available() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, on whatever device they are for."""
    return tuple(name for name in NAMES if unavailable(name) is None)


def unavailable(name: str) -> str | None:
    """Why backend ``name`` cannot run on this machine, whatever the logits; None if it can."""
    return None if name not in _MODULES else import_module(_MODULES[name]).unavailable()


def explain(student: Tensor, teacher: Tensor) -> dict[str, str]:
    """For each backend: ``"can run"`` with these logits (batch, classes), or the reason why it cannot.

    >>> mcld_kernels.backends.explain(torch.randn(8, 10), torch.randn(8, 10))["torch"]
    'can run'
    """
    return {name: reason(name, student, teacher, teacher.requires_grad) or "can run" for name in NAMES}


def reason(name: str, student: Tensor, teacher: Tensor, teacher_grad: bool) -> str | None:
    """Why backend ``name`` cannot run with these logits; None if it can."""
    if teacher_grad and name not in _GIVE_TEACHER_GRADIENT:
        return (
            "it gives no gradient by the teacher, and this teacher requires grad: detach the teacher, "
            "or use backend 'torch' or 'reference' (mutual learning)"
        )
    return None if name not in _MODULES else import_module(_MODULES[name]).reason(student, teacher)


def check_name(name: str) -> None:
    if name not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of 'auto', {', '.join(map(repr, NAMES))}; got {name!r}")


def choose(name: str, student: Tensor, teacher: Tensor, teacher_grad: bool) -> str:
    """The backend to run: ``name`` itself or, for "auto", the fastest that can. Raises BackendUnavailable."""
    if name == "auto":
        # On the CPU only "torch" is fast: the interpreter and the host build of the kernels are there to test them.
        if student.is_cuda:
            for candidate in preference(student, teacher):
                if reason(candidate, student, teacher, teacher_grad) is None:
                    return candidate
        return "torch"
    why = reason(name, student, teacher, teacher_grad)
    if why is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run: {why}")
    return name


def preference(student: Tensor, teacher: Tensor) -> tuple[str, ...]:
    """CUDA backends for these logits (batch, classes), the fastest first: as measured on this GPU, if it was.

    Where it was not, Triton's kernels come first, because its compiler is the better tested of the two; what a table
    does not name comes last.
    """
    return tuple(dict.fromkeys((*(measured.order(student, teacher) or ()), "triton", "cuda")))


def implementation(name: str) -> Callable[[Call], Result]:
    return import_module(_MODULES[name]).forward
