"""What a run leaves behind: the table on the screen, one JSON with everything, one CSV with a line a row."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.measure import ERROR, FAILED, NOT_RUN, OK, Row

SCHEMA = 1
_NARROW = 118  # columns that the table needs; a pipe has no width of its own


def console() -> Console:
    """The screen, or a pipe wide enough for the table."""
    found = Console()
    return found if found.is_terminal else Console(width=max(_NARROW, int(os.environ.get("COLUMNS", "0") or 0)))


def seconds(value: float | None) -> str:
    """A time with three digits and its unit."""
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def table(rows: Sequence[Row], device_type: str) -> Table:
    """The rows of one case."""
    case = rows[0].case
    found = Table(title=f"[bold]{case}[/bold]", title_justify="left", header_style="bold", expand=False)
    found.add_column("provider", no_wrap=True)
    found.add_column("error /\nallowed", justify="right", no_wrap=True)
    found.add_column("median", justify="right", no_wrap=True)
    found.add_column("p20 .. p80", justify="right", no_wrap=True)
    found.add_column("time\nvs eager", justify="right", no_wrap=True)
    found.add_column("peak\nMiB", justify="right", no_wrap=True)
    found.add_column("memory\nvs eager", justify="right", no_wrap=True)
    found.add_column("Gflop/s", justify="right", no_wrap=True)
    found.add_column("of\nGEMM", justify="right", no_wrap=True)
    graphs = device_type == "cuda" and any(row.replay or row.kernels for row in rows)
    if graphs:
        found.add_column("kernels", justify="right", no_wrap=True)
        found.add_column("graph", justify="right", no_wrap=True)
    for row in rows:
        if row.status == NOT_RUN:
            continue
        if row.status != OK:
            found.add_row(row.provider, Text(row.status, style="bold red"), *[""] * (9 if graphs else 7))
            continue
        times = row.times
        line = [
            row.provider,
            f"{row.verdict.ratio:.2f}" if row.verdict else "",
            seconds(times.median) if times else "",
            f"{seconds(times.quantile(0.2))} .. {seconds(times.quantile(0.8))}" if times else "",
            _times(row.time_ratio),
            mebibytes(row.memory.get("allocator")),
            _times(row.memory_ratio),
            "" if row.flops is None else f"{row.flops / 1e9:,.0f}",
            _percent(row.of_ceiling),
        ]
        if graphs:
            line += [seconds(launch.median if launch else None) for launch in (row.kernels, row.replay)]
        best = row.time_ratio is not None and row.time_ratio == max(r.time_ratio or 0 for r in rows)
        found.add_row(*line, style="green" if best and row.provider != "reference" else None)
    return found


def show(rows: Sequence[Row], device_type: str, out: Console) -> None:
    """The table of one case and, below it, every provider that has no speed, with the reason."""
    if any(row.status != NOT_RUN for row in rows):
        out.print(table(rows, device_type))
    else:
        out.print(f"[bold]{rows[0].case}[/bold]")
    for row in rows:
        if row.status in (FAILED, ERROR):
            out.print(Text(f"  {row.provider}: {row.status}: {row.reason}", style="red"))
        elif row.note:
            out.print(Text(f"  {row.provider}: {row.note}", style="dim"))
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.status == NOT_RUN:
            reasons[row.reason or "no reason given"].append(row.provider)
    for reason, names in reasons.items():
        out.print(Text(f"  not run: {', '.join(names)}: {reason}", style="dim"))
    out.print()


def finite(value: Any) -> Any:
    """The same plain values with null for what is not finite, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, header: dict[str, Any], rows: Iterable[Row]) -> None:
    """Everything that is known, replacing the file in one step so that an interrupted run leaves a whole one."""
    found = finite(header | {"schema": SCHEMA, "rows": [row.record() for row in rows]})
    text = json.dumps(found, indent=1, allow_nan=False)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


_CSV = (
    "batch", "classes", "dtype", "terms", "mode", "provider", "status", "reason", "gate_ratio", "median_ms", "p20_ms",
    "p80_ms", "rounds", "kernels_ms", "graph_ms", "first_call_s", "peak_extra_mib", "peak_resident_mib", "gflop_per_s",
    "fraction_of_gemm", "speedup_over_reference", "memory_over_reference",
)  # fmt: skip


def write_csv(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One line a row, from the records of a JSON."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _CSV)
        writer.writeheader()
        writer.writerows(_flat(record) for record in records)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    def scaled(value: float | None, scale: float) -> float | None:
        return None if value is None else float(f"{value * scale:.6g}")

    def of(key: str, field: str) -> float | None:
        return scaled((record.get(key) or {}).get(field), 1e3)

    return {
        **{key: record.get(key) for key in ("batch", "classes", "dtype", "mode", "provider", "status", "reason")},
        "terms": "+".join(record["terms"]),
        "gate_ratio": scaled((record.get("gate") or {}).get("ratio"), 1),
        "median_ms": of("time", "median_s"),
        "p20_ms": of("time", "p20_s"),
        "p80_ms": of("time", "p80_s"),
        "rounds": (record.get("time") or {}).get("rounds"),
        "kernels_ms": of("kernels_time", "median_s"),
        "graph_ms": of("graph_time", "median_s"),
        "first_call_s": scaled(record.get("first_call_s"), 1),
        "peak_extra_mib": scaled(record.get("peak_extra_bytes"), 2**-20),
        "peak_resident_mib": scaled(record.get("peak_extra_resident_bytes"), 2**-20),
        "gflop_per_s": scaled(record.get("flop_per_s"), 1e-9),
        "fraction_of_gemm": scaled(record.get("fraction_of_gemm"), 1),
        "speedup_over_reference": scaled(record.get("speedup_over_reference"), 1),
        "memory_over_reference": scaled(record.get("memory_over_reference"), 1),
    }
