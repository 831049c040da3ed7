"""The part of `calibrate` that compares forms of the kernels (`backends.forms`) at each shape."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from .backends import forms
from .calibrate_plan import Plan

STALL_S = 60  # without a line from the process, after which the form under way is left out
Row = dict[str, Any]


class Gate(Protocol):
    """The forms that are right at one shape."""

    rejected: dict[str, str]  # the reason of each that is not

    def admit(self, form: str) -> None:
        """Compute once by a candidate or a form."""

    def medians(self, names: Sequence[str] | None = None, backlog: bool = False) -> dict[str, float]:
        """Milliseconds of those that were admitted, or of ``names`` among them, in interleaved rounds.

        ``backlog``: of the device alone, which is kept busy while the host enqueues the call.
        """


def measure(plan: Plan, gate_of: Callable[[str, int, int], Gate]) -> Iterator[Row]:
    """A row a shape, every candidate by its fastest form: ``tuning`` has its fields.

    Forms are compared by the device's time, which ``forms`` has: where a call waits for the host, all look alike. The
    ``milliseconds`` are those of whole calls, by which backends are compared. A line ``trying`` comes before the first
    call of a form.
    """
    for shape in plan.shapes():
        names = [form for form in forms.of_shape(plan.candidates, shape) if form not in plan.skip_forms]
        if not names:
            continue
        gate = gate_of(shape.dtype, shape.batch, shape.classes)
        for form in (*plan.candidates, *names):
            if forms.parse(form)[0] not in gate.rejected:
                yield {"trying": form}
                gate.admit(form)
        times = gate.medians(backlog=True)
        for form in forms.combined(times):
            if form in plan.skip_forms:
                continue
            candidate = forms.parse(form)[0]
            yield {"trying": form}
            gate.admit(form)
            # Against the best so far, in rounds of their own.
            times |= gate.medians((candidate, forms.fastest(times)[candidate], form), backlog=True)
        chosen = forms.fastest(times)
        calls = gate.medians(tuple(chosen.values()))
        yield asdict(shape) | {
            "milliseconds": {candidate: calls[form] for candidate, form in chosen.items()},
            "tuning": {candidate: forms.parse(form)[1] for candidate, form in chosen.items() if ":" in form},
            "forms": times,
            "rejected": gate.rejected,
        }


def run(plan: Plan, seconds: float, run_plan: Callable[[Plan, float], tuple[list[Row], bool]]) -> list[Row]:
    """The rows of `measure`, which ``run_plan`` runs in a process: its lines, and whether it came to its end.

    A form that hangs or crashes is left out, and the shapes without a row are measured again.
    """
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    while (remaining := deadline - time.monotonic()) > 0:
        lines, complete = run_plan(plan, remaining)
        new = [line for line in lines if "trying" not in line]
        rows += new
        form = lines[-1].get("trying", "") if lines else ""
        if complete or time.monotonic() >= deadline or ":" not in form:
            break
        print(f"{form} is left out: it did not come to an end.")
        done = [(row["dtype"], row["batch"], row["classes"]) for row in new]
        plan = replace(plan, skip_forms=(*plan.skip_forms, form), skip_shapes=(*plan.skip_shapes, *done))
    return rows


def merge(rows: Sequence[Row], tuned: Sequence[Row]) -> list[Row]:
    """The rows of the candidates as they are, each with what `measure` has found at its shape."""
    keys = ("dtype", "precision", "batch", "classes")
    measured = {tuple(row[key] for key in keys): row for row in tuned}
    merged = []
    for row in rows:
        other = measured.get(tuple(row[key] for key in keys))
        # Times of different runs are not compared: the row keeps its own where a candidate is missing in the other.
        if other is None or set(other["milliseconds"]) != set(row["milliseconds"]):
            merged.append(row)
        else:
            merged.append(row | {key: other[key] for key in ("milliseconds", "tuning", "forms")})
    return merged


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Append a line of JSON a row, each as soon as it is there."""
    with path.open("a") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)


def join(process: BaseProcess, path: Path, seconds: float, stall: float) -> float:
    """Wait for a process for ``seconds``, and while ``path`` grows within every ``stall`` of them.

    Returns the limit that ended the wait, if one did.
    """
    end = time.monotonic() + seconds
    size, quiet = path.stat().st_size, time.monotonic() + stall
    while True:
        now = time.monotonic()
        process.join(max(0.0, min(end - now, quiet - now, 1.0 if stall < math.inf else math.inf)))
        written, now = path.stat().st_size, time.monotonic()
        if written != size:
            size, quiet = written, now + stall
        if process.exitcode is not None or now >= end:
            return seconds
        if now >= quiet:
            return stall
