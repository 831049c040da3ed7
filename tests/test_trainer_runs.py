"""Whole runs of the trainer in one process: images on disk, faulty ones, what a run leaves, and what ends it."""

import csv
import errno
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from trainer_cases import ROOT, image_folder, last_state, results, run, shard, write_config

from matplotlib.figure import Figure  # isort: skip
import train  # isort: skip
from trainer import checkpoint, engine, program, record, sources  # isort: skip
from trainer.config import Config  # isort: skip
from trainer.faults import Exit  # isort: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """240 training images of four classes and three broken files; 20 of validation."""
    root = tmp_path_factory.mktemp("images")
    image_folder(root / "train", each=60, broken=True)
    image_folder(root / "val", each=5)
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """240 training samples in six shards, one with a cut image, one cut itself; 20 of validation."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(6):
        shard(root / f"train-{number:02}.tar", range(40 * number, 40 * number + 40), broken=number == 2)
    last = root / "train-05.tar"
    last.write_bytes(last.read_bytes()[: 30 * 2048])
    shard(root / "val-00.tar", range(300, 320))
    return root


def folder_config(tmp_path, root, **more):
    data = {"source": "folder", "root": str(root), "image_size": 12, "faulty_limit": 0.1, **more.pop("data", {})}
    return write_config(tmp_path, data=data, batch=20, augment={"auto_augment": "rand-m5", "erasing": 0.2}, **more)


def shard_config(tmp_path, root, **more):
    data = {
        "source": "webdataset", "root": str(root), "train": "train-{00..05}.tar", "validation": "val-00.tar",
        "image_size": 12, "faulty_limit": 0.1, **more.pop("data", {}),
    }  # fmt: skip
    return write_config(tmp_path, data=data, batch=20, **more)


class TestImagesOnDisk:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_folder_with_broken_images_is_trained_on_and_they_are_named(self, images, tmp_path, workers):
        config = folder_config(tmp_path, images, data={"workers": workers}, epochs=2)
        assert run(config, tmp_path / "out") == 0
        left = results(tmp_path / "out")
        assert left["state"] == "done" and left["steps"] == 24 and left["faulty"] == 3
        named = (tmp_path / "out" / "faults.txt").read_text().splitlines()
        assert sorted(line.partition(":")[0] for line in named) == [
            f"class-0/{x}.jpg" for x in ("cut", "empty", "text")
        ]
        assert 0 <= left["last"]["accuracy"] <= 1
        assert "3 images could not be read: class-0/cut.jpg" in (tmp_path / "out" / "log.txt").read_text()
        if workers:  # the weights do not depend on who reads the images
            assert run(folder_config(tmp_path / "a", images, epochs=2), tmp_path / "in-process") == 0
            a, b = (last_state(tmp_path / name)["model"] for name in ("out", "in-process"))
            assert all(torch.equal(a[name], b[name]) for name in a)

    def test_shards_with_a_broken_image_and_a_cut_end(self, shards, tmp_path):
        assert run(shard_config(tmp_path, shards, epochs=1), tmp_path / "out") == 0
        left = results(tmp_path / "out")
        assert left["state"] == "done" and left["faulty"] == 1
        named = (tmp_path / "out" / "faults.txt").read_text()
        assert "train-05.tar: cut off at 61440 bytes" in named and "train-02.tar, sample 1:" in named
        assert "left out: train-05.tar" in (tmp_path / "out" / "log.txt").read_text()
        assert "accuracy" in left["last"]

    @pytest.mark.parametrize("kind", ["folder", "shards"])
    def test_a_faulty_file_ends_the_run_where_that_is_asked(self, kind, images, shards, tmp_path, capsys):
        make, root = (folder_config, images) if kind == "folder" else (shard_config, shards)
        assert run(make(tmp_path, root, data={"faulty": "fail"}), tmp_path / "out") == Exit.DATA
        text = " ".join(capsys.readouterr().out.split())
        assert ("an image cannot be read: class-0/" if kind == "folder" else "train-05.tar: cut off") in text

    def test_more_missing_shards_than_the_limit_end_the_run(self, shards, tmp_path, capsys):
        pattern = {"train": "train-{00..07}.tar"}
        assert run(shard_config(tmp_path, shards, data=pattern), tmp_path / "out") == Exit.DATA
        text = "2 of 8 shards cannot be read, more than data.faulty_limit=0.1 of them: train-06.tar: No such file"
        assert text in " ".join(capsys.readouterr().out.split())
        config = shard_config(tmp_path, shards, data={**pattern, "faulty_limit": 0.3}, epochs=1)
        assert run(config, tmp_path / "out") == 0

    def test_more_faulty_images_than_the_limit_end_the_run(self, images, tmp_path, capsys):
        config = folder_config(tmp_path, images, data={"faulty_limit": 0.01})
        assert run(config, tmp_path / "out") == Exit.DATA
        assert "3 images cannot be read, more than data.faulty_limit=0.01 of 243" in (
            " ".join(capsys.readouterr().out.split())
        )
        assert results(tmp_path / "out")["exit"] == Exit.DATA

    def test_a_class_without_a_folder_or_without_images_is_named(self, tmp_path, capsys):
        root = tmp_path / "images"
        image_folder(root / "train", each=2)
        image_folder(root / "val", each=1, classes=2)
        (root / "val" / "other").mkdir()
        config = folder_config(tmp_path, root)
        assert run(config, tmp_path / "out") == Exit.DATA
        shown = " ".join(capsys.readouterr().out.split())
        assert "has no folder for 2 of the training classes: class-2, class-3" in shown
        for label in (2, 3):
            (root / "val" / f"class-{label}").mkdir()
        assert run(config, tmp_path / "out") == Exit.DATA
        assert "has folders of classes that the training images do not have: other" in (
            " ".join(capsys.readouterr().out.split())
        )
        (root / "val" / "other").rmdir()
        assert run(config, tmp_path / "out") == Exit.DATA
        assert "has no image for 2 of 4 classes: class-2, class-3" in " ".join(capsys.readouterr().out.split())
        assert not (tmp_path / "out").exists()

    def test_an_empty_split_and_a_missing_root_are_told(self, tmp_path, capsys):
        (tmp_path / "images" / "train").mkdir(parents=True)
        config = folder_config(tmp_path, tmp_path / "images")
        assert run(config, tmp_path / "out") == Exit.DATA
        assert "has no folder of a class" in " ".join(capsys.readouterr().out.split())
        assert run(shard_config(tmp_path, tmp_path), tmp_path / "out") == Exit.DATA
        assert "no sample in 6 shards" in " ".join(capsys.readouterr().out.split())
        assert run(folder_config(tmp_path, tmp_path / "nowhere"), tmp_path / "out") == Exit.DATA
        assert "there is no folder" in " ".join(capsys.readouterr().out.split())

    def test_a_shard_is_read_as_webdataset_reads_it(self, shards):
        """The same images and labels, in the same order, as the library's own reader."""
        import webdataset

        source = sources.Shards(shards, "train-{00..01}.tar", 4, 3, "fail")
        urls = [str(path) for path in source.paths]
        wanted = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls"))
        assert len(source) == len(wanted) == 80
        for index in (0, 1, 39, 40, 79):
            image, label = source.read(index)
            assert label == wanted[index][1] and image.tobytes() == wanted[index][0].tobytes()


