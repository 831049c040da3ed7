"""The trainer over processes: a killed run that goes on ends where an undisturbed one does; two ranks are as one."""

import csv
import signal

import pytest
import torch
from trainer_cases import LAST_IS_KILLED, image_folder, in_processes, last_state, merged, results, write_config

from trainer import checkpoint  # isort: skip
from trainer.faults import ConfigFault, Exit  # isort: skip


def differences(a, b, path="") -> list[str]:
    """Where two checkpoints differ; tensors must be equal to the bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys"]
        return [text for key in a for text in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list):
        if len(a) != len(b):
            return [f"{path}: length"]
        return [text for i, (x, y) in enumerate(zip(a, b)) for text in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]


def without_settings(state):
    """A checkpoint without the output folder, and without the sums for the log, whose grouping a stop changes."""
    state.pop("config")
    for rank in state["ranks"]:
        rank.pop("sums")
    return state


EVERYTHING = {
    "epochs": 3,
    "accumulate": 2,
    "augment": {"mixup": 0.4, "cutmix": 1.0, "pad": 1, "mean": [0.5], "std": [0.5]},
    "student": {"name": "tiny-bn", "options": {"dropout": 0.2}},
    "loss": {"name": "mcld", "queue": 300, "options": {"weight": [1.0, 2.0, 1.0], "warmup_steps": 9}},
    "ema": {"decay": 0.9, "warmup": True},
    "optimizer": {"name": "adamw", "rate": 0.01, "clip_norm": 1.0},
    "checkpoint": {"every_steps": 3, "every_epochs": 0},
}


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_killed_within_an_epoch_and_resumed_ends_bitwise_as_an_undisturbed_one(size, tmp_path):
    data = {"source": "digits", "channels": 1, "classes": 10, "workers": 1 if size == 1 else 0, "validation": ""}
    changes = merged(EVERYTHING, {"data": data, "batch": 128, "steps": 17})
    config = write_config(tmp_path, **changes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["--config", str(config), "--output"]
    assert in_processes(size, [*arguments, str(whole)]) == [0] * size
    # An epoch has 7 steps: the kill comes in the second one, two steps after a checkpoint.
    codes = in_processes(size, [*arguments, str(killed)], signal_at=(11, signal.SIGKILL))
    assert codes == [-signal.SIGKILL] * size
    assert last_state(killed)["steps"] == 9 and results(killed)["state"] == "running"
    assert in_processes(size, [*arguments, str(killed), "--resume"]) == [0] * size
    states = [without_settings(last_state(folder)) for folder in (whole, killed)]
    assert states[0]["steps"] == 17 and len(states[0]["ranks"]) == size
    assert not differences(*states)
    rows = [(folder / "steps.csv").read_text().splitlines() for folder in (whole, killed)]
    steps = [[int(row.split(",")[0]) for row in table[1:]] for table in rows]
    assert steps[1] == sorted(set(steps[1]))  # no step stands twice in the log


@pytest.mark.parametrize("loss", ["kd", "dkd", "mcld"])
def test_two_ranks_equal_one_process_at_the_same_global_batch(loss, tmp_path):
    changes: dict = {
        "batch": 16, "steps": 20, "accumulate": 2, "ema": {"decay": 0.9}, "precision": {"dtype": "float64"},
        "data": {"images": 160, "validation_images": 13}, "loss": {"name": loss, "gradient_norms": 19},
    }  # fmt: skip
    if loss == "mcld":
        changes["loss"]["options"] = {
            "temperature": 0.5,
            "weight": [3.0, 2.0, 1.0],
            "warmup": 1,
            "direction": "symmetric",
        }
    config = write_config(tmp_path, **changes)
    one, two = tmp_path / "one", tmp_path / "two"
    assert in_processes(1, ["--config", str(config), "--output", str(one)]) == [0]
    assert in_processes(2, ["--config", str(config), "--output", str(two)]) == [0, 0]
    states = [last_state(folder) for folder in (one, two)]
    assert states[0]["steps"] == states[1]["steps"] == 20
    for kind in ("model", "ema"):
        for name, value in states[0][kind].items():
            torch.testing.assert_close(states[1][kind][name], value, rtol=0, atol=1e-6)
    rows = [results(folder)["last"] for folder in (one, two)]
    for name in ("loss", "cross-entropy", "accuracy", "accuracy_top5", "ema_accuracy"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-9)
    rows = [results(folder)["speed"] for folder in (one, two)]
    norms = [name for name in rows[0] if name.startswith("norm_")]
    assert len(norms) == (4 if loss == "mcld" else 2)
    for name in norms:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-6)


def test_sigterm_saves_and_ends_every_rank_with_its_own_code(tmp_path):
    config = write_config(tmp_path, checkpoint={"every_epochs": 0}, log={"every": 1})
    output = tmp_path / "out"
    arguments = ["--config", str(config), "--output", str(output)]
    # The last rank alone gets the signal; an epoch has 5 steps.
    assert in_processes(2, arguments, signal_at=(3, signal.SIGTERM)) == [Exit.STOPPED] * 2
    assert results(output)["state"] == "stopped" and results(output)["exit"] == Exit.STOPPED
    state = last_state(output)
    assert (state["steps"], state["epoch"], state["step_in_epoch"]) == (3, 0, 3)
    assert "stopped by SIGTERM after step 3" in (output / "log.txt").read_text()
    # One rank goes on with what two have begun, and says what that changes.
    assert in_processes(1, [*arguments, "--resume"]) == [0]
    log = (output / "log.txt").read_text()
    assert "the checkpoint is of 2 ranks, and this is 1: every step sees the same images" in log
    assert results(output)["state"] == "done" and results(output)["steps"] == 10
    steps, epochs = (
        [float(row["loss"]) for row in csv.DictReader((output / f"{name}.csv").read_text().splitlines())]
        for name in ("steps", "epochs")
    )
    assert epochs == pytest.approx([sum(steps[:5]) / 5, sum(steps[5:]) / 5])  # three of the first five by two ranks


@pytest.mark.parametrize("fault", ["a broken image", "a loss that is not finite"])
def test_a_fault_of_one_rank_ends_both_with_one_message(fault, tmp_path):
    if fault == "a broken image":  # only one of the ranks reads it
        image_folder(tmp_path / "images" / "train", each=4)
        (tmp_path / "images" / "train" / "class-0" / "000.jpg").write_bytes(b"")
        data = {"source": "folder", "root": str(tmp_path / "images"), "validation": "", "faulty": "fail"}
        changes, code, message = {"data": data}, Exit.DATA, "an image cannot be read: class-0/000.jpg"
    else:
        changes, code, message = {"optimizer": {"rate": 1e30}}, Exit.FAILED, "the loss is not finite at step"
    config = write_config(tmp_path, **changes)
    assert in_processes(2, ["--config", str(config), "--output", str(tmp_path / "out")]) == [code] * 2
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("error: ") == 1 and message in log and "rank " in log
    assert results(tmp_path / "out")["exit"] == code


def test_fsdp2_trains_and_resumes_as_ddp_does(tmp_path):
    changes = {
        "ema": {"decay": 0.9}, "precision": {"dtype": "float64"}, "optimizer": {"name": "adamw", "rate": 0.01},
        "checkpoint": {"every_steps": 3, "every_epochs": 0}, "student": {"name": "tiny-bn"},
    }  # fmt: skip
    states = []
    for kind in ("ddp", "fsdp2"):
        config = write_config(tmp_path / kind, parallel={"kind": kind}, **changes)
        arguments = ["--config", str(config), "--output", str(tmp_path / kind / "out")]
        if kind == "ddp":
            assert in_processes(2, arguments) == [0, 0]
        else:
            assert in_processes(2, arguments, signal_at=(5, signal.SIGKILL)) == [-signal.SIGKILL] * 2
            assert in_processes(2, [*arguments, "--resume"]) == [0, 0]
        states.append(last_state(tmp_path / kind / "out"))
    for part in ("model", "ema"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], value, rtol=0, atol=1e-10)


def test_a_queue_holds_the_same_rows_on_two_ranks(tmp_path):
    # 40 rows are two and a half steps: the order within a step decides which of its rows are left.
    changes = {"batch": 16, "steps": 8, "accumulate": 2, "precision": {"dtype": "float64"}}
    config = write_config(tmp_path, loss={"name": "mcld", "queue": 40}, data={"images": 160}, **changes)
    states = []
    for size in (1, 2):
        output = tmp_path / str(size)
        assert in_processes(size, ["--config", str(config), "--output", str(output)]) == [0] * size
        states.append(last_state(output))
    assert torch.equal(states[0]["loss"]["queue.labels"], states[1]["loss"]["queue.labels"])
    for part in ("loss", "model"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], value, rtol=0, atol=1e-6)


def test_ranks_end_with_a_message_where_one_of_them_is_killed(tmp_path):
    config = write_config(tmp_path)
    arguments = ["--config", str(config), "--output", str(tmp_path / "out")]
    codes = in_processes(2, arguments, signal_at=(3, LAST_IS_KILLED))
    assert codes == [Exit.FAILED, -signal.SIGKILL]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "error: rank 0: another rank has ended, or does not answer" in log
    assert (results(tmp_path / "out")["state"], results(tmp_path / "out")["exit"]) == ("failed", Exit.FAILED)


def test_faulty_images_of_all_ranks_count_for_the_limit(tmp_path):
    root = image_folder(tmp_path / "images" / "train", each=10)
    for label in range(3):
        (root / f"class-{label}" / "005.jpg").write_bytes(b"")
    data = {"source": "folder", "root": str(tmp_path / "images"), "validation": "", "faulty_limit": 2.5 / 40}
    config = write_config(tmp_path, data=data, augment={"enabled": False}, batch=40, epochs=6, seed=1)
    assert in_processes(2, ["--config", str(config), "--output", str(tmp_path / "out")]) == [Exit.DATA] * 2
    assert "3 images cannot be read, more than data.faulty_limit" in (tmp_path / "out" / "log.txt").read_text()
    assert results(tmp_path / "out")["epoch"] == 1  # no rank has read all three
    named = (tmp_path / "out" / "faults.txt").read_text().splitlines()
    assert len(named) == len(set(named)) == 3


def test_ranks_that_begin_at_different_steps_or_settings_are_told():
    tree = {"optimizer": {"rate": 0.1}, "output": "a"}
    checkpoint.check_ranks([(tree, 3), ({**tree, "output": "b"}, 3)])
    with pytest.raises(ConfigFault, match="rank 1 begins at the beginning, and rank 0 after step 3"):
        checkpoint.check_ranks([(tree, 3), (tree, None)])
    with pytest.raises(ConfigFault, match="rank 1 has other settings than rank 0: optimizer.rate"):
        checkpoint.check_ranks([(tree, None), ({**tree, "optimizer": {"rate": 0.2}}, None)])
