"""A case of the benchmark: its rows, the losses and the kernels in them, and the report."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
pytest.importorskip("matplotlib", reason="matplotlib, with pillow, is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from rich.console import Console
from test_bench import eager, verdict_of

from bench import run
from bench.harness import (
    gate,
    kernels,
    losses,
    measure,
    memory,
    plain,
    providers,
    report,
)
from bench.harness.cases import MODES, Case, default_grid, inputs, smoke_grid
from mcld_kernels import backends

CPU = torch.device("cpu")


def provider(name, step, reason=None, extra=0):
    return providers.Provider(name, "", lambda *_: step, lambda *_: reason, lambda _: extra)


def printed(*cases, width=120, kernel_rows=()):
    """The report of one or more cases, each a row or a list of rows."""
    console = Console(width=width, highlight=False)
    shown = report.Report(console, "cpu")
    with console.capture() as captured:
        for rows in cases:
            shown.show(rows if isinstance(rows, list) else [rows], kernel_rows)
    return captured.get()


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
        text = printed(row)
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
        assert "not installed" in printed(rows["absent"])

    def test_where_no_provider_can_run_nothing_is_computed(self):
        stages = []
        absent = provider("absent", None, reason="not installed")
        (row,) = measure.CaseRun(self.case, [absent], self.plan, stages.append).run()
        assert (row.status, row.reason) == ("not run", "not installed") and not stages

    def test_without_the_reference_the_bar_is_eager_in_chunks(self):
        rows = measure.CaseRun(self.case, [providers.all_providers()["torch"]], self.plan).run()
        assert rows[0].status == "ok" and rows[0].time_ratio is None


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

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", plain.LINES)
    def test_plain_lines_pass_the_gate(self, name, mode):
        case = Case(75, 37, "float32", mode=mode, loss=name)
        tensors = inputs(case, CPU)
        library = providers.all_providers()["library"]
        assert library.unsupported_reason(case, *tensors[:2]) is None
        verdict = verdict_of(case, tensors, library.make(case, *tensors)())
        assert verdict.passed, verdict

    def test_a_loss_without_gemms_is_compared_with_the_copy_speed(self, tmp_path, capsys):
        arguments = ["--loss", "kd", "--batch", "64", "--classes", "50", "--providers", "reference,torch,sdpa"]
        assert run.main([*arguments, "--repeats", "3", "--device", "cpu", "--output", str(tmp_path)]) == 0
        assert "sdpa: computes MCLD only" in capsys.readouterr().out
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
