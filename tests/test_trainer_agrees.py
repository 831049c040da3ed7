"""Agreement of the trainer with others: where to start with MCLD, timm's optimizers, torch.compile, a schedule."""

import csv
import inspect
import re

import pytest
import torch
from torch import nn
from trainer_cases import ROOT, SMALL, last_state, merged, run, write_config

import mcld_kernels

pytest.importorskip("sklearn", reason="scikit-learn is not installed: the digits are not trained on")
from distillation import experiment  # isort: skip
from trainer import assembly, ranks, settings, step, vision  # isort: skip

START = {"temperature": 0.5, "weight": 3.0}


class TestWhereToStart:
    """docs/hyperparameters.md says where: every place that passes a temperature to MCLD passes these two."""

    def test_the_page_states_it_and_why_the_defaults_of_the_library_differ(self):
        page = (ROOT / "docs" / "hyperparameters.md").read_text(encoding="utf-8")
        head = " ".join(page[: page.index("## Evidence")].split())
        assert "`temperature={temperature}, weight={weight}` beside a cross-entropy".format(**START) in head
        signature = inspect.signature(mcld_kernels.MCLDLoss).parameters
        assert (signature["temperature"].default, signature["weight"].default) == (0.1, (1.0, 1.0, 1.0))
        assert (
            "the functions' own defaults, temperature 0.1 and weight 1, are the customary ones of contrastive" in head
        )

    def test_the_experiment_takes_it(self):
        options = experiment.parser().parse_args([])
        assert options.temperature == [START["temperature"]] and set(options.weight) == {START["weight"]}

    @pytest.mark.parametrize("path", sorted((ROOT / "python" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
    def test_a_recipe_takes_it(self, path):
        made = settings.load(path, ["data.root=/data"])
        assert made.loss.name == "mcld" and made.loss.weight == made.loss.cross_entropy == 1.0
        assert {name: made.loss.options[name] for name in START} == START
        assert made.loss.options["warmup"] == made.epochs / 10

    @pytest.mark.parametrize("path", ["README.md", "docs/quickstart.md", *(
        str(path.relative_to(ROOT)) for path in sorted((ROOT / "python" / "adapters").glob("*.*"))
        if "MCLDLoss" in path.read_text(encoding="utf-8")
    )])  # fmt: skip
    def test_a_page_or_an_adapter_that_states_options_states_these(self, path):
        text = (ROOT / path).read_text(encoding="utf-8")
        stated = [float(value) for value in re.findall(r"\btemperature[=:] ?([\d.]+\d|\d)", text)]
        weights = [float(value) for value in re.findall(r"temperature[=:] ?[\d.]+,? weight[=:] ?([\d.]+\d|\d)", text)]
        assert set(stated) <= {START["temperature"]} and set(weights) <= {START["weight"]}
        assert len(stated) == len(weights)


def parts(**changes):
    made = settings.build(merged(SMALL, merged(changes, {"precision": {"dtype": "float64"}})), "here")
    return assembly.Parts(made, ranks.Ranks(made), ("a", "b", "c", "d"), 5)


@pytest.mark.parametrize(
    ("name", "own"),
    [("lars", lambda x, **k: vision.timm.optim.Lars(x, momentum=0.8, **k)), ("lamb", vision.timm.optim.Lamb)],
)
def test_the_optimizers_of_large_batches_are_those_of_timm(name, own):
    """Three steps of the trainer against a plain loop: no decay of biases, and the gradient of the plain sum."""
    section = {"name": name, "rate": 0.02, "base_batch": 2, "scaling": "sqrt", "weight_decay": 0.3, "momentum": 0.8}
    made, other = (parts(optimizer={**section, "decay_norm_and_bias": False}) for _ in range(2))
    student = other.student
    decayed = [x for x in student.parameters() if x.ndim > 1]
    plain = [x for x in student.parameters() if x.ndim <= 1]
    assert decayed and plain
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.3}]
    optimizer = own(groups, lr=0.04)  # 0.02 x sqrt(8 / 2)
    generator = torch.Generator().manual_seed(0)
    first = [x.detach().clone() for x in student.parameters()]
    for _ in range(3):
        images, target = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(8) % 4
        made.step([step.Micro(images=images, target=target)])
        logits = student(images)
        with torch.no_grad():
            of_teacher = other.teacher(images)
        loss = nn.functional.cross_entropy(logits, target)
        loss = loss + mcld_kernels.kd_loss(logits, of_teacher, backend="reference")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b, before in zip(made.student.parameters(), student.parameters(), first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert not torch.equal(b, before)


def test_compiled_models_train_the_same_student_under_the_same_names(tmp_path, monkeypatch):
    """Traced forward and backward, but not lowered to C++: what is the trainer's own is where it compiles."""
    compiled = []
    compile_ = nn.Module.compile

    def traced(self):
        compiled.append(self)
        compile_(self, backend="aot_eager")

    changes = {"student": {"name": "tiny-bn"}, "ema": {"decay": 0.5}, "epochs": 1, "data": {"validation_images": 8}}
    assert run(write_config(tmp_path, **changes), tmp_path / "plain") == 0
    monkeypatch.setattr(nn.Module, "compile", traced)
    assert run(write_config(tmp_path, **changes), tmp_path / "compiled", "--compile") == 0
    assert len(compiled) == 2 and compiled[0] is not compiled[1]
    plain, traced_ = (last_state(tmp_path / name) for name in ("plain", "compiled"))
    for kind in ("model", "ema"):
        assert plain[kind].keys() == traced_[kind].keys()
        for name, value in plain[kind].items():
            torch.testing.assert_close(traced_[kind][name], value)


def test_a_schedule_of_steps_falls_where_it_says(tmp_path):
    schedule = {"name": "step", "decay_epochs": 2, "decay_rate": 0.1, "warmup_epochs": 1, "warmup_rate": 0.01}
    config = write_config(tmp_path, epochs=5, schedule=schedule, log={"every": 1}, optimizer={"rate": 0.06})
    assert run(config, tmp_path / "out") == 0
    with (tmp_path / "out" / "steps.csv").open(newline="") as file:
        rates = {int(row["step"]): float(row["rate"]) for row in csv.DictReader(file)}
    warm = {number: 0.01 + 0.01 * number for number in range(1, 5)}  # five steps an epoch; the rate of the next step
    fallen = {number: 0.06 * 0.1 ** (number // 10) for number in range(5, 26)}
    assert rates == pytest.approx(warm | fallen)
