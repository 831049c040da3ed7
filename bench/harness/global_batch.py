"""The loss over ranks: ``torchrun --nproc-per-node N bench/run.py --global``.

Every rank holds the same number of rows. Providers, in interleaved rounds behind one gate:

    one process   every rank computes the whole batch alone, without communication: N times the work
    all, ring     process_group with gather="all" and "ring", even=True
    open_clip     what its ClipLoss does with local_loss and gather_with_grad: the instance-wise term alone, symmetric

Time is that of the slowest rank in a round. Exposed communication is the median step less the median step with the
collectives replaced by copies of the same bytes within the rank. Memory is the peak of a step, per rank.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import mcld_kernels
from mcld_kernels import distributed

from . import cases, memory, report
from .programs import Exit

BAR = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # relative, of the gradient's norm


@dataclass
class Row:
    """One provider at one shape."""

    batch: int  # of all ranks
    classes: int
    dtype: str
    terms: str
    direction: str
    provider: str
    status: str = "ok"
    error: float | None = None  # of the gradient, against one process in fp64
    milliseconds: float | None = None
    exposed_milliseconds: float | None = None
    received_bytes: int | None = None
    peak_bytes: int | None = None


class _Done:
    """A transfer that has ended."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def without_communication() -> Iterator[None]:
    """Replace every collective by a copy of as many bytes within this rank; results mean nothing."""
    run = distributed._run

    def local(kind: str, num_bytes: int, group: Any, collective: Any, /, *args: Any, **kw: Any) -> Any:
        if kind in ("all-gather", "exchange", "texts"):
            out, own = args
            out.view(-1, own.numel()).copy_(own.view(1, -1))
        elif kind == "reduce-scatter":
            out, everything = args
            out.copy_(everything[: out.shape[0]])
        elif kind == "shift":
            sent, received = args[0]
            received.tensor.copy_(sent.tensor)
            return [_Done()]
        return None

    distributed._run = local
    try:
        yield
    finally:
        distributed._run = run


def clip_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """open_clip's local loss with a differentiable gather, as its documentation recommends for many ranks."""
    from torch.distributed.nn.functional import all_gather

    s, t = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    s_all, t_all = torch.cat(all_gather(s)), torch.cat(all_gather(t))
    labels = torch.arange(s.shape[0], device=s.device) + dist.get_rank() * s.shape[0]
    rows = F.cross_entropy(s @ t_all.T / temperature, labels)
    return (rows + F.cross_entropy(t @ s_all.T / temperature, labels)) / 2


