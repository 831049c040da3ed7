"""The host's cost of one step of the "cuda" backend, measured on a CPU: nothing is launched, all else happens.

The kernels are those of the host emulation (tests/csrc_host) with launches stubbed: arguments are read, checked and
placed as for a GPU, and every tensor is made. A GEMM of the library and the multiplication by the upstream gradient are
dispatched at a size of a few elements. Labels are not read, as on a GPU. What only a GPU has is missing: the runtime's
launch itself, its allocator in place of the CPU's, and two calls of PyTorch that ask for device and stream.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mcld_kernels
from mcld_kernels import backends, ops, options
from mcld_kernels.backends import gemm
from mcld_kernels.backends.cuda import extension

TESTS = Path(__file__).resolve().parents[2] / "tests"
# Few classes: the host's cost does not depend on them, and a CPU has not the speed for the one operation that does.
CLASSES = 4


@dataclass(frozen=True, kw_only=True)
class HostCase:
    """A call whose host cost is measured, with the tuning that takes the kernels of wide logits."""

    name: str
    batch: int
    goal_us: float
    options: dict[str, Any]
    tuning: dict[str, Any]


CASES = (
    HostCase(
        name="B = 4096, instance + sample",
        batch=4096,
        goal_us=100.0,
        options={"weight": (1.0, 1.0, 0.0)},
        tuning={"low_latency_limit": 0, "flash_row_bytes": 0, "library_product": True},
    ),
    HostCase(name="B = 256, all terms", batch=256, goal_us=80.0, options={}, tuning={}),
    HostCase(
        name="B = 4096, instance + sample, flash",
        batch=4096,
        goal_us=100.0,
        options={"weight": (1.0, 1.0, 0.0)},
        tuning={"low_latency_limit": 0},
    ),
)


@contextlib.contextmanager
def stubbed() -> Iterator[Any]:
    """The emulated module, whose launches end at once; yields it."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import csrc_host

    module = csrc_host.load()
    small = torch.zeros(8, 8)
    real_gemm, readable = gemm.gemm, options.is_readable

    def small_gemm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        torch.mm(small, small, out=small)

    module.stub_launches(1)
    gemm.gemm = small_gemm
    for part in (options, ops):
        part.is_readable = lambda tensor: False  # type: ignore[attr-defined]
    try:
        with extension.use(module):
            yield module
    finally:
        module.stub_launches(0)
        gemm.gemm = real_gemm
        for part in (options, ops):
            part.is_readable = readable  # type: ignore[attr-defined]


def make_step(case: HostCase, dtype: torch.dtype = torch.bfloat16) -> Callable[[], tuple[Tensor, Tensor]]:
    """One step, forward and backward."""
    student, teacher = (torch.randn(case.batch, CLASSES, dtype=dtype) for _ in range(2))
    target = torch.randint(CLASSES, (case.batch,))
    leaf = student.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = mcld_kernels.mcld_loss(leaf, teacher, target, backend="cuda", **case.options)
        return loss, torch.autograd.grad(loss, leaf)[0]

    return step


@dataclass(frozen=True, kw_only=True)
class HostCost:
    """Microseconds of the thread's CPU time, and what a step asks of PyTorch and of the module."""

    microseconds: float  # median
    forward_microseconds: float
    launches: int
    allocations: int
    operations: int  # dispatched, allocations and views among them


def measure(case: HostCase, rounds: int = 400) -> HostCost:
    """The cost of a step that has run before."""
    with stubbed() as module, backends.tuned(**case.tuning):
        step = make_step(case)
        for _ in range(5):
            step()
        before = module.stub_launches(1)
        counts = count(step)
        launches = (module.stub_launches(1) - before) // 2
        forward, whole = [], []
        student, teacher = (torch.randn(case.batch, CLASSES, dtype=torch.bfloat16) for _ in range(2))
        target = torch.randint(CLASSES, (case.batch,))
        student.requires_grad_()
        for _ in range(rounds):
            begin = time.thread_time_ns()
            loss = mcld_kernels.mcld_loss(student, teacher, target, backend="cuda", **case.options)
            middle = time.thread_time_ns()
            torch.autograd.grad(loss, student)
            whole.append(time.thread_time_ns() - begin)
            forward.append(middle - begin)
    return HostCost(
        microseconds=statistics.median(whole) / 1e3,
        forward_microseconds=statistics.median(forward) / 1e3,
        launches=launches,
        **counts,
    )


def count(step: Callable[[], object]) -> dict[str, int]:
    """Operations that a step dispatches, by PyTorch's profiler; it runs the step twice, unobserved and observed."""
    step()
    with torch.autograd.profiler.profile() as recorded:
        step()
    events = [event for event in recorded.function_events if event.name.startswith("aten::")]
    outer = [event for event in events if event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")]
    made = [event for event in outer if event.name in ("aten::empty", "aten::empty_strided", "aten::empty_like")]
    return {"allocations": len(made), "operations": len(outer)}
