"""The Python of README.md, of docs/ and of examples/ runs, and what the pages promise about the package is so."""

import functools
import importlib.util
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision_shim
from torch import nn

import mcld_kernels

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "python"))  # of the adapters
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# A block of Python, or a comment that begins with "run": Python that readers do not see.
# "requires" names what must be installed for the next block and those that follow it up to the next heading.
BLOCK = re.compile(
    r"^```python\n(?P<shown>.*?)^```"
    r"|^```.*?^```"
    r"|^<!-- run\n(?P<hidden>.*?)^-->"
    r"|^<!-- requires: (?P<requires>.*?) -->"
    r"|^##? (?P<heading>[^\n]*)",
    re.MULTILINE | re.DOTALL,
)


def sections(page: str) -> list[tuple[str, tuple[str, ...], str]]:
    """(heading, required modules, Python) of each section that has any; line numbers are those of the page."""
    found: list[tuple[str, tuple[str, ...], str]] = []
    text = (ROOT / page).read_text(encoding="utf-8")
    heading, requires, code = "", (), ""
    for match in BLOCK.finditer(text):
        if match["heading"]:
            found.append((heading, requires, code))
            heading, requires, code = match["heading"], (), ""
        elif match["requires"]:
            requires = tuple(match["requires"].split(", "))
        elif (match["shown"] or match["hidden"]) and "--8<--" not in match[0]:  # a file of examples/ is put there
            line = text[: match.start()].count("\n") + 1
            code += "\n" * (line - code.count("\n")) + (match["shown"] or match["hidden"])
    found.append((heading, requires, code))
    return [section for section in found if section[2]]


def same(ours: torch.Tensor, theirs: torch.Tensor, *leaves: torch.Tensor) -> None:
    """Both losses have one value, and one gradient by each leaf."""
    results = [[x.detach(), *torch.autograd.grad(x, leaves, retain_graph=True)] for x in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def names() -> dict[str, object]:
    """The names that the pages' code uses: two models, a loader, logits and labels, and a comparison of losses."""
    torch.manual_seed(0)
    student_model, teacher_model = (nn.Sequential(nn.Flatten(), nn.Linear(48, 10)) for _ in range(2))
    dataset = torch.utils.data.TensorDataset(torch.randn(32, 3, 4, 4), torch.randint(10, (32,)))
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "Path": Path,
        "same": same,
        "mcld_kernels": mcld_kernels,
        "MCLDLoss": mcld_kernels.MCLDLoss,
        "mcld_loss": mcld_kernels.mcld_loss,
        "student_model": student_model,
        "teacher_model": teacher_model.eval().requires_grad_(False),
        "optimizer": torch.optim.SGD(student_model.parameters(), lr=0.1),
        "dataset": dataset,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=16),
        "epochs": 2,
        "student": torch.randn(32, 10, requires_grad=True),
        "teacher": torch.randn(32, 10),
        "target": torch.randint(10, (32,)),
    }


SECTIONS = [
    pytest.param(page, *section, id=f"{page}:{section[0].replace(' ', '-')}")
    for page in PAGES
    for section in sections(page)
]


@pytest.mark.parametrize(("page", "heading", "requires", "code"), SECTIONS)
def test_the_python_of_a_section_runs(page, heading, requires, code, monkeypatch):
    missing = [name for name in requires if importlib.util.find_spec(name) is None]
    if missing:  # mdistiller is a repository that is no package, so no environment has it
        pytest.skip(f"{'no package' if missing == ['mdistiller'] else 'not installed'}: {', '.join(missing)}")
    if requires:
        torchvision_shim.install()
    monkeypatch.chdir(ROOT)
    exec(compile(code, str(ROOT / page), "exec"), names())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, monkeypatch, capsys):
    # Without a C++ compiler, and in a second: the program is traced and its gradient too, and no code is generated.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_the_table_of_gradient_sizes_is_what_the_script_prints():
    module = runpy.run_path(str(ROOT / "docs" / "gradient_sizes.py"))
    page = (ROOT / "docs" / "hyperparameters.md").read_text(encoding="utf-8")
    rows = {cells[0]: cells[1:] for line in page.splitlines() if len(cells := line.strip("| ").split(" | ")) == 7}
    for temperature, *cells in module["rows"]():
        assert [float(x) for x in rows[temperature]] == pytest.approx([float(x) for x in cells], abs=0.0015)


