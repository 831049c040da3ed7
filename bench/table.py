"""A Markdown table of recorded rows, as in the README: ``python bench/table.py bench/results/<name>/results.json``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import machine  # noqa: E402
from bench.report import mebibytes, seconds  # noqa: E402


def markdown(found: dict[str, Any]) -> str:
    """One line a measured row, with a line below for where and with what it was measured."""
    lines = [
        "| B | C | dtype | terms | provider | time | against eager | peak extra MiB | against eager | of GEMM |",
        "|---:|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        if row["status"] == "not run":
            continue
        terms = "all" if len(row["terms"]) == 3 else " + ".join(row["terms"])
        cells = [str(row["batch"]), str(row["classes"]), row["dtype"], terms, f"`{row['provider']}`"]
        if row["status"] != "ok":
            cells += [row["status"], "", "", "", ""]
        else:
            cells += [
                seconds(row["time"]["median_s"]),
                _ratio(row["speedup_over_reference"], "{:.2f}x"),
                mebibytes(row["peak_extra_bytes"]),
                _ratio(row["memory_over_reference"], "{:.2f}x"),
                _ratio(row["fraction_of_gemm"], "{:.0%}"),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    commit = (found["commit"] or "unknown")[:10] + (", with changes" if found["dirty"] else "")
    torch_version, day = found["versions"]["torch"], found["started"][:10]
    lines += ["", f"{machine.name(found['machine'])}; torch {torch_version}; commit {commit}; {day}."]
    return "\n".join(lines)


def _ratio(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Markdown table of recorded rows.")
    parser.add_argument("results", type=Path, help="a results.json of bench/run.py")
    print(markdown(json.loads(parser.parse_args().results.read_text())))
