"""The results of a run: tables on the screen, one JSON with everything, one CSV with a line a row."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bench.harness.kernels import KernelRow
from bench.harness.measure import ERROR, FAILED, NOT_RUN, OK, Row
from bench.harness.screen import say
from bench.harness.timing import UNSTEADY, Times
from mcld_kernels import installation

SCHEMA = 2
CLOCK_MARKS = {"time": "", "kernels_time": " k", "graph_time": " g"}  # beside a fraction of a ceiling
CLOCK_NOTE = "k: by the time of the kernels with launches hidden; g: by that of a graph's replay"
UNSTEADY_NOTE = f"~ unsteady: p80 / p20 above {UNSTEADY:g}"


def seconds(value: float | None) -> str:
    """A time with three digits and its unit."""
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def _median(times: Times | None) -> str:
    return "" if times is None else seconds(times.median) + ("" if times.is_steady else " ~")


def _of_ceiling(row: Row) -> str:
    return _percent(row.of_ceiling) + ("" if row.of_ceiling is None else CLOCK_MARKS[row.clock or "time"])


def _spread(times: Times | None) -> str:
    return "" if times is None else f"{seconds(times.quantile(0.2))} .. {seconds(times.quantile(0.8))}"


@dataclass(frozen=True)
class Column:
    """A column of a table. Where the screen is too narrow, the columns of the lowest rank are left out first."""

    title: str
    cell: Callable[[Any], str]
    rank: int
    justify: str = "right"


def _columns(rows: Sequence[Row], device_type: str) -> list[Column]:
    gemm_bound = rows[0].case.is_gemm_bound
    columns = [
        Column("provider", lambda row: row.provider, 9, "left"),
        Column("error /\nallowed", lambda row: f"{row.verdict.ratio:.2f}" if row.verdict else "", 6),
        Column("median", lambda row: _median(row.times), 9),
        Column("p20 .. p80", lambda row: _spread(row.times), 1),
        Column("time\nvs eager", lambda row: _ratio(row.time_ratio), 8),
        Column("peak\nMiB", lambda row: mebibytes(row.memory.get("allocator")), 7),
        Column("memory\nvs eager", lambda row: _ratio(row.memory_ratio), 4),
        Column("Gflop/s", lambda row: "" if row.flops is None else f"{row.flops / 1e9:,.0f}", 2),
        Column("of\nGEMM" if gemm_bound else "of\ncopy", _of_ceiling, 5),
    ]
    if device_type == "cuda" and any(row.replay or row.kernels for row in rows):
        columns += [
            Column("kernels", lambda row: seconds(row.kernels.median if row.kernels else None), 3),
            Column("graph", lambda row: seconds(row.replay.median if row.replay else None), 3),
        ]
    return columns


def _kernel_columns(device_type: str) -> list[Column]:
    return [
        Column("kernel", lambda row: row.kernel, 9, "left"),
        Column("backend", lambda row: row.backend, 9, "left"),
        Column("shape", lambda row: row.shape, 2, "left"),
        Column("Mflop", lambda row: f"{row.flop / 1e6:,.3g}", 3),
        Column("MB", lambda row: f"{row.bytes / 1e6:,.3g}", 3),
        Column("error /\nallowed", lambda row: "" if row.ratio is None else f"{row.ratio:.2f}", 4),
        Column("median", lambda row: _median(row.times), 9),
        Column("Gflop/s", lambda row: "" if row.flops is None else f"{row.flops / 1e9:,.1f}", 5),
        Column("GB/s", lambda row: "" if row.bytes_per_s is None else f"{row.bytes_per_s / 1e9:,.1f}", 6),
        Column("of\nceiling", lambda row: _percent(row.of_ceiling), 8),
    ]


def _table(title: str, columns: Sequence[Column], lines: Sequence[tuple[list[str | Text], str | None]]) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.title, justify=column.justify, no_wrap=True)  # type: ignore[arg-type]
    for cells, style in lines:
        # As text: a form's name has brackets, which are markup in a plain string.
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)
    return table


def fitting_table(
    title: str, columns: Sequence[Column], rows: Sequence[Any], styles: Sequence[str | None], screen: Console
) -> tuple[Table, list[str]]:
    """A table no wider than the screen, and the titles of the columns that are left out for it."""
    left_out: list[Column] = []
    unlimited = screen.options.update(max_width=1000)
    while True:
        shown = [column for column in columns if column not in left_out]
        lines = []
        for row, style in zip(rows, styles):
            if row.status == OK:
                lines.append(([column.cell(row) for column in shown], style))
            else:  # no speed beside a result that is wrong
                names = [column.cell(row) for column in shown if column.rank == 9 and column.justify == "left"]
                lines.append(([*names, Text(row.status, style="bold red")], None))
        table = _table(title, shown, lines)
        if Measurement.get(screen, unlimited, table).maximum <= screen.width or len(shown) <= 3:
            return table, [column.title.replace("\n", " ") for column in left_out]
        left_out.append(min(shown, key=lambda column: column.rank))


class Report:
    """Prints the rows of the cases. A reason is printed once, under the first case that it holds for."""

    def __init__(self, screen: Console, device_type: str):
        self.screen, self.device_type = screen, device_type
        self._reasons: set[tuple[str, str]] = set()
        self._notes: set[str] = set()

    def show(self, rows: Sequence[Row], kernels: Sequence[KernelRow] = ()) -> None:
        """The table of one case and, below it, every provider without a speed, with the reason."""
        title = str(rows[0].case) if rows else ""
        measured = [row for row in rows if row.status != NOT_RUN]
        if measured:
            self._print_table(title, _columns(measured, self.device_type), measured, _styles(measured))
        else:
            say(self.screen, title, "bold")
        self._print_reasons([(row.provider, row) for row in rows])
        if kernels:
            ran = [row for row in kernels if row.status != NOT_RUN]
            self._print_table("its kernels", _kernel_columns(self.device_type), ran, [None] * len(ran))
            self._print_reasons([(f"{row.backend} {row.kernel}".strip(), row) for row in kernels])
        self.screen.print()

    def _print_table(
        self, title: str, columns: Sequence[Column], rows: Sequence[Any], styles: Sequence[str | None]
    ) -> None:
        table, left_out = fitting_table(title, columns, rows, styles, self.screen)
        self.screen.print(table)
        if any(row.times is not None and not row.times.is_steady for row in rows):
            self._note(UNSTEADY_NOTE)
        if any(isinstance(row, Row) and CLOCK_MARKS[row.clock or "time"] for row in rows):
            self._note(CLOCK_NOTE)
        if left_out:
            self._note(f"left out at {self.screen.width} columns, see the CSV: {', '.join(left_out)}")

    def _print_reasons(self, named: Sequence[tuple[str, Any]]) -> None:
        for name, row in named:
            if row.status in (FAILED, ERROR):
                say(self.screen, f"  {name}: {row.status}: {row.reason}", "red")
            elif row.note:
                say(self.screen, f"  {name}: {row.note}", "dim")
        new: dict[str, list[str]] = defaultdict(list)
        for name, row in named:
            if row.status == NOT_RUN and (name, row.reason) not in self._reasons:
                self._reasons.add((name, row.reason))
                new[row.reason or "no reason given"].append(name)
        for reason, names in new.items():
            say(self.screen, f"  not run: {', '.join(names)}: {reason}", "dim")

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.add(text)
            say(self.screen, f"  {text}", "dim")


def _styles(rows: Sequence[Row]) -> list[str | None]:
    """The fastest is green, unless it is the reference."""
    fastest = max((row.time_ratio or 0 for row in rows), default=0)
    return ["green" if row.time_ratio and row.time_ratio == fastest and row.time_ratio != 1 else None for row in rows]


@functools.cache
def _origin() -> str:
    return installation.source()[0]


def recordable(value: Any) -> Any:
    """The same plain values with null for numbers that are not finite, which JSON does not have.

    The folder that this package is installed from becomes ".": a reason may name it in a command.
    """
    if isinstance(value, dict):
        return {key: recordable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [recordable(entry) for entry in value]
    if isinstance(value, str):
        return value.replace(origin, ".") if Path(origin := _origin()).is_absolute() else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one step, so that an interrupted run leaves a valid one."""
    text = json.dumps(recordable(content), indent=1, allow_nan=False)
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text + "\n")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


