"""Tests and measurements on a GPU machine.

Three commands of under 9 minutes each, in order of value:

    python3 bench/gpu_report.py correct
        is it right, and is it fast on a short grid?
    python3 bench/gpu_report.py speed
        the long grid, forms of the kernels, profiles, Nsight Compute
    python3 bench/gpu_report.py safe
        compute-sanitizer, forced faults, the table for backend="auto"

Phases run in processes of their own, each within its budget and all within
``--minutes``. After every phase one archive, ``gpu-<command>.tar.gz``, is
rewritten with everything: logs, JSON, CSV and plots. It goes to ``--output``,
else to the folder that the environment variable OUT names, else to bench/out.
SIGINT and SIGTERM end the phases and leave an archive of what there is.
``--without hopper`` leaves out a provider that an earlier command has lost.
``--dry-run`` prints the plan; ``--rehearse`` runs it on a CPU at a toy size.
``bench/publish.py`` turns an archive into recorded results.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.harness import commands, goals, machine, phases  # noqa: E402
from bench.harness import report as reports  # noqa: E402
from bench.harness.phases import Phase  # noqa: E402
from bench.harness.programs import (  # noqa: E402
    EXIT_CODES,
    Exit,
    FolderInUse,
    claimed,
    complain,
    make_output_printable,
    wrapped,
)

LAST_S = 20  # after the deadline a thread ends the program, whatever it waits for
DOC = __doc__ or "Tests and measurements on a GPU machine."  # python -OO has no docstrings


class Report:
    """The record of a run, rewritten with the archive."""

    def __init__(self, command: str, folder: Path, archive: Path, rehearse: bool):
        self.folder, self.path = folder, archive
        self.content: dict[str, Any] = {
            "schema": 2,
            "command": command,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rehearsal": rehearse,
            "phases": {},
            **machine.commit(),
        }
        self._lock = threading.Lock()
        self.fault: OSError | None = None  # that the last writing of the archive met

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of every benchmark."""
        return [row for phase in self.content["phases"].values() for row in phase.get("rows", [])]

    def write(self) -> None:
        """Write what can be written: a fault here is told, and must not cost the phases that follow."""
        with self._lock:
            try:
                self.content["goals"] = goals.judge(self.rows)
                text = summary(self.content)
            except Exception as fault:  # of rows as nobody expected them
                text = f"no summary: {type(fault).__name__}: {fault}"
                self.content["no_summary"] = text
            before, self.fault = self.fault, None
            for step in (
                lambda: reports.write_json(self.folder / "report.json", self.content),
                lambda: (self.folder / "summary.txt").write_text(text + "\n"),
                lambda: self.content.update(left_out=phases.archive(self.path, self.folder)),
            ):
                try:
                    step()
                except OSError as fault:
                    self.fault = fault
            if self.fault is not None and str(before) != str(self.fault):
                print(f"gpu_report: not written, to be tried again: {self.fault}", file=sys.stderr, flush=True)


