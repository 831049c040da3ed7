"""The report of a GPU machine, without one: phases, archive, plan, live test results and checks."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from planned import HOPPER, code, run

from bench import correct, faults, gpu_report
from bench.harness import commands, forms, live, phases, providers
from bench.harness.cases import Case
from bench.harness.commands import Machine
from bench.harness.phases import Phase
from bench.harness.programs import Exit
from mcld_kernels.backends import forms as calibrated

ROOT = Path(__file__).resolve().parent.parent


class TestPhases:
    def test_output_and_values_are_recorded(self, tmp_path):
        record = run(tmp_path, code("print('{\"a\": 1}')", read=phases.last_json))["try"]
        assert record["status"] == "ok" and record["a"] == 1 and "seconds" in record

    def test_a_phase_is_told_its_time(self, tmp_path):
        text = "import os; print('{\"told\": ' + os.environ['MCLD_PHASE_S'] + '}')"
        record = run(tmp_path, code(text, most_s=17, read=phases.last_json))["try"]
        assert record["told"] == 17

    def test_the_output_of_a_failure_is_recorded(self, tmp_path):
        record = run(tmp_path, code("print('so far'); raise SystemExit(4)"))["try"]
        assert record["status"] == "failed" and record["exit_code"] == 4 and "so far" in record["output_tail"]

    def test_a_phase_out_of_time_can_write_its_results(self, tmp_path):
        text = (
            "import time\nprint('begun')\n"
            "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('{\"kept\": true}')"
        )
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
        try:
            record = run(tmp_path, code(text, read=phases.last_json), seconds=5.0 + phases.GRACE_S)["try"]
        finally:
            signal.signal(signal.SIGINT, before)
        assert record["status"] == "timed out" and record.get("kept") is True and record["seconds"] < 20, record

    def test_a_phase_that_ignores_the_interrupt_is_killed_with_its_children(self, tmp_path, monkeypatch):
        monkeypatch.setattr(phases, "GRACE_S", 0.5)
        text = (
            "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "child = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\ntime.sleep(60)"
        )
        record = run(tmp_path, code(text), seconds=6.0)["try"]  # the start of Python on a busy machine
        assert record["status"] == "timed out" and record["seconds"] < 20
        child = int(record["output_tail"].split()[0])
        for _ in range(50):
            if not _running(child):
                break
            time.sleep(0.1)
        assert not _running(child)

    def test_a_phase_without_time_or_program_has_a_reason(self, tmp_path):
        assert run(tmp_path, code(""), seconds=0)["try"]["reason"] == "the time was used up"
        missing = Phase(name="try", command=["/nowhere/program"], budget_s=5)
        assert run(tmp_path, missing)["try"]["status"] == "failed"

    def test_a_hang_costs_its_own_phase_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(phases, "GRACE_S", 0.3)
        hung = code("import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)", "hung", 1.0)
        following = [code("print(1)", name) for name in ("beside", "after")]
        hung.group = following[0].group = "together"
        following[0].budget_s = 1.0
        outcomes = run(tmp_path, hung, *following, seconds=22.5)
        assert [record["status"] for record in outcomes.values()] == ["timed out", "ok", "ok"]
        assert list(outcomes) == ["hung", "beside", "after"]

    def test_the_budgets_of_later_groups_are_kept_and_what_is_left_over_is_given(self, tmp_path, monkeypatch):
        limits = {}

        class Recorded(phases.Running):
            def __init__(self, phase, folder, outcomes, limit_s):
                limits[phase.name] = round(limit_s)
                super().__init__(phase, folder, outcomes, limit_s)

        monkeypatch.setattr(phases, "Running", Recorded)
        monkeypatch.setattr(phases, "GRACE_S", 0.0)
        left_out = code("", "left out", 500, skip="a reason")
        must_fail = code("raise SystemExit('boom')", "fault", 10, fault="boom")
        outcomes = run(tmp_path, code("", "a", 10), left_out, must_fail, code("", "b", 30, group="g"),
                       code("", "c", 40, group="g"), seconds=100)  # fmt: skip
        assert limits["a"] == 50 and limits["fault"] == 10 and limits["b"] == limits["c"] > 90
        assert outcomes["left out"] == {"status": "not run", "reason": "a reason"}

    def test_a_fault_that_was_asked_for_must_leave_its_message(self, tmp_path):
        told = code("import sys; sys.exit('out of memory: 5 GiB')", fault="out of memory.*")
        record = run(tmp_path, told)["try"]
        assert record["status"] == "ok" and record["reason"] == "left its message: out of memory: 5 GiB"
        for text in ("import sys; sys.exit('other')", "print('out of memory')"):  # another message; no fault at all
            assert run(tmp_path, code(text, fault="out of memory.*"))["try"]["status"] == "failed"

    def test_a_command_may_depend_on_what_happened_before(self, tmp_path):
        second = code("", "second")
        second.command = lambda outcomes: [sys.executable, "-c", f"print({outcomes['try']['exit_code']})"]
        outcomes = run(tmp_path, code("raise SystemExit(7)"), second)
        assert outcomes["second"]["output_tail"] == "7\n"

    def test_the_archive_is_rewritten_after_every_group_and_while_one_runs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(phases, "REWRITE_S", 0.2)
        written = []
        run(tmp_path, code("import time; time.sleep(0.7)", "a"), code("", "b"), rewrite=lambda: written.append(1))
        assert len(written) >= 4


class TestArchive:
    def test_it_holds_everything_and_is_replaced_in_one_step(self, tmp_path):
        folder, path = tmp_path / "work", tmp_path / "gpu-correct.tar.gz"
        (folder / "bench").mkdir(parents=True)
        (folder / "a.log").write_text("a"), (folder / "bench" / "results.json").write_text("{}")
        assert phases.archive(path, folder) == []
        with tarfile.open(path) as tar:
            assert sorted(tar.getnames()) == ["gpu-correct/a.log", "gpu-correct/bench/results.json"]
        assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["gpu-correct.tar.gz"]

    def test_the_largest_files_are_left_out_of_an_archive_that_would_be_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(phases, "LARGEST", 3000)
        folder = tmp_path / "work"
        folder.mkdir()
        (folder / "small").write_bytes(b"1"), (folder / "large").write_bytes(os.urandom(5000))
        assert phases.archive(tmp_path / "a.tar.gz", folder) == ["large"]

    def test_no_path_of_the_machine_is_recorded(self):
        text = phases.without_paths(f"{ROOT}/bench {sys.prefix}/bin/python {Path.home()}/x")
        assert text == "./bench <python>/bin/python ~/x"


def _running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


class TestPlan:
    @pytest.mark.parametrize("command", commands.COMMANDS)
    def test_a_command_is_planned_to_end_within_nine_minutes(self, command, tmp_path):
        planned = commands.COMMANDS[command](tmp_path, HOPPER, False)
        for phase in planned:  # as where every tool is found
            phase.skip = None if isinstance(phase.skip, str) and "not found" in phase.skip else phase.skip
        assert phases.planned_seconds(planned) + phases.GRACE_S <= 60 * commands.MINUTES
        assert 60 * commands.MINUTES + gpu_report.LAST_S <= 540

    def test_what_matters_most_comes_first(self, tmp_path):
        names = [phase.name for phase in commands.correct(tmp_path, HOPPER, False)]
        assert names[:3] == ["build", "info", "ceilings"] and names[-1] == "bench"
        order = ["errors-cuda", "layouts", "hopper", "cuda", "boundary", "bench"]
        assert sorted(order, key=names.index) == order
        checks = list(correct.checks("cuda"))
        assert {(c.dtype, c.precision) for c in checks[:5]} == {("float32", "highest")}
        wanted = {"float32", "bfloat16", "float16"}
        assert {c.dtype for c in checks} == wanted and {c.classes for c in checks} >= {100, 1000, 21841}
        assert max(c.batch * c.batch for c in checks) > 2**31
        for name in correct.OPTIONS:
            assert {c.dtype for c in checks if c.options == name} >= wanted - (
                {"float16", "float32"} if name == "rows" else set()
            )

    def test_triton_which_compiles_has_the_most_workers(self, monkeypatch):
        monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: name == "xdist")
        for workers in (2, 3, 4):
            machine = Machine(capability=(9, 0), workers=workers)
            beside = [p.command_line({}) for p in commands.correct(Path("."), machine, False) if p.group == "tests"]
            cuda, triton, torch_, boundary = (int(line[line.index("-n") + 1]) for line in beside)
            assert triton > cuda == boundary >= torch_ >= 1 and triton + cuda + torch_ + boundary == 4 * workers

    def test_hopper_runs_in_processes_of_its_own(self):
        for phase in commands.correct(Path("."), HOPPER, False):
            line = phase.command_line({})
            if phase.name not in ("bench", "hopper", "hopper-forms", "errors-hopper", "layouts"):
                assert "hopper" not in " ".join(line) and phase.environment.get("MCLD_HOPPER", "0") == "0"

    @pytest.mark.parametrize("record", [
        {"status": "failed", "exit_code": -11},
        {"status": "timed out", "exit_code": -9, "unfinished": ["hopper: 4096 x 1000"]},
    ])  # fmt: skip
    def test_a_provider_that_hung_or_died_is_not_measured(self, record, tmp_path):
        bench = commands.correct(tmp_path, HOPPER, False)[-1]
        assert "hopper" in " ".join(bench.command_line({}))
        chosen = " ".join(
            bench.command_line({"errors-hopper": record, "errors-cuda": {"status": "failed", "exit_code": 1}})
        )
        assert "hopper" not in chosen and "cuda" in chosen

    def test_a_module_for_this_gpu_is_not_built_again(self):
        assert commands.is_built(["90a-real"], (9, 0)) and commands.is_built(["80-real", "90a-real"], (9, 0))
        assert not commands.is_built(["80-real"], (9, 0)), "it holds no Hopper kernels"
        assert commands.is_built(["80-real"], (8, 6)) and not commands.is_built(None, (8, 6))
        assert HOPPER.arch == "90a-real" and Machine(capability=(8, 6), workers=1).arch == "86-real"

    def test_every_form_is_a_provider(self):
        for case, names in (forms.FORMS | forms.SMALL_FORMS).items():
            chosen = providers.choose(",".join(names))
            assert [provider.name for provider in chosen if ":" in provider.name] == [n for n in names if ":" in n]
            assert len(chosen) == len(names) and isinstance(case, Case)

    def test_every_form_of_calibration_is_among_them(self):
        named = {name for names in forms.FORMS.values() for name in names}
        for form in calibrated.FORMS:
            for value in form.values:
                assert named & {calibrated.name(candidate, {form.field: value}) for candidate in form.candidates}

    def test_a_form_is_the_backend_with_other_fields(self):
        from mcld_kernels import backends

        seen = []

        class Spy(backends.torch.TorchKernels):
            def __init__(self, tuning):
                seen.append(tuning.chunk_bytes)
                super().__init__(tuning)

        case = Case(64, 20)
        tensors = [torch.randn(64, 20), torch.randn(64, 20), torch.zeros(64, dtype=torch.int64)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends.torch, "TorchKernels", Spy)
            providers.tuned_backend("torch:chunk_bytes=4096+low_latency=False").make(case, *tensors)()
        assert 4096 in seen

    @pytest.mark.parametrize("command", commands.COMMANDS)
    def test_the_dry_run_names_every_phase_and_no_path(self, command, capsys):
        assert gpu_report.main([command, "--dry-run", "--skip", "info"]) == 0
        shown = capsys.readouterr().out
        for phase in commands.COMMANDS[command](Path("."), gpu_report.this_machine(), False):
            assert phase.name in shown
        assert "left out by --skip" in shown and str(ROOT) not in shown

    def test_an_unknown_phase_is_an_error(self, capsys):
        with pytest.raises(SystemExit):
            gpu_report.main(["correct", "--only", "everything"])
        assert "no such phase: everything; phases: build, info" in capsys.readouterr().err


class TestReport:
    def test_a_rehearsal_writes_one_archive(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("OUT", str(tmp_path))
        assert gpu_report.main(["safe", "--rehearse", "--only", "info", "sanitize-grid"]) == 0
        assert [entry.name for entry in tmp_path.iterdir()] == ["gpu-safe.tar.gz"]
        with tarfile.open(tmp_path / "gpu-safe.tar.gz") as tar:
            names = {Path(name).name for name in tar.getnames()}
            content = json.load(tar.extractfile("gpu-safe/report.json"))
        assert {"report.json", "summary.txt", "info.log", "sanitize-grid.log"} <= names
        assert content["rehearsal"] and content["phases"]["info"]["info"]["versions"]["torch"] == torch.__version__
        assert content["phases"]["calibrate"]["reason"] == "left out by --only"
        assert "0 were not repeatable, 0 were left" in content["phases"]["sanitize-grid"]["output_tail"]
        assert "written to" in capsys.readouterr().out
        assert gpu_report.main(["safe", "--rehearse", "--output", str(tmp_path)]) == Exit.USAGE
        assert "another run" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_without_a_gpu_it_says_so(self, capsys):
        assert gpu_report.main(["correct"]) == Exit.NO_DEVICE
        assert "no CUDA device" in capsys.readouterr().err

    def test_the_deadline_ends_a_report_that_waits(self, tmp_path):
        """A phase that cannot be ended, as a process in the driver, must not cost what was measured."""
        program = (
            "import sys, time; sys.path[:0] = ['.', 'tests']\n"
            "from bench import gpu_report\nfrom bench.harness import phases\n"
            "gpu_report.LAST_S = 1\nphases.run = lambda *a: time.sleep(60)\n"
            f"gpu_report.main(['safe', '--rehearse', '--minutes', '0.001', '--output', {str(tmp_path)!r}])"
        )
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
        assert done.returncode == Exit.FAILED and "the deadline has passed" in done.stderr, done.stderr
        assert time.monotonic() - begin < 45 and (tmp_path / "gpu-safe.tar.gz").stat().st_size > 0

    def test_the_summary_names_failures_and_what_did_not_end(self):
        record = {"status": "failed", "seconds": 3.0, "counts": {"passed": 2, "failed": 1, "skipped": 0}}
        record |= {"failed": {"tests/a.py::b": "boom\nmore"}, "unfinished": ["tests/a.py::c"]}
        record |= {"largest_error_of_allowed": {"float32 highest": 0.5}}
        text = gpu_report.summary({"phases": {"cuda": record}})
        assert "2 passed, 1 failed" in text and "failed: tests/a.py::b: boom" in text
        assert "did not end: tests/a.py::c" in text and "float32 highest 0.50" in text


class TestLive:
    def session(self, folder, *options):
        (folder / "test_it.py").write_text(
            "import os, pytest, time\n"
            "def test_good(): pass\n"
            "def test_bad(): assert 1 == 2, 'told'\n"
            "def test_skipped(): pytest.skip('why')\n"
            "def test_hangs(): os.kill(os.getpid(), 9)\n"
        )
        file = folder / "live.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.harness.live", *options]
        environment = os.environ | {"MCLD_LIVE": str(file), "PYTHONPATH": str(ROOT)}
        environment.pop("PYTEST_XDIST_WORKER", None)
        subprocess.run(
            [*command, str(folder / "test_it.py")], cwd=folder, capture_output=True, timeout=100, env=environment
        )
        return live.read(file)

    def test_a_killed_run_keeps_its_results_and_names_the_test(self, tmp_path):
        record = self.session(tmp_path)
        assert record["counts"] == {"tests": 3, "passed": 1, "failed": 1, "skipped": 1}
        (name,) = record["failed"]
        assert name.endswith("test_bad") and "told" in record["failed"][name] and record["skipped"] == {"why": 1}
        assert [name.rpartition("::")[2] for name in record["unfinished"]] == ["test_hangs"]

    def test_side_by_side_a_worker_that_dies_costs_one_test(self, tmp_path):
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
        record = self.session(tmp_path, "-n", "1", "--max-worker-restart", "2")
        assert record["counts"]["passed"] == 1 and record["counts"]["failed"] == 2 and not record["unfinished"]
        assert any("crashed" in message for message in record["failed"].values())


def test_the_checks_hold_backends_to_the_truth(monkeypatch):
    check = next(correct.checks("cpu"))
    cpu = torch.device("cpu")
    record = correct.run_check("torch", check, cpu)
    assert record["status"] == "ok" and record["repeats_bitwise"] and 0 < record["ratio"] <= 1
    assert correct.inputs(correct.Check(batch=7, classes=5, layout="misaligned"), cpu)[0].data_ptr() % 16
    exact = correct.evaluate
    monkeypatch.setattr(
        correct,
        "evaluate",
        lambda name, *rest: tuple(x * (1.001 if name == "torch" else 1) for x in exact(name, *rest)),
    )
    assert correct.run_check("torch", check, cpu)["status"] == "FAILED"

    def raises(*rest):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(correct, "in_eager", lambda *rest: exact("reference", check, *rest[1:4]))
    monkeypatch.setattr(correct, "evaluate", raises)
    record = correct.run_check("torch", check, cpu)
    assert record["status"] == "error" and "CUDA error" in correct.summary([record])


def test_chunks_are_the_reference_where_it_does_not_fit(monkeypatch):
    check = correct.Check(batch=40, classes=9, dtype="float32")
    tensors = correct.inputs(check, torch.device("cpu"))
    whole = correct.in_eager(check, *tensors, torch.float64)
    monkeypatch.setattr(correct.memory, "available", lambda device: 0)
    for a, b in zip(whole, correct.in_eager(check, *tensors, torch.float64)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="does not fit"):
        correct.in_eager(correct.Check(batch=40, classes=9, options="mask"), *tensors, torch.float64)


def test_checks_that_did_not_end_are_named(tmp_path):
    path = tmp_path / "errors.jsonl"
    row = {"provider": "cuda", "check": "a", "dtype": "float32", "precision": "high", "status": "FAILED", "ratio": 3.0}
    path.write_text("\n".join(map(json.dumps, [{"begun": "cuda: a"}, row, {"begun": "cuda: b"}])) + '\n{"cut')
    record = commands.read_errors(path)
    assert record["unfinished"] == ["cuda: b"] and record["failed"] == {"a": "error 3 times what is allowed"}
    assert record["largest_error_of_allowed"] == {"float32 high": 3.0}


def test_every_fault_is_a_phase():
    names = [phase.name for phase in commands.safe(Path("."), HOPPER, False)]
    assert [name.removeprefix("fault-") for name in names if name.startswith("fault-")] == list(faults.FAULTS)
