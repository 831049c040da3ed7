"""The report of a GPU machine, without one: phases, archive, plan, live test results, checks, and what is published."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import csrc_host
import pytest
import torch

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from bench import correct, faults, gpu_report, publish, sanitize
from bench.harness import commands, forms, goals, live, ncu, phases, providers
from bench.harness.cases import Case
from bench.harness.commands import Machine
from bench.harness.phases import Phase
from bench.harness.programs import Exit
from mcld_kernels.backends import forms as calibrated
from mcld_kernels.backends import timings
from mcld_kernels.backends.cuda import extension

ROOT = Path(__file__).resolve().parent.parent
HOPPER = Machine(capability=(9, 0), workers=4)


def code(text, name="try", budget_s=20, **more):
    return Phase(name=name, command=[sys.executable, "-c", text], budget_s=budget_s, **more)


def run(folder, *planned, seconds=60.0, rewrite=lambda: None):
    outcomes = {}
    phases.run(planned, folder, time.monotonic() + seconds, outcomes, rewrite, lambda text: None)
    return outcomes


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


def test_a_sanitizer_sees_forms_that_are_off_by_default(monkeypatch, capsys):
    """In emulation, the forms and what they differ from alone."""
    if csrc_host.compiler() is None:
        pytest.skip("needs a C++ compiler")
    module, launched = csrc_host.load(), []

    class Spy:
        def __getattr__(self, name):
            function = getattr(module, name)
            if name not in ("low_latency", "hopper_similarity"):
                return function

            def launch(**fields):
                keys = ("dependent",) if name == "low_latency" else ("skew", "cluster")
                launched.append((name, *(fields[key] for key in keys)))
                return function(**fields)

            return launch

    monkeypatch.setattr(sanitize, "OPTIONS", ({},))
    monkeypatch.setattr(sanitize, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(sanitize, "SHAPES", ((70, 100), (65, 300)))
    with extension.use(Spy()):
        assert sanitize.main(["--device", "cpu", "--providers", "cuda", "hopper", *sanitize.FORMS]) == Exit.OK
    assert {("low_latency", True), ("low_latency", False)} <= set(launched)
    assert {("hopper_similarity", *form) for form in ((0, 1), (2, 1), (0, 2))} <= set(launched)
    ended = [line for line in capsys.readouterr().out.splitlines() if line.startswith(commands.ENDS)]
    assert len(ended) == 2 * 2 + 4 and [line.rpartition(", {")[2] for line in ended[4:]] == [
        "'dependent_launches': True}", "'dependent_launches': True}", "'hopper_skew': 2}", "'hopper_cluster': 2}"
    ]  # fmt: skip


def test_forms_stand_behind_the_grid_of_a_sanitizer():
    plain = list(sanitize.combinations(sanitize.PROVIDERS))
    assert len(plain) == len(sanitize.OPTIONS) * len(sanitize.DTYPES) * len(sanitize.SHAPES) * len(sanitize.PROVIDERS)
    assert not any(combination.fields for combination in plain)
    both = list(sanitize.combinations(("hopper:hopper_cluster=2", *sanitize.PROVIDERS)))
    assert both[:-1] == plain and both[-1].fields == {"hopper_cluster": 2} and both[-1].provider == "hopper"


class TestSanitizers:
    def test_every_form_has_phases_of_its_own_after_what_comes_by_default(self):
        planned = commands.safe(Path("."), HOPPER, False)
        names = [phase.name for phase in planned]
        assert len(names) == len(set(names))
        for form in sanitize.FORMS:
            for check in commands.SANITIZERS:
                line = planned[names.index(f"{check}-{form}")].command_line({})
                assert line[line.index("--providers") + 1 :] == [form] and check in line
        plain = [name for name in names if name.startswith(commands.SANITIZERS) and ":" not in name]
        for name in plain:
            assert ":" not in " ".join(planned[names.index(name)].command_line({})[1:])
        assert [name for name in names if name in plain or ":" in name or name == "calibrate"] == [
            *plain, "calibrate", *(name for name in names if ":" in name)
        ]  # fmt: skip
        ampere = [phase.name for phase in commands.safe(Path("."), Machine(capability=(8, 0), workers=4), False)]
        assert {name.partition("-")[2] for name in ampere if ":" in name} == {"cuda:dependent_launches=True"}
        without = commands.safe(Path("."), Machine(capability=(9, 0), workers=4, without={"hopper"}), False)
        assert all(phase.skip_reason({}) for phase in without if "-hopper" in phase.name)

    def test_no_two_sanitizers_look_at_the_same_ports(self):
        taken = set()
        for phase in commands.safe(Path("."), HOPPER, False):
            if phase.group in ("sanitizers", "forms"):
                line = phase.command_line({})
                first, most = (int(line[line.index(option) + 1]) for option in ("--port", "--max-connections"))
                own = set(range(first, first + most))
                assert len(own) > 10 and not own & taken and max(own) < 1 << 16
                taken |= own
        assert taken

    def test_a_form_that_hangs_costs_itself_alone(self, tmp_path, monkeypatch):
        """With a tool that stands still at one form and otherwise prints what a sanitizer does."""
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            "#!/bin/sh\necho 'begins: it'\n"
            'case "$*" in *racecheck*hopper_cluster*) exec sleep 60;; esac\n'
            "echo 'ended: it'\necho '========= ERROR SUMMARY: 0 errors'\n"
        )
        tool.chmod(0o755)
        monkeypatch.setattr(commands.shutil, "which", lambda name, path=None: str(tool))
        planned = [p for p in commands.safe(tmp_path, HOPPER, False) if p.group in ("sanitizers", "forms")]
        for phase in planned:
            phase.budget_s = phase.most_s = 4.0
        outcomes = run(tmp_path, *planned)
        assert [name for name, record in outcomes.items() if record["status"] != "ok"] == [
            "racecheck-hopper:hopper_cluster=2"
        ]
        text = gpu_report.summary({"phases": outcomes})
        assert re.search(r"^racecheck-hopper:hopper_cluster=2 +timed out ", text, re.MULTILINE)
        assert text.count("did not end: it") == 1 and text.count("ERROR SUMMARY: 0 errors") == len(planned) - 1

    def test_a_sanitizer_that_did_not_watch_has_failed(self, tmp_path, monkeypatch):
        """As where the program's first CUDA call comes too late for it, which ends well, and was not looked at."""
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            "#!/bin/sh\necho '========= Error: compute-sanitizer timed-out.'\n"
            "echo '24 combinations ran, 0 were not repeatable, 0 were left for want of time'\n"
        )
        tool.chmod(0o755)
        monkeypatch.setattr(commands.shutil, "which", lambda name, path=None: str(tool))
        planned = [p for p in commands.safe(tmp_path, HOPPER, False) if p.group in ("sanitizers", "forms")]
        for phase in planned:
            line = phase.command_line({})
            assert line[line.index("--launch-timeout") + 1] == "0"
            assert line[line.index("--report-api-errors") + 1] == "no", "of PyTorch's own calls, before any of a kernel"
        outcomes = run(tmp_path, planned[0])
        assert outcomes["memcheck-hopper"]["status"] == "failed"
        assert "no message like 'SUMMARY: '; 24 combinations ran" in gpu_report.summary({"phases": outcomes})

    def test_a_combination_that_hangs_is_named_before_the_time_of_its_phase_is_up(self, tmp_path):
        """Also where it holds the interpreter, as a launch may; the phase ends by itself, as its sanitizer needs."""
        program = (
            "import ctypes, sys; sys.path[:0] = ['.', 'tests']\n"
            "from bench import sanitize\nimport torch\n"
            "sanitize.OPTIONS, sanitize.DTYPES, sanitize.LAST_S = ({},), (torch.float32,), 4.0\n"
            "real, calls = sanitize.mcld_kernels.mcld_loss, []\n"
            "def loss(*tensors, **options):\n"
            "    calls.append(1)\n"
            "    return real(*tensors, **options) if len(calls) < 3 else ctypes.PyDLL(None).sleep(100)\n"
            "sanitize.mcld_kernels.mcld_loss = loss\n"
            "sanitize.KEPT_S = 0.0\n"
            "sanitize.main(['--device', 'cpu', '--providers', 'torch'], sanitize.BEGUN)"
        )
        record = run(tmp_path, code(program, budget_s=20, most_s=20, read=commands.read_sanitizer))["try"]
        assert record["status"] == "failed" and record["exit_code"] == Exit.FAILED and record["seconds"] < 20, record
        assert record["unfinished"] == ["torch, 129 x 37, torch.float32, {}"]
        assert "begins: torch, 70 x 100" in record["output_tail"] and "in loss" in record["output_tail"]

    def test_what_is_left_for_want_of_time_is_counted(self, monkeypatch, capsys):
        monkeypatch.setattr(sanitize, "OPTIONS", ({},))
        monkeypatch.setattr(sanitize, "KEPT_S", 600.0)
        monkeypatch.setenv("MCLD_PHASE_S", "600")
        assert sanitize.main(["--device", "cpu", "--providers", "torch"]) == Exit.OK
        record = commands.read_sanitizer(capsys.readouterr().out)
        assert record["summary"] == ["1 combinations ran, 0 were not repeatable, 5 were left for want of time"]
        assert not record["unfinished"]


