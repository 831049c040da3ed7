"""The model of the GPU's times: its shape, its bounds and what it prints. No value is held to a number."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import cases
import csrc_host
import pytest
import torch

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from bench import model
from bench.harness import goals, phases
from bench.harness.cases import TERMS, Case
from bench.harness.programs import Exit
from mcld_kernels import backends
from mcld_kernels.backends import gemm
from mcld_kernels.backends.cuda import extension
from mcld_kernels.kernels import LossInputs
from mcld_kernels.losses import mcld

ROWS = ("instance", "sample")


def test_every_regime_of_the_goals_with_a_ceiling_is_predicted():
    names = set()
    for case, graph in model.REGIMES:
        predicted = model.predict(case, graph=graph)
        assert 0 < predicted.fraction(model.Machine()) < 1, case
        assert predicted.binds in ("tensor", "ex2", "issue", "memory", "latency", "launches", "epilogue")
        names |= set(goals.regimes(vars(case) | {"terms": list(case.terms)}))
    ceilings = {goal.regime for goal in goals.GOALS if "GEMM" in goal.quantity}
    assert ceilings <= names and goals.SMALL in names


@pytest.mark.parametrize(("case", "graph"), model.REGIMES, ids=lambda value: str(value))
def test_the_kernels_of_a_regime_are_those_that_the_module_launches(case, graph, monkeypatch):
    """Nothing is computed: launches are left out, and memory that nobody touches takes none."""
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
    module, products = csrc_host.load(), []
    student, teacher = (torch.empty(case.batch, case.classes, dtype=torch.bfloat16) for _ in range(2))
    options, _ = cases.options_of(weight=tuple(float(term in case.terms) for term in TERMS))
    inputs = LossInputs(
        student=student, teacher=teacher, target=torch.zeros(case.batch, dtype=torch.int64), weight=None,
        options=options, student_grad=True, teacher_grad=False,
    )  # fmt: skip
    monkeypatch.setattr(gemm, "has_gemm", lambda *dtypes: True)
    monkeypatch.setattr(gemm, "gemm", lambda *operands: products.append(module.stub_launches(1) + len(products)))
    tuning = {name: getattr(model.TUNING, name) for name in ("chunk_bytes", "wave_bytes", "hopper")}
    first = module.stub_launches(1)
    try:
        with extension.use(module), backends.tuned(library_product=True, **tuning):
            mcld.compute(backends.kernel_set("cuda", student, teacher), inputs)
    finally:
        last = module.stub_launches(0)
    launched = [module.stubbed_launch(index) for index in range(first, last)]
    for place in products:  # among the launches, of which some are products before it
        launched.insert(place - first, model.GEMM)
    # tests/test_plans.py counts the multiplication by the upstream gradient.
    assert [step.name for step in model.predict(case, graph=graph).steps] == [*launched, model.UPSTREAM]


@pytest.mark.parametrize("classes", [50, 100, 250, 1000])
def test_a_larger_batch_takes_longer_and_fills_the_machine_better(classes):
    cases = [Case(batch, classes, "bfloat16", ROWS) for batch in (4096, 8192, 16384, 32768, 65536)]
    times = [model.predict(case).seconds for case in cases]
    fractions = [model.predict(case).fraction(model.Machine()) for case in cases]
    assert times == sorted(times) and fractions[-1] > fractions[0]
    # Never faster than the products at the GEMM's speed.
    assert all(time > case.flop / model.Machine().gemm_flop_per_s for case, time in zip(cases, times))


@pytest.mark.parametrize(
    "field", ["gemm_flop_per_s", "copy_bytes_per_s", "clock_hz", "ex2_per_clock", "issues_per_clock"]
)
def test_a_faster_machine_is_never_slower(field):
    slow, fast = model.Machine(), model.Machine(**{field: 4 * getattr(model.Machine(), field)})
    for case, graph in model.REGIMES:
        if field != "clock_hz":  # at a higher clock the ceiling stays
            assert model.predict(case, fast, graph).seconds <= model.predict(case, slow, graph).seconds
    for case, _ in model.REGIMES:
        assert model.predict(case, slow, True).seconds <= model.predict(case, slow, False).seconds


def test_the_longest_part_of_a_kernel_is_its_time():
    step = model.Step(name="a", tensor=3.0, ex2=5.0, memory=1.0, serial=2.0)
    assert step.seconds == 7.0 and step.binds == "ex2"
    two = model.Prediction(case=model.REGIMES[0][0], steps=(step, step), launch_s=1.0)
    assert two.seconds == 16.0 and two.binds == "ex2"


def test_what_is_assumed_is_listed():
    listed = {name for name, _ in model.ASSUMPTIONS}
    assert {field.name for field in fields(model.Machine)} - {"name"} <= listed


def test_measurements_stand_beside_predictions(tmp_path, capsys):
    row = {"batch": 4096, "classes": 1000, "dtype": "bfloat16", "terms": list(ROWS), "mode": "forward-backward"}
    row |= {"status": "ok", "time": {"median_s": 9e-4}, "graph_time": None}
    rows = [
        row | {"provider": "cuda", "kernels_time": {"median_s": 3e-4}},
        row | {"provider": "hopper", "kernels_time": {"median_s": 2e-4}},
        row | {"provider": "library", "kernels_time": {"median_s": 1e-4}},
        row | {"provider": "hopper", "kernels_time": {"median_s": 1e-9}, "status": "FAILED"},
    ]
    run = {"machine": {"gpu": "A GPU", "multiprocessors": 100}, "rows": rows}
    run["ceilings"] = {"gemm_bfloat16_flop_per_s": 5e14, "copy_bytes_per_s": 2e12}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run))
    assert model.main([str(path), "--steps"]) == Exit.OK
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("B=4096 C=1000")][:1]
    predicted = model.predict(model.REGIMES[0][0], model.machine_of(run)).seconds
    assert "200 µs" in line and f"{2e-4 / predicted:.2f}" in line and line.endswith("hopper")
    assert "A GPU: GEMM 500 Tflop/s, copy 2.0 TB/s (its own ceilings)" in shown and "hopper_similarity" in shown
    # The same from an archive of the report, in which the long grid counts and not the short one.
    folder, archive = tmp_path / "work", tmp_path / "gpu-speed.tar.gz"
    for name, content in (("grid", run), ("bench", run | {"rows": []})):
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(content))
    report = {"command": "speed", "rehearsal": False, "phases": {}}
    (folder / "report.json").write_text(json.dumps(report))
    phases.archive(archive, folder)
    assert model.main([str(archive), "--steps"]) == Exit.OK and capsys.readouterr().out == shown
    (folder / "report.json").write_text(json.dumps(report | {"rehearsal": True}))
    phases.archive(archive, folder)
    assert model.main([str(archive)]) == Exit.USAGE and "of a rehearsal" in capsys.readouterr().err


def test_without_results_nothing_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert model.main([]) == Exit.OK
    shown = capsys.readouterr().out
    assert shown.count("\n") == len(model.REGIMES) + 3 and "a model, not a measurement" in shown
    assert model.main(["--steps"]) == Exit.OK
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert model.main(["--assumptions"]) == Exit.OK
    assert "white paper" in (shown := capsys.readouterr().out) and max(map(len, shown.splitlines())) <= 80
    (tmp_path / "cpu.json").write_text(json.dumps({"machine": {}, "ceilings": {}, "rows": []}))
    assert model.main([str(tmp_path / "cpu.json")]) == Exit.USAGE
    assert "not of a GPU" in capsys.readouterr().err
