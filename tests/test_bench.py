"""The benchmark: its counts, its gate, its clocks, its programs and what they write."""

import csv
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from bench import gpu_report, run, table
from bench.harness import (
    closed_form,
    gate,
    goals,
    kernels,
    losses,
    machine,
    mcld_chunks,
    measure,
    memory,
    peers,
    plots,
    programs,
    providers,
    report,
    screen,
    timing,
)
from bench.harness.cases import MODES, TERMS, Case, default_grid, inputs, product, smoke_grid
from bench.harness.programs import Exit
from mcld_kernels import backends, reference

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TERM_SETS = (("instance",), ("sample",), ("category",), ("instance", "sample"), TERMS)


def verdict_of(case, tensors, result):
    exact = gate.truth(case, *tensors)
    of_eager = gate.error(eager(case, *tensors), exact)
    return gate.judge(gate.error(result, exact), gate.allowed_error(case, *tensors, exact, of_eager))


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
    "bad",
    [
        {"batch": 0},
        {"classes": -1},
        {"dtype": "int8"},
        {"terms": ()},
        {"terms": ("rows",)},
        {"mode": "backward"},
        {"loss": "nothing"},
        {"loss": "kd", "terms": ("instance",)},
    ],
)
def test_a_case_rejects_bad_values(bad):
    with pytest.raises(ValueError, match="must be"):
        Case(**({"batch": 4, "classes": 4} | bad))


def test_the_default_grids_cover_the_regimes():
    on_gpu = default_grid(torch.device("cuda"))
    regimes = {goals.regime({**vars(case), "terms": list(case.terms)}) for case in on_gpu}
    assert {goals.IMAGENET, goals.NARROW, goals.WIDE, goals.SMALL} <= regimes
    assert len(set(on_gpu)) == len(on_gpu)
    assert all(case.batch <= 4096 for case in default_grid(CPU))


@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
@pytest.mark.parametrize("mode", MODES)
def test_the_chunked_truth_is_the_reference(terms, mode):
    case = Case(23, 17, "float64", terms, mode)
    student, teacher, target = inputs(case, CPU)
    five_rows = 5 * 8 * 23  # the last chunk is ragged
    loss, gradient = mcld_chunks.loss_and_gradient(case, student, teacher, target, torch.float64, five_rows)
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
    chunks = gate.eager_error(case, *tensors, exact)
    assert chunks.gradient == pytest.approx(whole.gradient, rel=0.3)
    assert chunks.gradient > (1e-3 if dtype == "bfloat16" else 1e-8)


class TestGate:
    case = Case(60, 20)

    def verdict(self, loss=1.0, gradient=1.0, case=case):
        tensors = inputs(case, CPU)
        exact = gate.truth(case, *tensors)
        result = eager(case, *tensors)
        allowed = gate.allowed_error(case, *tensors, exact, gate.error(result, exact))
        changed = (result[0] * loss, result[1] * gradient)
        return gate.judge(gate.error(changed, exact), allowed)

    def test_eager_itself_passes(self):
        assert self.verdict().passed and self.verdict().ratio <= 1

    @pytest.mark.parametrize("change", [{"loss": 1 + 1e-4}, {"gradient": 1 + 1e-4}, {"gradient": -1.0}])
    def test_a_wrong_result_fails(self, change):
        verdict = self.verdict(**change)
        assert not verdict.passed and verdict.ratio > 1

    @pytest.mark.parametrize("change", [{"loss": float("nan")}, {"gradient": float("nan")}, {"loss": float("inf")}])
    def test_a_result_that_is_not_finite_fails(self, change):
        assert not self.verdict(**change).passed

    def test_half_precision_allows_its_own_rounding_and_no_more(self):
        half = Case(60, 20, "bfloat16")
        assert self.verdict(gradient=1 + 1e-3, case=half).passed
        assert not self.verdict(gradient=1 + 5e-2, case=half).passed

    def test_if_eager_is_not_finite_only_the_floor_applies(self):
        tensors = inputs(self.case, CPU)
        broken = gate.Error(float("inf"), float("nan"))
        allowed = gate.allowed_error(self.case, *tensors, gate.truth(self.case, *tensors), broken)
        assert allowed == gate.Error(gate.LOSS_FLOOR["float32"], gate.GRADIENT_FLOOR["float32"])

    def test_a_missing_gradient_is_a_fault(self):
        exact = gate.truth(self.case, *inputs(self.case, CPU))
        with pytest.raises(ValueError, match="none"):
            gate.error((exact.loss, None), exact)

    @pytest.mark.parametrize("terms", [("instance",), TERMS], ids="+".join)
    @pytest.mark.parametrize("classes", [1, 10, 100, 1000])
    @pytest.mark.parametrize("name", ["torch", "library"])
    def test_a_batch_of_one_has_a_zero_gradient_and_passes(self, terms, classes, name):
        case = Case(1, classes, terms=terms)
        tensors = inputs(case, CPU)
        verdict = verdict_of(case, tensors, providers.all_providers()[name].make(case, *tensors)())
        assert verdict.passed, verdict

    def test_a_batch_of_one_with_a_gradient_fails(self):
        case = Case(1, 100, terms=("instance",))
        tensors = inputs(case, CPU)
        wrong = torch.zeros(()), torch.full((1, 100), 1e-3)
        assert not verdict_of(case, tensors, wrong).passed
        assert not verdict_of(case, tensors, (torch.tensor(0.1), torch.zeros(1, 100))).passed

    @pytest.mark.parametrize("batch, classes", [(1, 100), (2, 100), (60, 20)])
    def test_medium_precision_allows_operands_in_bf16(self, batch, classes, matmul_precision):
        """Eager does not take bf16 operands at every shape; a backend that does is not wrong."""
        case = Case(batch, classes)
        tensors = inputs(case, CPU)
        operands = [x.bfloat16().float() for x in tensors[:2]]
        result = eager(case, *operands, tensors[2])
        assert batch == 1 or not verdict_of(case, tensors, result).passed
        matmul_precision("medium")
        assert verdict_of(case, tensors, result).passed
        assert not verdict_of(case, tensors, (result[0], 1.1 * result[1] + 0.01)).passed


