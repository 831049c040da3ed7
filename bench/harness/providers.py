"""Who is measured. A provider says whether it can run a case, what it will need, and how to take one step of it."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mcld_kernels
from bench import closed_form, peers
from bench.cases import Case
from mcld_kernels import backends, compiled, reference
from mcld_kernels.cuda import hopper as hopper_kernels

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student (B, C), teacher (B, C), target (B,) -> ()
Result = tuple[Tensor, "Tensor | None"]  # the loss () and the student's gradient (B, C)
Step = Callable[[], Result]


@dataclass(frozen=True)
class Provider:
    """``make(case, student, teacher, target)`` gives a step; ``reason(case, student, teacher)`` None if it can run."""

    name: str
    what: str
    make: Callable[[Case, Tensor, Tensor, Tensor], Step]
    reason: Callable[[Case, Tensor, Tensor], str | None]
    extra_bytes: Callable[[Case], int]  # an estimate from above of the memory a step takes beside its inputs


def autograd_step(loss_fn: Loss, case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
    """A step of a differentiable loss. Without backward the student needs no gradient, so nothing is kept for one."""
    if not case.backward:
        return lambda: (loss_fn(student, teacher, target), None)
    leaf = student.detach().clone().requires_grad_()

    def step() -> Result:
        loss = loss_fn(leaf, teacher, target)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return step


def _always(case: Case, student: Tensor, teacher: Tensor) -> str | None:
    return None


def _square(case: Case, row_matrices: float, category_matrices: float) -> int:
    """Bytes of so many fp32 (fp64) matrices of the row terms and the category term, and four copies of the logits."""
    width = 8 if case.dtype == "float64" else 4
    matrices = (row_matrices * case.batch**2 if case.row_terms else 0) + (
        category_matrices * case.classes**2 if case.category else 0
    )
    return int(width * (matrices + 4 * case.batch * case.classes))


# (B, B) matrices that the eager reference holds at its peak, by (instance, sample), and (C, C) ones; counted from
# measured peaks at B = 2048 (torch 2.13, CPU), which tests/test_bench.py repeats at a smaller size.
_ROWS = {(True, False): (2.5, 5.0), (False, True): (4.5, 5.0), (True, True): (4.5, 6.0), (False, False): (0.0, 0.0)}
_CATEGORY = (2.0, 5.0)


def eager_bytes(case: Case) -> int:
    """What a step of the eager reference takes beside its inputs, estimated from above."""
    rows = _ROWS["instance" in case.terms, "sample" in case.terms]
    return _square(case, rows[case.backward], _CATEGORY[case.backward])


def _reference(case: Case) -> Loss:
    return lambda s, t, y: reference.mcld_loss(s, t, y, weight=case.weight, temperature=case.temperature)


def _compiled(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
    torch.compiler.reset()  # one shape, one program: no recompilation limit, no dynamic shapes from the case before
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # torch's own, of itself
    compiled = torch.compile(reference.mcld_loss, dynamic=False)
    options = {"weight": case.weight, "temperature": case.temperature}
    return autograd_step(lambda s, t, y: compiled(s, t, y, **options), case, student, teacher, target)


def _backend(name: str, what: str, hopper: str = "") -> Provider:
    """A backend; of "cuda" with MCLD_HOPPER=1 (then the provider is called "hopper") or 0."""

    def make(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
        options = {"weight": case.weight, "temperature": case.temperature, "backend": name}

        def loss_fn(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if hopper:
                os.environ["MCLD_HOPPER"] = hopper  # read at every call; steps of both kinds alternate
            return mcld_kernels.mcld_loss(s, t, y, **options)

        return autograd_step(loss_fn, case, student, teacher, target)

    def reason(case: Case, student: Tensor, teacher: Tensor) -> str | None:
        said = backends.explain(student, teacher).get(name, "this version of mcld_kernels has no such backend")
        if said == "can run" and name == "triton" and student.device.type == "cpu":
            return "interpreted on a CPU: its time says nothing"
        if said == "can run" and hopper == "1":
            return _without_hopper(student, teacher)
        return None if said == "can run" else said

    # Half copies of the inputs, vectors, one chunk; the chunk's budget is the backend's own, 256 MB at most by design.
    shown = "hopper" if hopper == "1" else name
    return Provider(shown, what, make, reason, lambda case: _square(case, 0, 0) + (768 << 20))


def _without_hopper(student: Tensor, teacher: Tensor) -> str | None:
    """Why the Hopper kernels are not taken for these logits; None if they are, where the work is large enough."""
    module, why = compiled.load()
    return why or hopper_kernels.refused(module, student.device, torch.promote_types(student.dtype, teacher.dtype))


def _closed_form(name: str, what: str, attend: closed_form.Attend, matrices: float) -> Provider:
    def make(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
        return lambda: closed_form.loss_and_gradient(case, student, teacher, target, attend)

    def reason(case: Case, student: Tensor, teacher: Tensor) -> str | None:
        return None if attend is closed_form.matrix else closed_form.attention_reason(name, case, student.device)

    return Provider(name, what, make, reason, lambda case: _square(case, matrices, matrices))


def _peer(peer: peers.Peer) -> Provider:
    def make(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
        loss_fn = peer.build(case.temperature)
        return autograd_step(lambda s, t, y: loss_fn(s, t), case, student, teacher, target)

    def reason(case: Case, student: Tensor, teacher: Tensor) -> str | None:
        if case.terms != ("instance",):
            return "computes the instance-wise term alone (--terms instance)"
        if peer.cuda_only and student.device.type != "cuda":
            return "needs a CUDA device"
        try:
            importlib.import_module(peer.module)
        except Exception as fault:  # whatever a foreign package raises on import is the reason to show
            return f"cannot import {peer.module}: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}"
        return None

    return Provider(peer.name, peer.what, make, reason, lambda case: peer.extra_bytes(case.batch) + _square(case, 0, 0))


@functools.cache
def all_providers() -> dict[str, Provider]:
    """Every provider by name, in the table's order: ``reference`` first, since the others are compared with it."""
    found = [
        Provider(
            "reference",
            "mcld_kernels.reference, eager",
            lambda case, *tensors: autograd_step(_reference(case), case, *tensors),
            _always,
            eager_bytes,
        ),
        Provider("compile", "mcld_kernels.reference under torch.compile", _compiled, _always, eager_bytes),
        _closed_form("library", "normalise, GEMM, softmax, GEMM; closed-form gradient", closed_form.matrix, 4.0),
        _backend("torch", "closed-form gradient by row chunks"),
        _backend("triton", "Triton kernels"),
        _backend("cuda", "CUDA C++ kernels, the portable ones alone", hopper="0"),
        _backend("cuda", "CUDA C++ kernels, the Hopper ones where they can", hopper="1"),
        _closed_form("sdpa", "PyTorch's flash attention, Q = anchors, K = V = candidates", closed_form.flash, 0.0),
        _closed_form("cudnn", "cuDNN's attention, Q = anchors, K = V = candidates", closed_form.cudnn, 0.0),
        *(_peer(peer) for peer in peers.PEERS),
    ]
    return {provider.name: provider for provider in found}


def choose(names: str | None) -> list[Provider]:
    """The providers of a comma-separated list, in the table's order; all for None. Unknown names raise ValueError."""
    known = all_providers()
    if names is None:
        return list(known.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"unknown provider {', '.join(unknown) or '(none given)'}; known: {', '.join(known)}")
    return [provider for name, provider in known.items() if name in wanted]
