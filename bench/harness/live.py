"""A pytest plugin: a line of JSON for each test as it begins and ends, in the file that MCLD_LIVE names.

A GPU kernel that hangs cannot be interrupted, so pytest is killed and writes no report; these lines name the test that
was running, and hold the traceback of each failure. A process whose CUDA context is lost, by an illegal address for
example, would fail all later tests: it ends, and pytest-xdist starts another.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

_LOST = 13  # exit code of a worker without a context
_TRACEBACK = 3000  # characters of a traceback, from its end
_CRASHED = "crashed while running"  # as pytest-xdist says it
_failed: set[str] = set()


def _write(**entry: Any) -> None:
    path = os.environ.get("MCLD_LIVE")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:  # the controller hears of every test
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _write(test=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _failed.add(report.nodeid)
    if report.when != "call" and report.passed:
        return
    message, more = "", {}
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash else report.longrepr)[:600]
        more = {"traceback": str(report.longrepr)[-_TRACEBACK:]}
    elif report.skipped and isinstance(report.longrepr, tuple):
        message = str(report.longrepr[2]).removeprefix("Skipped: ")
    _write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), message=message, **more)


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    _write(test=nodeid, finished=True)
    torch = sys.modules.get("torch")
    if nodeid in _failed and torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _write(context_lost=nodeid)
            time.sleep(0.5)  # a worker's reports are sent by a thread
            os._exit(_LOST)


def read(path: Path) -> dict[str, Any]:
    """Counts of outcomes, failed tests with their messages, reasons of skips, and tests that did not end."""
    outcomes: dict[str, dict[str, Any]] = {}
    running: dict[str, None] = {}
    crashed: dict[str, None] = {}
    context_lost = None
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was killed
            entry = json.loads(line)
            if "context_lost" in entry:
                context_lost = entry["context_lost"]
                continue
            name = entry["test"]
            if "outcome" in entry:
                if _CRASHED in entry["message"]:
                    crashed[name] = None
                worse = outcomes.get(name, {}).get("outcome") == "failed"
                outcomes[name] = outcomes[name] if worse else entry
            elif entry.get("finished"):
                running.pop(name, None)
            else:
                running[name] = None
    failed = {name: entry["message"] for name, entry in outcomes.items() if entry["outcome"] == "failed"}
    skipped = Counter(entry["message"] for entry in outcomes.values() if entry["outcome"] == "skipped")
    counts = Counter(entry["outcome"] for entry in outcomes.values())
    return {
        "counts": {"tests": len(outcomes), **{key: counts[key] for key in ("passed", "failed", "skipped")}},
        "failed": failed,
        "skipped": dict(skipped),
        "unfinished": [name for name in running if name not in outcomes],
        "crashed": list(crashed),
        "context_lost": context_lost,
        "slowest": {
            name: entry["seconds"]
            for name, entry in sorted(outcomes.items(), key=lambda item: -item[1]["seconds"])[:10]
        },
    }