def test_what_a_sanitizer_and_ncu_print_is_read():
    output = "x\n========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error\n"
    record = commands.read_sanitizer(output)
    assert record["summary"] == ["ERROR SUMMARY: 1 error"] and record["reports"] == ["Invalid __global__ read"]
    lines = [
        "==PROF== Connected", "cuda: B=4096",
        '"ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"',
        '"0","similarity<bf16>","(128, 1, 1)","(8, 1, 1)","GPU Speed Of Light","Duration","ns","12,345"',
        '"0","similarity<bf16>","(128, 1, 1)","(8, 1, 1)","Occupancy","Achieved Occupancy","%","48.5"',
        '"1","flash","(128, 1, 1)","(9, 1, 1)","GPU Speed Of Light","Duration","ns","7"',
    ]  # fmt: skip
    first, second = ncu.read(lines)
    assert (
        first["metrics"] == {"Duration [ns]": 12345.0, "Achieved Occupancy [%]": 48.5} and second["kernel"] == "flash"
    )
    assert "none" in ncu.command("ncu", ["python"]) and "--clock-control" in ncu.command("ncu", ["python"])


def test_every_fault_is_a_phase():
    names = [phase.name for phase in commands.safe(Path("."), HOPPER, False)]
    assert [name.removeprefix("fault-") for name in names if name.startswith("fault-")] == list(faults.FAULTS)


