"""The Python of README.md, of docs/ and of examples/ runs, and what the pages promise about the package is so."""

import functools
import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mcld_kernels

ROOT = Path(__file__).resolve().parents[1]
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
        elif match["shown"] or match["hidden"]:
            line = text[: match.start()].count("\n") + 1
            code += "\n" * (line - code.count("\n")) + (match["shown"] or match["hidden"])
    found.append((heading, requires, code))
    return [section for section in found if section[2]]


def names() -> dict[str, object]:
    """What the pages take for granted: two models, a loader, logits and labels."""
    torch.manual_seed(0)
    student_model, teacher_model = (nn.Sequential(nn.Flatten(), nn.Linear(48, 10)) for _ in range(2))
    dataset = torch.utils.data.TensorDataset(torch.randn(32, 3, 4, 4), torch.randint(10, (32,)))
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "Path": Path,
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
    pytest.param(page, *section, id=f"{page}:{section[0].replace(' ', '-')}") for page in PAGES for section in sections(page)
]


@pytest.mark.parametrize(("page", "heading", "requires", "code"), SECTIONS)
def test_the_python_of_a_section_runs(page, heading, requires, code, monkeypatch):
    missing = [name for name in requires if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    monkeypatch.chdir(ROOT)
    exec(compile(code, str(ROOT / page), "exec"), names())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, monkeypatch, capsys):
    # Without a C++ compiler, and in a second: the program is traced and its gradient too, and no code is generated.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
