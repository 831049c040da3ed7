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
from mcld_kernels import backends, calibrate, calibrate_forms, reference
from mcld_kernels.backends import forms, timings

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

def hang_in_a_form(path, plan):
    with path.open("a") as file:
        for shape in (1, 2):
            if ("bfloat16", shape, 3) in plan.skip_shapes:
                continue
            for form in ("hopper", "hopper:hopper_skew=1", "hopper:hopper_skew=2"):
                if form in plan.skip_forms:
                    continue
                print('{"trying": "%s"}' % form, file=file, flush=True)
                if shape == 2 and form == "hopper:hopper_skew=1":
                    time.sleep(600)
            print('{"dtype": "bfloat16", "batch": %d, "classes": 3}' % shape, file=file, flush=True)
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

    def test_a_form_that_hangs_is_left_out_and_the_others_go_on(self, targets, capsys):
        plans = []

        def run(plan, seconds):
            plans.append(plan)
            return calibrate.run_in_process(plan, seconds, targets.hang_in_a_form, stall=12)

        rows = calibrate_forms.run(on_cpu(("hopper",)), 120, run)
        assert [row["batch"] for row in rows] == [1, 2]
        assert plans[1].skip_forms == ("hopper:hopper_skew=1",) and plans[1].skip_shapes == (("bfloat16", 1, 3),)
        assert len(plans) == 2 and "hopper:hopper_skew=1 is left out" in capsys.readouterr().out


class Clock:
    """A gate with replaced timings: every form is right, or wrong, and takes what `times` says."""

    def __init__(self, times, wrong=()):
        self.times, self.wrong, self.rejected, self.admitted = times, wrong, {}, []

    def admit(self, form):
        if form in self.wrong:
            self.rejected[form] = "wrong"
        else:
            self.admitted.append(form)

    def medians(self, names=None, backlog=False):
        """Whole calls take longer by what the host takes, whatever the form."""
        names = self.admitted if names is None else names
        return {form: self.times(form) + (0.0 if backlog else 10.0) for form in self.admitted if form in names}


def compared(times, wrong=(), candidates=("triton", "cuda", "hopper"), dtype="bfloat16", batch=16384, classes=1000):
    plan = on_cpu(candidates, dtypes=(dtype,), batches=(batch,), classes=(classes,))
    lines = list(calibrate_forms.measure(plan, lambda *shape: Clock(times, wrong)))
    return [line["trying"] for line in lines[:-1]], lines[-1]


LARGE = forms.Shape(dtype="bfloat16", precision="highest", batch=65536, classes=1000)


