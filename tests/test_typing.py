"""A user's code type-checks: the package ships its annotations (py.typed)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mcld_kernels

ROOT = Path(__file__).resolve().parents[1]
USER = "tests/typing_user.py"


def test_the_package_declares_its_types():
    assert Path(mcld_kernels.__file__).with_name("py.typed").exists()


def test_the_users_code_has_every_public_name():
    text = (ROOT / USER).read_text()
    names = [*mcld_kernels.__all__, *(f"reference.{name}" for name in mcld_kernels.reference.__all__)]
    assert [name for name in names if name not in text] == []


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_users_code_passes_mypy_strict():
    # Silent: an installed package's own errors are not shown to its users either.
    command = ["-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "--python-version=3.10", USER]
    environ = {**os.environ, "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache" / "user")}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright on the PATH")
def test_a_users_code_passes_pyright():
    command = ["pyright", "--pythonpath", sys.executable, USER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
