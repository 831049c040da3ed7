"""Build, tests, sanitizer and measurements on a GPU machine, in under 8 minutes: ``python bench/gpu_report.py``.

Phases run one after the other, each in a process of its own with its own time budget: build, ceilings, the tests
marked ``gpu``, the benchmark grid, compute-sanitizer. The report is written after every phase, so an interrupted
run keeps its measurements. ``--dry-run`` prints the plan and ``--rehearse`` runs it on a CPU at a toy size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.harness import goals, machine, programs  # noqa: E402
from bench.harness import report as reports  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402

TOTAL_S = 465  # under 8 minutes with the plots
GRACE_S = 6  # between asking a phase to end and ending it
TAIL = 4000  # characters of a phase's output that the report keeps; the whole is in its log
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Phase:
    """One step of the report. ``read`` turns the output of the phase into plain values."""

    name: str
    command: list[str]
    budget_s: int
    read: Callable[[str], dict[str, Any]] = lambda output: {}
    environment: dict[str, str] = field(default_factory=dict)
    skip: str | None = None  # why it cannot run here


def build_archs() -> str:
    """The architecture of this machine's GPU, as CMake writes it; 9.0 and 10.0 need the "a" for wgmma and its heirs."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}{'a' if major in (9, 10) else ''}-real"