@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("attend", [closed_form.matrix, closed_form.flash])
def test_the_library_paths_pass_the_gate(terms, dtype, attend):
    case = Case(75, 37, dtype, terms)
    tensors = inputs(case, CPU)
    verdict = verdict_of(case, tensors, closed_form.loss_and_gradient(case, *tensors, attend))
    assert verdict.passed, verdict


def test_the_torch_backend_keeps_the_bar_where_a_column_is_long():
    """Sums over the batch that are not pairwise lose an order of magnitude here."""
    case = Case(16384, 64, terms=("category",))
    tensors = inputs(case, CPU)
    verdict = verdict_of(case, tensors, providers.all_providers()["torch"].make(case, *tensors)())
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


def test_every_provider_runs_or_has_a_reason():
    case = Case(300, 300)
    student, teacher, _ = inputs(case, CPU)
    reasons = {name: p.unsupported_reason(case, student, teacher) for name, p in providers.all_providers().items()}
    assert reasons["reference"] is reasons["torch"] is reasons["library"] is None
    assert "256 columns" in reasons["sdpa"]
    assert "instance-wise term alone" in reasons["info-nce"]
    # Interpreted or emulated on a CPU they have no speed.
    assert reasons["triton"] and reasons["cuda"] and reasons["hopper"]


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

    def test_memory_held_before_does_not_count(self):
        before = torch.ones(1000, 1000)
        assert memory.peak_extra(lambda: before.add_(1), CPU)["allocator"] < 1e5

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
    def test_resident_memory_agrees_where_allocations_are_large(self):
        peak = memory.peak_extra(lambda: torch.ones(20_000_000), CPU)  # 80 MB, which malloc gives back to the system
        assert peak["allocator"] == pytest.approx(80e6, rel=0.01)
        assert peak["resident"] == pytest.approx(80e6, rel=0.1)

    @pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
    @pytest.mark.parametrize("mode", MODES)
    def test_eager_is_predicted_from_above(self, terms, mode):
        case = Case(600, 500, terms=terms, mode=mode)
        step = providers.all_providers()["reference"].make(case, *inputs(case, CPU))
        measured = memory.peak_extra(step, CPU)["allocator"]
        assert 0.95 * measured <= losses.LOSSES["mcld"].eager_bytes(case) <= 3.2 * measured

    def test_a_step_that_would_not_fit_is_not_tried(self):
        assert memory.shortage(1 << 20, CPU) is None
        assert re.search(r"about 1024\.0 GiB", memory.shortage(1 << 40, CPU))


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
        result = timing.interleave(samples, rounds=20, seconds=60)
        rounds = [order[i : i + 4] for i in range(0, 80, 4)]
        assert all(sorted(names) == list("abcd") for names in rounds)
        assert len({tuple(names) for names in rounds}) > 5
        assert all(len(times.samples) == 20 for times in result.values())

    def test_the_budget_ends_the_rounds_but_never_before_three(self):
        times = timing.interleave({"a": lambda: 1.0}, rounds=50, seconds=0)["a"]
        assert len(times.samples) == timing.MIN_ROUNDS

    def test_a_scattered_time_is_unsteady(self):
        assert timing.Times((1.0, 1.1, 1.2, 1.3)).is_steady
        assert not timing.Times((1.0, 1.0, 1.0, 2.0, 2.0)).is_steady
        assert timing.Times((1.0, 2.0)).record()["steady"] is False


