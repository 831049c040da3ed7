"""The compiled module with the CUDA kernels: what it says of itself, what it needs, and why it may be missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import csrc_host
import pytest
import torch

import mcld_kernels
from mcld_kernels.backends.cuda import extension

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def module():
    found, reason = extension.load()
    if found is None:
        pytest.skip(reason)
    return found


def test_module_describes_itself(module):
    info = module.info()
    assert info["version"] == mcld_kernels.__version__
    assert info["cuda"] and info["architectures"]
    assert info["hopper"] == hasattr(module, "hopper_similarity")


def test_module_needs_neither_torch_nor_the_driver(module):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    text = subprocess.run([readelf, "-d", module.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", text)
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if re.match(r"lib(torch|c10|cuda|cudart|nv|python)", name)]


def test_module_does_not_offer_its_cuda_runtime_to_others(module):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    text = subprocess.run(
        [nm, "-D", "--defined-only", module.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r" T (\S+)", text) == ["PyInit__C"]


def test_a_launch_without_a_device_is_an_error_that_names_the_call(module):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    if csrc_host.compiler() is not None:
        csrc_host.load()  # a module that has a CudaError of its own
    names = ("products", "split_maxima", "row_maxima", "out", "rows", "padded_rows", "pitch")
    arguments = dict.fromkeys(names, 0)
    with pytest.raises(module.CudaError, match=r"cudaGetDevice\(.*\) failed: cudaError\w+ \(.*\) at .*checks.cu:\d+"):
        module.combine_splits(**arguments, splits=1, device=0, stream=0)
    with pytest.raises(TypeError, match="missing argument device"):
        module.combine_splits(**arguments, splits=1, stream=0)


def test_reason_for_a_missing_module(monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(extension.importlib, "import_module", fail)
    error = ModuleNotFoundError("no module")
    reason = extension._import.__wrapped__()[1]
    assert (
        "without CUDA kernels" in reason
        and f"`MCLD_BUILD_CUDA=1 pip install -v --force-reinstall --no-deps -e {ROOT}`" in reason
    )
    error = ImportError("undefined symbol: x")
    reason = extension._import.__wrapped__()[1]
    assert "does not load (undefined symbol: x)" in reason and "MCLD_BUILD_CUDA=1 pip install" in reason


def test_suffix_is_the_one_this_python_imports(module):
    assert module.__file__.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
