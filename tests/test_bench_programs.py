"""The benchmark's programs: what they print and write, their options, plots and exit codes."""

import csv
import dataclasses
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
pytest.importorskip("matplotlib", reason="matplotlib, with pillow, is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

import test_bench_cases
from rich.console import Console
from test_bench_cases import printed, provider

from bench import correct, faults, gpu_report, run, step, table
from bench.harness import (
    gate,
    global_batch,
    goals,
    host,
    machine,
    measure,
    memory,
    plots,
    profiling,
    programs,
    providers,
    report,
    screen,
    timing,
)
from bench.harness.cases import TERMS, Case, product
from bench.harness.programs import Exit

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TERM_SETS = (("instance",), ("sample",), ("category",), ("instance", "sample"), TERMS)


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
        lines = printed(rows, width=width).splitlines()
        assert max(map(len, lines)) <= width
        table_lines = [line for line in lines if "metric-learning" in line]
        assert len(table_lines) == 1 and "1 s" in table_lines[0] and "1.50x" in table_lines[0]
        assert "…" not in "".join(lines)

    def test_columns_left_out_are_named_once(self):
        rows = [self.row(name) for name in providers.all_providers()]
        text = printed(rows, rows, width=80)
        assert text.count("left out at 80 columns, see the CSV: p20 .. p80, Gflop/s") == 1
        assert "left out" not in printed(rows, width=120)

    def test_an_unsteady_time_is_marked(self):
        assert "1 s ~" in printed(self.row(samples=(1.0, 1.0, 1.0, 2.0, 2.0)))
        assert "unsteady: p80 / p20 above 1.5" in printed(self.row(samples=(1.0, 1.0, 1.0, 2.0, 2.0)))
        assert "~" not in printed(self.row())

    @pytest.mark.parametrize(
        "kernels, replay, clock, mark, words",
        [
            (None, None, "time", "", ""),
            (0.25, None, "kernels_time", " k", " (kernels)"),
            (0.25, 0.2, "graph_time", " g", " (graph)"),
            (0.25, 0.3, "kernels_time", " k", " (kernels)"),
        ],
    )
    def test_the_fraction_of_the_ceiling_is_by_the_kernels_own_time(self, kernels, replay, clock, mark, words):
        """A GEMM's speed has no launches in it; a call may be nothing else."""
        times = {"kernels": kernels, "replay": replay}
        row = self.row(**{name: None if time is None else timing.Times((time,) * 3) for name, time in times.items()})
        record = row.record()
        seconds = min(time for time in (1.0, kernels, replay) if time is not None)
        assert record["fraction_of_gemm"] == pytest.approx(self.case.flop / seconds / 1e12)
        assert record["fraction_by"] == clock and record["flop_per_s"] == self.case.flop / 1.0
        assert record["fraction_of_gemm"] == goals.of_gemm(record, {}), "as a goal says it"
        shown, percent = printed(row), f"{100 * row.of_ceiling:.0f}%"
        assert f"{percent}{mark} " in shown and (report.CLOCK_NOTE in shown) == bool(mark)
        assert report._flat(record)["fraction_by"] == clock
        run = {"rows": [record], "machine": machine.describe(CPU), "versions": machine.versions(), "started": ""}
        run |= machine.commit()
        assert f"| {percent}{words} |" in table.markdown(run)
        del record["fraction_by"]  # as in runs that were recorded before
        assert f"| {percent} |" in table.markdown(run)

    def test_a_reason_is_printed_under_the_first_case_only(self):
        rows = [self.row(), measure.Row(self.case, "cuda", reason="there is no CUDA device")]
        text = printed(rows, rows, rows)
        assert text.count("no CUDA device") == 1 and text.count("torch") == 3

    def test_a_new_reason_is_printed(self):
        first = measure.Row(self.case, "sdpa", reason="too wide")
        assert "too large" in printed([first], [measure.Row(self.case, "sdpa", reason="too large")])


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

    def test_a_message_is_wrapped_with_an_indent_and_never_cut(self, capsys):
        path = "/a/folder/of/fifty/characters/which-has-hyphens-too"
        text = f"  not run: {'a, ' * 20}cuda: the reason is long; see {path} or [brackets] for more"
        screen.say(Console(width=60), text)
        first, *others = capsys.readouterr().out.splitlines()
        assert max(map(len, [first, *others])) <= 60
        assert first.startswith("  not run: a,") and all(line.startswith("      ") for line in others)
        assert " ".join("\n".join([first, *others]).split()) == text.strip()
        assert any(path in line for line in others)

    def test_the_tables_of_ranks_and_of_the_host_fit(self, capsys):
        row = global_batch.Row(
            16384, 1000, "bfloat16", "instance+sample+category", "symmetric", "gathered", "FAILED", 1e-7
        )
        row.milliseconds = row.exposed_milliseconds = 12345.67
        row.received_bytes = row.peak_bytes = 1 << 38
        for part in global_batch._tables([row, row], 8):
            Console(width=80).print(part)
        names = {field.name: 12345 for field in dataclasses.fields(host.HostCost)}
        print(host.table([host.HostCost(**names | {"name": case.name}) for case in host.CASES]))
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
        assert shown.count("B=16384 C=1000 bfloat16") == 1 and shown.count("274,877.91") == 4

    def test_the_profile_on_the_screen_is_as_wide_as_the_screen(self, tmp_path, capsys):
        matrix = torch.ones(8, 8)

        def step():
            with torch.profiler.record_function("a_name_that_is_longer_than_the_whole_screen_" * 3):
                matrix @ matrix

        Console(width=80).print(profiling.profile_step(step, CPU, tmp_path, "it"))
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80 and any("aten::mm" in line and "%" in line for line in lines)
        assert "Self CPU" in (tmp_path / "kernels_it.txt").read_text()

    def test_an_estimate_learns_from_the_cases_that_ran(self):
        chosen = [providers.all_providers()["torch"]]
        ceilings = {"gemm_float32_flop_per_s": 1e11, "copy_bytes_per_s": 1e10}
        estimate = measure.Estimate(measure.Plan(CPU, rounds=5), chosen, ceilings)
        small, large = Case(256, 1000), Case(16384, 1000)
        before = estimate.seconds(large)
        assert before > 20 * estimate.seconds(small)
        estimate.learn(small, 3 * estimate.seconds(small))
        assert estimate.seconds(large) == pytest.approx(3 * before)


def test_a_run_leaves_json_csv_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    arguments = ["--batch", "32", "64", "--classes", "10", "--providers", "reference,torch,cuda", "--repeats", "3"]
    assert run.main([*arguments, "--device", "cpu", "--output", str(tmp_path), "--profile"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= screen.PIPE_WIDTH == 80
    assert shown.count("not run: cuda") == 1 and "Gflop/s" in shown and "case 2 of 2" in shown
    assert "trace_*.json.gz and kernels_*.txt (4 of each)" in " ".join(shown.split())
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
    of_a_queue = {**results, "rows": [{**row, "candidates": 4096} for row in results["rows"]]}
    both = table.markdown(results, of_a_queue).splitlines()
    assert len(both) == len(lines) + 4 and both[6].startswith("| 32, m = 4096 |")
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
        (["--short", "--batch", "64"], "leave out --short or --batch"),
        (["--short", "--forms"], "--short and --forms exclude each other"),
        (["--forms", "--providers", "cuda"], "leave out --providers"),
        (["--forms", "--loss", "kd"], "--forms is of mcld"),
        (["--device", "cpu", "--cold"], "--cold is for CUDA"),
        (["--threads", "100000"], "must be at most"),
        (["--loss", "kd", "--terms", "instance"], "--terms are those of mcld"),
    ],
)
def test_bad_arguments_end_with_a_message(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and message in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_every_prediction_names_its_baseline_and_a_command_that_the_program_takes():
    notes = (ROOT / "bench" / "NOTES.md").read_text(encoding="utf-8")
    lines = notes[notes.index("\n## Predictions\n") :].split("\n\n")[2].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    assert [cell.strip() for cell in head] == ["change", "evidence", "predicted", "baseline", "to be measured"] and rows
    for row in rows:
        (baseline, command), commands = row[3:], re.findall(r"`(--[^`]*)`", row[4])
        assert len(commands) == (command != "as above"), row
        for text in commands:
            options = run.parser().parse_args(shlex.split(text))
            names = {chosen.name for chosen in providers.choose(options.providers)}
            assert run.check(options, CPU) is None
            # The form that a baseline names is measured beside the other.
            assert set(re.findall(r"`((?:hopper|cuda|triton)[:\w=]*)`", baseline)) <= names, row
            # The terms that the row is about: all of them, by default, on the low-latency path alone.
            assert options.terms is not None or options.batch == [256], row


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
    case = test_bench_cases.TestCaseRun.case
    wrong = provider("wrong", lambda: (torch.full((), float("nan")), torch.full((40, 12), float("nan"))))
    rows = measure.CaseRun(case, [wrong], test_bench_cases.TestCaseRun.plan).run()
    report.write_json(tmp_path / "a.json", {"rows": [row.record() for row in rows]})
    row = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))["rows"][0]
    assert row["status"] == "FAILED" and row["gate"]["error"]["loss"] is None
    report.write_csv(tmp_path / "a.csv", [row])
    assert "FAILED" in (tmp_path / "a.csv").read_text()