def provider(name, step, reason=None, extra=0):
    return providers.Provider(name, "", lambda *_: step, lambda *_: reason, lambda _: extra)


class TestCaseRun:
    case = Case(40, 12)
    plan = measure.Plan(CPU, rounds=3, seconds=5)

    def rows(self, *others):
        rows = measure.CaseRun(self.case, [providers.all_providers()["reference"], *others], self.plan).run()
        return {row.provider: row for row in rows}

    def test_the_torch_backend_is_measured(self):
        rows = self.rows(providers.all_providers()["torch"])
        row, eager_row = rows["torch"], rows["reference"]
        assert row.status == "ok" and row.times.median > 0 and row.memory["allocator"] > 0
        assert row.time_ratio == eager_row.times.median / row.times.median
        assert row.memory_ratio == row.memory["allocator"] / eager_row.memory["allocator"]
        assert row.flops == self.case.flop / row.times.median and row.of_ceiling == row.flops / row.ceiling

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

    def test_a_provider_that_cannot_run_has_a_reason(self):
        rows = self.rows(provider("absent", None, reason="not installed"), provider("huge", None, extra=1 << 50))
        assert rows["absent"].status == rows["huge"].status == "not run"
        assert rows["absent"].reason == "not installed" and "GiB may be used" in rows["huge"].reason
        assert "not installed" in _printed(rows["absent"])

    def test_without_the_reference_the_bar_is_eager_in_chunks(self):
        rows = measure.CaseRun(self.case, [providers.all_providers()["torch"]], self.plan).run()
        assert rows[0].status == "ok" and rows[0].time_ratio is None


def _printed(*cases, width=120, kernel_rows=()):
    """The report of one or more cases, each a row or a list of rows."""
    console = Console(width=width, highlight=False)
    shown = report.Report(console, "cpu")
    with console.capture() as captured:
        for rows in cases:
            shown.show(rows if isinstance(rows, list) else [rows], kernel_rows)
    return captured.get()


class TestReport:
    case = Case(4096, 1000)

    def row(self, name="torch", samples=(1.0, 1.0, 1.0), **changed):
        row = measure.Row(self.case, name, measure.OK, times=timing.Times(samples), ceiling=1e12, **changed)
        row.memory, row.time_ratio, row.memory_ratio = {"allocator": 6331 << 20}, 1.5, 0.05
        row.verdict = gate.judge(gate.Error(1e-7, 1e-7), gate.Error(1e-6, 1e-6))
        return row

    @pytest.mark.parametrize("width", [60, 80, 100, 120])
    def test_no_line_is_wider_than_the_screen_and_no_cell_is_cut(self, width):
        rows = [self.row(name) for name in providers.all_providers()]
        lines = _printed(rows, width=width).splitlines()
        assert max(map(len, lines)) <= width
        table_lines = [line for line in lines if "metric-learning" in line]
        assert len(table_lines) == 1 and "1 s" in table_lines[0] and "1.50x" in table_lines[0]
        assert "…" not in "".join(lines)

    def test_columns_left_out_are_named_once(self):
        rows = [self.row(name) for name in providers.all_providers()]
        text = _printed(rows, rows, width=80)
        assert text.count("left out at 80 columns, see the CSV: p20 .. p80, Gflop/s") == 1
        assert "left out" not in _printed(rows, width=120)

    def test_an_unsteady_time_is_marked(self):
        assert "1 s ~" in _printed(self.row(samples=(1.0, 1.0, 1.0, 2.0, 2.0)))
        assert "unsteady: p80 / p20 above 1.5" in _printed(self.row(samples=(1.0, 1.0, 1.0, 2.0, 2.0)))
        assert "~" not in _printed(self.row())

    def test_a_reason_is_printed_under_the_first_case_only(self):
        rows = [self.row(), measure.Row(self.case, "cuda", reason="there is no CUDA device")]
        text = _printed(rows, rows, rows)
        assert text.count("no CUDA device") == 1 and text.count("torch") == 3

    def test_a_new_reason_is_printed(self):
        first = measure.Row(self.case, "sdpa", reason="too wide")
        assert "too large" in _printed([first], [measure.Row(self.case, "sdpa", reason="too large")])


