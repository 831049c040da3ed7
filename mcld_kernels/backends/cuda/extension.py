"""The compiled module ``mcld_kernels._C``: loaded once, or the reason why it is not there."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from ... import installation


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and why it cannot be imported."""
    try:
        return importlib.import_module("mcld_kernels._C"), None
    except ModuleNotFoundError:
        return (
            None,
            f"the package was installed without the CUDA kernels; `{installation.cuda_command()}` compiles them",
        )
    except ImportError as error:
        return None, f"the compiled module does not load ({error}); `{installation.cuda_command()}` compiles it again"


def without_cuda() -> str | None:
    """Why the compiled module holds no CUDA kernels, or None when it does."""
    module, reason = load()
    if module is None:
        return reason
    info = module.info()
    return info["reason"] if info["cuda"] is None else None
