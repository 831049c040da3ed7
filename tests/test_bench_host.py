"""The harness's demands on the process around a profile and on malloc."""

import ctypes
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from bench.harness import host, profiling


def test_the_notes_of_the_profiler_are_dropped_and_nothing_else(capfd):
    counted = host.count(lambda: torch.ones(3) + 1)
    assert counted == {"allocations": 0, "operations": 2}
    assert not capfd.readouterr().err
    with pytest.raises(KeyError), profiling.without_notes():
        os.write(2, b"USDT:2026 profiler_start\nCUPTI_ERROR_NOT_INITIALIZED\n")
        raise KeyError
    os.write(2, b"USDT: after it\n")
    assert capfd.readouterr().err == "CUPTI_ERROR_NOT_INITIALIZED\nUSDT: after it\n"


@pytest.mark.parametrize("takes", [1, 0])
def test_settings_that_malloc_refuses_are_told(takes, monkeypatch):
    settings = []
    libc = SimpleNamespace(mallopt=lambda *setting: settings.append(setting) or takes)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        host.keep_freed_memory()
    assert [str(x.message)[:25] for x in told] == ([] if takes else ["malloc takes no settings "])
    assert settings[: 1 + takes] == [(-4, 0), (-1, -1)][: 1 + takes]