class TestScreen:
    def test_a_pipe_gets_lines(self, capsys):
        console = Console(width=80)
        with screen.stages(console, 2) as progress:
            progress.begin("B=4", 125.0)
            progress.stage("fp64 truth")
            progress.end()
        assert "case 1 of 2: B=4 (about 2 min)" in capsys.readouterr().out

    def test_a_long_stage_of_a_pipe_shows(self, capsys, monkeypatch):
        monkeypatch.setattr(screen, "LINE_EVERY_S", 0.0)
        with screen.stages(Console(width=80), 1) as progress:
            progress.begin("B=4", 1.0)
            progress.stage("gate torch")
        assert "gate torch (after" in capsys.readouterr().out

    def test_an_estimate_learns_from_the_cases_that_ran(self):
        chosen = [providers.all_providers()["torch"]]
        ceilings = {"gemm_float32_flop_per_s": 1e11, "copy_bytes_per_s": 1e10}
        estimate = measure.Estimate(measure.Plan(CPU, rounds=5), chosen, ceilings)
        small, large = Case(256, 1000), Case(16384, 1000)
        before = estimate.seconds(large)
        assert before > 20 * estimate.seconds(small)
        estimate.learn(small, 3 * estimate.seconds(small))
        assert estimate.seconds(large) == pytest.approx(3 * before)


def test_a_run_leaves_json_csv_and_plot(tmp_path, capsys):
    arguments = ["--batch", "32", "64", "--classes", "10", "--providers", "reference,torch,cuda", "--repeats", "3"]
    assert run.main([*arguments, "--device", "cpu", "--output", str(tmp_path), "--profile"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not run: cuda") == 1 and "Gflop/s" in shown and "case 2 of 2" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] and len(results["rows"]) == 6
    assert results["schema"] == report.SCHEMA and results["machine"]["load_1min_end"] is not None
    assert results["machine"]["cpu"] and results["versions"]["torch"] == torch.__version__ and "commit" in results
    assert results["ceilings"]["gemm_float32_flop_per_s"] > 1e8 and results["ceilings"]["copy_bytes_per_s"] > 1e8
    ok = [row for row in results["rows"] if row["status"] == "ok"]
    assert {row["provider"] for row in ok} == {"reference", "torch"}
    assert all(row["gate"]["passed"] and row["time"]["p20_s"] <= row["time"]["median_s"] for row in ok)
    assert str(ROOT) not in json.dumps({**results, "rows": [], "options": {}})
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 and float(lines[0]["median_ms"]) > 0 and lines[0]["terms"] == "instance+sample+category"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    lines = table.markdown(results).splitlines()
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
        (["--temperature", "inf"], "must be positive and finite"),
        (["--smoke", "--batch", "64"], "leave out --smoke or --batch"),
        (["--device", "cpu", "--cold"], "--cold is for CUDA"),
        (["--threads", "100000"], "must be at most"),
        (["--loss", "kd", "--terms", "instance"], "--terms are those of mcld"),
    ],
)
def test_bad_arguments_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_smoke_takes_less_than_a_minute_of_one_cpu(tmp_path):
    before = _cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "bench/run.py", "--smoke", "--device", "cpu", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compile is left out" in done.stdout and "FAILED" not in done.stdout
    assert _cpu_seconds_of_children() - before < 60  # the clock on the wall depends on the machine's load


def _cpu_seconds_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_plot_of_nothing_is_no_file(tmp_path):
    assert plots.plot([], tmp_path / "none.png", "") is None
    assert not (tmp_path / "none.png").exists()


def test_a_row_that_is_not_finite_is_written_as_null(tmp_path):
    case = TestCaseRun.case
    wrong = provider("wrong", lambda: (torch.full((), float("nan")), torch.full((40, 12), float("nan"))))
    rows = measure.CaseRun(case, [wrong], TestCaseRun.plan).run()
    report.write_json(tmp_path / "a.json", {"rows": [row.record() for row in rows]})
    row = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))["rows"][0]
    assert row["status"] == "FAILED" and row["gate"]["error"]["loss"] is None
    report.write_csv(tmp_path / "a.csv", [row])
    assert "FAILED" in (tmp_path / "a.csv").read_text()


def test_times_print_with_their_unit():
    assert [report.seconds(value) for value in (1.5, 2.5e-3, 3.4e-5, 5e-9)] == ["1.5 s", "2.5 ms", "34 µs", "5 ns"]