_CSV = (
    "batch", "classes", "dtype", "terms", "mode", "provider", "status", "reason", "gate_ratio", "median_ms", "p20_ms",
    "p80_ms", "rounds", "kernels_ms", "graph_ms", "first_call_s", "peak_extra_mib", "peak_resident_mib", "gflop_per_s",
    "fraction_of_gemm", "speedup_over_reference", "memory_over_reference", "loss", "steady", "fraction_of_copy",
    "fraction_by",
)  # fmt: skip


def write_csv(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One line a row, from the records of a JSON."""
    _write_csv(path, _CSV, (_flat(record) for record in records))


def write_kernels_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One line a kernel, from the records of a JSON; the times in milliseconds."""
    flat = [{**record, "median_ms": _scaled((record.get("time") or {}).get("median_s"), 1e3)} for record in records]
    columns = [key for key in flat[0] if key != "time"]
    _write_csv(path, columns, ({key: row[key] for key in columns} for row in flat))


def _write_csv(path: Path, columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else float(f"{value * factor:.6g}")


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    def milliseconds(key: str, field: str) -> float | None:
        return _scaled((record.get(key) or {}).get(field), 1e3)

    return {
        **{key: record.get(key) for key in ("batch", "classes", "dtype", "mode", "provider", "status", "reason")},
        "terms": "+".join(record["terms"]),
        "gate_ratio": _scaled((record.get("gate") or {}).get("ratio"), 1),
        "median_ms": milliseconds("time", "median_s"),
        "p20_ms": milliseconds("time", "p20_s"),
        "p80_ms": milliseconds("time", "p80_s"),
        "rounds": (record.get("time") or {}).get("rounds"),
        "kernels_ms": milliseconds("kernels_time", "median_s"),
        "graph_ms": milliseconds("graph_time", "median_s"),
        "first_call_s": _scaled(record.get("first_call_s"), 1),
        "peak_extra_mib": _scaled(record.get("peak_extra_bytes"), 2**-20),
        "peak_resident_mib": _scaled(record.get("peak_extra_resident_bytes"), 2**-20),
        "gflop_per_s": _scaled(record.get("flop_per_s"), 1e-9),
        "fraction_of_gemm": _scaled(record.get("fraction_of_gemm"), 1),
        "speedup_over_reference": _scaled(record.get("speedup_over_reference"), 1),
        "memory_over_reference": _scaled(record.get("memory_over_reference"), 1),
        "loss": record.get("loss", "mcld"),
        "steady": (record.get("time") or {}).get("steady"),
        "fraction_of_copy": _scaled(record.get("fraction_of_copy"), 1),
        "fraction_by": record.get("fraction_by"),
    }
