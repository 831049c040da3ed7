"""The screen: a progress bar on a terminal, plain lines in a pipe, and tables that fit the width."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from bench.harness.programs import wrapped

PIPE_WIDTH = 80  # of a pipe, which has no width of its own
LINE_EVERY_S = 10.0  # in a pipe, a stage of a case is a line at most this often


def console(quiet: bool = False) -> Console:
    """The terminal, or a pipe of COLUMNS, else `PIPE_WIDTH`, columns."""
    made = Console(highlight=False, quiet=quiet)
    if made.is_terminal:
        return made
    return Console(width=int(os.environ.get("COLUMNS") or PIPE_WIDTH), highlight=False, quiet=quiet)


def say(screen: Console, text: str, style: str = "") -> None:
    """Print a message as wide as the screen. A word that fits on a line, such as a path, is never cut."""
    screen.print(Text(wrapped(text, screen.width)), style=style, soft_wrap=True)


def duration(seconds: float) -> str:
    """A rough time in words: it is an estimate."""
    if seconds < 90:
        return f"{max(1, round(seconds)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Stages:
    """The stage that the run is at."""

    def __init__(self, screen: Console, total: int, bar: Progress | None):
        self._screen, self._total, self._bar = screen, total, bar
        self._task = None if bar is None else bar.add_task("", total=total)
        self._number, self._title = 0, ""
        self._begun = self._shown = time.monotonic()

    def begin(self, title: str, estimated_s: float) -> None:
        """A case begins. Its estimate is shown if it is long, or if the output is a pipe."""
        self._number, self._title = self._number + 1, title
        self._begun = self._shown = time.monotonic()
        if self._bar is None or estimated_s >= 20:
            about = f"about {duration(estimated_s)}"
            self._print(f"case {self._number} of {self._total}: {title} ({about})")

    def stage(self, text: str) -> None:
        """A stage of the case."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title}: {text}")
        elif time.monotonic() - self._shown >= LINE_EVERY_S:
            self._shown = time.monotonic()
            self._print(f"  {text} (after {duration(self._shown - self._begun)})")

    def end(self) -> None:
        """The case is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def _print(self, text: str) -> None:
        say(self._screen, text, "dim")
        self._screen.file.flush()


@contextlib.contextmanager
def stages(screen: Console, total: int) -> Iterator[Stages]:
    """The stages of ``total`` cases, on a bar where the screen is a terminal."""
    if not screen.is_terminal:
        yield Stages(screen, total, None)
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=screen, transient=True) as bar:
        yield Stages(screen, total, bar)
