"""``bench/run.py``, of which a provider that hangs or takes the process with it costs itself alone.

It takes the options of bench/run.py, --output among them, and runs it in a process of its own. Where that process
dies, loses its CUDA context or stands still, it is started again at the same case without the provider whose turn it
was; where it was no provider's turn, at the case that follows. The rows of all processes become one results.json, with
what was lost and why in its field "lost".
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.harness import report  # noqa: E402
from bench.harness.programs import EXIT_CODES, Exit  # noqa: E402

RUN = [sys.executable, str(ROOT / "bench" / "run.py")]
STALL_S = 45.0  # no stage of a case takes as long, but the compiler's
COMPILE_S = 150.0
LOADED_S = 20.0  # the gate of a provider whose kernels are compiled before: it computes at once or never
START_S = 90.0  # until the first stage: imports, the ceilings
TURNS = ("gate", "memory", "profile")  # stages that name the provider whose turn it is
MOST_STARTS = 12
POLL_S = 0.1
LAST_S = 3.0  # that an interrupted process has to write its results: less than the grace of a phase of a report


class Attempt:
    """One process of bench/run.py."""

    def __init__(self, arguments: Sequence[str], folder: Path):
        self.folder, self._stage_file = folder, folder.with_name(f"{folder.name}.stage")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._stage_file.unlink(missing_ok=True)
        environment = os.environ | {"MCLD_STAGE": str(self._stage_file)}
        self.process = subprocess.Popen([*RUN, *arguments, "--output", str(folder)], env=environment)
        self.stage: dict[str, Any] = {}
        self.fault: str | None = None

    def wait(self, interrupted: threading.Event) -> None:
        """Until it has ended, by itself, or because it stands still or goes on after an interrupt."""
        changed, since = time.monotonic(), None
        while self.process.poll() is None:
            time.sleep(POLL_S)
            now, stage = time.monotonic(), self._read_stage()
            if stage != self.stage:
                self.stage, changed = stage, now
            if interrupted.is_set():
                since = since or now
            if now > changed + self._limit():
                self.fault = f"it stood still for {self._limit():.0f} s"
            elif since is not None and now > since + LAST_S:
                self.fault = "it did not end when it was interrupted"
            if self.fault is not None:
                self.process.kill()
                self.process.wait()
        self.stage = self._read_stage()
        self._stage_file.unlink(missing_ok=True)

    def _read_stage(self) -> dict[str, Any]:
        try:
            stage: dict[str, Any] = json.loads(self._stage_file.read_text())
            return stage
        except (OSError, ValueError):  # not yet there, or half written
            return self.stage

    def _limit(self) -> float:
        if not self.stage:
            return START_S
        provider = (self.turn or "").partition(":")[0]
        if provider == "compile":
            return COMPILE_S
        is_gate = str(self.stage.get("stage", "")).startswith("gate ")
        return min(LOADED_S, STALL_S) if is_gate and provider in ("cuda", "hopper") else STALL_S

    @property
    def turn(self) -> str | None:
        """The provider whose turn it was."""
        what, *provider = str(self.stage.get("stage", "")).split(" ")  # behind it a kernel's name, of one alone
        return provider[0] if what in TURNS and provider else None

    @property
    def results(self) -> dict[str, Any]:
        path = self.folder / "results.json"
        try:
            made: dict[str, Any] = json.loads(path.read_text())
            return made
        except (OSError, ValueError):
            return {}

    @property
    def is_whole(self) -> bool:
        """True where it did what it could: its exit code is a result's, and its results say that they are complete."""
        return self.fault is None and self.process.returncode in tuple(Exit) and bool(self.results.get("complete"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run bench/run.py until it is through; returns one of its exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="of the run")
    parser.add_argument("--without", type=lambda text: text.split(","), default=[], metavar="P,P", help="leave out")
    options, given = parser.parse_known_args(arguments)
    output, without = options.output, options.without
    # An interrupt goes to the whole process group: the process under way has it as well, and inherits no handler.
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        return _until_through(given, without, output, interrupted)
    finally:
        signal.signal(signal.SIGINT, before)


def _until_through(given: list[str], without: list[str], output: Path, interrupted: threading.Event) -> int:
    first, code = 0, int(Exit.FAILED)
    made: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    lost: dict[str, str] = {}
    for number in range(MOST_STARTS):
        folder = output if number == 0 else output.with_name(f"{output.name}-again-{number}")
        changed = ["--without", ",".join(without)] if without else []
        attempt = Attempt([*given, *changed, *(["--first", str(first)] if first else [])], folder)
        attempt.wait(interrupted)
        code, results = attempt.process.returncode, attempt.results
        made = made or results
        rows += results.get("rows", [])
        ended = attempt.is_whole or code in (Exit.USAGE, Exit.NO_DEVICE, Exit.OUTPUT, Exit.INTERRUPTED)
        if not ended:
            where = f"case {attempt.stage.get('case')}, {attempt.stage.get('stage') or 'before the first case'}"
            fault = f"{attempt.fault or f'its process ended with code {code}'} at {where}"
            print(f"isolated: {fault}", file=sys.stderr, flush=True)
            lost[attempt.turn or where] = fault
        if lost and made:
            whole = made | {"rows": rows, "lost": lost, "complete": attempt.is_whole}
            report.write_json(output / "results.json", whole)
            report.write_csv(output / "results.csv", report.recordable(rows))
        # Without a stage it would not go better the next time.
        if ended or interrupted.is_set() or not attempt.stage:
            break
        first = attempt.stage["case"]
        if attempt.turn is None:
            first += 1
        else:
            without = [*without, attempt.turn]
    if interrupted.is_set():
        return Exit.INTERRUPTED
    return Exit.FAILED if lost or code not in tuple(Exit) else code


if __name__ == "__main__":
    sys.exit(main())
