"""`python -m mcld_kernels.calibrate`: the gate, the process that may hang, and the table that "auto" chooses by."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mcld_kernels
from mcld_kernels import calibrate, reference
from mcld_kernels.backends import timings

ROOT = Path(__file__).resolve().parent.parent
GPU = "NVIDIA Test 9000"
TERMS = ["instance", "sample", "category"]


def on_cpu(candidates=("torch",), **changed):
    fields = {"dtypes": ("float32",), "batches": (24,), "classes": (7,), "rounds": 2, "device": "cpu"}
    return calibrate.Plan(candidates=candidates, **(fields | changed))


class TestMeasure:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
    def test_a_candidate_that_is_right_is_timed(self, dtype):
        milliseconds, rejected = calibrate.measure_shape(on_cpu(), dtype, 24, 7)
        assert milliseconds.keys() == {"torch"} and milliseconds["torch"] > 0 and not rejected

    @pytest.mark.parametrize("factor", [1.001, -1.0, float("nan")])
    def test_a_wrong_gradient_gets_no_time(self, monkeypatch, factor):
        right = calibrate._step

        def wrong(candidate, *tensors):
            step = right(candidate, *tensors)
            return lambda: (step()[0], factor * step()[1])

        monkeypatch.setattr(calibrate, "_step", wrong)
        milliseconds, rejected = calibrate.measure_shape(on_cpu(), "float32", 24, 7)
        assert not milliseconds and rejected["torch"].startswith("wrong: relative error")

    def test_a_candidate_that_raises_is_rejected_with_its_message(self, monkeypatch):
        def step():
            raise RuntimeError("no such kernel\nand much more")

        monkeypatch.setattr(calibrate, "_step", lambda *rest: step)
        assert calibrate.measure_shape(on_cpu(), "float32", 24, 7)[1] == {"torch": "RuntimeError: no such kernel"}

    def test_a_candidate_that_cannot_run_is_rejected_with_its_reason(self):
        milliseconds, rejected = calibrate.measure_shape(on_cpu(("cuda", "torch")), "float64", 24, 7)
        assert milliseconds.keys() == {"torch"} and rejected["cuda"]

    def test_without_memory_for_the_reference_the_oracle_works_in_chunks(self, monkeypatch):
        monkeypatch.setattr(reference, "mcld_loss", lambda *rest, **more: pytest.fail("the reference ran"))
        logits = torch.empty(1, 7).expand(1 << 20, 7)
        oracle = calibrate._oracle(logits, logits)
        student, teacher, target = calibrate._inputs(24, 7, torch.float64, torch.device("cpu"))
        assert torch.isfinite(oracle(student, teacher, target)[0])

    def test_every_shape_gives_a_row(self):
        rows = list(calibrate.measure(on_cpu(batches=(8, 24), dtypes=("float32", "bfloat16"))))
        assert [(row["dtype"], row["batch"]) for row in rows] == [
            ("float32", 8), ("float32", 24), ("bfloat16", 8), ("bfloat16", 24)
        ]  # fmt: skip


HANGS = """
import os, time

def hang(path, plan):
    path.write_text('{"batch": 1}\\n{"batch": 2, "cut sh')
    time.sleep(600)

def crash(path, plan):
    path.write_text('{"batch": 1}\\n')
    os._exit(11)
