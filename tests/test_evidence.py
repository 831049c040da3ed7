"""The comparison of the losses: students trained in a stack are those trained alone, tuning is equal, runs resume."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("psutil", reason="psutil is not installed: the digits are not trained on")
pytest.importorskip("rich", reason="rich is not installed: the digits are not trained on")
pytest.importorskip("matplotlib", reason="matplotlib, with pillow, is not installed: the digits are not trained on")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: the digits are not trained on")
sys.path.append(str(Path(__file__).resolve().parent.parent / "python"))

import evidence
from distillation import contenders, evidence_report, stack, study
from distillation.data import digits
from distillation.models import MODELS, mlp

from bench.harness.programs import Exit
from mcld_kernels import KDLoss, MCLDLoss

METHODS = "alone,kd,mcld,mcld-0.5-3"


@pytest.fixture(scope="module")
def pools():
    torch.manual_seed(0)
    teacher = MODELS["cnn"](10)
    return teacher.eval(), [stack.pool(teacher, 60, 0.4, seed) for seed in (0, 1)]


class TestStack:
    def test_each_student_of_a_stack_is_the_one_trained_alone(self, pools):
        teacher, (first, second) = pools
        losses = [None, KDLoss(), MCLDLoss(temperature=0.5, weight=3.0, warmup_steps=5)]
        students = [
            stack.Student(first, 3, None),
            stack.Student(second, 4, losses[1]),
            stack.Student(first, 4, MCLDLoss(temperature=0.5, weight=3.0, warmup_steps=5)),
        ]
        training = {"batch": 20, "steps": 12, "rate": 0.01, "decay": 0.1}
        images = torch.rand(7, 1, 8, 8)
        stacked = stack.train(lambda: mlp(10), students, **training)(images)
        for student, loss, logits in zip(students, losses, stacked):
            expected = self.alone(teacher, student, loss, **training)(images)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)

    def alone(self, teacher, student, loss, *, batch, steps, rate, decay):
        """A plain loop that asks the teacher for every image."""
        torch.manual_seed(student.seed)
        model = mlp(10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        for places, rows in zip(*stack.draw(student.pool, batch, steps, student.seed)):
            images, target = student.pool.images[places, rows], student.pool.labels[rows]
            logits = model(images)
            total = F.cross_entropy(logits, target)
            if loss is not None:
                total = total + loss(logits, teacher(images).detach(), target)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
        return model

    def test_a_diverging_student_leaves_the_others_alone(self, pools):
        first = pools[1][0]
        students = [stack.Student(first, 3, None), stack.Student(first, 3, lambda s, t, y: s.sum() * float("nan"))]
        training = {"batch": 20, "steps": 3, "rate": 0.01, "decay": 0.1}
        predict = stack.train(lambda: mlp(10), students, **training)
        images, labels = torch.rand(9, 1, 8, 8), torch.randint(10, (9,))
        only = stack.train(lambda: mlp(10), students[:1], **training)
        torch.testing.assert_close(predict(images)[0], only(images)[0], rtol=1e-3, atol=1e-4)
        assert stack.accuracies(predict, images, labels)[1] == 0

    def test_an_epoch_repeats_no_image_and_drops_the_remainder(self, pools):
        places, rows = stack.draw(pools[1][0], 25, 5, seed=0)
        assert rows.shape == places.shape == (5, 25) and int(places.max()) <= 8
        for epoch in (rows[:2], rows[2:4]):  # 60 images: two batches of 25
            assert len(set(epoch.flatten().tolist())) == 50
        with pytest.raises(ValueError, match="a batch of 61 needs as many training images; there are 60"):
            stack.draw(pools[1][0], 61, 1, seed=0)

    def test_a_seed_draws_images_and_wrong_labels_from_the_teachers_half(self, pools):
        first, second = pools[1]
        assert first.images.shape == (9, 60, 1, 8, 8) and first.teacher.shape == (9, 60, 10)
        assert not torch.equal(first.images, second.images)
        splits = digits(60, 0.0, 0)
        known = {tuple(image.flatten().tolist()) for image in splits.teacher.padded[:, :, 1:-1, 1:-1]}
        middle = stack.SHIFTS.index((1, 1))
        for seed, pool in enumerate((first, second)):
            assert all(tuple(image.flatten().tolist()) in known for image in pool.images[middle])
            assert int((pool.labels != digits(60, 0.0, 0, draw=seed).student.labels).sum()) == 24


class TestMethods:
    def test_every_tuned_method_has_as_many_settings(self):
        tuned = [method for method in contenders.METHODS if method.is_tuned]
        assert len(tuned) > 8 and {len(method.grid) for method in tuned} == {contenders.SETTINGS}
        for method in tuned:
            assert len({json.dumps(setting) for setting in method.grid}) == contenders.SETTINGS, method.name

    def test_the_losses_are_what_their_titles_say(self):
        torch.manual_seed(0)
        student, teacher, target = *torch.randn(2, 16, 10), torch.randint(10, (16,))
        run = contenders.Run(steps=80, batch=16, classes=10)

        def value(name, **setting):
            return contenders.BY_NAME[name].make(setting, run)(student, teacher, target)

        setting = {"temperature": 0.2, "weight": 3.0}
        terms = [value(name, **setting) for name in ("mcld-instance", "mcld-sample", "mcld-category")]
        torch.testing.assert_close(value("mcld", **setting), sum(terms))
        torch.testing.assert_close(value("mcld-warmup", **setting), terms[0] + terms[1])  # its first step
        torch.testing.assert_close(
            value("kd", temperature=2.0, weight=0.5), 0.5 * KDLoss(temperature=2.0)(student, teacher)
        )
        masked = MCLDLoss(temperature=0.2, weight=3.0, mask_same_class=True)(student, teacher, target)
        torch.testing.assert_close(value("mcld-mask", **setting), masked)

    def test_every_method_that_is_there_gives_a_finite_loss_over_two_steps(self):
        torch.manual_seed(0)
        run = contenders.Run(steps=8, batch=16, classes=10)
        missing = contenders.absent()
        for method in contenders.METHODS:
            loss = None if method.name in missing else method.make(method.grid[0], run)
            for _ in range(2):
                student = torch.randn(16, 10, requires_grad=True)
                teacher, target = torch.randn(16, 10), torch.randint(10, (16,))
                if loss is not None:
                    found = loss(student, teacher, target)
                    found.backward()
                    assert found.isfinite() and student.grad.isfinite().all(), method.name

    def test_the_setting_with_the_best_mean_is_chosen(self):
        students = [
            {"setting": {"weight": weight}, "accuracy": accuracy}
            for weight, accuracy in ((1, 0.9), (2, 0.8), (3, 0.8), (1, 0.5), (2, 0.8), (3, 0.8))
        ]
        assert study.chosen({"students": students}) == {"weight": 2}


class TestReport:
    def test_the_interval_is_students(self):
        found = evidence_report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
        assert found.mean == 3.0 and found.half == pytest.approx(2.7764451 * (2.5 / 5) ** 0.5)  # t of 4 degrees

    def test_differences_are_paired_by_the_seed(self):
        def cell(method, accuracies):
            students = [{"setting": {}, "seed": seed, "accuracy": value} for seed, value in accuracies.items()]
            return {"phase": "test", "method": method, "batch": 32, "students": students}

        cells = [cell("alone", {0: 0.5, 1: 0.7, 2: 0.9}), cell("kd", {2: 0.95, 0: 0.6, 1: 0.8})]
        rows = {row.method: row for row in evidence_report.rows({"cells": cells})}
        expected = evidence_report.interval([0.1, 0.1, 0.05])
        assert rows["kd"].against_alone.mean == pytest.approx(expected.mean)
        assert rows["kd"].against_alone.half == pytest.approx(expected.half)
        assert rows["kd"].against_kd is None and rows["alone"].against_kd.mean == pytest.approx(-expected.mean)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    assert evidence.main(["--quick", "--methods", METHODS, "--output", str(folder)]) == 0
    return folder


class TestProgram:
    def test_a_run_leaves_json_csv_and_plots(self, whole):
        results = results_of(whole)
        assert results["complete"] is True and results["plan"]["batches"] == [64]
        assert {cell["method"] for cell in results["cells"]} == set(METHODS.split(","))
        with (whole / "results.csv").open() as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
        test = next(cell for cell in results["cells"] if cell["phase"] == "test" and cell["method"] == "kd")
        accuracies = [student["accuracy"] for student in test["students"]]
        assert float(rows["kd"]["accuracy"]) == pytest.approx(sum(accuracies) / 3, abs=1e-4)
        for name in ("results.png", "settings.png"):
            assert (whole / name).read_bytes().startswith(b"\x89PNG")
        assert str(whole) not in json.dumps(results)

    def test_the_report_comes_from_the_json_alone(self, whole, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "80")
        tmp_path = tmp_path / "new"
        assert evidence.main(["--draw", str(whole / "results.json"), "--output", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert "left out at 80 columns, see the CSV: setting" in shown and max(map(len, shown.splitlines())) <= 80
        monkeypatch.setenv("COLUMNS", "150")
        assert evidence.main(["--draw", str(whole / "results.json"), "--output", str(tmp_path)]) == 0
        assert "left out" not in (shown := capsys.readouterr().out) and "temperature" in shown
        assert (tmp_path / "results.csv").read_text() == (whole / "results.csv").read_text()

    def test_an_interrupted_run_goes_on_and_ends_as_an_undisturbed_one(self, whole, tmp_path, monkeypatch, capsys):
        train, calls = stack.train, []

        def interrupted(*rest, **more):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return train(*rest, **more)

        monkeypatch.setattr(stack, "train", interrupted)
        command = ["--quick", "--methods", METHODS, "--output", str(tmp_path)]
        assert evidence.main(command) == Exit.INTERRUPTED
        assert results_of(tmp_path)["complete"] is False
        before = len(list((tmp_path / "cells").iterdir()))
        assert 0 < before < 7 and "the same command goes on" in capsys.readouterr().out
        assert evidence.main(command) == 0
        assert f"{before} of 7 cells are done" in capsys.readouterr().out
        for ours, expected in zip(results_of(tmp_path)["cells"], results_of(whole)["cells"], strict=True):
            assert ours["students"] == expected["students"]

    def test_a_run_interrupted_before_the_first_test_is_told(self, whole, tmp_path, capsys):
        results = results_of(whole)
        results["cells"] = [cell for cell in results["cells"] if cell["phase"] == "validation"][:1]
        (tmp_path / "early.json").write_text(json.dumps(results))
        assert evidence.main(["--draw", str(tmp_path / "early.json")]) == 0
        assert "no method has its test yet" in capsys.readouterr().out
        (tmp_path / "other.json").write_text('{"rows": []}')
        assert evidence.main(["--draw", str(tmp_path / "other.json")]) == Exit.USAGE
        assert "other.json is no results.json of this program: KeyError" in " ".join(capsys.readouterr().out.split())

    def test_a_recorded_run_goes_on_from_its_json(self, whole, tmp_path, capsys):
        recorded = results_of(whole)
        recorded["cells"] = [cell for cell in recorded["cells"] if cell["method"] != "mcld-0.5-3"]
        (tmp_path / "results.json").write_text(json.dumps(recorded))
        command = ["--quick", "--methods", METHODS, "--output", str(tmp_path)]
        assert evidence.main(command) == 0
        assert "6 of 7 cells are done" in capsys.readouterr().out
        for ours, expected in zip(results_of(tmp_path)["cells"], results_of(whole)["cells"], strict=True):
            assert ours["students"] == expected["students"]
        other = tmp_path / "other"
        other.mkdir()
        (other / "results.json").write_text(json.dumps(recorded | {"teacher": {"validation": 0.5, "test": 0.5}}))
        for _ in range(2):
            assert evidence.main([*command[:-1], str(other)]) == Exit.USAGE
        assert "the cells would not compare" in " ".join(capsys.readouterr().out.split())

    def test_a_folder_of_another_plan_is_refused(self, whole, capsys):
        assert evidence.main(["--quick", "--seeds", "4", "--output", str(whole)]) == Exit.USAGE
        assert "another plan: seeds 3 there, 4 now" in " ".join(capsys.readouterr().out.split())

    def test_cells_of_other_settings_are_refused(self, whole, monkeypatch, capsys):
        other = contenders.Method(
            name="kd", title="KD", grid=contenders.product(temperature=(9.0, 10.0)), make=contenders.BY_NAME["kd"].make
        )
        monkeypatch.setitem(contenders.BY_NAME, "kd", other)
        assert evidence.main(["--quick", "--methods", "kd", "--output", str(whole)]) == Exit.USAGE
        assert "has other settings than kd has now" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--batch", "700"], Exit.USAGE, "a batch of 700 needs as many training images; there are 600"),
            (["--draw", "none.json"], Exit.OUTPUT, "none.json"),
        ],
    )
    def test_bad_arguments_end_with_a_message(self, arguments, code, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert evidence.main(arguments) == code
        assert message in " ".join(capsys.readouterr().out.split())

    def test_an_unknown_method_does_not_parse(self, capsys):
        with pytest.raises(SystemExit):
            evidence.main(["--methods", "alone,magic"])
        assert "'magic' is not one of alone,kd" in capsys.readouterr().err


def test_the_table_of_the_documentation_is_that_of_the_recorded_run():
    page = (evidence.ROOT / "docs" / "hyperparameters.md").read_text(encoding="utf-8")
    recorded, rest = page.split("<!-- evidence: ")[1].split(" -->\n", 1)
    run = json.loads((evidence.ROOT / recorded / "results.json").read_text())
    rows = {(row.method, row.batch): row for row in evidence_report.rows(run)}
    lines = rest.split("\n\n")[0].splitlines()[2:]
    assert len(lines) == len({method for method, _ in rows})
    for line in lines:
        title, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        name = next(method.name for method in contenders.METHODS if method.title == title)
        for batch, accuracy, difference in zip((32, 128, 512), cells[::2], cells[1::2], strict=True):
            row = rows[name, batch]
            assert (accuracy, difference) == (str(row.accuracy), evidence_report.signed(row.against_kd))
