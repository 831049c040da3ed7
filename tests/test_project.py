"""Files beside the package agree with it: versions stand in more than one place, and only one of them is right."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
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


# Packages of the extras that a GPU machine may lack, by the names of their modules.
PEERS = (
    *("PIL", "matplotlib", "psutil", "rich", "scipy", "sklearn", "tensorboard", "timm", "torchmetrics", "torchvision"),
    *("webdataset", "yaml", "accelerate", "lightning", "torchdistill", "transformers", "info_nce", "lightly"),
    *("open_clip", "pytorch_metric_learning", "mypy", "pybind11", "cmake", "ninja", "mkdocs", "mkdocstrings_handlers"),
)
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {names} else super().find_spec(name, path, target)

sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
"""


def collected(folder, ci, *options):
    """pytest's run over tests/ in a process in which no module of PEERS can be imported."""
    (folder / "hide.py").write_text(HIDE.format(names=set(PEERS)))
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_XDIST_WORKER")}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment |= {"CI": "true"} if ci else {}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "hide", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_without_the_packages_that_it_needs_a_test_file_is_skipped(tmp_path):
    done = collected(tmp_path, False, "--collect-only", "tests")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    skipped = re.findall(r"^SKIPPED \[(\d+)\] (?:tests/)?\w+\.py:\d+: (.*)$", done.stdout, re.MULTILINE)
    assert sum(int(count) for count, _ in skipped) >= 16 and all("not installed" in reason for _, reason in skipped)


def test_in_a_ci_no_test_is_skipped_for_want_of_a_package(tmp_path):
    files = ["tests/test_train.py", "tests/test_trainer_resume.py", "tests/test_typing.py"]
    done = collected(tmp_path, True, "--continue-on-collection-errors", *files)
    assert done.returncode == 1 and " 3 errors in " in done.stdout, done.stdout[-4000:]
    assert done.stdout.count("a CI must have it") == 3 and "mypy is not installed" in done.stdout


def test_an_install_requires_what_the_package_imports_and_nothing_else():
    """Imports outside of functions; Triton and NumPy, in one folder, are asked for by an extra."""
    package = ROOT / "mcld_kernels"
    statements = [
        node
        for path in package.rglob("*.py")
        if "triton" not in path.relative_to(package).as_posix()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    ]
    imported = {alias.name.split(".")[0] for node in statements if isinstance(node, ast.Import) for alias in node.names}
    imported |= {
        str(node.module).split(".")[0] for node in statements if isinstance(node, ast.ImportFrom) and not node.level
    }
    required = re.search(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert required is not None
    names = {re.split(r"[<>=!~; ]", text)[0] for text in ast.literal_eval(required[1])}
    assert names == {name for name in imported - set(sys.stdlib_module_names) if name != "mcld_kernels"}


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


def imported_modules(path: Path) -> set[str]:
    """The modules, and names in modules, that a file of the package imports: dotted, from the package's root."""
    parents = ("mcld_kernels", *path.relative_to(ROOT / "mcld_kernels").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("mcld_kernels.") for name in found if name.startswith("mcld_kernels.")}


def test_a_loss_knows_no_backend_and_a_backend_no_loss():
    """Everything but the programs, which report on backends, reaches them by the package `backends` alone."""
    package = ROOT / "mcld_kernels"
    programs = {package / name for name in ("info.py", "calibrate.py", "calibrate_forms.py", "calibrate_plan.py")}
    backends = {path.stem for path in (package / "backends").iterdir()} - {"__init__", "gemm"}  # a shared definition
    for path in package.rglob("*.py"):
        parts = {tuple(name.split(".")[:2]) for name in imported_modules(path)}
        if package / "backends" in path.parents:
            assert not {part for part in parts if part[0] in ("losses", "reference")}, path
        elif path not in programs:
            assert not {part[1] for part in parts if part[0] == "backends" and len(part) > 1} & backends, path


def test_no_docstring_opens_with_a_question_word():
    """A docstring names the thing itself."""
    openings = re.compile(r"(What|Whether|Why|Who)\b")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    wrong = []
    for folder in ("mcld_kernels", "python", "bench", "tests", "docs", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.get_docstring(node) if isinstance(node, documented) else None
                if text and openings.match(text):
                    wrong.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