def summary(content: dict[str, Any]) -> str:
    """A line for each phase, its failures below it, and a line for each goal."""
    lines, width = [], max([22, *(len(name) + 2 for name in content["phases"])])
    for name, phase in content["phases"].items():
        detail = phase.get("reason") or ""
        if "counts" in phase:
            detail = ", ".join(f"{value} {key}" for key, value in phase["counts"].items() if value)
        if "rows" in phase:
            measured = sum(row["status"] == "ok" for row in phase["rows"])
            failed = sum(row["status"] in ("FAILED", "error") for row in phase["rows"])
            detail = f"{measured} rows measured, {failed} failed"
        if phase.get("summary"):
            detail = "; ".join(filter(None, [phase.get("reason"), *phase["summary"]]))
        seconds = f"{phase['seconds']:6.1f} s" if "seconds" in phase else " " * 8
        lines.append(f"{name:<{width}}{phase['status']:<12}{seconds}  {detail}".rstrip())
        worst = phase.get("largest_error_of_allowed")
        if worst:
            lines.append("  largest error of what is allowed: " + ", ".join(f"{k} {v:.2f}" for k, v in worst.items()))
        failed_names = phase.get("failed") or {}
        lines += [f"  failed: {test}: {message.splitlines()[0] if message else ''}"[:200]
                  for test, message in list(failed_names.items())[:12]]  # fmt: skip
        lines += [f"  ... and {len(failed_names) - 12} more"] if len(failed_names) > 12 else []
        lines += [f"  did not end: {test}" for test in phase.get("unfinished", [])[:5]]
        lines += [f"  lost: {what}: {fault}"[:200] for what, fault in (phase.get("lost") or {}).items()]
        if phase.get("context_lost"):
            lines.append(f"  the CUDA context was lost: {phase['context_lost']}")
    for goal in content.get("goals", []):
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}"
        verdict = {True: "reached", False: "MISSED", None: ""}[goal["reached"]]
        lines.append(f"{goal['regime']}, B = {goal['batch']}, {goal['backend']}: {goal['goal']}: {value} {verdict}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=DOC, epilog=wrapped(EXIT_CODES, 78), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("command", choices=list(commands.COMMANDS))
    made.add_argument("--output", type=Path, metavar="DIR", help="for the archive")
    made.add_argument("--only", nargs="+", metavar="PHASE", help="these phases alone")
    made.add_argument("--skip", nargs="+", default=[], metavar="PHASE", help="phases to leave out")
    made.add_argument(
        "--without", nargs="+", default=[], choices=commands.OURS, metavar="PROVIDER",
        help=f"leave out of every phase: {', '.join(commands.OURS)}",
    )  # fmt: skip
    made.add_argument("--minutes", type=float, default=commands.MINUTES, help=f"in all (default: {commands.MINUTES})")
    made.add_argument("--dry-run", action="store_true", help="print the phases, commands and budgets, and stop")
    made.add_argument("--rehearse", action="store_true", help="without a GPU: what a CPU can do, small")
    return made


def this_machine(without: Sequence[str] = ()) -> commands.Machine:
    import torch

    # The GPU's name and capability open no context; kernels run in the phases' processes.
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    workers = max(2, min(6, (os.cpu_count() or 2) // 4))
    return commands.Machine(capability=capability, workers=workers, without=frozenset(without))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases of a command; returns one of the exit codes of ``--help``."""
    options = parser().parse_args(arguments)
    make_output_printable()
    here = this_machine(options.without)
    made = commands.COMMANDS[options.command]
    names = [phase.name for phase in made(Path("."), here, options.rehearse)]
    unknown = (set(options.skip) | set(options.only or ())) - set(names)
    if unknown:
        parser().error(f"no such phase: {', '.join(sorted(unknown))}; phases: {', '.join(names)}")

    def plan(folder: Path) -> list[Phase]:
        planned = made(folder, here, options.rehearse)
        for phase in planned:
            if phase.name in options.skip or (options.only and phase.name not in options.only):
                phase.skip = "left out by --skip" if phase.name in options.skip else "left out by --only"
        return planned

    if options.dry_run:
        show(plan(Path("<folder>")))
        return Exit.OK
    if here.capability is None and not options.rehearse:
        complain(
            "gpu_report: this machine, or this build of torch, has no CUDA device, and everything here needs one.\n"
            "--dry-run prints the plan; --rehearse runs its phases on the CPU at a toy size; bench/run.py measures the "
            "CPU."
        )
        return Exit.NO_DEVICE
    name = f"gpu-{options.command}.tar.gz"
    requested = options.output or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    default = ROOT / "bench" / "out" / time.strftime("gpu-%Y%m%d-%H%M%S")
    try:
        with claimed(requested, default, name) as target:
            with phases.noted_signals() as signals:
                return run_all(plan, options, target.resolve() / name, signals)
    except FolderInUse as fault:
        complain(f"gpu_report: {fault}")
        return Exit.USAGE
    except OSError as fault:
        complain(f"gpu_report: the output cannot be written: {fault}")
        return Exit.OUTPUT


def show(planned: Sequence[Phase]) -> None:
    for phase in planned:
        reason = phase.skip_reason({})
        setting = " ".join(f"{key}={value}" for key, value in phase.environment.items() if key != "PATH")
        command = phases.without_paths(" ".join(filter(None, [setting, shlex.join(phase.command_line({}))])))
        side_by_side = f" [{phase.group}]" if phase.group else ""
        print(f"{phase.name + side_by_side:<32}{phase.budget_s:>4.0f} s" + (f"  not run: {reason}" if reason else ""))
        print(f"    {command}")  # in one line, to be copied
    print(f"{phases.planned_seconds(planned):.0f} s in all; phases with one name in brackets run side by side")


def run_all(plan: Any, options: argparse.Namespace, archive: Path, signals: Callable[[], int]) -> int:
    """Run the phases; 0, 1 where one failed or was cut short, 4 without an archive, 130 where a signal ended it."""
    deadline = time.monotonic() + 60 * options.minutes
    folder = Path(tempfile.mkdtemp(prefix="gpu-report-"))
    report = Report(options.command, folder, archive, options.rehearse)

    def give_up() -> None:
        report.content["gave_up"] = "the deadline passed while a phase could not be ended"
        report.write()
        print("gpu_report: the deadline has passed", file=sys.stderr, flush=True)
        os._exit(Exit.FAILED)

    watchdog = threading.Timer(max(0.0, deadline - time.monotonic()) + LAST_S, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        phases.run(
            plan(folder), folder, deadline, report.content["phases"], report.write,
            lambda text: print(text, flush=True), signals,
        )  # fmt: skip
    finally:
        watchdog.cancel()
        if signals():
            report.content["interrupted"] = True
        report.write()
    print(summary(report.content) if "no_summary" not in report.content else report.content["no_summary"])
    if report.fault is not None:
        print(f"gpu_report: the archive cannot be written; {folder} is kept: {report.fault}", file=sys.stderr)
        return Exit.OUTPUT
    print(f"written to {phases.without_paths(str(archive))}")
    if report.content["left_out"]:
        print(f"left out, since the archive would be too large: {', '.join(report.content['left_out'])}")
    shutil.rmtree(folder, ignore_errors=True)
    if report.content.get("interrupted"):
        return Exit.INTERRUPTED
    statuses = {phase["status"] for phase in report.content["phases"].values()}
    return Exit.OK if statuses <= {"ok", "not run"} else Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
