"""Files beside the package agree with it: versions stand in more than one place, and only one of them is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mcld_kernels

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def test_citation_names_this_version():
    assert f"\nversion: {mcld_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_pre_commit_runs_the_ruff_of_the_constraints():
    pinned = set(re.findall(r"ruff==\S+(?=\])", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert len(pinned) == 1 and pinned <= set((ROOT / "constraints.txt").read_text().split())


def test_an_issue_asks_for_what_info_prints():
    assert "python -m mcld_kernels.info --json" in (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()


def test_the_workflow_runs_what_a_change_must_pass():
    assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_a_kernel_that_is_no_template_is_compiled_once():
    """Two definitions of one kernel link in the host emulation, where all is one file, but not in the CUDA build."""
    csrc = ROOT / "csrc"
    headers = {path.name: path.read_text(encoding="utf-8") for path in csrc.rglob("*.cuh")}

    def included(text: str) -> set[str]:
        names = set(re.findall(r'#include "(?:[\w/.]*/)?([\w.]+\.cuh)"', text)) & headers.keys()
        return names.union(*(included(headers[name]) for name in names))

    users: dict[str, set[str]] = {}
    for source in csrc.rglob("*.cu"):
        for name in included(source.read_text(encoding="utf-8")):
            users.setdefault(name, set()).add(source.name)
    kernels = {
        name for name, text in headers.items() if re.search(r"(?<!>)\n(?:inline )?MCLD_KERNEL\(", text) is not None
    }
    assert kernels, "no header with a kernel was found"
    assert {name: users[name] for name in kernels if len(users[name]) > 1} == {}
