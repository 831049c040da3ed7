"""The distillation trainer: its data, equal conditions for all students, its checkpoints and its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("psutil", reason="psutil is not installed: the digits are not trained on")
pytest.importorskip("rich", reason="rich is not installed: the digits are not trained on")
pytest.importorskip("matplotlib", reason="matplotlib, with pillow, is not installed: the digits are not trained on")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: the digits are not trained on")
sys.path.append(str(Path(__file__).resolve().parent.parent / "python"))

import train
from distillation import engine, objectives, report
from distillation.data import digits, loader
from distillation.models import MODELS, parameters

from bench.harness.programs import Exit
from mcld_kernels import MCLDLoss

CPU = torch.device("cpu")
SHORT = ["--epochs", "3", "--teacher-epochs", "2", "--seeds", "1", "--images", "50", "--batch", "25", "--device", "cpu"]


ROOT = Path(__file__).resolve().parent.parent


def run(folder, *more):
    code = train.main([*SHORT, *more, "--output", str(folder)])
    return code, json.loads((folder / "results.json").read_text()) if code == 0 else None


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return folder, run(folder)[1]


def test_a_run_leaves_results_curves_and_teacher(first):
    folder, results = first
    assert set(results["methods"]) == {"alone", "soft-targets", "mcld"}
    assert results["wrong_labels"] == 15
    for method in results["methods"].values():
        assert len(method["accuracy"]) == len(method["history"]) == 1 and 0 <= method["accuracy"][0] <= 1
        assert len(method["history"][0]) == 3
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "teacher.pt").exists()
    assert str(folder) not in json.dumps(results)


def test_the_results_say_what_was_run_and_where(first):
    results = first[1]
    assert results["schema"] == report.SCHEMA and results["complete"] is True
    assert {"torch", "mcld_kernels", "python"} <= results["versions"].keys()
    assert results["machine"]["cpu"] and results["machine"]["load_1min_end"] is not None
    assert "commit" in results and "dirty" in results and results["started"].endswith("Z")


def test_the_figure_is_captioned(first, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    report.plot(tmp_path / "a.png", first[1], "the caption")
    left, right = figures[0].axes
    assert left.get_title(loc="left").startswith("Accuracy on the test images")
    assert right.get_title(loc="left").startswith("Loss of the MCLD student")
    assert figures[0].get_supxlabel() == "digits: 50 training images, 15 wrongly labelled\nthe caption"
    monkeypatch.undo()
    report.plt.close("all")


def test_the_terms_are_logged_every_epoch(first):
    for epoch in first[1]["methods"]["mcld"]["history"][0]:
        assert {"loss", "cross-entropy", "instance", "sample", "category", "accuracy"} == epoch.keys()
        assert all(value > 0 for value in epoch.values())
    assert {"loss", "cross-entropy", "accuracy"} == first[1]["methods"]["alone"]["history"][0][0].keys()


def test_the_table_is_printed(first, tmp_path, capsys):
    run(tmp_path, "--teacher", str(first[0] / "teacher.pt"))
    shown = capsys.readouterr().out
    for text in (
        "teacher",
        "student alone (cross-entropy)",
        "cross-entropy + MCLD",
        "15 of them wrongly labelled",
        "±",
    ):
        assert text in shown


def test_a_saved_teacher_is_loaded_and_not_trained_again(first, tmp_path):
    results = run(tmp_path, "--teacher", str(first[0] / "teacher.pt"), "--teacher-epochs", "999")[1]
    assert results["teacher"]["loaded"] and not first[1]["teacher"]["loaded"]
    assert results["teacher"]["accuracy"] == first[1]["teacher"]["accuracy"]
    # The same seed and the same teacher: every student ends where it did.
    for name, method in results["methods"].items():
        assert method["accuracy"] == first[1]["methods"][name]["accuracy"]
        assert method["history"] == first[1]["methods"][name]["history"]


def test_students_differ_in_the_loss_alone(first, tmp_path, monkeypatch):
    seen = []

    def recorded(model, batches, objective, **more):
        seen.append((torch.cat([value.flatten() for value in model.parameters()]), [target for _, target in batches]))
        return engine.History([{"loss": 1.0, "accuracy": 1.0}])

    monkeypatch.setattr(engine, "fit", recorded)
    run(tmp_path, "--teacher", str(first[0] / "teacher.pt"), "--seeds", "2", "--methods", "alone,soft-targets")
    alone, soft, second, _ = seen
    assert torch.equal(alone[0], soft[0]) and not torch.equal(alone[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(alone[1], soft[1]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--teacher", "nowhere.pt"], "cannot read the checkpoint"),
        (["--backend", "abacus"], "abacus"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "1", "2"], "three"),
        (["--weight", "-1", "0", "0"], "weight"),
        (["--warmup", "-2"], "warmup"),
        (["--images", "5000"], "images must be"),
        (["--label-noise", "1.5"], "fraction of wrong labels"),
        (["--device", "abacus"], "abacus"),
        (["--backend", "cuda"], "backend 'cuda' cannot run"),
    ],
)
def test_bad_arguments_end_with_a_message_before_any_training(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("training began"))
    assert run(tmp_path, *arguments)[0] == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--methods", "alone,magic"], ["--epochs", "0"], ["--seeds", "many"], ["--threads", "100000"]]
)
def test_arguments_that_do_not_parse(arguments):
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    assert end.value.code == 2


class TestCheckpoints:
    def test_a_round_trip(self, tmp_path):
        model = MODELS["mlp"](10)
        engine.save(tmp_path / "a.pt", model, "mlp", classes=10, data="digits")
        loaded, name = engine.load(tmp_path / "a.pt", classes=10, data="digits")
        assert name == "mlp"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))

    def test_another_number_of_classes(self, tmp_path):
        engine.save(tmp_path / "a.pt", MODELS["mlp"](7), "mlp", classes=7, data="digits")
        with pytest.raises(ValueError, match="for 7 classes; 10 are needed"):
            engine.load(tmp_path / "a.pt", classes=10, data="digits")

    def test_another_data_set_of_as_many_classes(self, tmp_path):
        engine.save(tmp_path / "a.pt", MODELS["mlp"](10), "mlp", classes=10, data="letters")
        with pytest.raises(ValueError, match="was trained on 'letters'; the student learns from 'digits'"):
            engine.load(tmp_path / "a.pt", classes=10, data="digits")

    def test_weights_of_another_model(self, tmp_path):
        engine.save(tmp_path / "a.pt", MODELS["mlp"](10), "small-cnn", classes=10, data="digits")
        with pytest.raises(ValueError, match="does not hold the weights of a small-cnn"):
            engine.load(tmp_path / "a.pt", classes=10, data="digits")

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
    def test_a_file_that_is_none(self, tmp_path, content):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(ValueError, match="not a checkpoint"):
            engine.load(tmp_path / "a.pt", classes=10, data="digits")

    def test_a_foreign_one(self, tmp_path):
        torch.save({"weights": torch.ones(2)}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="of this program"):
            engine.load(tmp_path / "a.pt", classes=10, data="digits")


class TestData:
    def test_splits_do_not_overlap_and_noise_is_counted(self):
        splits = digits(200, 0.3, 0)
        assert len(splits.student) == 200 and splits.flipped == 60
        clean = digits(200, 0.0, 0)
        assert int((splits.student.labels != clean.student.labels).sum()) == 60
        assert clean.student.labels.bincount().min() >= 15  # stratified
        images = [splits.teacher.padded[:, :, 1:-1, 1:-1], splits.validation.tensors[0], splits.test.tensors[0]]
        rows = [{tuple(image.flatten().tolist()) for image in split} for split in images]
        # A few of the 1797 images occur twice in the bundle itself.
        assert len(rows[0] & rows[2]) <= 2 and len(rows[1] & rows[2]) <= 2
        assert sum(len(split) for split in images) == 1797

    def test_images_move_by_at_most_a_pixel(self):
        data = digits(50, 0.0, 0).student
        torch.manual_seed(0)
        original = data.padded[3, :, 1:-1, 1:-1]
        drawn = [data[3][0] for _ in range(60)]
        assert all(image.shape == original.shape for image in drawn)
        assert len({tuple(image.flatten().tolist()) for image in drawn}) == 9
        assert any(torch.equal(image, original) for image in drawn)

    def test_a_seed_fixes_the_order(self):
        data = TensorDataset(torch.arange(50.0), torch.arange(50))
        orders = [torch.cat([y for _, y in loader(data, 8, True, seed)]).tolist() for seed in (1, 1, 2)]
        assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(50))


def test_the_student_is_small():
    assert parameters(MODELS["small-cnn"](10)) * 50 < parameters(MODELS["cnn"](10))


def test_the_warm_up_follows_the_fraction_of_the_epoch(monkeypatch):
    loss = objectives.Contrastive(MCLDLoss(warmup=2))
    heard = []
    set_epoch = loss.mcld.set_epoch

    def record(epoch):
        heard.append(epoch)
        set_epoch(epoch)

    monkeypatch.setattr(loss.mcld, "set_epoch", record)
    data = TensorDataset(torch.randn(6, 1, 8, 8), torch.arange(6))
    model, teacher = MODELS["mlp"](10), MODELS["mlp"](10)
    engine.fit(model, DataLoader(data, 3), loss, epochs=2, rate=1e-3, device=CPU, teacher=teacher)
    assert heard == [0.0, 0.5, 1.0, 1.5]


def test_the_teacher_is_not_changed():
    data = TensorDataset(torch.randn(6, 1, 8, 8), torch.arange(6))
    model, teacher = MODELS["mlp"](10), MODELS["mlp"](10)
    before = [value.clone() for value in teacher.parameters()]
    loss = objectives.Contrastive(MCLDLoss())
    engine.fit(model, DataLoader(data, 3), loss, epochs=2, rate=1e-2, device=CPU, teacher=teacher)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
    assert all(value.grad is None for value in teacher.parameters())


def test_a_loss_that_is_not_finite_stops_the_training():
    data = TensorDataset(torch.full((6, 1, 8, 8), float("nan")), torch.arange(6))
    with pytest.raises(engine.Diverged, match="epoch 1"):
        engine.fit(MODELS["mlp"](10), DataLoader(data, 3), objectives.CrossEntropy(), epochs=2, rate=1e-2, device=CPU)


def test_spread():
    assert report.spread([0.5]) == (0.5, 0.0)
    assert report.spread([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_distillation_helps(tmp_path):
    """The default setting, shortened. Five seeds give +10 points; +3 leaves room for another machine's rounding."""
    arguments = [
        "--seeds",
        "2",
        "--epochs",
        "60",
        "--teacher-epochs",
        "15",
        "--methods",
        "alone,mcld",
        "--device",
        "cpu",
    ]
    assert train.main([*arguments, "--output", str(tmp_path)]) == 0
    methods = json.loads((tmp_path / "results.json").read_text())["methods"]
    alone, distilled = (report.spread(methods[name]["accuracy"])[0] for name in ("alone", "mcld"))
    assert distilled > alone + 0.03


