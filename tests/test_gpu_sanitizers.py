"""The grid under sanitizers, their phases, and what they and Nsight Compute print, without a GPU."""

import re
import sys
from pathlib import Path

import csrc_host
import pytest
import torch

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from planned import HOPPER, code, run

from bench import gpu_report, sanitize
from bench.harness import commands, ncu
from bench.harness.commands import Machine
from bench.harness.programs import Exit
from mcld_kernels.backends.cuda import extension


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

    def plan_with(self, folder, monkeypatch, script):
        """The phases under sanitizers, with a shell script in the place of compute-sanitizer."""
        tool = folder / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\n{script}")
        tool.chmod(0o755)
        monkeypatch.setattr(commands.shutil, "which", lambda name, path=None: str(tool))
        return [p for p in commands.safe(folder, HOPPER, False) if p.group in ("sanitizers", "forms")]

    def test_a_form_that_hangs_costs_itself_alone(self, tmp_path, monkeypatch):
        """With a tool that stands still at one form and otherwise prints what a sanitizer does."""
        planned = self.plan_with(
            tmp_path, monkeypatch,
            "echo 'begins: it'\n"
            'case "$*" in *racecheck*hopper_cluster*) exec sleep 60;; esac\n'
            "echo 'ended: it'\necho '========= ERROR SUMMARY: 0 errors'\n",
        )  # fmt: skip
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
        planned = self.plan_with(
            tmp_path, monkeypatch,
            "echo '========= Error: compute-sanitizer timed-out.'\n"
            "echo '24 combinations ran, 0 were not repeatable, 0 were left for want of time'\n",
        )  # fmt: skip
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
