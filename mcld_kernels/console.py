"""Text for a terminal or a pipe."""

from __future__ import annotations

import shutil
import textwrap


def wrapped(text: str, width: int) -> str:
    """The lines of the text, none longer than the width; what a line goes on with is indented."""
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line, width, subsequent_indent=f"{indent}    ", break_on_hyphens=False, drop_whitespace=True
        ) or [""]
    return "\n".join(lines)


def to_terminal(text: str) -> str:
    """The text as wide as the terminal (COLUMNS, else 80)."""
    return wrapped(text, shutil.get_terminal_size().columns)
