"""The loss's part of a training step: the step's arithmetic, its counts, its gate, and the program."""

import csv
import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
import torchvision_shim

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
pytest.importorskip("matplotlib", reason="matplotlib, with pillow, is not installed: the benchmark is not tested")

from bench import step_cost
from bench.harness import cases, measure, memory, step_report, steps, timing
from bench.harness.programs import Exit
from mcld_kernels import mcld_loss

CPU = torch.device("cpu")
CASE = cases.Case(48, 20)
PLAN = measure.Plan(CPU, rounds=3, seconds=0.0)
MLP = steps.backbone("mlp", 0)


def test_a_step_has_the_gradient_of_cross_entropy_and_the_loss(monkeypatch):
    step = steps.TrainingStep(MLP, CASE, CPU)
    found = []
    monkeypatch.setattr(
        step.optimizer, "step", lambda: found.append([p.grad.clone() for p in step.student.parameters()])
    )
    step.run(steps.loss_of("torch", CASE)[0])
    student, teacher = step.student(step.images), step.teacher(step.images)
    total = F.cross_entropy(student, step.target) + mcld_loss(student, teacher, step.target, backend="reference")
    for ours, expected in zip(found[0], torch.autograd.grad(total, step.student.parameters()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_flop_of_an_image_are_those_of_its_products():
    def forward(width, classes):
        return 2 * (256 * width + width * width + width * classes)

    assert steps.flop_per_image(MLP, 100) == 3 * forward(512, 100) + forward(1024, 100)


def test_the_memory_of_a_batch_is_predicted_from_above_by_a_few_images():
    case = cases.Case(512, 100)
    step = steps.TrainingStep(MLP, case, CPU)
    step.run(None)
    taken = memory.peak_extra(lambda: step.run(None), CPU)["allocator"] + step.images.nbytes
    assert taken <= 512 * steps.bytes_per_image(MLP, case, CPU) < 8 * taken


def test_the_parts_of_a_step_are_measured_in_it():
    rows = {row.variant: row for row in steps.StepRun(CASE, MLP, [steps.WITHOUT, "reference", "torch"], PLAN).run()}
    assert all(row.status == measure.OK for row in rows.values())
    assert rows[steps.WITHOUT].loss is None and rows[steps.WITHOUT].share is None
    for name in ("reference", "torch"):
        row = rows[name]
        assert len(row.loss.samples) == len(row.step.samples) == 3
        assert all(0 < loss < step for loss, step in zip(row.loss.samples, row.step.samples))
        assert 0 < row.share < 1 and row.verdict.passed
    assert rows["reference"].step_speedup == rows["reference"].loss_speedup == 1


def test_a_wrong_loss_gets_no_time(monkeypatch):
    correct = steps.loss_of

    def doubled(variant, case):
        loss, extra = correct(variant, case)
        return (lambda s, t, y: 2 * loss(s, t, y)) if variant == "torch" else loss, extra

    monkeypatch.setattr(steps, "loss_of", doubled)
    rows = {row.variant: row for row in steps.StepRun(CASE, MLP, [steps.WITHOUT, "reference", "torch"], PLAN).run()}
    assert rows["torch"].status == measure.FAILED and rows["torch"].step is None
    assert "times what is allowed" in rows["torch"].reason and rows["reference"].status == measure.OK


def test_a_large_batch_is_checked_on_its_first_images_and_timed_by_one_round(monkeypatch):
    seen = []
    correct = steps.loss_of

    def watched(variant, case):
        loss, extra = correct(variant, case)
        return lambda s, t, y: seen.append(len(y)) or loss(s, t, y), extra

    monkeypatch.setattr(steps, "loss_of", watched)
    plan = measure.Plan(CPU, rounds=3, seconds=0.0, least=1, gate_batch=16)
    rows = steps.StepRun(CASE, MLP, [steps.WITHOUT, "torch"], plan).run()
    assert seen == [16, 48, 48]  # the gate, the first call, the only round
    record = rows[1].record()
    assert record["gate"]["batch"] == 16 and record["gate"]["passed"] and record["step_time"]["rounds"] == 1
    whole = measure.Plan(CPU, rounds=3, seconds=0.0)
    assert steps.predicted_seconds(CASE, MLP, 2, plan, 1e9) < steps.predicted_seconds(CASE, MLP, 2, whole, 1e9)


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 3 << 30)
    case = cases.Case(48, 20)
    monkeypatch.setattr(steps, "loss_of", lambda variant, case: (None, 1 << 40))
    rows = {row.variant: row for row in steps.StepRun(case, MLP, [steps.WITHOUT, "reference"], PLAN).run()}
    assert rows["reference"].status == measure.NOT_RUN and memory.SHORTAGE in rows["reference"].reason
    assert rows[steps.WITHOUT].status == measure.OK


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="not installed: timm")
def test_a_pair_of_timm_is_a_backbone_too():
    torchvision_shim.install()
    pair = steps.backbone("test_resnet,test_vit", 160)
    rows = steps.StepRun(cases.Case(2, 20), pair, [steps.WITHOUT, "torch"], PLAN).run()
    assert all(row.status == measure.OK for row in rows), [row.reason for row in rows]
    with pytest.raises(ValueError, match="STUDENT,TEACHER of timm's models; got 'resnet18'"):
        steps.backbone("resnet18", 160)


