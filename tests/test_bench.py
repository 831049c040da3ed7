"""The benchmark: its counts, its gate, its clocks, and that a run leaves behind what it says."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not part of what is installed

from bench import (
    closed_form,
    gate,
    goals,
    gpu_report,
    measure,
    memory,
    peers,
    plots,
    providers,
    report,
    run,
    table,
    timing,
)
from bench.cases import MODES, TERMS, Case, default_grid, inputs, product
from mcld_kernels import reference

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TERM_SETS = (("instance",), ("sample",), ("category",), ("instance", "sample"), TERMS)


def eager(case, student, teacher, target):
    return providers.all_providers()["reference"].make(case, student, teacher, target)()


@pytest.mark.parametrize(
    "terms, mode, flop",
    [
        (("instance",), "forward", 2 * 30 * 30 * 7),
        (("instance", "sample"), "forward-backward", 4 * 30 * 30 * 7),  # one shared matrix
        (("category",), "forward-backward", 4 * 7 * 7 * 30),
        (TERMS, "forward-backward", 4 * 30 * 30 * 7 + 4 * 7 * 7 * 30),
    ],
)
def test_flop_count(terms, mode, flop):
    assert Case(30, 7, terms=terms, mode=mode).flop == flop


def test_byte_count_follows_the_dtype():
    assert Case(10, 3, "float32").bytes == 3 * 10 * 3 * 4
    assert Case(10, 3, "bfloat16", mode="forward").bytes == 2 * 10 * 3 * 2


@pytest.mark.parametrize(
    "bad", [{"batch": 0}, {"classes": -1}, {"dtype": "int8"}, {"terms": ()}, {"terms": ("rows",)}, {"mode": "backward"}]
)
def test_a_case_refuses_nonsense(bad):
    with pytest.raises(ValueError, match="must be"):
        Case(**({"batch": 4, "classes": 4} | bad))


def test_the_default_grids_cover_the_regimes():
    on_gpu = default_grid(torch.device("cuda"))
    found = {goals.regime({**vars(case), "terms": list(case.terms)}) for case in on_gpu}
    assert {goals.IMAGENET, goals.NARROW, goals.WIDE, goals.SMALL} <= found
    assert len(set(on_gpu)) == len(on_gpu)
    assert all(case.batch <= 4096 for case in default_grid(CPU))


@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
@pytest.mark.parametrize("mode", MODES)
def test_the_chunked_truth_is_the_reference(terms, mode, monkeypatch):
    monkeypatch.setattr(gate, "_CHUNK_BYTES", 5 * 8 * 23)  # five anchors a chunk: the last one is ragged
    case = Case(23, 17, "float64", terms, mode)
    student, teacher, target = inputs(case, CPU)
    loss, gradient = gate.truth(case, student, teacher, target)
    expected, expected_gradient = eager(case, student, teacher, target)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    if mode == "forward":
        assert gradient is None
    else:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_in_chunks_errs_as_eager_does(dtype):
    case = Case(150, 40, dtype)
    tensors = inputs(case, CPU)
    exact = gate.truth(case, *tensors)
    whole = gate.error(eager(case, *tensors), exact)
    chunks = gate.error(gate.chunked(case, *tensors, case.torch_dtype), exact)
    assert chunks.gradient == pytest.approx(whole.gradient, rel=0.3)
    assert chunks.gradient > (1e-3 if dtype == "bfloat16" else 1e-8)


class TestGate:
    case = Case(60, 20)

    def verdict(self, loss=1.0, gradient=1.0, case=case):
        tensors = inputs(case, CPU)
        exact = gate.truth(case, *tensors)
        result = eager(case, *tensors)
        error = gate.error(result, exact)
        changed = (result[0] * loss, result[1] * gradient)
        return gate.judge(case, gate.error(changed, exact), error)

    def test_eager_itself_passes(self):
        assert self.verdict().passed and self.verdict().ratio <= 1

    @pytest.mark.parametrize("change", [{"loss": 1 + 1e-4}, {"gradient": 1 + 1e-4}, {"gradient": -1.0}])
    def test_a_wrong_result_fails(self, change):
        verdict = self.verdict(**change)
        assert not verdict.passed and verdict.ratio > 1

    @pytest.mark.parametrize("change", [{"loss": float("nan")}, {"gradient": float("nan")}, {"loss": float("inf")}])
    def test_what_is_not_finite_fails(self, change):
        assert not self.verdict(**change).passed

    def test_half_allows_what_half_costs_and_no_more(self):
        half = Case(60, 20, "bfloat16")
        assert self.verdict(gradient=1 + 1e-3, case=half).passed
        assert not self.verdict(gradient=1 + 5e-2, case=half).passed

    def test_an_eager_that_breaks_excuses_nobody(self):
        broken = gate.Error(float("inf"), float("inf"))
        assert not gate.judge(self.case, gate.Error(1e-3, 1e-3), broken).passed

    def test_a_missing_gradient_is_a_fault(self):
        exact = gate.truth(self.case, *inputs(self.case, CPU))
        with pytest.raises(ValueError, match="none"):
            gate.error((exact[0], None), exact)


@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("attend", [closed_form.matrix, closed_form.flash])
def test_the_library_paths_pass_the_gate(terms, dtype, attend):
    case = Case(75, 37, dtype, terms)
    tensors = inputs(case, CPU)
    exact = gate.truth(case, *tensors)
    measured = gate.error(closed_form.loss_and_gradient(case, *tensors, attend), exact)
    verdict = gate.judge(case, measured, gate.error(eager(case, *tensors), exact))
    assert verdict.passed, verdict


def test_the_torch_backend_keeps_the_bar_where_a_column_is_long():
    """Sums over the batch that are not pairwise lose an order of magnitude here."""
    case = Case(16384, 64, terms=("category",))
    tensors = inputs(case, CPU)
    exact = gate.truth(case, *tensors)
    measured = gate.error(providers.all_providers()["torch"].make(case, *tensors)(), exact)
    verdict = gate.judge(case, measured, gate.error(eager(case, *tensors), exact))
    assert verdict.passed, verdict


@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if not peer.cuda_only], ids=lambda peer: peer.name)
def test_the_peers_compute_the_instance_term(peer):
    case = Case(40, 12, "float64", ("instance",))
    student, teacher, target = inputs(case, CPU)
    loss = peer.build(case.temperature)(student, teacher)
    expected = reference.mcld_loss(student, teacher, weight=case.weight)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if not peer.cuda_only], ids=lambda peer: peer.name)
def test_the_peers_memory_is_predicted(peer):
    case = Case(150, 20, terms=("instance",))
    known = providers.all_providers()[peer.name]
    step = known.make(case, *inputs(case, CPU))
    step()
    assert 0.8 <= known.extra_bytes(case) / memory.peak_extra(step, CPU)["allocator"] <= 3


def test_every_provider_runs_or_says_why_not():
    case = Case(300, 300)
    student, teacher, _ = inputs(case, CPU)
    reasons = {name: p.reason(case, student, teacher) for name, p in providers.all_providers().items()}
    assert reasons["reference"] is reasons["torch"] is reasons["library"] is None
    assert "256 columns" in reasons["sdpa"]
    assert "instance-wise term alone" in reasons["info-nce"]
    assert (
        reasons["triton"] and reasons["cuda"] and reasons["hopper"]
    )  # no speed of theirs on CPU tensors, interpreted or not


def test_choosing_providers():
    assert [provider.name for provider in providers.choose("torch, reference")] == ["reference", "torch"]
    with pytest.raises(ValueError, match="nothing"):
        providers.choose("torch,nothing")


class TestMemory:
    def test_the_peak_of_a_known_step(self):
        def step():
            first = torch.ones(1000, 1000)  # 4 MB
            second = first + 1  # 8 MB
            del first
            return torch.ones(250, 1000) + second[:250]  # 4 + 1 + 1 MB

        assert memory.peak_extra(step, CPU)["allocator"] == pytest.approx(8e6, rel=0.01)

    def test_what_was_held_before_does_not_count(self):
        held = torch.ones(1000, 1000)
        assert memory.peak_extra(lambda: held.add_(1), CPU)["allocator"] < 1e5

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
    def test_resident_memory_agrees_where_allocations_are_large(self):
        found = memory.peak_extra(lambda: torch.ones(20_000_000), CPU)  # 80 MB, beyond what malloc keeps for itself
        assert found["allocator"] == pytest.approx(80e6, rel=0.01)
        assert found["resident"] == pytest.approx(80e6, rel=0.1)

    @pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
    @pytest.mark.parametrize("mode", MODES)
    def test_eager_is_predicted_from_above(self, terms, mode):
        case = Case(600, 500, terms=terms, mode=mode)
        step = providers.all_providers()["reference"].make(case, *inputs(case, CPU))
        measured = memory.peak_extra(step, CPU)["allocator"]
        assert 0.95 * measured <= providers.eager_bytes(case) <= 3.2 * measured

    def test_a_step_that_would_not_fit_is_refused(self):
        assert memory.refusal(1 << 20, CPU) is None
        assert re.search(r"about 1024\.0 GiB", memory.refusal(1 << 40, CPU))


class TestClocks:
    def test_a_sample_is_the_time_of_one_step(self):
        sample = timing.cpu_sample(lambda: time.sleep(3e-3))
        assert 3e-3 <= sample() < 50e-3

    def test_short_steps_are_repeated(self):
        count = 0

        def step():
            nonlocal count
            count += 1

        sample = timing.cpu_sample(step)
        assert sample() < 1e-4
        assert count > 100

    def test_rounds_are_interleaved_in_changing_order(self):
        order = []
        samples = {name: lambda name=name: order.append(name) or 1.0 for name in "abcd"}
        found = timing.interleave(samples, rounds=20, seconds=60)
        rounds = [order[i : i + 4] for i in range(0, 80, 4)]
        assert all(sorted(names) == list("abcd") for names in rounds)
        assert len({tuple(names) for names in rounds}) > 5
        assert all(len(times.samples) == 20 for times in found.values())

    def test_the_budget_ends_the_rounds_but_never_before_three(self):
        found = timing.interleave({"a": lambda: 1.0}, rounds=50, seconds=0)
        assert len(found["a"].samples) == timing.MIN_ROUNDS


def provider(name, step, reason=None, extra=0):
    return providers.Provider(name, "", lambda *_: step, lambda *_: reason, lambda _: extra)


class TestCaseRun:
    case = Case(40, 12)
    plan = measure.Plan(CPU, rounds=3, seconds=5)

    def rows(self, *others):
        found = measure.CaseRun(self.case, [providers.all_providers()["reference"], *others], self.plan).run()
        return {row.provider: row for row in found}

    def test_the_torch_backend_is_measured(self):
        rows = self.rows(providers.all_providers()["torch"])
        row, eager_row = rows["torch"], rows["reference"]
        assert row.status == "ok" and row.times.median > 0 and row.memory["allocator"] > 0
        assert row.time_ratio == eager_row.times.median / row.times.median
        assert row.memory_ratio == row.memory["allocator"] / eager_row.memory["allocator"]
        assert row.flops == self.case.flop / row.times.median and row.of_ceiling == row.flops / row.ceiling_flops

    def test_a_wrong_result_has_no_speed(self):
        row = self.rows(provider("wrong", lambda: (torch.zeros(()), torch.zeros(40, 12))))["wrong"]
        assert row.status == "FAILED" and row.times is None and "times what is allowed" in row.reason
        text = _printed(row)
        assert "FAILED" in text and not re.search(r"\d (ms|µs|ns|s)\b", text)

    def test_a_fault_is_shown_and_the_others_go_on(self):
        def step():
            raise RuntimeError("no such kernel\nand much more")

        rows = self.rows(provider("broken", step), providers.all_providers()["torch"])
        assert rows["broken"].status == "error" and rows["broken"].reason == "RuntimeError: no such kernel"
        assert rows["torch"].status == "ok"

    def test_what_cannot_run_says_why(self):
        rows = self.rows(provider("absent", None, reason="not installed"), provider("huge", None, extra=1 << 50))
        assert rows["absent"].status == rows["huge"].status == "not run"
        assert rows["absent"].reason == "not installed" and "GiB may be used" in rows["huge"].reason
        assert "not installed" in _printed(rows["absent"])

    def test_without_the_reference_the_bar_is_eager_in_chunks(self):
        rows = measure.CaseRun(self.case, [providers.all_providers()["torch"]], self.plan).run()
        assert rows[0].status == "ok" and rows[0].time_ratio is None


def _printed(*rows):
    screen = report.console()
    with screen.capture() as captured:
        report.show(rows, "cpu", screen)
    return captured.get()


def test_a_run_leaves_json_csv_and_plot(tmp_path, capsys):
    arguments = ["--batch", "32", "64", "--classes", "10", "--providers", "reference,torch,cuda", "--repeats", "3"]
    assert run.main([*arguments, "--device", "cpu", "--output", str(tmp_path), "--profile"]) == 0
    shown = capsys.readouterr().out
    assert "not run: cuda" in shown and "Gflop/s" in shown
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["complete"] and len(found["rows"]) == 6
    assert found["machine"]["cpu"] and found["versions"]["torch"] == torch.__version__ and "commit" in found
    assert found["ceilings"]["gemm_float32_flop_per_s"] > 1e8 and found["ceilings"]["copy_bytes_per_s"] > 1e8
    ok = [row for row in found["rows"] if row["status"] == "ok"]
    assert {row["provider"] for row in ok} == {"reference", "torch"}
    assert all(row["gate"]["passed"] and row["time"]["p20_s"] <= row["time"]["median_s"] for row in ok)
    assert str(ROOT) not in json.dumps({**found, "rows": [], "options": {}})
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 and float(lines[0]["median_ms"]) > 0 and lines[0]["terms"] == "instance+sample+category"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    lines = table.markdown(found).splitlines()
    assert len(lines) == 2 + 4 + 2 and all(line.count("|") == 11 for line in lines[:6])
    assert len(list(tmp_path.glob("trace_*.json.gz"))) == 4
    assert "aten::" in next(tmp_path.glob("kernels_torch_B64*.txt")).read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--providers", "nobody"], "unknown provider nobody"),
        (["--batch", "0"], "at least 1"),
        (["--terms", "rows"], "must be some of"),
        (["--temperature", "-1"], "must be positive"),
    ],
)
def test_bad_arguments_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_smoke_ends_in_under_a_minute(tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "bench/run.py", "--smoke", "--device", "cpu", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compile is left out" in done.stdout and "FAILED" not in done.stdout
    assert time.monotonic() - start < 60


def test_a_plot_of_nothing_is_no_file(tmp_path):
    assert plots.plot([], tmp_path / "none.png", "") is None
    assert not (tmp_path / "none.png").exists()


def test_a_row_that_is_not_finite_is_written_as_null(tmp_path):
    case = TestCaseRun.case
    wrong = provider("wrong", lambda: (torch.full((), float("nan")), torch.full((40, 12), float("nan"))))
    rows = measure.CaseRun(case, [wrong], TestCaseRun.plan).run()
    report.write_json(tmp_path / "a.json", {}, rows)
    row = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))["rows"][0]
    assert row["status"] == "FAILED" and row["gate"]["error"]["loss"] is None
    report.write_csv(tmp_path / "a.csv", [row])
    assert "FAILED" in (tmp_path / "a.csv").read_text()


def test_times_print_with_their_unit():
    assert [report.seconds(value) for value in (1.5, 2.5e-3, 3.4e-5, 5e-9)] == ["1.5 s", "2.5 ms", "34 µs", "5 ns"]


class TestGpuReport:
    def phase(self, code, budget=20, **more):
        return gpu_report.Phase("try", [sys.executable, "-c", code], budget, **more)

    def test_output_and_values_are_kept(self, tmp_path):
        found = gpu_report.run_phase(self.phase("print('{\"a\": 1}')", read=gpu_report.last_json), tmp_path, 20)
        assert found["status"] == "ok" and found["a"] == 1 and "seconds" in found

    def test_a_failure_keeps_its_output(self, tmp_path):
        found = gpu_report.run_phase(self.phase("print('so far'); raise SystemExit(4)"), tmp_path, 20)
        assert found["status"] == "failed" and found["exit_code"] == 4 and "so far" in found["output_tail"]

    def test_a_phase_out_of_time_is_asked_to_write_what_it_has(self, tmp_path):
        code = (
            "import time\nprint('begun')\n"
            "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('{\"kept\": true}')"
        )
        found = gpu_report.run_phase(self.phase(code, read=gpu_report.last_json), tmp_path, 1.5)
        assert found["status"] == "timed out" and found["kept"] is True and found["seconds"] < 10

    def test_a_phase_that_will_not_end_is_ended_with_its_children(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_report, "GRACE_S", 0.5)
        code = (
            "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "child = subprocess.Popen(['sleep', '60'])\nprint(child.pid)\ntime.sleep(60)"
        )
        found = gpu_report.run_phase(self.phase(code), tmp_path, 1.5)
        assert found["status"] == "timed out" and found["seconds"] < 10
        child = int(found["output_tail"].split()[0])
        for _ in range(50):
            if not _running(child):
                break
            time.sleep(0.1)
        assert not _running(child)

    def test_no_time_and_no_program(self, tmp_path):
        assert gpu_report.run_phase(self.phase(""), tmp_path, 0)["reason"] == "the time was used up"
        missing = gpu_report.Phase("try", ["/nowhere/program"], 5)
        assert gpu_report.run_phase(missing, tmp_path, 5)["status"] == "failed"

    def test_the_dry_run_names_every_phase_and_fits_no_path(self, capsys):
        assert gpu_report.main(["--dry-run", "--skip", "tests"]) == 0
        shown = capsys.readouterr().out
        for name in ("info", "build", "ceilings", "tests", "bench", *gpu_report.SANITIZERS):
            assert name in shown
        assert "left out by --skip" in shown and str(ROOT) not in shown

    def test_it_is_planned_to_end_within_eight_minutes(self):
        assert gpu_report.TOTAL_S + gpu_report.GRACE_S < 480

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_without_a_gpu_it_says_so(self, capsys):
        assert gpu_report.main([]) == 3
        assert "no CUDA device" in capsys.readouterr().err

    def test_a_rehearsal_writes_the_report(self, tmp_path, capsys):
        assert gpu_report.main(["--rehearse", "--skip", "ceilings", "bench", "--output", str(tmp_path)]) == 0
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["rehearsal"] and found["phases"]["info"]["status"] == "ok"
        assert found["phases"]["build"]["reason"] == "a rehearsal builds nothing"

    def test_what_the_sanitizer_watches_runs(self):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "bench/sanitize.py", "--device", "cpu"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "18 combinations ran, 0 were not repeatable" in done.stdout

    def test_a_test_run_is_read(self, tmp_path):
        path = tmp_path / "tests.xml"
        path.write_text(
            '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
            '<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>'
            "</testsuite></testsuites>"
        )
        found = gpu_report.read_junit(path)
        assert found["counts"] == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
        assert found["failed"] == ["a::bad"]

    def test_goals_are_judged_against_rows_of_the_same_case(self):
        def row(name, median, **more):
            case = {"batch": 4096, "classes": 1000, "dtype": "bfloat16", "terms": ["instance", "sample"]}
            case |= {"mode": "forward-backward", "status": "ok", "provider": name, "time": {"median_s": median}}
            return case | {"fraction_of_gemm": 0.9, "peak_extra_bytes": 100 << 20} | more

        rows = [row("triton", 1.0), row("cuda", 0.9, fraction_of_gemm=0.8), row("library", 1.2)]
        rows += [row("reference", 2.7), row("compile", 9.0, batch=16384)]
        found = {goal["goal"].rpartition(" >=")[0] or goal["goal"]: goal for goal in goals.judge(rows)}
        assert {goal["backend"] for goal in found.values()} == {"cuda"}
        assert found["fraction of the GEMM ceiling"]["reached"] is False
        assert found["times the library path"]["value"] == pytest.approx(1.2 / 0.9)
        assert found["times the library path"]["reached"] is True
        assert found["times eager"]["reached"] is True  # 3.0
        assert found["times torch.compile"]["reached"] is None  # measured at another batch size alone
        assert found["extra memory / (256 MiB + 3 half copies) <= 1"]["reached"] is True


def _running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_grid_of_the_options():
    options = run.parser().parse_args(["--batch", "8", "4", "--classes", "3", "--terms", "category,instance"])
    found = run.grid(options, CPU)
    assert found == product([4, 8], [3], ["float32"], ("instance", "category"), ["forward-backward"])
