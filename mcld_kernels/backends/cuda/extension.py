"""The compiled module ``mcld_kernels._C``: loaded once, or the reason why it cannot be."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from types import ModuleType

from ... import installation

_OVERRIDE: ContextVar[ModuleType | None] = ContextVar("mcld_kernels_module", default=None)


def load() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and the reason why it cannot be imported."""
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
    except ModuleNotFoundError:
        return None, f"the package was installed without CUDA kernels; `{installation.cuda_command()}` compiles them"
    except ImportError as error:
        return None, f"the compiled module does not load ({error}); `{installation.cuda_command()}` compiles it again"