class TestOutput:
    @pytest.fixture
    def quick(self, first):
        """Arguments of a run that trains two students for one epoch each."""
        return ["--teacher", str(first[0] / "teacher.pt"), "--epochs", "1", "--methods", "alone,soft-targets"]

    def test_an_output_in_use_is_not_overwritten(self, quick, tmp_path, capsys):
        assert run(tmp_path, *quick)[0] == 0
        before = (tmp_path / "results.json").read_text()
        assert run(tmp_path, *quick)[0] == Exit.USAGE
        assert (tmp_path / "results.json").read_text() == before
        assert "holds results.json of another run" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize(("fault", "code"), [(KeyboardInterrupt, 130), (engine.Diverged("the loss is nan"), 1)])
    def test_students_finished_before_a_fault_are_kept(self, quick, tmp_path, monkeypatch, capsys, fault, code):
        fit, calls = engine.fit, []

        def interrupted(*rest, **more):
            calls.append(1)
            if len(calls) == 2:
                raise fault
            return fit(*rest, **more)

        monkeypatch.setattr(engine, "fit", interrupted)
        assert run(tmp_path, *quick)[0] == code
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["complete"] is False
        assert len(results["methods"]["alone"]["accuracy"]) == 1
        assert not results["methods"]["soft-targets"]["accuracy"]
        assert (tmp_path / "curves.png").exists() and "student alone" in capsys.readouterr().out

    def test_a_fault_before_the_first_student_is_one_message(self, quick, tmp_path, monkeypatch, capsys):
        def interrupted(*rest, **more):
            raise KeyboardInterrupt

        monkeypatch.setattr(engine, "fit", interrupted)
        assert run(tmp_path, *quick)[0] == Exit.INTERRUPTED
        assert "no student was finished" in capsys.readouterr().out

    def test_a_folder_that_cannot_be_made_is_one_message(self, quick, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert run(tmp_path / "file" / "folder", *quick)[0] == Exit.OUTPUT
        assert "the output cannot be written" in capsys.readouterr().out

    @pytest.mark.parametrize("method", ["write_text", "write_bytes"], ids=["results", "teacher"])
    def test_a_full_disk_is_one_message(self, method, quick, tmp_path, capsys, monkeypatch):
        def full(*rest, **more):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(report.Path, method, full)
        assert run(tmp_path, *quick)[0] == Exit.OUTPUT
        assert "No space left on device" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_without_a_gpu_it_says_so(self, tmp_path, capsys):
        assert run(tmp_path, "--device", "cuda")[0] == Exit.NO_DEVICE
        assert "no CUDA device" in capsys.readouterr().out

    def test_a_pipe_gets_a_line_for_each_training(self, quick, tmp_path, capsys, monkeypatch):
        monkeypatch.delenv("COLUMNS", raising=False)
        run(tmp_path, *quick)
        shown = capsys.readouterr().out
        assert "alone, seed 0: 1 epochs  cross-entropy" in shown
        assert max(map(len, shown.splitlines())) <= 80

    def test_it_runs_without_docstrings_and_on_an_ascii_terminal(self, quick, tmp_path):
        done = subprocess.run(
            [sys.executable, "-OO", "python/train.py", *SHORT, *quick, "--output", str(tmp_path / "a")],
            cwd=ROOT,
            capture_output=True,
            timeout=300,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        )
        assert done.returncode == 0, done.stderr.decode()
        assert b"+- 0.00" in done.stdout and max(done.stdout) < 128
