"""The goals for an H200 class GPU and whether recorded rows reach them. Baselines are of the same case and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
OURS = ("triton", "cuda", "hopper")


@dataclass(frozen=True)
class Goal:
    """One bar of a regime: ``value(ours, others)`` is None where a row is missing."""

    regime: str
    quantity: str
    bar: float
    value: Callable[[Record, dict[str, Record]], float | None]
    at_most: bool = False


def _time(record: Record | None, *fields: str) -> float | None:
    """The least of some times of a row, in seconds; None where there is none."""
    times = [record[field]["median_s"] for field in fields if record is not None and record.get(field)]
    return min(times, default=None)


PLAIN = ("time",)
# Host time left out, whichever clock says so: the launches hidden behind a busy stream, or the replay of a graph.
KERNELS = ("kernels_time", "graph_time", "time")


def best_clock(record: Record) -> str | None:
    """The field of the kernels' own time of a row where a clock has it, else the plain one's; None without a time."""
    measured = (field for field in KERNELS if record.get(field))
    return min(measured, key=lambda field: float(record[field]["median_s"]), default=None)


def best_time(record: Record) -> float | None:
    """The kernels' own time of a row where a clock has it, else the plain one."""
    return _time(record, *KERNELS)


def against(provider: str, fields: tuple[str, ...] = KERNELS) -> Callable[[Record, dict[str, Record]], float | None]:
    """How many times as fast as a provider, both by their best of some times."""

    def value(ours: Record, others: dict[str, Record]) -> float | None:
        mine, theirs = _time(ours, *fields), _time(others.get(provider), *fields)
        return None if not mine or not theirs else theirs / mine

    return value


def of_gemm(ours: Record, others: dict[str, Record]) -> float | None:
    """The fraction of the GEMM speed of the same rounds, by the kernels' own time."""
    seconds, gemm = _time(ours, *KERNELS), ours.get("gemm_flop_per_s")
    return None if not seconds or not gemm else ours["flop"] / seconds / gemm


def _memory(allowed: int) -> Callable[[Record, dict[str, Record]], float | None]:
    """Peak extra memory over so many bytes and three half copies of the inputs (student and teacher)."""

    def value(ours: Record, others: dict[str, Record]) -> float | None:
        copies = 3 * 2 * 2 * ours["batch"] * ours["classes"]
        return None if ours.get("peak_extra_bytes") is None else ours["peak_extra_bytes"] / (allowed + copies)

    return value


def _without_matrix(ours: Record, others: dict[str, Record]) -> float | None:
    """Peak extra memory over a C x C matrix of 16-bit numbers and six half copies of the inputs."""
    allowed = 2 * ours["classes"] ** 2 + 6 * 2 * 2 * ours["batch"] * ours["classes"]
    return None if ours.get("peak_extra_bytes") is None else ours["peak_extra_bytes"] / allowed


def _graph_microseconds(ours: Record, others: dict[str, Record]) -> float | None:
    time = _time(ours, "graph_time")
    return None if time is None else 1e6 * time


def _regime(name: str, gemm: float, library: float, compiled: float, eager: float, memory: bool = True) -> list[Goal]:
    goals = [
        Goal(name, "fraction of the GEMM ceiling", gemm, of_gemm),
        Goal(name, "times the library path", library, against("library")),
        Goal(name, "times torch.compile", compiled, against("compile")),
        Goal(name, "times eager", eager, against("reference")),
    ]
    if memory:
        goals.append(Goal(name, "extra memory / (600 MB + 3 half copies)", 1.0, _memory(600_000_000), at_most=True))
    return goals


