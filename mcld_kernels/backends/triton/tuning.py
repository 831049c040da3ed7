"""Opt-in tuning of the two kernels with products: MCLD_AUTOTUNE=1.

The first call with a new kind of operand, depth and set of options times the alternatives of `configs` and keeps the
fastest for the process. Off by default: it costs seconds of compiling, synchronises, and lets the order of a sum, and
so the last bits of a result, depend on a clock. It never happens in the interpreter or while a CUDA graph is captured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .configs import INTERPRETED, Launch

_chosen: dict[Hashable, Launch] = {}


def enabled() -> bool:
    return os.environ.get("MCLD_AUTOTUNE", "0") == "1"


def choose(key: Hashable, default: Launch, alternatives: Sequence[Launch], trial: Callable[[Launch], None]) -> Launch:
    """The fastest for ``key`` of ``default`` and ``alternatives`` if tuning is on, else ``default``; trial runs one."""
    if not enabled() or default == INTERPRETED:
        return default
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return default
    if key not in _chosen:
        times = [(_milliseconds(trial, launch), i) for i, launch in enumerate((default, *alternatives))]
        _chosen[key] = (default, *alternatives)[min(times)[1]]
    return _chosen[key]


def _milliseconds(trial: Callable[[Launch], None], launch: Launch) -> float:
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: trial(launch), warmup=5, rep=30, return_mode="median"))
    except (OutOfResources, CompilationError, PTXASError):
        return float("inf")  # does not fit this GPU
