"""One case from inputs to rows: the gate, then times, then memory, for every provider that can run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.harness import gate, goals, machine, memory, timing
from bench.harness.cases import DTYPES, Case, inputs
from bench.harness.losses import Result
from bench.harness.providers import Provider, Step

GRAPH_BATCH = 1024  # up to here the launches of a step's kernels take most of its time: every provider is captured
CAPTURED = ("library", "torch", "triton", "cuda", "hopper")  # captured at every size, and their forms
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
    least: int = timing.MIN_ROUNDS  # rounds that are taken whatever they cost
    gate_batch: int | None = None  # rows of the gate in a training step; None: all of them


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
    ceiling: float | None = None  # flop/s of a GEMM or, for a loss that is not GEMM-bound, bytes/s of a copy
    time_ratio: float | None = None  # eager's time over this one's
    memory_ratio: float | None = None  # this one's peak extra memory over eager's
    note: str | None = None

    @property
    def flops(self) -> float | None:
        return None if self.times is None else self.case.flop / self.times.median

    @property
    def clock(self) -> str | None:
        """The time of the record by which `of_ceiling` goes: on CUDA that of the kernels, as the ceiling is one.

        The time of a call has the host's in it, which is most of it in a small case.
        """
        return goals.best_clock(self._times())

    @property
    def of_ceiling(self) -> float | None:
        """The fraction of the GEMM speed, or of the copy speed for a loss that is not GEMM-bound."""
        seconds = goals.best_time(self._times())
        return None if seconds is None or not self.ceiling else _work(self.case) / seconds / self.ceiling

    def _times(self) -> dict[str, object]:
        times = {"time": self.times, "kernels_time": self.kernels, "graph_time": self.replay}
        return {name: None if measured is None else measured.record() for name, measured in times.items()}

    def record(self) -> dict[str, object]:
        """Plain values for JSON."""
        case = self.case
        gemm = self.ceiling if case.is_gemm_bound else None
        return {
            "loss": case.loss,
            "batch": case.batch,
            "classes": case.classes,
            **({"candidates": case.candidates} if case.candidates else {}),
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
            **self._times(),
            "peak_extra_bytes": self.memory.get("allocator"),
            "peak_extra_resident_bytes": self.memory.get("resident"),
            "flop_per_s": self.flops,
            "gemm_flop_per_s": gemm,
            "fraction_of_gemm": self.of_ceiling if case.is_gemm_bound else None,
            "copy_bytes_per_s": None if case.is_gemm_bound else self.ceiling,
            "fraction_of_copy": None if case.is_gemm_bound else self.of_ceiling,
            "fraction_by": None if self.of_ceiling is None else self.clock,
            "speedup_over_reference": self.time_ratio,
            "memory_over_reference": self.memory_ratio,
        }


def _work(case: Case) -> int:
    """Of what the ceiling is a speed: flop, or bytes for a loss that is not GEMM-bound."""
    return case.flop if case.is_gemm_bound else case.bytes


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
        """``announce`` receives each stage; ``inspect`` gets every measured step at the end, to profile it."""
        self.case, self.providers, self.plan, self.announce, self.inspect = case, providers, plan, announce, inspect
        self.rows = [Row(case, provider.name) for provider in providers]
        self.steps: dict[str, Step] = {}

    def run(self) -> list[Row]:
        """Fill and return the rows. A fault of one provider is its row's reason; the others go on."""
        with memory.released(self.plan.device):
            need = 8 * 8 * self.case.columns * self.case.classes + (2 << 30)  # fp64 copies, and the graph of a chunk
            shortage = memory.shortage(need, self.plan.device)
            if shortage:
                for row in self.rows:
                    row.reason = f"inputs and truth: {shortage}"
                return self.rows
            tensors = inputs(self.case, self.plan.device)
            self._gate(*tensors)
            self._time()
            self._memory()
            self._ratios()
            for name, step in self.steps.items() if self.inspect else ():
                self._inspect(name, step)
            self.steps.clear()
        return self.rows

    def _inspect(self, name: str, step: Step) -> None:
        assert self.inspect is not None
        try:
            self.inspect(name, step)
        except RuntimeError as fault:  # of a profiler that this machine does not let at the device
            if timing.context_is_lost(self.plan.device):
                raise
            (row,) = (row for row in self.rows if row.provider == name)
            row.note = "; ".join(filter(None, [row.note, f"no profile: {_fault(fault)}"]))

    def _gate(self, *tensors: Tensor) -> None:
        case, device = self.case, self.plan.device
        able = []
        for provider, row in zip(self.providers, self.rows):
            row.reason = provider.unsupported_reason(case, *tensors[:2])
            if not row.reason:
                able.append((provider, row))
        if not able:  # the truth of a large batch takes hours on a CPU
            return
        self.announce("fp64 truth")
        exact = gate.truth(case, *tensors)
        allowed: gate.Error | None = None
        for provider, row in able:
            row.reason = memory.shortage(provider.extra_bytes(case), device)
            if row.reason:
                continue
            self.announce(f"gate {provider.name}")
            try:
                with memory.released(device):
                    step = provider.make(case, *tensors)
                    row.first_call_s, result = _once(step, device)
                    measured = gate.error(result, exact)
                    del result
            except Exception as fault:  # a foreign kernel may raise anything; the row shows it and the run goes on
                if timing.context_is_lost(device):
                    raise  # nothing more runs in this process; bench/isolated.py starts another
                row.status, row.reason = ERROR, _fault(fault)
                continue
            if allowed is None:
                of_eager = measured
                if provider.name != "reference":  # it is not among the providers, or too large
                    self.announce("eager's error")
                    of_eager = gate.eager_error(case, *tensors, exact)
                allowed = gate.allowed_error(case, *tensors, exact, of_eager)
            row.verdict = gate.judge(measured, allowed)
            if row.verdict.passed:
                row.status = OK
                self.steps[provider.name] = step
            else:
                row.status = FAILED
                row.reason = f"error {row.verdict.ratio:.3g} times what is allowed"

    def _time(self) -> None:
        if not self.steps:
            return
        device, plan = self.plan.device, self.plan
        self.announce("timing")
        gemm_bound = self.case.is_gemm_bound
        ceiling, amount = machine.gemm(self.case.torch_dtype, device) if gemm_bound else machine.copy(device)
        for _ in range(2):
            ceiling()
        if device.type == "cuda":
            clock = timing.CudaClock(device, plan.cold)
            sample = clock.sample
        else:
            sample = timing.cpu_sample  # type: ignore[assignment]
        samples = {name: sample(step) for name, step in self.steps.items()}
        samples["ceiling"] = sample(ceiling)
        rounds = iter(range(1, plan.rounds + 1))
        times = timing.interleave(
            samples, plan.rounds, plan.seconds, self.case.seed, lambda: self.announce(f"timing, round {next(rounds)}")
        )
        for row in self._ok():
            row.times, row.ceiling = times[row.provider], amount / times["ceiling"].median
        if device.type == "cuda":
            self._time_launches(clock)

    def _time_launches(self, clock: timing.CudaClock) -> None:
        """The kernels without their launches, and the replay of a graph."""
        back_to_back = {row.provider: clock.sample(self.steps[row.provider], backlog=True) for row in self._ok()}
        times = timing.interleave(back_to_back, self.plan.rounds, self.plan.seconds / 4, self.case.seed)
        for row in self._ok():
            row.kernels = times[row.provider]
        if not self.plan.graph:
            return
        graphs = {}
        for row in self._ok():
            if self.case.batch > GRAPH_BATCH and row.provider.partition(":")[0] not in CAPTURED:
                continue
            try:
                graphs[row.provider] = clock.sample(timing.capture(self.steps[row.provider], self.plan.device))
            except Exception as fault:  # a step that cannot be captured has a note and no replay time
                row.note = f"no graph: {_fault(fault)}"
                torch.cuda.synchronize(self.plan.device)
        if graphs:
            times = timing.interleave(graphs, self.plan.rounds, self.plan.seconds / 4, self.case.seed)
            for row in self._ok():
                row.replay = times.get(row.provider)

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
            own, of_eager = row.memory.get("allocator"), eager.memory.get("allocator")
            if own is not None and of_eager:
                row.memory_ratio = own / of_eager

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
    """The machine's ceilings, measured alone: GEMM flop/s per dtype and copied bytes/s (reads and writes counted)."""
    steps = {f"gemm_{name}_flop_per_s": machine.gemm(DTYPES[name], device) for name in dtypes}
    steps["copy_bytes_per_s"] = machine.copy(device)
    for step, _ in steps.values():
        step()
    clock = timing.CudaClock(device).sample if device.type == "cuda" else timing.cpu_sample
    times = timing.interleave({name: clock(step) for name, (step, _) in steps.items()}, rounds, 20.0)
    return {name: amount / times[name].median for name, (_, amount) in steps.items()}