def test_times_print_with_their_unit():
    assert [report.seconds(value) for value in (1.5, 2.5e-3, 3.4e-5, 5e-9)] == ["1.5 s", "2.5 ms", "34 µs", "5 ns"]


def test_the_grid_of_the_options():
    options = run.parser().parse_args(["--batch", "8", "4", "--classes", "3", "--terms", "category,instance"])
    grid = run.grid(options, CPU)
    assert grid == product([4, 8], [3], ["float32"], ("instance", "category"), ["forward-backward"])


@pytest.mark.parametrize("arguments", [[], ["--smoke"], ["--batch", "4"]])
def test_every_grid_has_the_temperature_and_the_seed_asked_for(arguments):
    options = run.parser().parse_args([*arguments, "--temperature", "0.5", "--seed", "3"])
    assert {(case.temperature, case.seed) for case in run.grid(options, CPU)} == {(0.5, 3)}


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

    def test_recorded_runs_of_one_machine_are_drawn_into_one_figure(self, tmp_path):
        recorded = sorted((ROOT / "bench" / "results").glob("cpu-2026-11-21-*/results.json"))
        assert len(recorded) == 2
        assert plots.main([*map(str, recorded), "--output", str(tmp_path / "a.png")]) == 0
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_runs_that_make_no_line_are_refused(self, tmp_path, capsys):
        head = {"machine": {"cpu": "A CPU", "threads": 2}}
        run = {**head, "rows": [self.record("torch", 64)]}
        other = {**head, "rows": [self.record("torch", 256)]}
        assert len(plots.joined({"a": run, "b": other})) == 2
        with pytest.raises(ValueError, match="torch at B = 64, .* stands in both a and b: leave one out"):
            plots.joined({"a": run, "b": run})
        with pytest.raises(ValueError, match=r"different machines.*: A CPU, 2 threads \(a\), A CPU, 1 thread \(b\)"):
            plots.joined({"a": run, "b": {**other, "machine": {"cpu": "A CPU", "threads": 1}}})
        recorded = sorted((ROOT / "bench" / "results").glob("*/results.json"))
        assert plots.main([*map(str, recorded), "--output", str(tmp_path / "a.png")]) == 2
        assert "different machines" in capsys.readouterr().err
        assert plots.main([str(tmp_path / "none.json")]) == 2
        assert not (tmp_path / "a.png").exists()

    def test_no_line_passes_through_a_label(self, figure, tmp_path):
        missing = {"time": None, "status": "not run", "reason": f"{memory.SHORTAGE} 100 GiB, 5 GiB may be used"}
        seconds = {"reference": 40.0, "compile": 12.0, "library": 9.0}
        records = [self.record(name, 1024, value) for name, value in seconds.items()]
        records += [self.record(name, 256, value / 20) for name, value in seconds.items()]
        records += [self.record(name, 4096, **missing) for name in seconds]
        records += [self.record("torch", batch, value) for batch, value in ((256, 0.4), (1024, 9.0), (4096, 200.0))]
        plots.plot(records, tmp_path / "a.png", "")
        axis = figure[0].axes[0]
        renderer = figure[0].canvas.get_renderer()
        line = next(line for line in axis.lines if line.get_color() == plots.STYLE["torch"][0])
        path = line.get_transform().transform_path(line.get_path())
        for text in axis.texts:
            if not text.get_text().startswith("torch"):
                assert not path.intersects_bbox(text.get_window_extent(renderer), filled=False), text.get_text()


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
        assert "holds results.json of another run" in " ".join(capsys.readouterr().err.split())

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

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_every_program_has_one_exit_code_without_a_gpu(self, capsys):
        assert run.main(["--device", "cuda"]) == gpu_report.main(["correct"]) == Exit.NO_DEVICE
        assert correct.main([]) == step.main([]) == faults.main(["hang"]) == Exit.NO_DEVICE
        command = [sys.executable, "bench/sanitize.py"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == Exit.NO_DEVICE


def test_programs_start_without_docstrings_and_document_their_exit_codes():
    # In one process: under -OO each would compile every module again that it imports, torch's too.
    programs = ["run", "calibrate", "gpu_report", "sanitize", "table", "correct", "publish", "step_cost"]
    code = f"""
import runpy, sys
for name in {programs}:
    sys.argv = [f"bench/{{name}}.py", "--help"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
"""
    command = [sys.executable, "-OO", "-c", code]
    columns = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=columns)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    documented = "exit codes: 0 done; 1 a result is wrong or missing"
    assert " ".join(done.stdout.split()).count(documented) == len(programs)


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
