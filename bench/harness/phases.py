"""Phases of a report: commands in processes of their own, each with a time budget, and the archive they leave.

Phases of one group run side by side. MCLD_PHASE_S tells a phase how many seconds it may take; one that is out of time
is interrupted, so that it writes its results, and then killed with its children; one that cannot be killed is left
behind. The archive is rewritten in one step after every group and, while a group runs, every `REWRITE_S`. A signal to
the report ends the phases in the same way; a second one kills them. Nothing that a report has started outlives it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 6.0  # between asking a phase to end and killing it
ABANDON_S = 5.0  # after which a process that does not die is left behind
REWRITE_S = 20.0
POLL_S = 0.1
TAIL = 4000  # characters of a phase's output that the report keeps; the whole is in its log
LARGEST = 15 << 20  # bytes of an archive; the largest files are left out, and named, where it would be larger

Record = dict[str, Any]
Outcomes = dict[str, Record]  # by phase


@dataclass(kw_only=True)
class Phase:
    """One step of a report."""

    name: str
    command: list[str] | Callable[[Outcomes], list[str]]  # from the outcomes of the phases before
    budget_s: float
    most_s: float = math.inf  # however much time is left
    group: str | None = None  # phases of one group run side by side
    read: Callable[[str], Record] = lambda output: {}  # its output -> values for the report
    environment: dict[str, str] = field(default_factory=dict)
    skip: str | None | Callable[[Outcomes], str | None] = None  # the reason why it cannot run
    fault: str | None = None  # a pattern: the phase must fail, with this message in its output
    told: str | None = None  # a pattern: a phase without it in its output has failed

    @property
    def planned_s(self) -> float:
        """The time that is kept for it."""
        return 0.0 if isinstance(self.skip, str) else self.budget_s

    def skip_reason(self, outcomes: Outcomes) -> str | None:
        return self.skip(outcomes) if callable(self.skip) else self.skip

    def command_line(self, outcomes: Outcomes) -> list[str]:
        return self.command(outcomes) if callable(self.command) else self.command


def _hear_interrupts() -> None:
    """In a child: a shell makes what it starts in the background ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """A phase under way; `record` is None until it has ended."""

    def __init__(self, phase: Phase, folder: Path, outcomes: Outcomes, limit_s: float):
        self.phase, self.log, self.limit_s = phase, folder / f"{phase.name}.log", limit_s
        self.record: Record | None = None
        self.start, self._asked, self._killed = time.monotonic(), 0.0, 0.0
        self._status = "ok"
        reason = phase.skip_reason(outcomes)
        if reason is None and limit_s <= 0:
            reason = "the time was used up"
        if reason is not None:
            self.record = {"status": "not run", "reason": reason}
            return
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "MCLD_PHASE_S": f"{limit_s:.0f}"} | phase.environment
        try:
            with self.log.open("wb") as out:
                self.process = subprocess.Popen(
                    phase.command_line(outcomes), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    cwd=ROOT, env=environment, start_new_session=True,
                    preexec_fn=_hear_interrupts if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else None,
                )  # fmt: skip
        except OSError as fault:
            self.record = {"status": "failed", "reason": f"cannot start: {fault.strerror}"}

    def poll(self, now: float) -> bool:
        """True once the phase has ended; on its way, it is asked to end and killed as its time is up."""
        if self.record is not None:
            return True
        code = self.process.poll()
        if code is None:
            if not self._asked and now >= self.start + self.limit_s:
                self.stop("timed out", now)
            elif self._asked and not self._killed and now >= self._asked + GRACE_S:
                self._killed = now
                self._signal(signal.SIGKILL)
            elif self._killed and now >= self._killed + ABANDON_S:
                self._finish(None)
            return self.record is not None
        self._finish(code)
        return True

    def stop(self, status: str, now: float) -> None:
        """Interrupt the phase, so that it writes its results."""
        if self.record is None and not self._asked:
            self._asked, self._status = now, status
            self._signal(signal.SIGINT)

    def kill(self, now: float) -> None:
        """Kill the phase with its children, without a grace."""
        if self.record is None and not self._killed:
            self._asked = self._asked or now
            self._killed = now
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def _finish(self, code: int | None) -> None:
        self._signal(signal.SIGKILL)  # children that outlive it
        try:
            output = self.log.read_text(errors="replace")
        except OSError as fault:
            output = f"no output: {fault}"
        status = "failed" if self._status == "ok" and code != 0 else self._status
        record: Record = {
            "status": status,
            "exit_code": code,
            "seconds": round(time.monotonic() - self.start, 1),
            "output_tail": without_paths(output[-TAIL:]),
        }
        if code is None:
            record["reason"] = "it could not be killed, and was left behind"
        if self.phase.told is not None and status == "ok" and not re.search(self.phase.told, output):
            record |= {"status": "failed", "reason": f"no message like {self.phase.told!r}"}
        if self.phase.fault is not None and status != "interrupted":
            told = re.search(self.phase.fault, output)
            record["status"] = "ok" if told and status in ("failed", "timed out") else "failed"
            record["reason"] = f"left its message: {told[0]}" if told else f"no message like {self.phase.fault!r}"
        try:
            record |= self.phase.read(output)
        except Exception as unread:  # whatever a phase that was cut short has left
            record["unread"] = f"{type(unread).__name__}: {unread}"
        self.record = record


