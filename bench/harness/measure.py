"""One case from inputs to rows: the gate, then times, then memory, for every provider that can run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import gate, machine, memory, timing
from bench.cases import DTYPES, Case, inputs
from bench.providers import Provider, Result, Step

GRAPH_BATCH = 1024  # up to here a step is short enough that launching its kernels is what takes the time
OK, FAILED, NOT_RUN, ERROR = "ok", "FAILED", "not run", "error"

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How to measure."""

    device: torch.device
    rounds: int
    seconds: float = 60.0  # for the timing of one case
    cold: bool = False
    graph: bool = True


@dataclass
class Row:
    """One provider in one case. Without a status of ``ok`` it has a reason and no speed."""

    case: Case
    provider: str
    status: str = NOT_RUN
    reason: str | None = None
    verdict: gate.Verdict | None = None
    first_call_s: float | None = None
    times: timing.Times | None = None
    kernels: timing.Times | None = None  # CUDA: back to back, launches hidden
    replay: timing.Times | None = None  # CUDA: a graph of the step
    memory: dict[str, int | None] = field(default_factory=dict)
    ceiling_flops: float | None = None
    time_ratio: float | None = None  # eager's time over this one's
    memory_ratio: float | None = None  # this one's peak extra memory over eager's
    note: str | None = None

    @property
    def flops(self) -> float | None:
        return None if self.times is None else self.case.flop / self.times.median

    @property
    def of_ceiling(self) -> float | None:
        return None if self.flops is None or not self.ceiling_flops else self.flops / self.ceiling_flops

    def record(self) -> dict[str, object]:
        """Plain values for JSON."""
        case = self.case
        found: dict[str, object] = {
            "batch": case.batch,
            "classes": case.classes,
            "dtype": case.dtype,
            "terms": list(case.terms),
            "mode": case.mode,
            "temperature": case.temperature,
            "flop": case.flop,
            "bytes": case.bytes,
            "provider": self.provider,
            "status": self.status,
            "reason": self.reason,
            "note": self.note,
            "gate": None if self.verdict is None else self.verdict.record(),
            "first_call_s": self.first_call_s,
            "time": None if self.times is None else self.times.record(),
            "kernels_time": None if self.kernels is None else self.kernels.record(),
            "graph_time": None if self.replay is None else self.replay.record(),
            "peak_extra_bytes": self.memory.get("allocator"),
            "peak_extra_resident_bytes": self.memory.get("resident"),
            "flop_per_s": self.flops,
            "gemm_flop_per_s": self.ceiling_flops,
            "fraction_of_gemm": self.of_ceiling,
            "speedup_over_reference": self.time_ratio,
            "memory_over_reference": self.memory_ratio,
        }
        return found


def _fault(fault: BaseException) -> str:
    text = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {text[0][:200]}" if text else type(fault).__name__