def plan(folder: Path, rehearse: bool) -> list[Phase]:
    """The phases in their order: those that others need first, the sanitizer, the slowest, late."""
    python = sys.executable
    grid = ["--smoke", "--device", "cpu"] if rehearse else ["--device", "cuda", "--repeats", "20", "--seconds", "6"]
    junit = folder / "tests.xml"
    phases = [
        Phase("info", [python, "-m", "mcld_kernels.info"], 40),
        Phase(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            120,
            environment={"MCLD_BUILD_CUDA": "1", "MCLD_CUDA_ARCHS": build_archs()},
            skip="a rehearsal builds nothing" if rehearse else None,
        ),
        Phase("ceilings", [python, "bench/ceilings.py"], 60, last_json),
        Phase(
            "tests",
            [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", "tests"],
            100,
            lambda output: read_junit(junit),
            skip="a rehearsal has no GPU tests to run" if rehearse else None,
        ),
        Phase("bench", [python, "bench/run.py", *grid, "--output", str(folder)], 240, lambda _: read_rows(folder)),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    missing = None if sanitizer else "compute-sanitizer is not on the PATH"
    for tool in SANITIZERS:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--print-limit", "10"]
        phases.append(
            Phase(
                f"sanitizer-{tool}",
                [*command, python, "bench/sanitize.py"],
                30,
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                skip="a rehearsal has no GPU to watch" if rehearse else missing,
            )
        )
    # For `auto`, with what time is left: its whole grid takes longer.
    shapes = ["--dtype", "bfloat16", "--batch", "256", "1024", "4096", "16384", "--seconds", "70"]
    phases.append(
        Phase(
            "calibrate",
            [python, "bench/calibrate.py", *shapes, "--output", str(folder / "table.json")],
            90,
            lambda _: json.loads((folder / "table.json").read_text()),
            skip="a rehearsal has no GPU to choose for" if rehearse else None,
        )
    )
    return phases


def run_phase(phase: Phase, folder: Path, limit_s: float) -> dict[str, Any]:
    """Run one phase; after ``limit_s`` it is interrupted, and a little later killed. Its faults do not raise."""
    if phase.skip:
        return {"status": "not run", "reason": phase.skip}
    if limit_s <= 0:
        return {"status": "not run", "reason": "the time was used up"}
    log = folder / f"{phase.name}.log"
    start = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | phase.environment
    status = "ok"
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                phase.command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
                preexec_fn=_interruptible,
            )  # fmt: skip
        except OSError as fault:
            return {"status": "failed", "reason": f"cannot start: {fault.strerror}"}
        try:
            code = process.wait(limit_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            status = "timed out" if isinstance(stop, subprocess.TimeoutExpired) else "interrupted"
            code = _end(process)
    if status == "ok" and code != 0:
        status = "failed"
    output = log.read_text(errors="replace")
    record: dict[str, Any] = {
        "status": status,
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "output_tail": _without_paths(output[-TAIL:]),
    }
    try:
        record |= phase.read(output)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as fault:
        record["unread"] = f"{type(fault).__name__}: {fault}"
    return record


def _interruptible() -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Interrupt the phase, so that it writes its results; then kill it with its children."""
    for number, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


def _without_paths(text: str) -> str:
    """Recorded results are published: no path of the machine in them."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~").replace(sys.prefix, "<python>")


def last_json(output: str) -> dict[str, Any]:
    """The last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise ValueError("no JSON in the output")


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a test run, and the names of the tests that failed."""
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return {"counts": counts, "failed": failed}


def read_rows(folder: Path) -> dict[str, Any]:
    """The results of the benchmark, which it writes after every case."""
    run = json.loads((folder / "results.json").read_text())
    return {key: run[key] for key in ("machine", "versions", "commit", "dirty", "ceilings", "complete", "rows")}


def write(folder: Path, report: dict[str, Any]) -> None:
    """The JSON, and from the rows the CSV, the goals and the plot."""
    rows = report["phases"].get("bench", {}).get("rows", [])
    report["goals"] = goals.judge(rows)
    reports.write_json(folder / "report.json", report)
    if rows:
        reports.write_csv(folder / "report.csv", rows)


def draw(folder: Path, report: dict[str, Any]) -> None:
    bench_phase = report["phases"].get("bench", {})
    if bench_phase.get("rows"):
        from bench.harness import plots

        head = bench_phase | {"started": report["started"]}
        plots.plot(bench_phase["rows"], folder / "report.png", machine.caption(head))


def summary(report: dict[str, Any]) -> str:
    lines = []
    for name, phase in report["phases"].items():
        detail = phase.get("reason") or ""
        if "counts" in phase:
            detail = ", ".join(f"{value} {key}" for key, value in phase["counts"].items())
        if "rows" in phase:
            measured = sum(row["status"] == "ok" for row in phase["rows"])
            failed = sum(row["status"] in ("FAILED", "error") for row in phase["rows"])
            detail = f"{measured} rows measured, {failed} failed"
        seconds = f"{phase['seconds']:6.1f} s" if "seconds" in phase else " " * 8
        lines.append(f"{name:<22}{phase['status']:<12}{seconds}  {detail}")
    for goal in report.get("goals", []):
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}"
        verdict = {True: "reached", False: "MISSED", None: ""}[goal["reached"]]
        lines.append(f"{goal['regime']}, B = {goal['batch']}, {goal['backend']}: {goal['goal']}: {value} {verdict}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(
        description="Build, test, sanitize and measure on a GPU machine.", epilog=programs.EXIT_CODES
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: bench/out/gpu-<date and time>")
    parser.add_argument("--dry-run", action="store_true", help="print the phases, commands and budgets, and stop")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: go through what a CPU can do, small")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PHASE", help="phases to leave out")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"in all (default: {TOTAL_S})")
    options = parser.parse_args(arguments)
    programs.make_output_printable()
    default = ROOT / "bench" / "out" / time.strftime("gpu-%Y%m%d-%H%M%S")
    phases = plan((options.output or default).resolve(), options.rehearse)
    unknown = set(options.skip) - {phase.name for phase in phases}
    if unknown:
        parser.error(f"no such phase: {', '.join(sorted(unknown))}; phases: {', '.join(p.name for p in phases)}")
    if options.dry_run:
        for phase in phases:
            reason = phase.skip or ("left out by --skip" if phase.name in options.skip else None)
            setting = " ".join(f"{key}={value}" for key, value in phase.environment.items())
            command = _without_paths(" ".join(filter(None, [setting, *phase.command])))
            print(f"{phase.name:<22}{phase.budget_s:>4} s  {command}{f'   (not run: {reason})' if reason else ''}")
        return Exit.OK
    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        print(
            "gpu_report: this machine, or this build of torch, has no CUDA device, and everything here needs one.\n"
            "--dry-run prints the plan; --rehearse runs the plumbing on the CPU; bench/run.py measures the CPU.",
            file=sys.stderr,
        )
        return Exit.NO_DEVICE
    try:
        with programs.claimed(options.output, default, "report.json") as folder:
            return run_all(plan(folder.resolve(), options.rehearse), folder.resolve(), options)
    except programs.FolderInUse as fault:
        print(f"gpu_report: {fault}", file=sys.stderr)
        return Exit.USAGE
    except OSError as fault:
        print(f"gpu_report: the output cannot be written: {fault}", file=sys.stderr)
        return Exit.OUTPUT


def run_all(phases: Sequence[Phase], folder: Path, options: argparse.Namespace) -> int:
    """Run the phases into the folder; 0, 1 where one failed or was cut short, 130 where it was interrupted."""
    deadline = time.monotonic() + options.seconds
    report: dict[str, Any] = {
        "schema": 1,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rehearsal": options.rehearse,
        "phases": {},
    }
    for phase in phases:
        if phase.name in options.skip:
            phase.skip = "left out by --skip"
        print(f"{phase.name} (at most {phase.budget_s} s) ...", flush=True)
        limit = min(phase.budget_s, deadline - time.monotonic() - GRACE_S)
        report["phases"][phase.name] = record = run_phase(phase, folder, limit)
        write(folder, report)
        print(f"  {record['status']}", flush=True)
        if record["status"] == "interrupted":
            break
    draw(folder, report)
    print(summary(report))
    statuses = {phase["status"] for phase in report["phases"].values()}
    if "interrupted" in statuses:
        return Exit.INTERRUPTED
    return Exit.OK if statuses <= {"ok", "not run"} else Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