LARGE = "C = 1000, B >= 16384, instance + sample"
MIDDLE = "C = 1000, B = 4096, instance + sample"
NARROW = "C = 100, B >= 16384, instance + sample"
WIDE = {batch: f"C = 21841, category, B = {batch}" for batch in (256, 1024, 4096)}
SMALL = "C = 1000, B = 256, all terms, graph replay"
ACCURATE = "float32 at 'highest'"
PLAIN_CALL = "plain call, host included, B = 256 and 4096"
_NO_MATRIX = "extra memory / (a C x C matrix + 6 half copies)"
GOALS = (
    *_regime(LARGE, 0.85, 1.12, 1.4, 2.5),
    *_regime(MIDDLE, 0.72, 1.12, 1.4, 2.5),
    *_regime(NARROW, 0.70, 2.5, 3.5, 10.0),
    *(
        goal
        for (batch, name), gemm in zip(WIDE.items(), (0.70, 0.80, 0.88))
        for goal in (
            *_regime(name, gemm, 1.0, 1.1, 1.3, memory=False),
            Goal(name, _NO_MATRIX, 1.0, _without_matrix, at_most=True),
        )
    ),
    Goal(SMALL, "times torch.compile", 3.0, against("compile", ("graph_time",))),
    Goal(SMALL, "times eager", 10.0, against("reference", ("graph_time",))),
    Goal(SMALL, "microseconds", 25.0, _graph_microseconds, at_most=True),
    Goal(PLAIN_CALL, "times torch.compile", 2.0, against("compile", PLAIN)),
    Goal(PLAIN_CALL, "times eager", 4.0, against("reference", PLAIN)),
    Goal(NARROW, "times flash attention", 1.15, against("sdpa")),
    Goal(NARROW, "times cuDNN's attention", 1.15, against("cudnn")),
    Goal(NARROW, "times Inf-CL", 10.0, against("inf-cl")),
    Goal(ACCURATE, "times eager", 2.0, against("reference")),
)


def regimes(record: Record) -> tuple[str, ...]:
    """The regimes of the goals that a row belongs to."""
    if record.get("loss", "mcld") != "mcld" or record["mode"] != "forward-backward":
        return ()
    batch, classes, terms = record["batch"], record["classes"], tuple(record["terms"])
    if record["dtype"] == "float32":
        return (ACCURATE,) if batch >= 1024 else ()
    if record["dtype"] != "bfloat16":
        return ()
    goals = []
    if terms == ("instance", "sample"):
        if classes == 1000 and batch >= 4096:
            goals.append(LARGE if batch >= 16384 else MIDDLE)
        if classes == 100 and batch >= 16384:
            goals.append(NARROW)
    if terms == ("instance",) and classes == 100 and batch >= 16384:
        goals.append(NARROW)  # the public peers know this term alone
    if terms == ("category",) and classes == 21841 and batch in WIDE:
        goals.append(WIDE[batch])
    if len(terms) == 3 and classes == 1000 and batch == 256:
        goals.append(SMALL)
    if classes == 1000 and batch in (256, 4096):
        goals.append(PLAIN_CALL)
    return tuple(goals)


def judge(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every goal at every case of its regime, for the fastest of our backends: the value, and whether it is reached.

    The time of kernels decides who is the fastest, and the plain time is beside it (``seconds``, ``kernel_seconds``).
    """
    cases: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        if record["status"] == "ok":
            for name in regimes(record):
                key = (name, record["batch"], record["classes"], tuple(record["terms"]))
                cases.setdefault(key, {})[record["provider"]] = record
    judged = []
    for (name, batch, *_), rows in cases.items():
        fields = PLAIN if name == PLAIN_CALL else KERNELS
        ours = [rows[provider] for provider in OURS if provider in rows and _time(rows[provider], *fields)]
        if not ours:
            continue
        best = min(ours, key=lambda record: _time(record, *fields) or float("inf"))
        for goal in GOALS:
            if goal.regime != name:
                continue
            value = goal.value(best, rows)
            if value is None and goal.quantity.endswith(("attention", "Inf-CL")):
                continue  # of the cases that have these peers
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
                    "seconds": _time(best, *PLAIN),
                    "kernel_seconds": _time(best, *KERNELS),
                }
            )
    return judged
