"""Times of several steps against each other.

Rounds are interleaved: each round takes one sample of every step, in an order that changes from round to round,
because a clock that drifts by a factor of two over a minute would otherwise decide who is faster.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mcld_kernels.calibrate import cycles_to_enqueue

SampleFn = Callable[[], float]  # seconds of one step
MIN_ROUNDS = 3
LEAST_SAMPLE_S = 2e-3  # a shorter CPU step is repeated, so that the clock's own cost does not show
MOST_CALLS = 1000
MOST_TAKES = 3  # of a sample on CUDA, while the allocator asks the driver for memory in it
UNSTEADY = 1.5  # p80 / p20 above which a time is marked


@dataclass(frozen=True)
class Times:
    """Seconds of one step over the rounds."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.samples, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def is_steady(self) -> bool:
        return self.quantile(0.8) <= UNSTEADY * self.quantile(0.2)

    def record(self) -> dict[str, float | int | bool]:
        return {
            "median_s": self.median,
            "p20_s": self.quantile(0.2),
            "p80_s": self.quantile(0.8),
            "min_s": min(self.samples),
            "rounds": len(self.samples),
            "steady": self.is_steady,
        }


def interleave(
    samples: Mapping[str, SampleFn],
    rounds: int,
    seconds: float,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    least: int = MIN_ROUNDS,
) -> dict[str, Times]:
    """Times of every step over ``rounds`` rounds, or as few as ``least`` once ``seconds`` are used up."""
    order = list(samples)
    shuffle = random.Random(seed).shuffle
    taken: dict[str, list[float]] = {name: [] for name in order}
    deadline = time.monotonic() + seconds
    for number in range(rounds):
        if number >= least and time.monotonic() > deadline:
            break
        shuffle(order)
        for name in order:
            taken[name].append(samples[name]())
        progress()
    return {name: Times(tuple(values)) for name, values in taken.items()}


def cpu_sample(step: Callable[[], object]) -> SampleFn:
    """A sample by the wall clock. The step must have run before: its first call may compile or allocate."""
    calls = 1

    def timed() -> float:
        gc.collect(0)
        enabled = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return time.perf_counter() - start
        finally:
            if enabled:
                gc.enable()

    def sample() -> float:
        nonlocal calls
        while (elapsed := timed()) < LEAST_SAMPLE_S / 2 and calls < MOST_CALLS:
            calls = min(MOST_CALLS, max(2 * calls, int(calls * LEAST_SAMPLE_S / max(elapsed, 1e-9))))
        return elapsed / calls

    return sample


class CudaClock:
    """Samples by CUDA events on the current stream.

    ``cold``: the L2 cache is overwritten before each sample. ``backlog``: the device is kept busy while the host
    enqueues the step, so that the time is the kernels' own and not that of launching them; without it a step pays
    for its launches, as in use. A sample in which the allocator asks the driver for memory is taken again: where steps
    together need more than the device has, each would pay in every round for what the others keep cached.
    """

    def __init__(self, device: torch.device, cold: bool = False):
        self.device = device
        size = 4 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self._flush = torch.empty(size // 4, dtype=torch.int32, device=device) if cold else None

    def sample(self, step: Callable[[], object], backlog: bool = False) -> SampleFn:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = cycles_to_enqueue(step, self.device) if backlog else 0

        def once() -> float:
            torch.cuda.synchronize(self.device)
            if self._flush is not None:
                self._flush.zero_()
            if backlog:
                torch.cuda._sleep(cycles)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize(self.device)
            return start.elapsed_time(end) * 1e-3

        def take() -> float:
            for _ in range(MOST_TAKES):
                before = self._allocations()
                seconds = once()
                if self._allocations() == before:
                    break
            return seconds

        return take

    def _allocations(self) -> int:
        """How often the allocator has asked the driver for memory so far."""
        return int(torch.cuda.memory_stats(self.device).get("segment.all.allocated", 0))


def context_is_lost(device: torch.device) -> bool:
    """True where a kernel's fault, as an illegal address, has ended the CUDA context: every later call raises."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def capture(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The step as a CUDA graph: one launch a replay. Raises the errors of the capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> None:
        graph.replay()

    replay.outputs = outputs  # type: ignore[attr-defined]  # their memory belongs to the graph
    return replay