class Estimate:
    """Seconds that a case will take, from its counts and the ceilings; corrected by the cases that have run."""

    def __init__(self, plan: Plan, providers: Sequence[Provider], ceilings: dict[str, float]):
        self.plan, self.providers, self.ceilings = plan, providers, ceilings
        self.corrections: list[float] = []

    def seconds(self, case: Case) -> float:
        """About how long the case will take."""
        if not self.corrections:
            return self._predicted(case)
        return self._predicted(case) * sorted(self.corrections)[len(self.corrections) // 2]

    def learn(self, case: Case, seconds: float) -> None:
        self.corrections.append(seconds / self._predicted(case))

    def _predicted(self, case: Case) -> float:
        gemm, copy = self.ceilings[f"gemm_{case.dtype}_flop_per_s"], self.ceilings["copy_bytes_per_s"]
        # Eager reaches about a third of the GEMM speed, the others more; small steps are call overhead.
        step = 2e-3 + 2 * (case.flop / gemm if case.is_gemm_bound else 0) + 20 * case.bytes / copy
        one_round = step * sum(memory.shortage(p.extra_bytes(case), self.plan.device) is None for p in self.providers)
        truth = 6 * step  # fp64, by autograd
        compilation = 25.0 * any(provider.name == "compile" for provider in self.providers)
        timing_s = min(self.plan.rounds * one_round, max(self.plan.seconds, timing.MIN_ROUNDS * one_round))
        return truth + compilation + 2 * one_round + timing_s + 1.0