def recorded(provider, seconds, batch=4096, classes=1000, terms=("instance", "sample"), **more):
    row = {"loss": "mcld", "mode": "forward-backward", "dtype": "bfloat16", "terms": list(terms), "classes": classes}
    row |= {"batch": batch, "provider": provider, "status": "ok", "reason": None}
    row["time"] = dict.fromkeys(("median_s", "p20_s", "p80_s"), 2 * seconds)
    row |= {"kernels_time": {"median_s": seconds}, "graph_time": None, "peak_extra_bytes": 100 << 20}
    return row | {"flop": 4 * batch**2 * classes, "gemm_flop_per_s": 7.9e14, "speedup_over_reference": None} | more


class TestGoals:
    def test_kernel_time_decides_and_plain_time_stands_beside_it(self):
        rows = [recorded("triton", 1e-4), recorded("cuda", 0.9e-4), recorded("library", 1.2e-4)]
        rows += [recorded("reference", 2.7e-4), recorded("compile", 9.0, batch=16384)]
        judged = {
            goal["goal"].rpartition(" >=")[0]: goal for goal in goals.judge(rows) if goal["regime"] == goals.MIDDLE
        }
        assert {goal["backend"] for goal in judged.values()} == {"cuda"}
        fraction = judged["fraction of the GEMM ceiling"]
        assert fraction["value"] == pytest.approx(4 * 4096**2 * 1000 / 0.9e-4 / 7.9e14) and fraction["reached"]
        assert (fraction["seconds"], fraction["kernel_seconds"]) == pytest.approx((1.8e-4, 0.9e-4))
        assert judged["times the library path"]["value"] == pytest.approx(1.2 / 0.9)
        assert judged["times eager"]["reached"] is True
        assert judged["times torch.compile"]["reached"] is None  # measured at another batch size alone

    def test_memory_is_held_to_600_mb_and_three_half_copies(self):
        allowed = 600_000_000 + 3 * 2 * 2 * 4096 * 1000
        for extra, reached in ((allowed, True), (allowed + 1, False)):
            judged = goals.judge([recorded("cuda", 1e-4, peak_extra_bytes=extra)])
            assert [goal["reached"] for goal in judged if "600 MB" in goal["goal"]] == [reached]