class TestProgram:
    def test_a_run_leaves_json_csv_and_plot(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")  # where no title takes two lines
        grid = ["--batch", "16", "64", "--classes", "10", "--repeats", "3", "--seconds", "0", "--device", "cpu"]
        assert step_cost.main([*grid, "--output", str(tmp_path)]) == 0
        run = json.loads((tmp_path / "results.json").read_text())
        assert run["complete"] is True and [row["batch"] for row in run["rows"] if row["variant"] == "torch"] == [
            16,
            64,
        ]
        with (tmp_path / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        torch_rows = [row for row in run["rows"] if row["variant"] == "torch"]
        assert [float(row["share"]) for row in rows if row["variant"] == "torch"] == pytest.approx(
            [row["share"] for row in torch_rows], rel=1e-4
        )
        assert float(rows[0]["step_ms"]) == pytest.approx(1e3 * run["rows"][0]["step_time"]["median_s"], rel=1e-4)
        assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
        assert str(step_cost.ROOT) not in json.dumps(run)
        assert "part of step" in capsys.readouterr().out

    def test_a_case_that_would_take_too_long_is_skipped_with_the_reason(self, tmp_path, capsys):
        grid = ["--batch", "16", "--classes", "10", "--limit", "0", "--device", "cpu", "--output", str(tmp_path)]
        assert step_cost.main(grid) == 0
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        assert {row["status"] for row in rows} == {measure.NOT_RUN}
        assert all("would take about" in row["reason"] and "--limit" in row["reason"] for row in rows)

    def test_a_backbone_that_is_none_is_a_message(self, capsys):
        torchvision_shim.install()
        assert step_cost.main(["--backbone", "abacus"]) == Exit.USAGE
        assert "--backbone" in capsys.readouterr().err


class TestJoinedRuns:
    """Records of two runs, made by hand: what is joined, what is refused, and what the table and the figure say."""

    def write(self, folder, batches, classes=(10,), threads=2, backbone="mlp", not_run=()):
        rows = []
        for case in (cases.Case(batch, width) for width in classes for batch in batches):
            for name, seconds in ((steps.WITHOUT, 1.0), ("reference", 4.0), ("torch", 2.0)):
                row = steps.StepRow(case, name, backbone, 1000, measure.OK)
                if case.batch in not_run:
                    row.status = measure.NOT_RUN
                else:
                    row.step = timing.Times((seconds * case.batch,) * 3)
                    row.loss = None if name == steps.WITHOUT else timing.Times((seconds * case.batch - case.batch,) * 3)
                    row.step_speedup = 4.0 / seconds
                rows.append(row.record())
        computer = {"cpu": "a CPU", "threads": threads, "load_1min": 1.0}
        head = {"machine": computer, "versions": {"mcld_kernels": "0", "torch": "2"}, "commit": f"{len(batches)}" * 12}
        folder.mkdir()
        run = head | {"dirty": False, "started": "2026-01-01T00:00:00Z", "rows": rows}
        (folder / "results.json").write_text(json.dumps(run))
        return folder

    def test_a_row_that_one_run_left_out_is_taken_from_the_other(self, tmp_path, capsys, monkeypatch):
        first = self.write(tmp_path / "first", [16, 64, 256], not_run=[256])
        second = self.write(tmp_path / "second", [256])
        drawn = []
        save = step_report.plt.Figure.savefig
        monkeypatch.setattr(step_report.plt.Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k))
        out = tmp_path / "joint"
        assert step_cost.main(["--from", str(first), str(second / "results.json"), "--output", str(out)]) == 0
        with (out / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["batch"], row["run"]) for row in rows if row["variant"] == "torch"] == [
            ("16", "first"), ("64", "first"), ("256", "second"),
        ]  # fmt: skip
        assert {row["status"] for row in rows} == {measure.OK}
        table = (out / "results.md").read_text()
        assert "| 64 | 10 | 64 s | 256 s | 75 % | 128 s | 50 % | 2.00x | first |" in table
        assert "filled markers: first (C = 10: B = 16, 64; 3 rounds)" in table and "commit 333" in table
        assert "hollow markers: second (C = 10: B = 256; 3 rounds)" in table and "commit 111" in table
        assert table in capsys.readouterr().out
        caption = drawn[0].get_supxlabel().replace("\n", " ")
        assert "filled markers: first" in caption and "hollow markers: second" in caption
        shares = drawn[0].axes[0].get_lines()
        ends = [line for line in shares if line.get_markerfacecolor() == "white"]
        assert [list(line.get_xdata()) for line in ends] == [[256], [256]]  # eager's and torch's
        assert any(list(line.get_xdata()) == [16, 64, 256] for line in shares)  # one line through both runs

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"batches": [16]}, "B = 16, C = 10, without stands in both first and second"),
            ({"threads": 1}, "differ in machine, so their points make no line: a CPU, 2 threads (first), a CPU, 1 t"),
            ({"backbone": "vit"}, "differ in backbone, so their points make no line: mlp, vit"),
        ],
    )
    def test_runs_that_make_no_line_are_refused(self, tmp_path, capsys, changed, message):
        first = self.write(tmp_path / "first", [16, 64])
        second = self.write(tmp_path / "second", **{"batches": [256], **changed})
        out = tmp_path / "joint"
        assert step_cost.main(["--from", str(first), str(second), "--output", str(out)]) == Exit.USAGE
        assert message in " ".join(capsys.readouterr().err.split()) and not out.exists()

    def test_a_file_that_is_no_record_of_steps_is_refused(self, tmp_path, capsys):
        for text in ("{", "[]", '{"rows": [{"provider": "torch"}]}'):
            (tmp_path / "results.json").write_text(text)
            assert step_cost.main(["--from", str(tmp_path)]) == Exit.USAGE
            assert "is no results.json of bench/step_cost.py" in " ".join(capsys.readouterr().err.split())
        assert step_cost.main(["--from", str(tmp_path / "nowhere.json")]) == Exit.USAGE
        assert "nowhere.json" in capsys.readouterr().err
