"""``python -m mcld_kernels.info``, and what the package shows of itself."""

import subprocess
import sys

import torch

import mcld_kernels
from mcld_kernels import backends, info


def test_prints_what_a_bug_report_needs():
    done = subprocess.run([sys.executable, "-m", "mcld_kernels.info"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for word in (
        "versions", "devices", "backends", "compiled module", "environment",
        mcld_kernels.__version__, torch.__version__, "cpu", "MCLD_CHUNK_MB", *backends.NAMES,
    ):  # fmt: skip
        assert word in done.stdout


def test_every_backend_is_available_or_explained():
    words = info.describe()["backends"]
    assert tuple(words) == backends.NAMES
    for name, word in words.items():
        assert word
        assert (name in backends.available()) == (word == "available")


def test_values_of_variables_are_shown(monkeypatch):
    monkeypatch.setenv("MCLD_CHUNK_MB", "17")
    assert info.describe()["environment"]["MCLD_CHUNK_MB"] == "17"
    monkeypatch.delenv("MCLD_CHUNK_MB")
    assert "unset" in info.describe()["environment"]["MCLD_CHUNK_MB"]


def test_public_names():
    assert set(mcld_kernels.__all__) == {
        "MCLDLoss", "MCLDTerms", "__version__", "backends", "mcld_loss", "mcld_terms", "reference",
    }  # fmt: skip
    assert all(hasattr(mcld_kernels, name) for name in mcld_kernels.__all__)
    assert mcld_kernels.MCLDTerms._fields == ("loss", "instance", "sample", "category")


def test_importing_the_package_imports_no_kernels():
    """The import stays quick, and works where Triton and the compiled module are missing or broken."""
    code = "import sys, mcld_kernels; print([m for m in sys.modules if m.startswith('mcld_kernels.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "triton" not in done.stdout and "mcld_kernels._C" not in done.stdout