class TestGpuReport:
    def phase(self, code, budget=20, **more):
        return gpu_report.Phase("try", [sys.executable, "-c", code], budget, **more)

    def test_output_and_values_are_recorded(self, tmp_path):
        record = gpu_report.run_phase(self.phase("print('{\"a\": 1}')", read=gpu_report.last_json), tmp_path, 20)
        assert record["status"] == "ok" and record["a"] == 1 and "seconds" in record

    def test_the_output_of_a_failure_is_recorded(self, tmp_path):
        record = gpu_report.run_phase(self.phase("print('so far'); raise SystemExit(4)"), tmp_path, 20)
        assert record["status"] == "failed" and record["exit_code"] == 4 and "so far" in record["output_tail"]

    def test_a_phase_out_of_time_can_write_its_results(self, tmp_path):
        code = (
            "import time\nprint('begun')\n"
            "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('{\"kept\": true}')"
        )
        record = gpu_report.run_phase(self.phase(code, read=gpu_report.last_json), tmp_path, 1.5)
        assert record["status"] == "timed out" and record["kept"] is True and record["seconds"] < 10

    def test_a_phase_that_ignores_the_interrupt_is_killed_with_its_children(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_report, "GRACE_S", 0.5)
        code = (
            "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "child = subprocess.Popen(['sleep', '60'])\nprint(child.pid)\ntime.sleep(60)"
        )
        record = gpu_report.run_phase(self.phase(code), tmp_path, 1.5)
        assert record["status"] == "timed out" and record["seconds"] < 10
        child = int(record["output_tail"].split()[0])
        for _ in range(50):
            if not _running(child):
                break
            time.sleep(0.1)
        assert not _running(child)

    def test_a_phase_without_time_or_program_has_a_reason(self, tmp_path):
        assert gpu_report.run_phase(self.phase(""), tmp_path, 0)["reason"] == "the time was used up"
        missing = gpu_report.Phase("try", ["/nowhere/program"], 5)
        assert gpu_report.run_phase(missing, tmp_path, 5)["status"] == "failed"

    def test_the_dry_run_names_every_phase_and_no_path(self, capsys):
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
        record = json.loads((tmp_path / "report.json").read_text())
        assert record["rehearsal"] and record["phases"]["info"]["status"] == "ok"
        assert record["phases"]["build"]["reason"] == "a rehearsal builds nothing"

    def test_the_grid_of_the_sanitizer_runs(self):
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
        record = gpu_report.read_junit(path)
        assert record["counts"] == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
        assert record["failed"] == ["a::bad"]

    def test_goals_are_judged_against_rows_of_the_same_case(self):
        def row(name, median, **more):
            case = {"batch": 4096, "classes": 1000, "dtype": "bfloat16", "terms": ["instance", "sample"]}
            case |= {"mode": "forward-backward", "status": "ok", "provider": name, "time": {"median_s": median}}
            return case | {"fraction_of_gemm": 0.9, "peak_extra_bytes": 100 << 20} | more

        rows = [row("triton", 1.0), row("cuda", 0.9, fraction_of_gemm=0.8), row("library", 1.2)]
        rows += [row("reference", 2.7), row("compile", 9.0, batch=16384)]
        judged = {goal["goal"].rpartition(" >=")[0] or goal["goal"]: goal for goal in goals.judge(rows)}
        assert {goal["backend"] for goal in judged.values()} == {"cuda"}
        assert judged["fraction of the GEMM ceiling"]["reached"] is False
        assert judged["times the library path"]["value"] == pytest.approx(1.2 / 0.9)
        assert judged["times the library path"]["reached"] is True
        assert judged["times eager"]["reached"] is True  # 3.0
        assert judged["times torch.compile"]["reached"] is None  # measured at another batch size alone
        assert judged["extra memory / (256 MiB + 3 half copies) <= 1"]["reached"] is True


def _running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_grid_of_the_options():
    options = run.parser().parse_args(["--batch", "8", "4", "--classes", "3", "--terms", "category,instance"])
    grid = run.grid(options, CPU)
    assert grid == product([4, 8], [3], ["float32"], ("instance", "category"), ["forward-backward"])


@pytest.mark.parametrize("arguments", [[], ["--smoke"], ["--batch", "4"]])
def test_every_grid_has_the_temperature_and_the_seed_asked_for(arguments):
    options = run.parser().parse_args([*arguments, "--temperature", "0.5", "--seed", "3"])
    assert {(case.temperature, case.seed) for case in run.grid(options, CPU)} == {(0.5, 3)}