class Global:
    """The measurement of one shape on all ranks."""

    def __init__(
        self, batch: int, classes: int, dtype: str, terms: tuple[str, ...], options: Any, device: torch.device
    ):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.batch, self.classes, self.dtype, self.device = batch, classes, dtype, device
        self.temperature = options.temperature or 0.1
        self.rounds = options.repeats or 7
        self.terms = terms
        generator = torch.Generator().manual_seed(options.seed)
        logits = torch.randn(2, batch, classes, generator=generator).to(device, getattr(torch, dtype))
        self.student, self.teacher = logits
        self.target = torch.randint(classes, (batch,), generator=generator).to(device)
        rows = batch // self.count
        self.own = slice(self.rank * rows, (self.rank + 1) * rows)

    def steps(self, direction: str) -> dict[str, Callable[[], Tensor]]:
        """By provider, forward and backward; each returns the gradient by own rows, over the ranks' number."""
        weight = [float(term in self.terms) for term in cases.TERMS]
        common = {"weight": weight, "temperature": self.temperature, "direction": direction}

        def step(loss: Callable[..., Tensor], rows: slice, divisor: int, **given: Any) -> Callable[[], Tensor]:
            student, teacher, target = self.student[rows], self.teacher[rows], self.target[rows]

            def run() -> Tensor:
                x = student.detach().requires_grad_()
                loss(x, teacher, target, **given).backward()
                assert x.grad is not None
                return x.grad[self.own] if rows != self.own else x.grad / divisor

            return run

        group = dist.group.WORLD
        steps = {"one process": step(mcld_kernels.mcld_loss, slice(0, self.batch), 1, **common)}
        for gather in distributed.GATHERS:
            over_ranks = {"process_group": group, "gather": gather, "even": True}
            steps[gather] = step(mcld_kernels.mcld_loss, self.own, self.count, **common, **over_ranks)
        if self.terms == ("instance",) and direction == "symmetric":

            def clip(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
                return clip_loss(student, teacher, self.temperature)

            steps["open_clip"] = step(clip, self.own, self.count)
        return steps

    def run(self, direction: str) -> list[Row]:
        steps = self.steps(direction)
        shape = self.batch, self.classes, self.dtype, "+".join(self.terms), direction
        rows = {name: Row(*shape, name) for name in steps}
        x = self.student.double().requires_grad_()
        weight = [float(term in self.terms) for term in cases.TERMS]
        options = {"weight": weight, "temperature": self.temperature, "direction": direction}
        mcld_kernels.mcld_loss(x, self.teacher.double(), self.target, **options, backend="torch").backward()
        truth = x.grad[self.own]
        for name, step in steps.items():
            error = torch.stack([(step().double() - truth).square().sum(), truth.square().sum()])
            dist.all_reduce(error)
            rows[name].error = float((error[0] / error[1]).sqrt())
            if not rows[name].error <= BAR[self.dtype]:
                rows[name].status = "failed"
        sound = {name: step for name, step in steps.items() if rows[name].status == "ok"}
        times = self._times(sound)
        silent = {name: step for name, step in sound.items() if name in distributed.GATHERS}
        with without_communication():
            alone = self._times(silent)
        for name, step in sound.items():
            rows[name].milliseconds = 1e3 * times[name]
            with distributed.count_collectives() as counted:
                step()
            if name in alone:
                rows[name].exposed_milliseconds = 1e3 * (times[name] - alone[name])
                rows[name].received_bytes = sum(size for _, size in counted)
            dist.barrier()
            rows[name].peak_bytes = memory.peak_extra(step, self.device)["allocator"]
        return list(rows.values())

    def _times(self, steps: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        """Seconds of the slowest rank, the median over rounds."""
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(self.rounds + 1):
            for name, step in steps.items():
                dist.barrier()
                self._wait()
                begun = time.perf_counter()
                step()
                self._wait()
                taken = torch.tensor(time.perf_counter() - begun, device=self.device)
                dist.all_reduce(taken, op=dist.ReduceOp.MAX)
                samples[name].append(float(taken))
        return {name: statistics.median(values[1:]) for name, values in samples.items()}  # the first warms up

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run(options: argparse.Namespace, device: torch.device, screen: Console, folder: Path | None, head: Any) -> int:
    """Measure the shapes that the options ask for; rank 0 prints, and writes results.json into the folder."""
    count = dist.get_world_size()
    smoke = options.smoke
    batches = options.batch or ([256] if smoke else [4096 * count] if device.type == "cuda" else [1024 * count])
    rows: list[Row] = []
    for batch in batches:
        batch -= batch % count
        for classes in options.classes or [100 if smoke else 1000]:
            for dtype in options.dtype or ["bfloat16" if device.type == "cuda" else "float32"]:
                for terms, direction in _selected(options):
                    rows += Global(batch, classes, dtype, terms, options, device).run(direction)
    if dist.get_rank() == 0:
        for part in _tables(rows, count):
            screen.print(part)
        if folder is not None:
            report.write_json(
                folder / "results.json",
                head | {"ranks": count, "rows": [asdict(row) for row in rows], "complete": True},
            )
    return Exit.FAILED if any(row.status != "ok" for row in rows) else Exit.OK


def _selected(options: argparse.Namespace) -> list[tuple[tuple[str, ...], str]]:
    if options.terms:
        return [(options.terms, "student"), (options.terms, "symmetric")]
    return [(("instance",), "symmetric"), (("instance", "sample"), "student"), (cases.TERMS, "student")]


def _tables(rows: list[Row], count: int) -> Iterator[Table | Text]:
    """A table for each shape: eleven columns do not fit on a screen of 80."""
    yield Text(f"{count} ranks; milliseconds of the slowest rank, MB (10^6 bytes) of each")

    def shape(row: Row) -> str:
        return f"B={row.batch} C={row.classes} {row.dtype}, {row.terms}, {row.direction}"

    def shown(value: float | None, scale: float = 1.0) -> str:
        return "" if value is None else f"{value / scale:,.2f}"

    for title, group in itertools.groupby(rows, shape):
        table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("provider")
        for name in ("error", "ms", "exposed\nms", "received\nMB", "peak\nMB"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in group:
            numbers = shown(row.milliseconds), shown(row.exposed_milliseconds)
            sizes = shown(row.received_bytes, 1e6), shown(row.peak_bytes, 1e6)
            note = row.provider if row.status == "ok" else f"{row.provider} ({row.status})"
            table.add_row(note, f"{row.error:.1e}", *numbers, *sizes)
        yield table


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """The process group of torchrun."""
    if device.type == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank(0))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
