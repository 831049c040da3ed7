"""The compiled module ``mcld_kernels._C``: loaded once, or the reason why it is not there."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

# Written by setup.py when not even the CPU-only module could be built.
_NOTE = Path(__file__).with_name("_C_missing.txt")


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and why it cannot be imported. A module without CUDA in it is still a module."""
    try:
        return importlib.import_module("mcld_kernels._C"), None
    except ImportError as error:
        if _NOTE.exists():
            return None, _NOTE.read_text().strip()
        if not isinstance(error, ModuleNotFoundError):
            return None, f"the compiled module does not load ({error}): install the package again with `pip install .`"
        return None, "the compiled module is not built: install the package with `pip install .` or `pip install -e .`"


def without_cuda() -> str | None:
    """Why the compiled module holds no CUDA kernels, or None when it does."""
    module, reason = load()
    if module is None:
        return reason
    info = module.info()
    return info["reason"] if info["cuda"] is None else None
