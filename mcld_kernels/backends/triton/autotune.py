"""Opt-in autotuning of the kernels with products: MCLD_AUTOTUNE=1.

The first call with a new kind of operand, pitch and set of options times the alternatives and keeps the fastest for the
process. Off by default: it costs seconds of compiling, synchronizes, and lets the order of a sum, and so the last bits
of a result, depend on a clock. It never happens in the interpreter or while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .configs import Launch, TritonTuning

fastest: dict[Hashable, Launch] = {}  # of this process, by key


def choose(
    tuning: TritonTuning,
    key: Hashable,
    default: Launch,
    alternatives: Sequence[Launch],
    trial: Callable[[Launch], None],
) -> Launch:
    """The fastest of ``default`` and ``alternatives`` if autotuning is on, else ``default``. ``trial`` runs one."""
    if not tuning.autotune or tuning.blocks is not None:
        return default
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return default
    if key not in fastest:
        times = [(_milliseconds(trial, launch), i) for i, launch in enumerate((default, *alternatives))]
        fastest[key] = (default, *alternatives)[min(times)[1]]
    return fastest[key]


def _milliseconds(trial: Callable[[Launch], None], launch: Launch) -> float:
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: trial(launch), warmup=5, rep=30, return_mode="median"))
    except (OutOfResources, CompilationError, PTXASError):
        return float("inf")  # does not fit this GPU