def test_the_figure_is_what_its_script_draws():
    module = runpy.run_path(str(ROOT / "docs" / "figures" / "tiles.py"))
    for theme, colours in module["THEMES"].items():
        drawn = (ROOT / "docs" / "figures" / f"tiles-{theme}.svg").read_text(encoding="utf-8")
        assert drawn == module["draw"](colours)


def test_the_support_matrix_has_the_versions_of_the_project():
    support = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("torch", "triton"):
        row = next(line for line in support.splitlines() if line.lower().startswith(f"| {name} "))
        _, _, accepted, tested, _ = (cell.strip() for cell in row.split("|"))
        assert f'"{name}>={accepted.removesuffix(" or later")}' in project
        assert re.search(rf"^{name}=={re.escape(tested)}\b", constraints, re.MULTILINE)
    assert f'requires-python = ">={re.search(r"Python . ([0-9.]+) or later", support)[1]}"' in project


def test_the_support_matrix_has_the_losses_of_each_backend():
    from mcld_kernels.losses import ckd, clkd, info_nce, kd, mcld, mlkd

    support = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    heads, cells = (
        [cell.strip(" `") for cell in next(line for line in support.splitlines() if line.startswith(start)).split("|")]
        for start in ("| | `reference`", "| losses")
    )
    losses = {"MCLD": mcld, "CKD": ckd, "CLKD": clkd, "MLKD": mlkd, "KD": kd, "InfoNCE": info_nce}
    for backend in ("torch", "triton", "cuda"):
        wanted = [name for name, module in losses.items() if backend in module._OPERATOR.supported]
        assert cells[heads.index(backend)] == ", ".join(wanted)
    assert cells[heads.index("reference")] == ", ".join(losses)


LOSSES = ("MCLD", "InfoNCE", "CKD", "CLKD", "MLKD", "KD")


@pytest.mark.parametrize("name", [*LOSSES, "TeacherQueue"])
def test_every_option_of_a_loss_is_on_its_page(name):
    """In its section, or in the table of options of several losses."""
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    text = parts["Which loss when"] + parts["MCLD" if name == "TeacherQueue" else name]
    functions = [mcld_kernels.TeacherQueue]
    if name in LOSSES:
        function = "info_nce" if name == "InfoNCE" else f"{name.lower()}_loss"
        functions = [getattr(mcld_kernels, function), getattr(mcld_kernels, f"{name}Loss")]
    for function in functions:
        for option in inspect.signature(function).parameters.values():
            is_option = option.kind is option.KEYWORD_ONLY
            assert not is_option or re.search(rf"`{option.name}(=.*?)?`", text), (function.__name__, option.name)


def test_the_environment_variables_are_those_of_info():
    from mcld_kernels import info

    support = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([A-Z_]+)", support, re.MULTILINE)) == set(info.VARIABLES)


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"^```.*?^```|<!--.*?-->", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_site_builds_without_a_warning(tmp_path):
    """Docstrings that griffe cannot read, links out of the pages: also of the files that a page includes."""
    for name in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "api.html").exists()


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_a_page_names_files_and_folders_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.-]+/)+|(?:[\w.-]+/)*[\w-]+\.(?:py|md|cuh?|h|cpp|txt|toml|yml|cff))`", text)
    folders = [ROOT / folder for folder in (".", "mcld_kernels", "csrc", "docs", "tests")]
    for name in named:
        exists = any((folder / name).exists() for folder in folders)
        # A single name may lie anywhere below.
        name = name.rstrip("/")
        exists = exists or (
            "/" not in name and any(any(folder.rglob(name)) for folder in (*folders[1:], ROOT / "python"))
        )
        assert exists, f"{page} names {name}"


def test_the_line_of_the_readme_equals_what_it_replaces():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    eager, ours = [match["shown"] for match in BLOCK.finditer(text) if match["shown"]][:2]
    results = []
    for code in (eager, ours):
        scope = names()
        exec(code, scope)
        results.append((scope["loss"], torch.autograd.grad(scope["loss"], scope["student"])[0]))
    torch.testing.assert_close(*results)


def test_the_readme_is_short_and_its_commands_are_those_of_ci():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    commands = [line for line in lines if line.startswith("python3 -m venv .venv")]
    assert len(commands) == 2
    assert "pytest -n 2" in commands[1]
