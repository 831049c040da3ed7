"""Shared by the programs: exit codes, argument types, output folders and text for terminals without Unicode."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mcld_kernels.calibrate import EXIT_CODES, Exit
from mcld_kernels.console import to_terminal, wrapped

__all__ = [
    "EXIT_CODES",
    "Exit",
    "MOST_THREADS",
    "FolderInUse",
    "Parser",
    "claimed",
    "complain",
    "end_with_pipe",
    "make_output_printable",
    "positive",
    "tell_stage",
    "threads",
    "to_terminal",
    "wrapped",
]

MOST_THREADS = 4 * (os.cpu_count() or 1)  # OpenMP crashes when it cannot start the threads that it is told to


class FolderInUse(Exception):
    """The folder given by --output holds the results of another run."""


def complain(text: str) -> None:
    """Print a message on stderr, as wide as the terminal (COLUMNS, else 80)."""
    print(to_terminal(text), file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """A parser whose errors fit the terminal as its help does."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        complain(f"{self.prog}: error: {message}")
        raise SystemExit(int(Exit.USAGE))


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def threads(text: str) -> int:
    """An argument that is a number of CPU threads which this machine can start."""
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_THREADS}, four times this machine's CPUs; got {value}")
    return value


@contextlib.contextmanager
def claimed(requested: Path | None, default: Path, marker: str) -> Iterator[Path]:
    """The output folder, with a file ``marker`` that this run has made and no other run can make.

    A default name that is in use gets a number. Raises FolderInUse for a requested folder in use, OSError where it
    cannot be made. A marker that is still empty at the end is removed.
    """
    folder = _claim(requested, default, marker)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if (folder / marker).stat().st_size == 0:
                (folder / marker).unlink()
                folder.rmdir()  # fails, rightly, where there is anything else


def _claim(requested: Path | None, default: Path, marker: str) -> Path:
    for number in itertools.count(1):
        folder = requested or (default if number == 1 else default.with_name(f"{default.name}-{number}"))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / marker).open("x").close()
            return folder
        except FileExistsError:
            if requested is not None:
                raise FolderInUse(f"{folder} holds {marker} of another run: choose another --output") from None
    raise AssertionError("unreachable")


def tell_stage(case: int, text: str) -> None:
    """Write where a benchmark is, for bench/isolated.py, to the file that MCLD_STAGE names."""
    if path := os.environ.get("MCLD_STAGE"):
        with contextlib.suppress(OSError):  # a full disk: what is measured counts for more
            Path(path).write_text(json.dumps({"case": case, "stage": text}))


_REPLACEMENTS = {"µ": "u", "±": "+-", "×": "x", "…": "...", "–": "-", "−": "-"}


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_REPLACEMENTS.get(character, "?") for character in text), error.end


def end_with_pipe() -> None:
    """End quietly where nobody reads stdout any more, as in ``| head``: of programs that only print."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def make_output_printable() -> None:
    """Let stdout replace the characters that its encoding does not have, where it would raise."""
    codecs.register_error("mcld_replace", _replace)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="mcld_replace")
