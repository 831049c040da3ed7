"""The compiled module ``mcld_kernels._C``: loaded once, or the reason why it cannot be."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType

# Written by setup.py when not even the CPU-only module could be built.
_NOTE = Path(__file__).parents[2] / "_C_missing.txt"
_OVERRIDE: ContextVar[ModuleType | None] = ContextVar("mcld_kernels_module", default=None)


def load() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and the reason why it cannot be imported; a module without CUDA is a module."""
    override = _OVERRIDE.get()
    return _import() if override is None else (override, None)


@contextlib.contextmanager
def use(module: ModuleType) -> Iterator[None]:
    """Make `load` return ``module`` inside: for tests, whose modules hold the kernels compiled for the host."""
    token = _OVERRIDE.set(module)
    try:
        yield
    finally:
        _OVERRIDE.reset(token)


@cache
def _import() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("mcld_kernels._C"), None
    except ImportError as error:
        if _NOTE.exists():
            return None, _NOTE.read_text().strip()
        if not isinstance(error, ModuleNotFoundError):
            return None, f"the compiled module does not load ({error}): install the package again with `pip install .`"
        return None, "the compiled module is not built: install the package with `pip install .` or `pip install -e .`"


def cuda_unavailable_reason() -> str | None:
    """The reason why the compiled module holds no CUDA kernels; None if it does."""
    module, reason = load()
    if module is None:
        return reason
    info = module.info()
    return info["reason"] if info["cuda"] is None else None
