"""Distil a student from a teacher: ``python python/train.py`` on digits, ``--config FILE`` on data of your own.

Without --config (or --resume) it is the experiment of `distillation.experiment`, which takes about a minute.
With it, the trainer (package `trainer`), alone or under torchrun: docs/training.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "python"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # after the installed packages: an installed mcld_kernels comes first


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two programs; returns one of the exit codes of its ``--help``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if any(text.partition("=")[0] in ("--config", "--resume") for text in given):
        try:
            from trainer import program
        except ModuleNotFoundError as fault:
            print(f"error: {fault.name} is not installed: pip install -e '.[train]'", file=sys.stderr)
            return 2
        return program.main(given)
    from distillation import experiment

    return experiment.main(given)


if __name__ == "__main__":
    sys.exit(main())