class TestARunFolder:
    @pytest.fixture(scope="class")
    @classmethod
    def done(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        changes = {
            "data": {"validation_images": 12}, "ema": {"decay": 0.9}, "log": {"every": 2, "tensorboard": True},
            "loss": {"name": "mcld", "options": {"temperature": 0.5}, "gradient_norms": 2},
            "checkpoint": {"every_steps": 2, "keep": 3},
        }  # fmt: skip
        config = write_config(folder, **changes)
        assert run(config, folder / "out", "--loss-option", "warmup=2", "--profile", "2", curves=True) == 0
        return folder / "out"

    def test_it_has_settings_versions_commit_and_machine(self, done):
        left = results(done)
        assert left["schema"] == 1 and left["state"] == "done" and left["exit"] == 0
        assert {"commit", "dirty", "started", "machine"} <= left.keys()
        assert {"torch", "timm", "torchmetrics", "mcld_kernels", "python"} <= left["versions"].keys()
        saved = program.settings.load(done / "config.yaml")
        assert saved.loss.options == {"temperature": 0.5, "warmup": 2} and saved.log.profile == 2
        assert str(done) not in json.dumps({name: left[name] for name in ("machine", "versions", "last")})

    def test_it_has_curves_lines_a_profile_and_events(self, done):
        assert (done / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert list(done.glob("events.out.tfevents.*"))
        assert "aten::" in (done / "profile.txt").read_text()
        events = json.loads((done / "trace.json").read_text())["traceEvents"]
        seen = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
        assert seen == {"ProfilerStep#3", "ProfilerStep#4"}  # an epoch has five steps, and --profile is 2
        log = (done / "log.txt").read_text()
        assert "step 2: loss" in log and "images/s" in log and "% of the validation images" in log
        assert "\x1b" not in log

    @pytest.mark.parametrize(
        ("wanted", "steps", "expected"),
        [(10, 100, (5, 10)), (2, 5, (3, 2)), (2, 3, (1, 2)), (10, 4, (1, 3)), (10, 1, (0, 1)), (1, 1, (0, 1))],
    )
    def test_a_short_epoch_has_a_profile_too(self, wanted, steps, expected):
        assert engine.profiled(wanted, steps) == expected

    def test_no_legend_hides_a_curve(self, tmp_path, monkeypatch):
        names = ("loss", "cross-entropy", "mcld", "instance", "sample", "category")
        rows = [{"step": at, **dict.fromkeys(names, float(at % 9)), "share_loss": 0.5} for at in range(1, 30)]
        steps = SimpleNamespace(rows=rows, columns=["step", *names, *(f"weight_{name}" for name in names[1:])])
        epochs = SimpleNamespace(rows=[{"step": at, "accuracy": at / 30, "ema_accuracy": 0.9} for at in range(1, 30)])
        drawn = []
        save = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: save(figure, *a, **k) or drawn.append(figure))
        left = {"teacher": {"accuracy": 0.25}, "ranks": 2}
        state = SimpleNamespace(steps=steps, epochs=epochs, results=left, config=Config())
        record.plot(tmp_path / "curves.png", state)
        boxes = [(axis.get_legend().get_window_extent(), axis.get_window_extent()) for axis in drawn[0].axes]
        assert len(boxes) == 3 and not any(legend.overlaps(panel) for legend, panel in boxes)
        assert not any(a[0].overlaps(b[0]) for a, b in zip(boxes, boxes[1:]))
        assert "2 ranks, seed 0" in drawn[0].get_supxlabel()

    def test_every_part_its_weight_and_its_gradient_is_in_the_table(self, done):
        with (done / "steps.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [2, 4, 5, 6, 8, 10]
        parts = ("cross-entropy", "instance", "sample", "category")
        for row in rows:
            total = sum(float(row[f"weight_{name}"]) * float(row[name]) for name in parts)
            if row["step"] in ("5", "6"):  # weights are those of the last step; here it is the only one
                assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
            if row["step"] != "6":  # no norms were due
                assert all(float(row[f"norm_{name}"]) > 0 for name in parts[:3])
            assert 0 < float(row["share_loss"]) < 1 and float(row["images_per_s"]) > 0
            shares = [float(row[f"share_{name}"]) for name in ("data", "teacher", "student", "loss", "optimizer")]
            assert sum(shares) <= 1
        assert float(rows[-1]["weight_category"]) == pytest.approx(0.9)  # (1 + 4/5) / 2 of its warm-up

    def test_the_newest_checkpoints_and_the_best_stay(self, done):
        names = sorted(path.name for path in (done / "checkpoints").iterdir())
        assert names == ["best.pt", "step-00000006.pt", "step-00000008.pt", "step-00000010.pt"]
        best = checkpoint.read(done / "checkpoints" / "best.pt")
        assert best["best"] == results(done)["best"]

    def test_a_student_becomes_a_teacher_by_its_checkpoint(self, done, tmp_path):
        teacher = {"checkpoint": str(done / "checkpoints" / "best.pt"), "allow_untrained": False}
        config = write_config(tmp_path, teacher=teacher, data={"validation_images": 12}, steps=1)
        assert run(config, tmp_path / "out") == 0
        assert results(tmp_path / "out")["teacher"]["accuracy"] == results(done)["best"]

    def test_a_run_that_is_done_goes_on_with_more_epochs_and_says_so(self, done, tmp_path, capsys):
        path = done / "checkpoints" / "step-00000010.pt"
        arguments = ["--resume", str(path), "--output", str(tmp_path / "more"), "--set", "epochs=3"]
        assert train.main(arguments) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "goes on from" in shown and "epochs was 2 and is 3 now" in shown
        assert results(tmp_path / "more")["steps"] == 15

    def test_an_output_in_use_is_refused(self, done, capsys):
        before = results(done)
        assert run(done.parent / "small.yaml", done) == Exit.USAGE
        assert "choose another --output, or --resume" in " ".join(capsys.readouterr().out.split())
        assert results(done) == before


class TestCheckpointsThatDoNotFit:
    @pytest.fixture(scope="class")
    @classmethod
    def begun(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("begun")
        config = write_config(folder, checkpoint={"every_steps": 2}, steps=4)
        assert run(config, folder / "out") == 0
        return folder

    def resume(self, begun, *more):
        return train.main(["--config", str(begun / "small.yaml"), "--output", str(begun / "out"), "--resume", *more])

    def test_a_cut_file_is_told_and_the_one_before_it_named(self, begun, capsys):
        path = begun / "out" / "checkpoints" / "step-00000004.pt"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert self.resume(begun) == Exit.USAGE
        shown = "".join(capsys.readouterr().out.split())
        assert "iscutoffordamaged" in shown and "--resume" + "".join(str(path.with_name("step-00000002.pt"))) in shown
        path.write_bytes(whole)

    def test_a_changed_bit_is_told(self, begun, capsys):
        path = begun / "out" / "checkpoints" / "step-00000004.pt"
        whole = path.read_bytes()
        weights = torch.load(path, weights_only=True)["model"].values()
        start = whole.index(max(weights, key=torch.numel).numpy().tobytes())
        path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
        assert self.resume(begun) == Exit.USAGE
        assert "iscutoffordamaged(thechecksum" in "".join(capsys.readouterr().out.split())
        path.write_bytes(whole)

    def test_a_changed_bit_of_a_teacher_is_told(self, begun, tmp_path, capsys):
        whole = (begun / "out" / "checkpoints" / "step-00000004.pt").read_bytes()
        weights = torch.load(begun / "out" / "checkpoints" / "step-00000004.pt", weights_only=True)["model"].values()
        start = whole.index(max(weights, key=torch.numel).numpy().tobytes())
        (tmp_path / "teacher.pt").write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
        teacher = f"teacher.checkpoint={tmp_path / 'teacher.pt'}"
        assert run(begun / "small.yaml", tmp_path / "out", "--set", teacher) == Exit.USAGE
        assert "teacher.ptiscutoff,orholdsmorethanweights:thechecksum" in "".join(capsys.readouterr().out.split())

    def test_another_teacher_is_told(self, begun, tmp_path, capsys):
        shutil.copytree(begun / "out", tmp_path / "out")
        weights = begun / "out" / "checkpoints" / "step-00000004.pt"
        config = begun / "small.yaml"
        assert run(config, tmp_path / "out", "--resume", "--set", f"teacher.checkpoint={weights}") == 0
        assert "teacher.checkpoint was" in " ".join(capsys.readouterr().out.split())

    def test_an_average_that_a_run_begins_when_it_goes_on_is_that_of_the_student(self, tmp_path):
        config = write_config(tmp_path, student={"name": "tiny-bn"}, epochs=1)
        assert run(config, tmp_path / "out") == 0
        want = last_state(tmp_path / "out")["model"]
        assert run(config, tmp_path / "out", "--resume", "--set", "epochs=2", "--set", "ema.decay=1") == 0
        got = last_state(tmp_path / "out")["ema"]
        assert all(torch.equal(got[name], value) for name, value in want.items() if value.is_floating_point())

    def test_later_checkpoints_are_not_the_newest_of_a_run_that_goes_on_before_them(self, tmp_path, capsys):
        config = write_config(tmp_path, checkpoint={"every_steps": 2, "keep": 1, "every_epochs": 0}, steps=8)
        assert run(config, tmp_path / "out", "--set", "checkpoint.keep=9") == 0
        kept = tmp_path / "out" / "checkpoints"
        assert run(config, tmp_path / "out", "--resume", str(kept / "step-00000002.pt"), "--set", "steps=4") == 0
        assert [path.name for path in kept.glob("step-*.pt")] == ["step-00000004.pt"]  # the last of this run
        assert sorted(path.name for path in kept.glob("abandoned-*.pt")) == [
            f"abandoned-step-0000000{step}.pt" for step in (4, 6, 8)
        ]
        assert "later checkpoints are renamed" in " ".join(capsys.readouterr().out.split())
        assert run(config, tmp_path / "out", "--resume") == 0
        assert "goes on from" in capsys.readouterr().out and last_state(tmp_path / "out")["steps"] == 8

    def test_other_images_are_told_and_within_an_epoch_refused(self, tmp_path, capsys):
        image_folder(tmp_path / "images" / "train", each=8)
        data = {"source": "folder", "root": str(tmp_path / "images"), "validation": ""}
        config = write_config(tmp_path, data=data, checkpoint={"every_steps": 3, "keep": 9})
        assert run(config, tmp_path / "out") == 0  # two epochs of four steps
        for label in range(4):
            for number in range(4):
                (tmp_path / "images" / "train" / f"class-{label}" / f"{number:03}.jpg").unlink()
        within = tmp_path / "out" / "checkpoints" / "step-00000003.pt"
        assert run(config, tmp_path / "out", "--resume", str(within)) == Exit.USAGE
        assert "is within an epoch of 32 training images, and there are 16 now" in (
            " ".join(capsys.readouterr().out.split())
        )
        assert run(config, tmp_path / "out", "--resume", "--set", "epochs=6") == 0
        assert "there were 32 training images, and there are 16 now" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("student.name=tiny-bn", "is of a run with student.name=tiny-cnn, and student.name=tiny-bn now"),
            ("batch=4", "is of a run with batch=8, and batch=4 now"),
            ("ema.decay=0.9", None),
            ("student.options={width: 4}", "student.options"),
        ],
    )
    def test_another_model_or_batch_is_refused(self, begun, capsys, change, message):
        code = self.resume(begun, "--set", change)
        if message is None:
            assert code == 0
        else:
            assert code == Exit.USAGE and message in " ".join(capsys.readouterr().out.split())

    def test_a_foreign_file_and_an_empty_folder_are_told(self, begun, tmp_path, capsys):
        torch.save({"weights": torch.ones(2)}, tmp_path / "a.pt")
        assert train.main(["--resume", str(tmp_path / "a.pt")]) == Exit.USAGE
        assert "is not a checkpoint of this trainer" in " ".join(capsys.readouterr().out.split())
        assert train.main(["--resume", str(tmp_path / "empty")]) == Exit.USAGE
        assert "there is no checkpoint in" in " ".join(capsys.readouterr().out.split())

    def test_a_full_disk_leaves_the_earlier_checkpoint_whole(self, begun, tmp_path, monkeypatch, capsys):
        state = last_state(begun / "out")

        def full(*rest, **more):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.write_whole(begun / "out" / "checkpoints" / "step-00000004.pt", {"kind": "half"})
        monkeypatch.undo()
        assert last_state(begun / "out")["steps"] == state["steps"]
        assert not list((begun / "out" / "checkpoints").glob("*.partial"))


class TestAnEnd:
    def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint_before_it(self, tmp_path, capsys):
        config = write_config(tmp_path, checkpoint={"every_steps": 1, "keep": 100}, optimizer={"rate": 1e30})
        assert run(config, tmp_path / "out") == Exit.FAILED
        shown = " ".join(capsys.readouterr().out.split())
        assert "the loss is not finite at step" in shown and "the last checkpoint is" in shown
        state = last_state(tmp_path / "out")
        assert math.isfinite(state["ranks"][0]["sums"]["loss"]) and results(tmp_path / "out")["state"] == "failed"

    def test_an_interrupted_run_says_how_to_go_on(self, tmp_path, monkeypatch, capsys):
        def interrupted(*rest):
            raise KeyboardInterrupt

        monkeypatch.setattr(engine.Run, "_after_step", interrupted)
        assert run(write_config(tmp_path), tmp_path / "out") == Exit.INTERRUPTED
        assert results(tmp_path / "out")["state"] == "interrupted"
        assert "--resume goes on" in " ".join(capsys.readouterr().out.split())

    def test_a_folder_that_cannot_be_made_is_one_message(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert run(write_config(tmp_path), tmp_path / "file" / "out") == Exit.OUTPUT
        assert "the run folder cannot be written" in " ".join(capsys.readouterr().out.split())

    def test_more_threads_than_the_machine_can_start_are_refused(self, tmp_path, capsys):
        assert run(write_config(tmp_path, threads=100_000), tmp_path / "out") == Exit.USAGE
        assert "threads must be at most" in " ".join(capsys.readouterr().out.split())
        assert not (tmp_path / "out").exists()


def test_a_full_disk_at_the_end_is_told(tmp_path, capsys, monkeypatch):
    def plot(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "plot", plot)
    assert run(write_config(tmp_path), tmp_path / "out", curves=True) == Exit.OUTPUT
    assert "cannot be completed" in (shown := " ".join(capsys.readouterr().out.split())) and "No space left" in shown
    assert last_state(tmp_path / "out")["epoch"] == 2


def test_a_full_disk_within_the_run_has_its_own_code_in_the_results(tmp_path, monkeypatch):
    def full(self, row):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record.Record, "step", full)
    assert run(write_config(tmp_path), tmp_path / "out") == Exit.OUTPUT
    assert results(tmp_path / "out")["exit"] == Exit.OUTPUT


def test_cached_logits_are_computed_once_and_train_the_same_student(tmp_path, monkeypatch):
    calls = []
    ask = engine.Run._to_device

    def counted(self, *rest):
        self.parts.step.teacher.register_forward_pre_hook(lambda *_: calls.append(1)) if not calls else None
        return ask(self, *rest)

    changes = {"augment": {"enabled": False}, "epochs": 3}
    assert run(write_config(tmp_path, **changes), tmp_path / "plain") == 0
    monkeypatch.setattr(engine.Run, "_to_device", counted)
    config = write_config(tmp_path, teacher={"cache": True}, **changes)
    assert run(config, tmp_path / "cached") == 0
    assert len(calls) == 5  # the steps of the first epoch
    states = [last_state(tmp_path / name)["model"] for name in ("plain", "cached")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


@pytest.mark.parametrize("change", ["teacher.name=tiny-bn", "augment.mean=0.2", "precision.amp=bfloat16"])
def test_kept_logits_of_another_teacher_or_other_images_are_not_read(tmp_path, capsys, change):
    data = {"source": "digits", "channels": 1, "classes": 10, "validation": ""}
    augment = {"enabled": False, "mean": [0.5], "std": [0.5]}
    config = write_config(
        tmp_path, teacher={"cache": True}, data=data, augment=augment, batch=449, loss={"name": "mcld"}
    )
    states = []
    for name in ("kept", "fresh"):
        out = tmp_path / name
        assert run(config, out, "--set", "epochs=1") == 0
        if name == "fresh":
            for path in out.glob("teacher-logits.*"):
                path.unlink()
        capsys.readouterr()
        assert run(config, out, "--resume", "--set", change) == 0
        assert ("computed anew" in " ".join(capsys.readouterr().out.split())) == (name == "kept")
        states.append(last_state(out)["model"])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_logits_of_an_image_in_the_place_of_another_are_not_kept(tmp_path):
    root = tmp_path / "images"
    image_folder(root / "train", each=4)
    broken, data = root / "train" / "class-1" / "001.jpg", {"source": "folder", "root": str(root), "validation": ""}
    whole = broken.read_bytes()
    config = write_config(
        tmp_path, teacher={"cache": True}, augment={"enabled": False}, data={**data, "faulty_limit": 1}, epochs=1
    )
    broken.write_bytes(b"")
    assert run(config, tmp_path / "out") == 0
    marks = (tmp_path / "out" / "teacher-logits.marks").read_bytes()
    assert sum(marks) == 15 and not marks[5]
    broken.write_bytes(whole)  # the place was out of reach, and is back
    assert run(config, tmp_path / "out", "--resume", "--set", "epochs=2") == 0
    logits = [(folder / "teacher-logits.bin").read_bytes() for folder in (tmp_path / "out", tmp_path / "fresh")
              if folder.name == "out" or run(config, folder) == 0]  # fmt: skip
    assert logits[0] == logits[1]


def test_kept_logits_serve_a_run_that_goes_on(tmp_path, capsys):
    config = write_config(tmp_path, teacher={"cache": True}, augment={"enabled": False})
    assert run(config, tmp_path / "out", "--set", "epochs=1") == 0
    before = (tmp_path / "out" / "teacher-logits.bin").read_bytes()
    assert run(config, tmp_path / "out", "--resume") == 0
    assert "computed anew" not in capsys.readouterr().out
    assert (tmp_path / "out" / "teacher-logits.bin").read_bytes() == before


def test_the_best_model_is_saved_in_an_epoch_without_a_checkpoint(tmp_path, monkeypatch):
    scores = iter([0.25, 0.5, 0.75, 0.5, 0.5])  # the teacher's, and of four epochs
    monkeypatch.setattr(engine, "accuracy", lambda *_: (next(scores), 1.0, 0, [], ""))
    config = write_config(tmp_path, data={"validation_images": 8}, epochs=4, checkpoint={"every_epochs": 4})
    assert run(config, tmp_path / "out") == 0
    best = checkpoint.read(tmp_path / "out" / "checkpoints" / "best.pt")
    assert (best["epoch"], best["best"], last_state(tmp_path / "out")["epoch"]) == (2, 0.75, 4)


def test_a_recipe_runs_on_synthetic_images(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    recipe = ROOT / "python" / "recipes" / "cifar100-resnet32x4-resnet8x4.yaml"
    arguments = ["--try", "2", "--set", "batch=8", "--set", "student.name=resnet20", "--set", "teacher.name=resnet20"]
    assert run(recipe, tmp_path / "out", *arguments) == 0
    printed = capsys.readouterr().out
    shown = " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80  # a pipe
    assert "trial: " in shown and "images/s, the loss takes" in shown