class TestForms:
    def test_each_candidate_takes_its_fastest_form(self):
        gains = {"hopper:hopper_skew=2": 0.90, "hopper:hopper_skew=1": 0.95, "triton:chunk_bytes=67108864": 0.98}
        tried, row = compared(lambda form: gains.get(form, 1.0))
        assert row["tuning"] == {"hopper": {"hopper_skew": 2}}, "2 % are not taken for a gain"
        assert row["milliseconds"] == {"triton": 11.0, "cuda": 11.0, "hopper": 10.90}, "of whole calls"
        assert set(row["forms"]) == set(tried) >= set(gains) and row["forms"]["hopper:hopper_skew=2"] == 0.90

    def test_what_gains_alone_is_tried_together(self):
        alone = dict.fromkeys(forms.of_shape(("triton", "cuda", "hopper"), LARGE), 1.0)
        alone |= {"triton": 1.0, "cuda": 1.0, "hopper": 1.0}
        alone |= {"hopper:hopper_skew=2": 0.90, "hopper:wave_bytes=0": 0.95}
        both = "hopper:hopper_skew=2+wave_bytes=0"
        for together, taken in ((0.85, {"hopper_skew": 2, "wave_bytes": 0}), (0.93, {"hopper_skew": 2})):
            tried, row = compared((alone | {both: together}).get, batch=LARGE.batch)
            assert tried[-1] == both and row["tuning"] == {"hopper": taken}

    def test_a_form_that_is_wrong_is_not_taken_and_forms_of_a_wrong_candidate_are_not_tried(self):
        tried, row = compared(lambda form: 0.5 if ":" in form else 1.0, ("hopper", "triton:library_product=True"))
        assert not [form for form in tried if form.startswith("hopper:")]
        right = {"library_product": False, "chunk_bytes": 64 << 20, "product_stages": 3}
        assert row["tuning"]["triton"].items() <= right.items()
        assert row["milliseconds"].keys() == {"triton", "cuda"}

    def test_the_gate_measures_forms_of_a_backend(self, monkeypatch):
        """On a CPU: the real gate, with a form of "torch" in place of those of the GPU's backends."""
        chunk = forms.Form(candidates=("torch",), field="chunk_bytes", values=(256,), matters=lambda shape: True)
        monkeypatch.setattr(forms, "FORMS", (chunk,))
        seen, right = [], calibrate._loss_and_gradient

        def recorded(*rest):
            seen.append(dict(backends._TUNING.get()))
            return right(*rest)

        monkeypatch.setattr(calibrate, "_loss_and_gradient", recorded)
        plan = on_cpu()
        *tried, row = calibrate_forms.measure(plan, lambda *shape: calibrate._Gate(plan, *shape))
        assert tried == [{"trying": "torch"}, {"trying": "torch:chunk_bytes=256"}]
        assert set(row["forms"]) == {"torch", "torch:chunk_bytes=256"} and not row["rejected"]
        assert {"hopper": False, "chunk_bytes": 256} in seen

    def test_every_field_is_one_of_the_backends_and_no_default(self):
        for form in forms.FORMS:
            for candidate in form.candidates:
                tuning = backends._MODULES[timings.CANDIDATES[candidate]].TUNING
                field = tuning.__dataclass_fields__[form.field]
                # "wave_bytes" has the device's default, which is more than 0 on a GPU.
                default = None if form.field == "wave_bytes" else field.default
                assert not any(value is default for value in form.values), "that is the candidate itself"
                for value in form.values:
                    text = forms.name(candidate, {form.field: value})
                    assert forms.parse(text) == (candidate, {form.field: value})
                    assert forms.unknown_reason(candidate, {form.field: value}) is None

    def test_rows_with_other_candidates_keep_their_times(self):
        found = {"milliseconds": {"cuda": 0.5}, "tuning": {"cuda": {"library_product": True}}, "forms": {}}
        rows = [row(cuda=1.0), row(cuda=1.0, triton=2.0, batch=256)]
        tuned = [row() | found, row(batch=256) | found]
        merged = calibrate_forms.merge(rows, tuned)
        assert merged[0]["milliseconds"] == {"cuda": 0.5} and merged[0]["tuning"]
        assert merged[1] == rows[1]


def test_forms_get_the_time_that_is_kept_for_them(processes, monkeypatch, tmp_path, capsys):
    found = {"milliseconds": {"triton": 2.0, "cuda": 0.5}, "tuning": {"cuda": {"max_flash_splits": 1}}}
    limits = []

    def run_forms(plan, seconds):
        limits.append(seconds)
        return [row() | found | {"forms": {"cuda:max_flash_splits=1": 0.5}}]

    monkeypatch.setattr(calibrate, "run_forms", run_forms)
    processes.answers = {("hopper",): ([], True), ("triton", "cuda"): BOTH}
    path = tmp_path / "table.json"
    arguments = ["--output", str(path), "--matmul-precision", "highest", "--seconds", "100"]
    assert calibrate.main(arguments) == 0
    assert processes.seconds[-1] <= 100 * (1 - calibrate.FORMS_SHARE) and 90 < limits[0] <= 100
    assert "cuda 0.500 ms (max_flash_splits=1)" in capsys.readouterr().out
    table, _ = timings.parse(path, path.read_bytes())
    assert table.rows[0].tuning == found["tuning"]
    assert json.loads(path.read_text())["clocks"] == calibrate.CLOCKS
    assert calibrate.main([*arguments, "--no-forms"]) == 0
    assert len(limits) == 1 and processes.seconds[-1] > 90
    assert "tuning" not in json.loads(path.read_text())["rows"][0]


def row(batch=4096, classes=1000, dtype="bfloat16", precision="highest", rejected=None, **milliseconds):
    shape = {"dtype": dtype, "precision": precision, "batch": batch, "classes": classes}
    return shape | {"milliseconds": milliseconds, "rejected": rejected or {}}


@pytest.fixture
def processes(monkeypatch):
    """`run_in_process` replaced: maps candidates to rows and completion; records the plans."""

    def run(plan, seconds):
        run.plans.append(plan)
        run.seconds.append(seconds)
        return run.answers[plan.candidates]

    run.plans, run.seconds, run.answers = [], [], {}
    monkeypatch.setattr(calibrate, "run_forms", lambda plan, seconds: [])
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
    assert "a.jsonisnoresults.json" in "".join(capsys.readouterr().err.split())  # wrapped, wherever that is


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
