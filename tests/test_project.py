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
