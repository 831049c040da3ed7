"""The goals for an H200 class GPU and whether recorded rows reach them. Baselines are of the same case and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
OURS = ("triton", "cuda", "hopper")
MIB = 2**20


@dataclass(frozen=True)
class Goal:
    """One bar of a regime: ``value(ours, others)`` is None where a row is missing."""

    regime: str
    quantity: str
    bar: float
    value: Callable[[Record, dict[str, Record]], float | None]
    at_most: bool = False


def _time(record: Record | None, field: str = "time") -> float | None:
    return None if record is None or not record.get(field) else record[field]["median_s"]


def against(provider: str, graph: bool = False) -> Callable[[Record, dict[str, Record]], float | None]:
    """How many times as fast as a provider; ``graph``: our graph replay against its best time."""

    def value(ours: Record, others: dict[str, Record]) -> float | None:
        other = others.get(provider)
        mine = _time(ours, "graph_time" if graph else "time")
        theirs = [time for time in (_time(other), _time(other, "graph_time") if graph else None) if time]
        return None if not mine or not theirs else min(theirs) / mine

    return value


def _of_gemm(ours: Record, others: dict[str, Record]) -> float | None:
    return ours.get("fraction_of_gemm")


def _memory(ours: Record, others: dict[str, Record]) -> float | None:
    """Peak extra memory over 600 MB and three half copies of the inputs (student and teacher)."""
    copies = 3 * 2 * 2 * ours["batch"] * ours["classes"]
    return None if ours.get("peak_extra_bytes") is None else ours["peak_extra_bytes"] / (600e6 + copies)


def _graph_microseconds(ours: Record, others: dict[str, Record]) -> float | None:
    time = _time(ours, "graph_time")
    return None if time is None else 1e6 * time


def _regime(name: str, gemm: float, library: float, compiled: float, eager: float, memory: bool = True) -> list[Goal]:
    goals = [
        Goal(name, "fraction of the GEMM ceiling", gemm, _of_gemm),
        Goal(name, "times the library path", library, against("library")),
        Goal(name, "times torch.compile", compiled, against("compile")),
        Goal(name, "times eager", eager, against("reference")),
    ]
    if memory:
        goals.append(Goal(name, "extra memory / (600 MB + 3 half copies)", 1.0, _memory, at_most=True))
    return goals


IMAGENET = "C = 1000, B >= 4096, instance + sample"
NARROW = "C = 100, B >= 16384, instance + sample"
WIDE = "C = 21841, category"
SMALL = "C = 1000, B <= 1024, all terms, graph replay"
GOALS = (
    *_regime(IMAGENET, 0.85, 1.12, 1.4, 2.5),
    *_regime(NARROW, 0.70, 2.5, 3.5, 10.0),
    *_regime(WIDE, 0.85, 1.0, 1.1, 1.3, memory=False),
    Goal(SMALL, "times torch.compile", 3.0, against("compile", graph=True)),
    Goal(SMALL, "times eager", 10.0, against("reference")),
    Goal(SMALL, "microseconds at B = 256", 25.0, _graph_microseconds, at_most=True),
)


def regime(record: Record) -> str | None:
    """The regime of the goals that a row belongs to."""
    if record.get("loss", "mcld") != "mcld" or record["dtype"] != "bfloat16" or record["mode"] != "forward-backward":
        return None
    batch, classes, terms = record["batch"], record["classes"], tuple(record["terms"])
    if terms == ("instance", "sample"):
        if classes == 1000 and batch >= 4096:
            return IMAGENET
        if classes == 100 and batch >= 16384:
            return NARROW
    if terms == ("category",) and classes == 21841:
        return WIDE
    if len(terms) == 3 and classes == 1000 and batch <= 1024:
        return SMALL
    return None


def judge(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every goal at every case of its regime, for the fastest of our backends: the value, and whether it is reached."""
    cases: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        if regime(record) and record["status"] == "ok":
            key = (regime(record), record["batch"], record["classes"], tuple(record["terms"]))
            cases.setdefault(key, {})[record["provider"]] = record
    judged = []
    for (name, batch, *_), rows in cases.items():
        ours = [rows[provider] for provider in OURS if provider in rows and _time(rows[provider])]
        if not ours:
            continue
        best = min(ours, key=lambda record: _time(record) or float("inf"))
        for goal in GOALS:
            if goal.regime != name or ("B = 256" in goal.quantity and batch != 256):
                continue
            value = goal.value(best, rows)
            reached = None if value is None else value <= goal.bar if goal.at_most else value >= goal.bar
            bar = f"{'<=' if goal.at_most else '>='} {goal.bar:g}"
            judged.append(
                {
                    "regime": name,
                    "batch": batch,
                    "backend": best["provider"],
                    "goal": f"{goal.quantity} {bar}",
                    "value": value,
                    "reached": reached,
                }
            )
    return judged