def run(
    phases: Sequence[Phase],
    folder: Path,
    deadline: float,
    outcomes: Outcomes,
    rewrite: Callable[[], None],
    say: Callable[[str], None],
    signals: Callable[[], int] = lambda: 0,
) -> None:
    """Run the groups in order, into ``outcomes``; ``deadline`` by time.monotonic().

    A group may take the budget of its phases and all time that is not the budget of a later group; one that must fail
    takes its budget alone. ``signals``: the signals to end that have come so far (`noted_signals`).
    """
    groups = list(grouped(phases))
    for number, group in enumerate(groups):
        if signals():
            return
        later = sum(max(phase.planned_s for phase in following) for following in groups[number + 1 :])
        begin = time.monotonic()
        most = deadline - begin - GRACE_S
        budget = max(phase.planned_s for phase in group)
        limit = min(most, budget if any(phase.fault for phase in group) else max(budget, most - later))
        limits = [min(limit, phase.most_s) for phase in group]
        say(f"{', '.join(phase.name for phase in group)} (at most {max(0, *limits):.0f} s) ...")
        runs: list[Running] = []
        try:
            runs += [Running(phase, folder, outcomes, most_s) for phase, most_s in zip(group, limits, strict=True)]
            _wait(runs, rewrite, signals)
        finally:  # whatever is raised here
            for running in runs:
                running.kill(time.monotonic())
        for running in runs:
            assert running.record is not None
            outcomes[running.phase.name] = running.record
            say(f"  {running.phase.name}: {running.record['status']}")
        rewrite()


def _wait(runs: Sequence[Running], rewrite: Callable[[], None], signals: Callable[[], int]) -> None:
    """Until all have ended."""
    written, heard = time.monotonic(), 0
    while sum(running.poll(time.monotonic()) for running in runs) < len(runs):
        time.sleep(POLL_S)
        if signals() > heard:
            heard = signals()
            if heard == 1:
                rewrite()  # before the phases have their grace: whoever signals may kill next
            for running in runs:
                if heard == 1:
                    running.stop("interrupted", time.monotonic())
                else:
                    running.kill(time.monotonic())
        elif time.monotonic() >= written + REWRITE_S:
            written = time.monotonic()
            rewrite()


def grouped(phases: Sequence[Phase]) -> Iterator[list[Phase]]:
    """Phases that run side by side, in order."""
    for _, members in groupby(enumerate(phases), key=lambda item: item[1].group or item[0]):
        yield [phase for _, phase in members]


def planned_seconds(phases: Sequence[Phase]) -> float:
    """The sum of the budgets, those of a group once."""
    return sum(max(phase.planned_s for phase in group) for group in grouped(phases))


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Gives the number of signals to end that have come: they are noted here, and not raised.

    A shell starts background jobs with SIGINT ignored, and children inherit that; a handler they do not inherit.
    """
    count = 0

    def note(number: int, frame: Any) -> None:
        nonlocal count
        count += 1

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def without_paths(text: str) -> str:
    """Recorded results are published: no path of the machine in them."""
    names = {str(ROOT): ".", sys.prefix: "<python>", str(Path.home()): "~"}
    for path in sorted(names, key=len, reverse=True):  # one may lie in another, as a virtual environment in a checkout
        text = text.replace(path, names[path])
    return text


def archive(path: Path, folder: Path) -> list[str]:
    """Write everything in the folder to a tar.gz in one step; returns the files left out of one too large."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=_size)
    left_out: list[str] = []
    partial = path.with_name(f".{path.name}.partial")
    try:
        while True:
            with tarfile.open(partial, "w:gz", compresslevel=6) as tar:
                for file in files:
                    try:
                        content, modified = file.read_bytes(), file.stat().st_mtime
                    except OSError:  # of a phase under way, and gone
                        continue
                    # Read as a whole: a file that is cut short while tarfile copies it would break the archive.
                    member = tarfile.TarInfo(f"{path.name.partition('.')[0]}/{file.relative_to(folder)}")
                    member.size, member.mtime = len(content), int(modified)
                    tar.addfile(member, io.BytesIO(content))
            if partial.stat().st_size <= LARGEST or len(files) <= 1:
                break
            left_out.append(str(files.pop().relative_to(folder)))
        partial.replace(path)
    except OSError:  # a full disk: what was written last stays
        partial.unlink(missing_ok=True)
        raise
    return left_out


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def last_json(output: str) -> Record:
    """The last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            value: Record = json.loads(line)
            return value
    raise ValueError("no JSON in the output")


def json_lines(path: Path) -> list[Record]:
    """Every whole line of a file of JSON lines; none where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # of a process that was killed
            continue
    return rows
