"""Reasons for which backend "cuda" cannot run: compiled architectures, compute capability, driver and dtype."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_csrc_host import emulated, module  # noqa: F401 (fixtures)

from mcld_kernels import backends
from mcld_kernels.backends import cuda
from mcld_kernels.backends.cuda import extension

ROOT = Path(__file__).resolve().parents[1]


def test_reasons():
    logits = torch.zeros(2, 3)
    assert cuda.unavailable_reason() is None
    assert cuda.unsupported_reason(logits, logits) is None
    assert "fp64" in cuda.unsupported_reason(logits, logits.double())
    if not torch.cuda.is_available():
        with extension.use(compiled_for("90a-real", None)):
            assert "no CUDA device" in cuda.unavailable_reason()
            assert cuda.unsupported_reason(logits, logits) == cuda.unavailable_reason()


def compiled_for(architectures, driver, toolkit="13.0.88"):
    """A module compiled for a GPU, on a machine whose driver runs CUDA ``driver`` at most."""
    info = {"cuda": toolkit, "architectures": architectures.split(";")}
    return SimpleNamespace(info=lambda: info, driver_version=lambda: driver)


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes a GPU of a compute capability seem to be there; it returns logits that seem to be on it."""

    def seems(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 0))

    return seems


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)], ids=str)
def test_the_default_build_runs_on(gpu, capability):
    default = re.search(r'CMAKE_CUDA_ARCHITECTURES "([^"]+)" CACHE', (ROOT / "CMakeLists.txt").read_text())[1]
    logits = gpu(*capability)
    with extension.use(compiled_for(default, (13, 0))):
        assert cuda.unsupported_reason(logits, logits) is None


def test_the_cuda_kernels_are_not_for_amd(gpu, monkeypatch):
    logits = gpu(9, 4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with extension.use(compiled_for("80-real;90a-real", (13, 0))):
        assert "AMD's GPUs (HIP 7.0)" in cuda.unsupported_reason(logits, logits)


@pytest.mark.parametrize("driver", [(12, 4), (11, 8)])
def test_a_driver_older_than_the_toolkits_major_version_is_a_reason(gpu, driver):
    """It fails at the first launch with cudaErrorInsufficientDriver."""
    logits = gpu(9, 0)
    with extension.use(compiled_for("90a-real", driver)):
        for reason in (cuda.unavailable_reason(), cuda.unsupported_reason(logits, logits)):
            assert f"CUDA {driver[0]}.{driver[1]} at most" in reason and "built with CUDA 13.0" in reason


def test_an_old_driver_lets_auto_fall_back(gpu, monkeypatch):
    logits = gpu(9, 0)
    logits.is_cuda, logits.requires_grad = True, False
    monkeypatch.setattr(backends, "preference", lambda student, teacher: ("cuda",))
    with extension.use(compiled_for("90a-real", (12, 4))):
        assert backends.choose("auto", logits, logits, False) == "torch"
    with extension.use(compiled_for("90a-real", (13, 0))):
        assert backends.choose("auto", logits, logits, False) == "cuda"


def test_a_driver_of_the_toolkits_major_version_runs_code_but_compiles_no_newer_ptx(gpu):
    logits = gpu(9, 0)
    with extension.use(compiled_for("90a-real", (13, 0), "13.1.5")):
        assert cuda.unsupported_reason(logits, logits) is None
    with extension.use(compiled_for("80", (13, 0), "13.1.5")):
        assert "compile PTX of CUDA 13.1" in cuda.unsupported_reason(logits, logits)
    for driver in ((13, 1), (13, 2), (14, 0), None):
        with extension.use(compiled_for("80", driver, "13.1.5")):
            assert cuda.unsupported_reason(logits, logits) is None


def test_a_device_without_code_is_a_reason(gpu):
    logits = gpu(7, 5)
    with extension.use(compiled_for("80-real;90a-real", (13, 0))):
        assert "compute capability 8.0 or above" in cuda.unsupported_reason(logits, logits)
        logits = gpu(12, 0)
        assert "MCLD_BUILD_CUDA=1 pip install" in cuda.unsupported_reason(logits, logits)
        logits.device = torch.device("cpu")
        assert "CUDA tensors" in cuda.unsupported_reason(logits, logits)


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("100a-real", [(10, 0)], [(10, 3), (12, 0)]),
        ("100", [(10, 0), (10, 3), (11, 0)], [(9, 0)]),
        ("120", [(12, 0), (12, 1), (13, 0)], [(10, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
        ("90-virtual", [(9, 0), (12, 0)], [(8, 9)]),
    ],
)
def test_which_device_an_architecture_runs_on(architecture, runs, does_not):
    assert all(cuda.runs_on(architecture, capability) for capability in runs)
    assert not any(cuda.runs_on(architecture, capability) for capability in does_not)