class CaseRun:
    """The measurement of one case."""

    def __init__(
        self,
        case: Case,
        providers: Sequence[Provider],
        plan: Plan,
        announce: Announce = lambda text: None,
        inspect: Callable[[str, Step], None] | None = None,
    ):
        """``announce`` hears what is being done; ``inspect`` gets every measured step at the end, to profile it."""
        self.case, self.providers, self.plan, self.announce, self.inspect = case, providers, plan, announce, inspect
        self.rows = [Row(case, provider.name) for provider in providers]
        self.steps: dict[str, Step] = {}

    def run(self) -> list[Row]:
        """Fill and return the rows. A fault of one provider is its row's reason; the others go on."""
        with memory.released(self.plan.device):
            need = 8 * 8 * self.case.batch * self.case.classes + (2 << 30)  # fp64 copies, and the graph of a chunk
            refused = memory.refusal(need, self.plan.device)
            if refused:
                for row in self.rows:
                    row.reason = f"inputs and truth: {refused}"
                return self.rows
            tensors = inputs(self.case, self.plan.device)
            self._gate(*tensors)
            self._time()
            self._memory()
            self._ratios()
            for name, step in self.steps.items() if self.inspect else ():
                self.inspect(name, step)
            self.steps.clear()
        return self.rows

    def _gate(self, student: Tensor, teacher: Tensor, target: Tensor) -> None:
        case = self.case
        self.announce("fp64 truth")
        exact = gate.truth(case, student, teacher, target)
        eager: gate.Error | None = None
        for provider, row in zip(self.providers, self.rows):
            self.announce(f"gate {provider.name}")
            row.reason = provider.reason(case, student, teacher) or memory.refusal(
                provider.extra_bytes(case), self.plan.device
            )
            if row.reason:
                continue
            try:
                with memory.released(self.plan.device):
                    step = provider.make(case, student, teacher, target)
                    row.first_call_s, result = _once(step, self.plan.device)
                    measured = gate.error(result, exact)
                    del result
            except Exception as fault:  # a foreign kernel may raise anything; the row shows it and the run goes on
                row.status, row.reason = ERROR, _fault(fault)
                continue
            if provider.name == "reference":
                eager = measured
            elif eager is None:
                eager = self._eager_error(student, teacher, target, exact)
            assert eager is not None
            row.verdict = gate.judge(case, measured, eager)
            if row.verdict.passed:
                row.status = OK
                self.steps[provider.name] = step
            else:
                row.status = FAILED
                row.reason = f"error {row.verdict.ratio:.3g} times what is allowed"

    def _eager_error(
        self, student: Tensor, teacher: Tensor, target: Tensor, exact: tuple[Tensor, Tensor | None]
    ) -> gate.Error:
        """Eager's error where the reference is not among the providers, or too large: the same arithmetic in chunks."""
        self.announce("eager's error, in chunks")
        return gate.error(gate.chunked(self.case, student, teacher, target, self.case.torch_dtype), exact)

    def _time(self) -> None:
        if not self.steps:
            return
        device, plan = self.plan.device, self.plan
        self.announce("timing")
        ceiling, flop = machine.gemm(self.case.torch_dtype, device)
        for _ in range(2):
            ceiling()
        if device.type == "cuda":
            clock = timing.CudaClock(device, plan.cold)
            sample = clock.sample
        else:
            sample = timing.cpu_sample  # type: ignore[assignment]
        samples = {name: sample(step) for name, step in self.steps.items()}
        samples["gemm"] = sample(ceiling)
        rounds = iter(range(1, plan.rounds + 1))
        times = timing.interleave(
            samples, plan.rounds, plan.seconds, self.case.seed, lambda: self.announce(f"timing, round {next(rounds)}")
        )
        best = flop / times["gemm"].median
        for row in self._ok():
            row.times, row.ceiling_flops = times[row.provider], best
        if device.type == "cuda":
            self._time_launches(clock)

    def _time_launches(self, clock: timing.CudaClock) -> None:
        """Small cases: the kernels without their launches, and the replay of a graph."""
        if self.case.batch > GRAPH_BATCH:
            return
        back_to_back = {row.provider: clock.sample(self.steps[row.provider], backlog=True) for row in self._ok()}
        found = timing.interleave(back_to_back, self.plan.rounds, self.plan.seconds / 4, self.case.seed)
        for row in self._ok():
            row.kernels = found[row.provider]
        if not self.plan.graph:
            return
        graphs = {}
        for row in self._ok():
            try:
                graphs[row.provider] = clock.sample(timing.capture(self.steps[row.provider], self.plan.device))
            except Exception as fault:  # what cannot be captured has no replay time, and says why
                row.note = f"no graph: {_fault(fault)}"
                torch.cuda.synchronize(self.plan.device)
        if graphs:
            found = timing.interleave(graphs, self.plan.rounds, self.plan.seconds / 4, self.case.seed)
            for row in self._ok():
                row.replay = found.get(row.provider)

    def _memory(self) -> None:
        for row in self._ok():
            self.announce(f"memory {row.provider}")
            with memory.released(self.plan.device):
                row.memory = memory.peak_extra(self.steps[row.provider], self.plan.device)

    def _ratios(self) -> None:
        eager = next((row for row in self._ok() if row.provider == "reference"), None)
        if eager is None or eager.times is None:
            return
        for row in self._ok():
            if row.times is not None:
                row.time_ratio = eager.times.median / row.times.median
            mine, base = row.memory.get("allocator"), eager.memory.get("allocator")
            if mine is not None and base:
                row.memory_ratio = mine / base

    def _ok(self) -> list[Row]:
        return [row for row in self.rows if row.status == OK]


def _once(step: Step, device: torch.device) -> tuple[float, Result]:
    """Seconds of the first call, which compiles what must be compiled, and its result."""
    start = time.perf_counter()
    result = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def ceilings(device: torch.device, dtypes: Sequence[str], rounds: int = 10) -> dict[str, float]:
    """The machine's best, alone: GEMM flop/s per dtype and copied bytes/s (reads and writes counted)."""
    steps = {f"gemm_{name}_flop_per_s": machine.gemm(DTYPES[name], device) for name in dtypes}
    steps["copy_bytes_per_s"] = machine.copy(device)
    for step, _ in steps.values():
        step()
    clock = timing.CudaClock(device).sample if device.type == "cuda" else timing.cpu_sample
    found = timing.interleave({name: clock(step) for name, (step, _) in steps.items()}, rounds, 20.0)
    return {name: amount / found[name].median for name, (_, amount) in steps.items()}