class TestLosses:
    """Every entry of the registry, so that a new loss is covered by adding it."""

    @pytest.mark.parametrize("name", losses.LOSSES)
    @pytest.mark.parametrize("mode", MODES)
    def test_the_package_and_the_truth_agree_with_the_reference(self, name, mode):
        case = Case(20, 12, "float64", mode=mode, loss=name)
        tensors = inputs(case, CPU)
        expected = eager(case, *tensors)
        exact = gate.truth(case, *tensors)
        torch.testing.assert_close(exact.loss, expected[0], rtol=1e-12, atol=0)
        loss, gradient = providers.all_providers()["torch"].make(case, *tensors)()
        torch.testing.assert_close(loss, expected[0], rtol=1e-11, atol=0)
        if mode == "forward":
            assert gradient is None and exact.gradient is None
        else:
            torch.testing.assert_close(exact.gradient, expected[1], rtol=1e-10, atol=1e-15)
            torch.testing.assert_close(gradient, expected[1], rtol=1e-10, atol=1e-15)

    @pytest.mark.parametrize("name", losses.LOSSES)
    @pytest.mark.parametrize("mode", MODES)
    def test_the_eager_memory_is_predicted_from_above(self, name, mode):
        case = Case(600, 500, mode=mode, loss=name)
        peak = memory.peak_extra(providers.all_providers()["reference"].make(case, *inputs(case, CPU)), CPU)
        assert 0.95 * peak["allocator"] <= losses.LOSSES[name].eager_bytes(case) <= 3.5 * peak["allocator"]

    @pytest.mark.parametrize("name", losses.LOSSES)
    def test_the_grids_have_its_cases(self, name):
        for grid in (
            smoke_grid(loss=name),
            default_grid(CPU, loss=name),
            default_grid(torch.device("cuda"), loss=name),
        ):
            assert grid and {case.loss for case in grid} == {name} and all(case.flop > 0 for case in grid)

    def test_a_loss_without_gemms_is_compared_with_the_copy_speed(self, tmp_path, capsys):
        arguments = ["--loss", "kd", "--batch", "64", "--classes", "50", "--providers", "reference,torch,library"]
        assert run.main([*arguments, "--repeats", "3", "--device", "cpu", "--output", str(tmp_path)]) == 0
        assert "library: computes MCLD only" in capsys.readouterr().out
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        row = next(row for row in rows if row["provider"] == "torch")
        assert row["loss"] == "kd" and row["fraction_of_gemm"] is None and row["fraction_of_copy"] > 0
        assert "kd" in (tmp_path / "results.csv").read_text()


