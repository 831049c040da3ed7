"""The host's cost of one step of the "cuda" backend, measured on a CPU: nothing is launched, all else happens.

The kernels are those of the host emulation (tests/csrc_host) with launches stubbed: arguments are read, checked and
placed as for a GPU, and every tensor is made. A GEMM of the library and the multiplication by the upstream gradient are
dispatched at a size of a few elements. Labels are not read, as on a GPU. What only a GPU has is missing: the runtime's
launch itself, its allocator in place of the CPU's, and two calls of PyTorch that ask for device and stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mcld_kernels
from mcld_kernels import backends, ops, options, replay
from mcld_kernels.backends import gemm
from mcld_kernels.backends.cuda import extension

from . import profiling

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


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, as a GPU's allocator does, instead of mapping large tensors anew at every call.

    By M_MMAP_MAX = 0: glibc may refuse an M_MMAP_THRESHOLD above 32 MiB, as its manual says, and tensors are larger.
    Then all memory comes from the heap, and M_TRIM_THRESHOLD = -1 keeps the end of the heap too.
    """
    mmap_max, trim_threshold = (-4, 0), (-1, -1)  # of mallopt, with their values
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(*setting) for setting in (mmap_max, trim_threshold)):
        warnings.warn(
            "malloc takes no settings here: the cost of a step includes mapping large tensors anew", stacklevel=2
        )


@contextlib.contextmanager
def stubbed(bindings: str = "-O3") -> Iterator[Any]:
    """The emulated module, whose launches end at once; yields it. ``bindings``: as they are compiled in an install."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import csrc_host

    module = csrc_host.load(bindings)
    small = torch.zeros(8, 8)
    real, readable = (gemm.gemm, gemm.product), options.is_readable

    def small_gemm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        torch.mm(small, small, out=small)

    def small_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.mm(small, small)

    keep_freed_memory()
    module.stub_launches(1)
    gemm.gemm, gemm.product = small_gemm, small_product
    for part in (options, ops, replay):
        part.is_readable = lambda tensor: False  # type: ignore[attr-defined]
    try:
        with extension.use(module):
            yield module
    finally:
        module.stub_launches(0)
        gemm.gemm, gemm.product = real
        for part in (options, ops, replay):
            part.is_readable = readable  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class HostCost:
    """Medians of the thread's CPU time in microseconds, and what a step asks of PyTorch and of the module.

    ``least_us``: the least of the rounds, which a busy machine, whose caches others fill, disturbs the least.
    ``pytorch_us``: a step of an autograd.Function that does nothing, interleaved with the others: PyTorch's own part.
    ``unplanned_us``: the same step through the Python that a plan leaves out.
    """

    name: str
    goal_us: float
    step_us: float
    least_us: float
    forward_us: float
    pytorch_us: float
    unplanned_us: float
    launches: int
    allocations: int
    operations: int  # dispatched, allocations and views among them


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None


def measure(case: HostCase, rounds: int = 400, bindings: str = "-O3") -> HostCost:
    """The cost of a step that has run before; the kinds of steps are interleaved."""
    with stubbed(bindings) as module, backends.tuned(**case.tuning):
        student, teacher = (torch.randn(case.batch, CLASSES, dtype=torch.bfloat16) for _ in range(2))
        target = torch.randint(CLASSES, (case.batch,))
        gradient = torch.zeros_like(student)
        student.requires_grad_()

        def forward() -> Tensor:
            return mcld_kernels.mcld_loss(student, teacher, target, backend="cuda", **case.options)

        def step(loss_of: Callable[[], Tensor]) -> tuple[int, int]:
            begin = time.thread_time_ns()
            loss = loss_of()
            middle = time.thread_time_ns()
            torch.autograd.grad(loss, student)
            return time.thread_time_ns() - begin, middle - begin

        for _ in range(5):
            step(forward)
        before = module.stub_launches(1)
        counts = count(lambda: step(forward))
        launches = (module.stub_launches(1) - before) // 2
        planned, nothing, unplanned = [], [], []
        for _ in range(rounds):
            planned.append(step(forward))
            nothing.append(step(lambda: _Nothing.apply(student, gradient))[0])
        with backends.tuned(plans=False):
            for _ in range(max(20, rounds // 4)):
                unplanned.append(step(forward)[0])
    return HostCost(
        name=case.name,
        goal_us=case.goal_us,
        step_us=statistics.median(whole for whole, _ in planned) / 1e3,
        least_us=min(whole for whole, _ in planned) / 1e3,
        forward_us=statistics.median(part for _, part in planned) / 1e3,
        pytorch_us=statistics.median(nothing) / 1e3,
        unplanned_us=statistics.median(unplanned) / 1e3,
        launches=launches,
        **counts,
    )


def table(costs: Sequence[HostCost]) -> str:
    """Two lines for each case, of 80 columns."""
    lines = [f"{'':<34}{'step':>6}{'least':>7}{'forward':>9}{'PyTorch':>9}{'no plan':>9}{'goal':>6}"]
    for cost in costs:
        times = f"{cost.step_us:6.0f}{cost.least_us:7.0f}{cost.forward_us:9.0f}"
        times += f"{cost.pytorch_us:9.0f}{cost.unplanned_us:9.0f}"
        lines.append(f"{cost.name:<34}{times}{cost.goal_us:6.0f}")
        lines.append(f"  {cost.launches} launches, {cost.allocations} allocations, {cost.operations} operations")
    return "\n".join([*lines, "microseconds of the thread's CPU time, median; nothing is launched"])


def count(step: Callable[[], object]) -> dict[str, int]:
    """Operations that a step dispatches, by PyTorch's profiler; it runs the step twice, unobserved and observed."""
    step()
    with profiling.without_notes(), torch.autograd.profiler.profile() as recorded:
        step()
    events = [event for event in recorded.function_events if event.name.startswith("aten::")]
    outer = [event for event in events if event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")]
    made = [event for event in outer if event.name in ("aten::empty", "aten::empty_strided", "aten::empty_like")]
    return {"allocations": len(made), "operations": len(outer)}