"""


@pytest.fixture
def targets(tmp_path, monkeypatch):
    """A module of its own, without torch, so that the process starts at once."""
    (tmp_path / "calibrate_targets.py").write_text(HANGS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("calibrate_targets")
    del sys.modules["calibrate_targets"]


LIGHT_PLAN = SimpleNamespace(candidates=("torch",))


class TestProcess:
    def test_the_rows_come_back(self):
        rows, complete = calibrate.run_in_process(on_cpu(), 120)
        assert complete and rows[0]["milliseconds"]["torch"] > 0

    def test_a_process_that_hangs_is_ended_and_its_rows_are_kept(self, targets, capsys):
        rows, complete = calibrate.run_in_process(LIGHT_PLAN, 10, targets.hang)
        assert rows == [{"batch": 1}] and not complete
        assert "took longer than 10 s" in capsys.readouterr().err

    def test_a_process_that_crashes_keeps_its_rows(self, targets, capsys):
        assert calibrate.run_in_process(LIGHT_PLAN, 120, targets.crash) == ([{"batch": 1}], False)
        assert "ended with 11" in capsys.readouterr().err


def row(batch=4096, classes=1000, dtype="bfloat16", precision="highest", rejected=None, **milliseconds):
    shape = {"dtype": dtype, "precision": precision, "batch": batch, "classes": classes}
    return shape | {"milliseconds": milliseconds, "rejected": rejected or {}}


@pytest.fixture
def processes(monkeypatch):
    """`run_in_process` replaced: maps candidates to rows and completion; records the plans."""

    def run(plan, seconds):
        run.plans.append(plan)
        return run.answers[plan.candidates]

    run.plans, run.answers = [], {}
    monkeypatch.setattr(calibrate, "run_in_process", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: GPU)
    return run


BOTH = [row(triton=2.0, cuda=1.0)], True


@pytest.mark.parametrize(
    "trial",
    [([], False), ([], True), ([row(rejected={"hopper": "wrong"})], True), ([row(hopper=1.0)], False)],
    ids=["hangs", "nothing", "wrong", "cut short"],
)
def test_hopper_kernels_that_fail_their_trial_are_left_out(processes, trial, tmp_path, capsys):
    processes.answers = {("hopper",): trial, ("triton", "cuda"): BOTH}
    assert calibrate.main(["--output", str(tmp_path / "table.json"), "--matmul-precision", "highest"]) == 0
    assert [plan.candidates for plan in processes.plans] == [("hopper",), ("triton", "cuda")]
    assert "left out" in capsys.readouterr().out


def test_hopper_kernels_that_pass_take_part(processes, tmp_path):
    answer = [row(triton=2.0, hopper=1.0)], True
    processes.answers = {("hopper",): ([row(hopper=1.0)], True), ("triton", "cuda", "hopper"): answer}
    assert calibrate.main(["--output", str(tmp_path / "table.json")]) == 0
    assert [plan.precision for plan in processes.plans[1:]] == ["highest", "high"]
    assert [plan.dtypes for plan in processes.plans[1:]] == [("bfloat16", "float16", "float32"), ("float32",)]
    assert "hopper" in json.loads((tmp_path / "table.json").read_text())["rows"][0]["milliseconds"]


def test_rows_measured_before_a_hang_make_a_table(processes, tmp_path):
    processes.answers = {("hopper",): ([], True), ("triton", "cuda"): (BOTH[0], False)}
    assert calibrate.main(["--output", str(tmp_path / "table.json"), "--matmul-precision", "highest"]) == 0


def test_a_run_without_rows_makes_no_table(processes, tmp_path, capsys):
    processes.answers = {("hopper",): ([], True), ("triton", "cuda"): ([], False)}
    assert calibrate.main(["--output", str(tmp_path / "table.json")]) == 1
    assert not (tmp_path / "table.json").exists() and "no table" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_one_message(processes, tmp_path, capsys):
    processes.answers = {("hopper",): ([], True), ("triton", "cuda"): BOTH}
    (tmp_path / "file").write_text("")
    assert calibrate.main(["--output", str(tmp_path / "file" / "table.json")]) == 4
    assert "cannot be written" in capsys.readouterr().err


def test_without_a_home_folder_the_message_names_a_remedy(processes, monkeypatch, capsys):
    def home():
        raise RuntimeError("Could not determine home directory.")

    processes.answers = {("hopper",): ([], True), ("triton", "cuda"): BOTH}
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MCLD_TABLE", raising=False)
    monkeypatch.setattr(calibrate.Path, "home", home)
    assert calibrate.main([]) == 4
    assert "--output FILE" in capsys.readouterr().err


def test_ctrl_c_is_one_message(processes, monkeypatch, capsys):
    def run(plan, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "run_in_process", run)
    assert calibrate.main([]) == 130
    assert "interrupted" in capsys.readouterr().err


def record(provider, median, batch=4096, classes=1000, dtype="bfloat16", status="ok", terms=TERMS, **more):
    entry = {"provider": provider, "batch": batch, "classes": classes, "dtype": dtype, "status": status}
    entry |= {"terms": list(terms), "mode": "forward-backward"}
    return entry | {"time": {"median_s": median} if status == "ok" else None} | more


def recorded(*rows, precision="highest", gpu=GPU):
    machine = {"float32_matmul_precision": precision} | ({"gpu": gpu} if gpu else {})
    versions = {"mcld_kernels": mcld_kernels.__version__, "torch": torch.__version__}
    started = "2020-01-01T10:00:00Z"
    header = {"machine": machine, "versions": versions, "started": started, "commit": "abc", "dirty": False}
    return header | {"rows": list(rows), "complete": True}


def test_only_rows_that_are_right_and_complete_get_into_the_table():
    run = recorded(
        record("reference", 9.0),
        record("triton", 2e-3),
        record("cuda", 1e-3),
        record("hopper", 5e-4, status="FAILED"),
        record("triton", 3e-3, batch=256),
        record("cuda", 1e-9, batch=256, mode="forward"),
        record("cuda", 1e-9, batch=256, terms=("instance",)),
        record("cuda", 1e-9, batch=256, loss="another"),
    )
    first, second = calibrate.recorded_table(run)["rows"]
    assert first["milliseconds"] == {"triton": 2.0, "cuda": 1.0} and first["batch"] == 4096
    assert second["milliseconds"] == {"triton": 3.0} and second["precision"] == "highest"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (recorded(record("triton", 1.0)), "two of triton, cuda, hopper"),
        (recorded(record("triton", 1.0), record("cuda", 1.0), gpu=None), "not of a GPU"),
    ],
)
def test_a_recorded_run_without_a_choice_makes_no_table(run, message):
    with pytest.raises(ValueError, match=message):
        calibrate.recorded_table(run)


def test_the_package_reads_the_table_of_a_recorded_run(tmp_path, monkeypatch, capsys):
    source = tmp_path / "results.json"
    source.write_text(json.dumps(recorded(record("triton", 2e-3), record("cuda", 1.5e-3), record("hopper", 1e-3))))
    monkeypatch.setenv("MCLD_TABLE", str(tmp_path / "made" / "table.json"))
    assert calibrate.main(["--from", str(source)]) == 0
    assert "hopper 1.000 ms, cuda 1.500 ms, triton 2.000 ms" in capsys.readouterr().out
    table, description = timings.find(GPU)
    assert table.rows[0].milliseconds["hopper"] == 1.0 and "2020-01-01" in description
    source.write_text(json.dumps(recorded(record("cuda", 1.0))))
    assert calibrate.main(["--from", str(source)]) == 1
    assert "no table" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_a_file_that_is_no_recorded_run_is_named(tmp_path, text, capsys):
    (tmp_path / "a.json").write_text(text)
    assert calibrate.main(["--from", str(tmp_path / "a.json")]) == 2
    assert "a.json is no results.json" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert calibrate.main([]) == 3
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["-m", "mcld_kernels.calibrate"], [str(ROOT / "bench" / "calibrate.py")]])
def test_both_commands_run_from_any_folder(command, tmp_path):
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "exit codes: 0 done" in " ".join(done.stdout.split()), done.stderr


def test_medium_precision_allows_operands_in_bf16(monkeypatch, matmul_precision):
    """Backends take bf16 operands there; eager on a GPU takes tf32."""
    right = calibrate._step
    monkeypatch.setattr(
        calibrate,
        "_step",
        lambda name, s, t, y: right(name, s.bfloat16().float(), t.bfloat16().float(), y),
    )
    assert calibrate.measure_shape(on_cpu(), "float32", 24, 7)[1]
    matmul_precision("medium")
    assert not calibrate.measure_shape(on_cpu(precision="medium"), "float32", 24, 7)[1]