class TestPublish:
    ROWS = [recorded(name, time) for name, time in (("triton", 1.1e-4), ("hopper", 1e-4), ("library", 1.3e-4))]
    ALL = [recorded(name, time, 256, terms=("instance", "sample", "category"), graph_time={"median_s": time})
           for name, time in (("triton", 4e-5), ("cuda", 2e-5), ("reference", 4e-4))]  # fmt: skip

    def archive(self, folder, command, rows, table=None, rehearsal=False, day="01", gpu="NVIDIA H200"):
        machine = {"gpu": gpu, "cpu": "c", "threads": 8, "load_1min": 1.0, "float32_matmul_precision": "highest"}
        started = f"2030-01-{day}T00:00:00Z"
        head = {"machine": machine, "versions": {"torch": "2.11", "mcld_kernels": timings.__version__}, "commit": "abc"}
        head |= {"dirty": False, "started": started, "ceilings": {}, "options": {}, "complete": True, "rows": rows}
        work = folder / f"work-{command}"
        (work / "bench").mkdir(parents=True)
        (work / "bench" / "results.json").write_text(json.dumps(head))
        phase = {"status": "ok", "machine": machine}
        content = {"command": command, "started": started, "rehearsal": rehearsal, "phases": {"ceilings": phase}}
        (work / "report.json").write_text(json.dumps(content | {"commit": "abc", "dirty": False}))
        (work / "errors-cuda.jsonl").write_text('{"begun": "x"}\n{"check": "a", "ratio": 0.5}\n{"cut')
        (work / "summary.txt").write_text("the summary\n")
        if table is not None:
            (work / "table.json").write_text(json.dumps(table))
        path = folder / f"gpu-{command}.tar.gz"
        phases.archive(path, work)
        return path

    def of_commit(self, path, commit):
        """The archive with another commit in its report."""
        work = path.parent / path.name.replace("gpu-", "work-").removesuffix(".tar.gz")
        content = json.loads((work / "report.json").read_text())
        (work / "report.json").write_text(json.dumps(content | {"commit": commit}))
        phases.archive(path, work)
        return path

    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "repository"
        root.mkdir()
        (root / "README.md").write_text((ROOT / "README.md").read_text())
        return root

    def test_rows_table_and_plot(self, tmp_path, root, capsys):
        row = {"dtype": "bfloat16", "precision": "highest", "batch": 256, "classes": 100}
        row["milliseconds"] = {"triton": 2.0, "cuda": 1.0}
        table = {"schema": timings.SCHEMA, "package": timings.__version__, "gpu": "NVIDIA H200", "date": "2030-01-02"}
        paths = [
            self.archive(tmp_path, "correct", self.ROWS),
            self.archive(tmp_path, "safe", self.ALL, table | {"rows": [row]}, day="02"),
        ]
        assert publish.main([*map(str, paths), "--root", str(root)]) == Exit.OK
        shown = capsys.readouterr().out
        folder = root / "bench" / "results" / "nvidia-h200-2030-01-01-correct"
        names = {entry.name for entry in folder.iterdir()}
        assert {"report.json", "results.json", "results.csv", "results.png", "errors.json", "summary.txt"} <= names
        assert "bench/results/nvidia-h200-2030-01-02-safe" in shown and "README.md" in shown
        text = (root / "README.md").read_text()
        assert text.startswith((ROOT / "README.md").read_text().partition(publish.BEGIN)[0])
        section = text.partition(publish.BEGIN)[2].partition(publish.END)[0]
        assert "| instance + sample | 1000 | 4096 | bfloat16 | `hopper` | 100 µs | 200 µs | 85% | 1.30x |" in section
        assert "| all | 1000 | 256 | bfloat16 | `cuda` | 20 µs | 40 µs |" in section and "20.00x" in section
        assert f"]({folder.relative_to(root)}/results.png)" in section and "NVIDIA H200" in section
        path = root / "mcld_kernels" / "tables" / "nvidia-h200.json"
        parsed, reason = timings.parse(path, path.read_bytes())
        assert parsed is not None and parsed.rows[0].milliseconds == {"triton": 2.0, "cuda": 1.0}, reason
        # What is recorded stays: a second time nothing is written.
        assert publish.main([str(paths[0]), "--root", str(root)]) == Exit.USAGE
        assert "not overwritten" in capsys.readouterr().err

    def test_without_a_calibration_the_table_is_of_the_rows(self, tmp_path, root):
        publish.publish([self.archive(tmp_path, "speed", self.ALL)], root)
        made = json.loads((root / "mcld_kernels" / "tables" / "nvidia-h200.json").read_text())
        assert made["rows"][0]["milliseconds"] == pytest.approx({"triton": 0.08, "cuda": 0.04})

    def test_what_cannot_be_published_says_why(self, tmp_path, root, capsys):
        rehearsal = self.archive(tmp_path, "speed", self.ROWS, rehearsal=True)
        other = [self.archive(tmp_path, "safe", self.ROWS, gpu="B"), self.archive(tmp_path, "correct", self.ROWS)]
        (tmp_path / "text").write_text("no archive")
        for paths, message in (
            ([rehearsal], "of a rehearsal"),
            (other, "different GPUs"),
            ([tmp_path / "text"], "is no archive"),
        ):
            assert publish.main([*map(str, paths), "--root", str(root)]) == Exit.USAGE
            assert message in capsys.readouterr().err
        (tmp_path / "again").mkdir()
        again = self.archive(tmp_path / "again", "correct", self.ROWS)
        assert publish.main([str(other[1]), str(again), "--root", str(root)]) == Exit.USAGE
        assert "two archives are of one command and day" in capsys.readouterr().err
        assert publish.main([str(other[1]), str(self.of_commit(again, "def")), "--root", str(root)]) == Exit.USAGE
        assert "different commits: abc, def" in capsys.readouterr().err
        (root / "README.md").write_text("no comments")
        with pytest.raises(publish.Unpublishable, match="has no lines"):
            publish.publish([other[1]], root)
        assert [entry.name for entry in root.iterdir()] == ["README.md"]

    def test_no_damaged_archive_is_published(self, tmp_path, root, capsys):
        path = self.archive(tmp_path, "speed", self.ROWS)
        whole = path.read_bytes()
        begin = whole.index(b"\0", 10) + 1  # after the header, which names a file and is of no matter
        for place in (*range(begin, len(whole), 97), len(whole) - 6):  # the last one in the checksum
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert publish.main([str(path), "--root", str(root)]) == Exit.USAGE, place
            assert "is no archive of bench/gpu_report.py" in capsys.readouterr().err
        assert [entry.name for entry in root.iterdir()] == ["README.md"]
