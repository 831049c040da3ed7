"""Plugin of pytest: the tests launch no kernel, and the names of those that they would are written to a file.

`python -m pytest -p ptx.recorder ...` in tests/, with the file's path in MCLD_TEST_LAUNCHES. Tests that look at values
fail then; what they launch, the shapes decide, not the values.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import ModuleType

import csrc_host

import ptx

_load = csrc_host.load
_kernels: list[ptx.Kernels] = []
_open = contextlib.ExitStack()


class _Recorder(ptx.Kernels):
    def _launch(self, name: str, *arguments: int) -> None:
        self.launched[name] = self.launched.get(name, 0) + 1


class _Recorded(ptx.Kernels):
    """For tests that run the compiled kernels: the launches are taken already."""

    def take_launches(self, of: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _load_recorded(bindings: str = "-O0") -> ModuleType:
    module = _load(bindings)
    _kernels.append(_Recorder(module))
    _open.enter_context(_kernels[-1].take_launches())
    return module


def pytest_configure(config) -> None:
    csrc_host.load, ptx.Kernels = _load_recorded, _Recorded


def pytest_unconfigure(config) -> None:
    _open.close()
    names = {name for kernels in _kernels for name in kernels.launched}
    Path(os.environ["MCLD_TEST_LAUNCHES"]).write_text("\n".join(sorted(names)))
