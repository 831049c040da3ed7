"""A Markdown table of recorded rows: ``python bench/table.py bench/results/<name>/results.json ...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.harness import machine, programs  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402
from bench.harness.report import mebibytes, seconds  # noqa: E402

CLOCKS = {"kernels_time": " (kernels)", "graph_time": " (graph)"}  # by which a fraction goes in place of the call's


def markdown(*runs: dict[str, Any]) -> str:
    """One line a measured row of each run; machine, load, versions and commit below."""
    lines = [
        "| B | C | dtype | terms | provider | time | against eager | peak extra MiB | against eager | of GEMM |",
        "|---:|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in (row for run in runs for row in run["rows"]):
        if row["status"] == "not run":
            continue
        loss = row.get("loss", "mcld")
        terms = loss if loss != "mcld" else "all" if len(row["terms"]) == 3 else " + ".join(row["terms"])
        batch = str(row["batch"]) + (f", m = {row['candidates']}" if row.get("candidates") else "")
        cells = [batch, str(row["classes"]), row["dtype"], terms, f"`{row['provider']}`"]
        if row["status"] != "ok":
            cells += [row["status"], "", "", "", ""]
        else:
            cells += [
                seconds(row["time"]["median_s"]),
                _ratio(row["speedup_over_reference"], "{:.2f}x"),
                mebibytes(row["peak_extra_bytes"]),
                _ratio(
                    row["memory_over_reference"], "{:.2f}x" if (row["memory_over_reference"] or 1) >= 0.1 else "{:.1g}x"
                ),
                _ratio(row["fraction_of_gemm"], "{:.0%}" + CLOCKS.get(row.get("fraction_by"), "")),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    captions = dict.fromkeys(f"{machine.caption(run)}." for run in runs)
    return "\n".join([*lines, "", *captions])


def _ratio(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(description="A Markdown table of recorded rows.", epilog=programs.EXIT_CODES)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of bench/run.py")
    paths = parser.parse_args(arguments).results
    programs.make_output_printable()
    runs = []
    for path in paths:
        try:
            run = json.loads(path.read_text())
            markdown(run)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            print(f"table: {path} is no results.json of bench/run.py: {type(fault).__name__}: {fault}", file=sys.stderr)
            return Exit.USAGE
        runs.append(run)
    print(markdown(*runs))
    return Exit.OK


if __name__ == "__main__":
    programs.end_with_pipe()
    sys.exit(main())
