"""The output of Nsight Compute for the kernels of ``bench/step.py``, as records."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import Any

SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "InstructionStats",
    "LaunchStats",
    "Occupancy",
    "SchedulerStats",
    "WarpStateStats",
)


def command(ncu: str, program: list[str]) -> list[str]:
    """The command line: what ``program`` runs between cudaProfilerStart and cudaProfilerStop, as CSV on stdout.

    The clocks are left as they are: the machine may be shared.
    """
    sections = [part for section in SECTIONS for part in ("--section", section)]
    return [
        ncu, "--profile-from-start", "off", "--clock-control", "none", "--target-processes", "all", "--csv",
        "--page", "details", "--print-units", "base", *sections, *program,
    ]  # fmt: skip


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """One record a launch, in order: ``kernel``, ``grid``, ``block`` and ``metrics`` (name and unit -> value).

    Lines of the program between the two tables are left out; a line "provider: case" names what follows.
    """
    records: dict[str, dict[str, Any]] = {}
    header: list[str] | None = None
    for line in lines:
        if not line.startswith('"'):
            continue
        cells = next(csv.reader([line]))
        if cells[0] == "ID":
            header = cells
            continue
        if header is None or len(cells) != len(header):
            continue
        row = dict(zip(header, cells))
        record = records.setdefault(
            row["ID"],
            {
                "kernel": row.get("Kernel Name"),
                "grid": row.get("Grid Size"),
                "block": row.get("Block Size"),
                "metrics": {},
            },
        )
        name, unit = row.get("Metric Name", ""), row.get("Metric Unit", "")
        if name:
            record["metrics"][f"{name} [{unit}]" if unit else name] = _number(row.get("Metric Value", ""))
    return list(records.values())


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