class TestKernels:
    case = Case(40, 12)
    plan = measure.Plan(CPU, rounds=3, seconds=4)
    ceilings = {"gemm_float32_flop_per_s": 1e11, "gemm_bfloat16_flop_per_s": 1e11, "copy_bytes_per_s": 1e10}

    def rows(self, case=case, names=("torch",)):
        return {row.kernel: row for row in kernels.KernelRun(case, names, self.plan, self.ceilings).run()}

    @pytest.mark.parametrize("case", [case, Case(12, 40), Case(33, 9, "bfloat16")], ids=str)
    def test_every_kernel_of_the_torch_set_is_right_and_timed(self, case):
        rows = self.rows(case)
        assert len(rows) == 11
        for row in rows.values():
            assert row.status == "ok" and row.ratio <= 1 and row.bytes_per_s > 0 and row.of_ceiling > 0, row

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the CUDA device, not interpreted")
    def test_every_kernel_of_the_interpreted_triton_set_is_right(self, monkeypatch):
        """Operands in the layouts of another backend; interpreted kernels are not timed."""
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setattr(kernels, "backend_unsupported_reason", lambda *rest: None)
        monkeypatch.setattr(kernels.KernelRun, "_time", lambda run: None)
        rows = self.rows(Case(20, 12), ("triton",))
        assert len(rows) == 11 and {row.status for row in rows.values()} == {"ok"}, rows

    def test_the_counts_of_the_contrast(self):
        by_name = {kernel.name: kernel for kernel in kernels.all_kernels(Case(10, 3), 4, 4)}
        assert by_name["contrast"].flop == 2 * 10 * 10 * 3
        assert by_name["contrast, gradient"].flop == 4 * 10 * 10 * 3
        assert by_name["contrast, candidates"].flop == 6 * 10 * 10 * 3
        assert by_name["contrast"].bytes == 4 * (2 * 10 * 3 + 2 * 10)

    def test_a_wrong_kernel_has_no_speed(self, monkeypatch):
        right = backends.kernel_set

        def wrong(name, student, teacher):
            made = right(name, student, teacher)
            if student.dtype != torch.float64:
                positive_cosines = made.positive_cosines
                made.positive_cosines = lambda *rest: tuple(1.001 * value for value in positive_cosines(*rest))
            return made

        monkeypatch.setattr(kernels.backends, "kernel_set", wrong)
        row = self.rows()["positive_cosines"]
        assert row.status == "FAILED" and row.times is None and "times what is allowed" in row.reason

    def test_a_kernel_that_raises_has_a_reason_and_the_others_go_on(self, monkeypatch):
        right = backends.kernel_set

        def broken(name, student, teacher):
            made = right(name, student, teacher)
            if student.dtype != torch.float64:
                made.reduce_terms = lambda *rest: 1 / 0
            return made

        monkeypatch.setattr(kernels.backends, "kernel_set", broken)
        rows = self.rows()
        assert rows["reduce_terms"].status == "error" and "ZeroDivisionError" in rows["reduce_terms"].reason
        assert rows["contrast"].status == "ok"

    def test_a_run_prints_and_writes_them_beside_the_call(self, tmp_path, capsys):
        arguments = ["--batch", "24", "--classes", "10", "--providers", "torch,triton", "--repeats", "3", "--kernels"]
        assert run.main([*arguments, "--device", "cpu", "--output", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert "its kernels" in shown and "grad_epilogue" in shown and shown.count("not run: triton") == 1
        records = json.loads((tmp_path / "results.json").read_text())["kernels"]
        assert {"flop", "bytes", "flop_per_s", "bytes_per_s", "fraction_of_ceiling"} <= records[0].keys()
        with (tmp_path / "kernels.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(records) == 12


class TestPlots:
    def record(self, provider, batch, seconds=1.0, **changed):
        time_s = {"median_s": seconds, "p20_s": 0.9 * seconds, "p80_s": 1.2 * seconds}
        made = {"loss": "mcld", "batch": batch, "classes": 1000, "dtype": "float32", "terms": TERMS}
        made |= {"mode": "forward-backward", "provider": provider, "status": "ok", "reason": None}
        return made | {"time": time_s, "peak_extra_bytes": 1 << 20} | changed

    @pytest.fixture
    def figure(self, monkeypatch):
        """The figure that `plot` has drawn."""
        drawn = []
        monkeypatch.setattr(plots.plt, "close", drawn.append)
        yield drawn
        monkeypatch.undo()
        plots.plt.close("all")

    def texts(self, figure, column):
        return [text.get_text() for text in figure[0].axes[column].texts]

    def test_line_ends_have_their_ratio_and_memory_ends_are_named(self, figure, tmp_path):
        missing = {"time": None, "status": "not run", "reason": f"{memory.SHORTAGE} 100 GiB, 5 GiB may be used"}
        records = [self.record("reference", batch, 4.0 * batch) for batch in (64, 256)]
        records += [self.record("torch", batch, 1.0 * batch) for batch in (64, 256, 1024)]
        records.append(self.record("reference", 1024, **missing))
        assert plots.plot(records, tmp_path / "a.png", "the machine").exists()
        assert set(self.texts(figure, 0)) == {"reference, memory ends", "torch 4x at 256"}
        assert set(self.texts(figure, 1)) == {"reference, memory ends", "torch 1x at 256"}

    def test_both_columns_have_titles(self, figure, tmp_path):
        plots.plot([self.record("torch", 64), self.record("torch", 256)], tmp_path / "a.png", "")
        left, right = (axis.get_title(loc="left") for axis in figure[0].axes)
        assert left.startswith("Time of one step") and right.startswith("Peak extra memory")
        assert "C = 1,000, float32, all three terms" in left and "C = 1,000" in right

    def test_one_batch_size_is_drawn_as_bars(self, figure, tmp_path):
        plots.plot([self.record("reference", 64, 2.0), self.record("torch", 64)], tmp_path / "a.png", "")
        assert len(figure[0].axes[0].patches) == 2 and "1,000   2x" in self.texts(figure, 0)

    def test_labels_of_one_end_do_not_overlap(self, figure, tmp_path):
        records = [self.record(name, batch) for name in ("reference", "library", "torch") for batch in (64, 256)]
        plots.plot(records, tmp_path / "a.png", "")
        heights = sorted(text.xyann[1] for text in figure[0].axes[0].texts)
        assert all(b - a >= 10.9 for a, b in zip(heights, heights[1:]))

    def test_the_caption_has_the_load(self):
        head = {"machine": {"cpu": "A CPU", "threads": 2, "load_1min": 0.5, "load_1min_end": 1.25}, "commit": "abc"}
        head |= {"dirty": True, "versions": {"torch": "2.0", "mcld_kernels": "0.1"}, "started": "2020-01-01T10:00:00Z"}
        assert (
            machine.caption(head)
            == "A CPU, 2 threads; load 0.5 to 1.25; mcld_kernels 0.1; torch 2.0; commit abc with changes; 2020-01-01"
        )

    def test_recorded_runs_are_drawn_into_one_figure(self, tmp_path):
        recorded = sorted((ROOT / "bench" / "results").glob("*/results.json"))
        assert plots.main([*map(str, recorded), "--output", str(tmp_path / "a.png")]) == 0
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


SMALL = ["--batch", "16", "--classes", "5", "--providers", "reference,torch", "--repeats", "3", "--device", "cpu"]


class TestOutput:
    def test_two_runs_in_one_second_have_two_folders(self, tmp_path):
        with programs.claimed(None, tmp_path / "now", "results.json") as first:
            (first / "results.json").write_text("{}")
            with programs.claimed(None, tmp_path / "now", "results.json") as second:
                assert first.name == "now" and second.name == "now-2"

    def test_an_output_in_use_is_not_overwritten(self, tmp_path, capsys):
        assert run.main([*SMALL, "--output", str(tmp_path)]) == Exit.OK
        before = (tmp_path / "results.json").read_text()
        assert run.main([*SMALL, "--output", str(tmp_path)]) == Exit.USAGE
        assert (tmp_path / "results.json").read_text() == before
        assert "holds results.json of another run" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_made_is_one_message(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert run.main([*SMALL, "--output", str(tmp_path / "file" / "folder")]) == Exit.OUTPUT
        assert "the output cannot be written" in capsys.readouterr().err

    def test_a_full_disk_is_one_message(self, tmp_path, capsys, monkeypatch):
        def full(*rest, **more):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(report.Path, "write_text", full)
        assert run.main([*SMALL, "--output", str(tmp_path / "folder")]) == Exit.OUTPUT
        assert "No space left on device" in capsys.readouterr().err
        assert not (tmp_path / "folder").exists()

    def test_ctrl_c_keeps_the_cases_that_are_done(self, tmp_path, capsys, monkeypatch):
        real = measure.CaseRun.run

        def interrupted(case_run):
            if case_run.case.batch == 32:
                raise KeyboardInterrupt
            return real(case_run)

        monkeypatch.setattr(measure.CaseRun, "run", interrupted)
        arguments = [*SMALL, "--batch", "16", "32", "--output", str(tmp_path / "folder")]
        assert run.main(arguments) == Exit.INTERRUPTED
        results = json.loads((tmp_path / "folder" / "results.json").read_text())
        assert not results["complete"] and {row["batch"] for row in results["rows"]} == {16}
        assert (tmp_path / "folder" / "results.csv").exists() and "interrupted" in capsys.readouterr().out

    def test_the_report_of_another_run_is_not_overwritten(self, tmp_path, capsys):
        (tmp_path / "report.json").write_text("{}")
        assert gpu_report.main(["--rehearse", "--output", str(tmp_path)]) == Exit.USAGE
        assert "another run" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_every_program_has_one_exit_code_without_a_gpu(self, capsys):
        assert run.main(["--device", "cuda"]) == gpu_report.main([]) == Exit.NO_DEVICE
        command = [sys.executable, "bench/sanitize.py"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == Exit.NO_DEVICE


@pytest.mark.parametrize("program", ["run", "calibrate", "gpu_report", "sanitize", "table"])
def test_programs_start_without_docstrings_and_document_their_exit_codes(program):
    command = [sys.executable, "-OO", f"bench/{program}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "exit codes: 0 done; 1 a result is wrong or missing" in " ".join(done.stdout.split())


def test_an_ascii_terminal_gets_the_whole_report(tmp_path):
    done = subprocess.run(
        [sys.executable, "bench/run.py", *SMALL, "--output", str(tmp_path / "a")],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"reference" in done.stdout and max(done.stdout) < 128


def test_characters_that_ascii_lacks_are_spelled_out():
    programs.make_output_printable()
    assert "5 µs ± 1 ☃".encode("ascii", "mcld_replace") == b"5 us +- 1 ?"
