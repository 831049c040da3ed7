"""The report of a GPU machine where something dies, hangs, is signalled, or finds a full disk."""

import json
import os
import re
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

from bench import correct, gpu_report, isolated, run
from bench.harness import commands, live, phases
from bench.harness.commands import Machine
from bench.harness.phases import Phase
from bench.harness.programs import Exit

ROOT = Path(__file__).resolve().parent.parent
HOPPER = Machine(capability=(9, 0), workers=4)


def code(text, name="try", budget_s=20, **more):
    return Phase(name=name, command=[sys.executable, "-c", text], budget_s=budget_s, **more)


def running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


class TestSignals:
    def test_a_signal_ends_the_phases_and_leaves_a_whole_archive(self, tmp_path):
        """As `timeout` sends it to a command that is out of time."""
        program = (
            "import sys; sys.path[:0] = ['.', 'tests']\n"
            "from bench import gpu_report\nfrom bench.harness import commands\nfrom bench.harness.phases import Phase\n"
            "text = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
            "commands.COMMANDS['safe'] = lambda *a: [\n"
            "    Phase(name=name, command=[sys.executable, '-c', text], budget_s=50) for name in ('long', 'later')]\n"
            f"sys.exit(gpu_report.main(['safe', '--rehearse', '--output', {str(tmp_path)!r}]))"
        )
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("long"):
                break
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == Exit.INTERRUPTED
        with tarfile.open(tmp_path / "gpu-safe.tar.gz") as tar:
            content = json.load(tar.extractfile("gpu-safe/report.json"))
            pid = int(tar.extractfile("gpu-safe/long.log").read().split()[0])
        assert content["interrupted"] and content["phases"]["long"]["status"] == "interrupted"
        assert "later" not in content["phases"] and not running(pid)

    def test_a_second_signal_kills_what_ignores_the_first(self, tmp_path, monkeypatch):
        monkeypatch.setattr(phases, "GRACE_S", 60.0)
        ignores = "import signal, time\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)"
        begin, outcomes = time.monotonic(), {}
        signals = lambda: int(time.monotonic() > begin + 1) + int(time.monotonic() > begin + 2)  # noqa: E731
        phases.run([code(ignores)], tmp_path, begin + 100, outcomes, lambda: None, lambda text: None, signals)
        assert outcomes["try"]["status"] == "interrupted" and time.monotonic() < begin + 20

    def test_no_child_outlives_a_report_that_fails(self, tmp_path):
        def fails():
            raise ZeroDivisionError

        log = tmp_path / "try.log"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(phases, "REWRITE_S", 2.0)
            text = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
            phases.run([code(text)], tmp_path, time.monotonic() + 100, {}, fails, lambda text: None)
        pid = int(log.read_text())
        for _ in range(50):
            if not running(pid):
                break
            time.sleep(0.1)
        assert not running(pid)


class TestDisk:
    def test_a_full_disk_costs_no_phase_and_is_told(self, tmp_path, monkeypatch, capsys):
        """The archive fails until the last writing, and once more then."""
        planned = [code("print(1)", "a"), code("print(2)", "b")]
        monkeypatch.setitem(commands.COMMANDS, "safe", lambda *arguments: planned)
        whole, full = phases.archive, [True]

        def archive(path, folder):
            if full[0]:
                raise OSError(28, "No space left on device")
            return whole(path, folder)

        monkeypatch.setattr(phases, "archive", archive)
        assert gpu_report.main(["safe", "--rehearse", "--output", str(tmp_path / "full")]) == Exit.OUTPUT
        told = capsys.readouterr()
        assert "b: ok" in told.out and told.err.count("No space left") == 2
        kept = Path(re.search(r"cannot be written; (\S+) is kept", told.err)[1])
        assert "b" in json.loads((kept / "report.json").read_text())["phases"]

        def frees(*arguments):
            full[0] = False
            return [*planned]

        monkeypatch.setitem(commands.COMMANDS, "safe", frees)
        assert gpu_report.main(["safe", "--rehearse", "--output", str(tmp_path / "freed")]) == Exit.OK

    def test_what_was_written_last_stays(self, tmp_path, monkeypatch):
        folder, path = tmp_path / "work", tmp_path / "gpu-safe.tar.gz"
        folder.mkdir()
        (folder / "a.log").write_text("a")
        phases.archive(path, folder)
        before = path.read_bytes()

        def full(self, *arguments, **more):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(OSError, match="No space"):
            phases.archive(path, folder)
        assert path.read_bytes() == before and [e.name for e in tmp_path.iterdir() if e.is_file()] == [path.name]

    def test_a_file_that_is_cut_short_does_not_break_the_archive(self, tmp_path, monkeypatch):
        folder, path = tmp_path / "work", tmp_path / "gpu-safe.tar.gz"
        folder.mkdir()
        (folder / "a.json").write_bytes(os.urandom(1 << 16)), (folder / "b.log").write_text("b" * (1 << 17))
        member = tarfile.TarFile.gettarinfo

        def cut(self, *arguments, **more):
            made = member(self, *arguments, **more)
            os.truncate(folder / "a.json", 10)
            return made

        monkeypatch.setattr(tarfile.TarFile, "gettarinfo", cut)  # between its size and its content
        phases.archive(path, folder)
        with tarfile.open(path) as tar:
            assert len(tar.extractfile("gpu-safe/b.log").read()) == 1 << 17

    def test_rows_that_no_goal_can_read_cost_the_summary_alone(self, tmp_path, monkeypatch):
        monkeypatch.setitem(commands.COMMANDS, "safe", lambda *a: [code("", read=lambda output: {"rows": [{"x": 1}]})])
        assert gpu_report.main(["safe", "--rehearse", "--output", str(tmp_path)]) == Exit.OK
        with tarfile.open(tmp_path / "gpu-safe.tar.gz") as tar:
            assert b"no summary: KeyError" in tar.extractfile("gpu-safe/summary.txt").read()


# Stands in for bench/run.py: cases 0 to 2 of the providers given, of which one ends the process at case 1.
FAKE = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, first = options["--output"], int(options.get("--first", 0))
names = [n for n in ("reference", "hopper", "cuda") if n not in options.get("--without", "").split(",")]
os.makedirs(folder)
def write(complete):
    with open(folder + "/results.json", "w") as file:
        json.dump({"complete": complete, "started": "t", "rows": rows}, file)
def stage(text):
    with open(os.environ["MCLD_STAGE"], "w") as file:
        json.dump({"case": case, "stage": text}, file)
rows = []
for case in range(first, 3):
    for name in names:
        stage(f"gate {name}")
        if case == 1 and name == "hopper":
            FAULT
    stage("timing, round 1")
    rows += [{"case": case, "provider": name, "status": "ok", "terms": []} for name in names]
    write(False)
write(True)
"""


class TestIsolation:
    @pytest.mark.parametrize(
        ("fault", "told"),
        [
            ("os.kill(os.getpid(), 9)", "code -9"),
            ("os.kill(os.getpid(), 11)", "code -11"),
            ("raise RuntimeError('CUDA error: an illegal memory access was encountered')", "code 1"),
            ("time.sleep(60)", "stood still"),
        ],
    )
    def test_a_provider_that_takes_the_process_with_it_costs_itself_alone(self, fault, told, tmp_path, monkeypatch):
        monkeypatch.setattr(isolated, "RUN", [sys.executable, "-c", FAKE.replace("FAULT", fault)])
        monkeypatch.setattr(isolated, "STALL_S", 1.0)
        assert isolated.main(["--device", "cuda", "--output", str(tmp_path / "bench")]) == Exit.FAILED
        made = json.loads((tmp_path / "bench" / "results.json").read_text())
        assert list(made["lost"]) == ["hopper"] and told in made["lost"]["hopper"] and made["complete"]
        measured = {(row["case"], row["provider"]) for row in made["rows"]}
        assert measured == {(c, n) for c in range(3) for n in ("reference", "cuda")} | {(0, "hopper")}
        assert (tmp_path / "bench" / "results.csv").exists() and not list(tmp_path.glob("*.stage"))
        # The benchmarks that follow do without it.
        forms = commands.speed(tmp_path, HOPPER, False)[4].command_line({"grid": made})
        assert forms[forms.index("--without") + 1] == "hopper"
        assert "lost: hopper" in gpu_report.summary({"phases": {"bench": {"status": "failed", **made}}})

    def test_kernels_that_are_compiled_before_get_no_time_to_compile(self, tmp_path):
        class Process:
            def __init__(self, *arguments, **more):
                pass

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(isolated.subprocess, "Popen", Process)
            attempt = isolated.Attempt([], tmp_path / "bench")
        limits = {}
        for stage in ("gate hopper:hopper_cluster=2", "gate cuda", "profile hopper", "gate triton", "gate compile",
                      "timing, round 1"):  # fmt: skip
            attempt.stage = {"case": 0, "stage": stage}
            limits[stage] = attempt._limit()
        assert list(limits.values()) == [isolated.LOADED_S] * 2 + [isolated.STALL_S] * 2 + [
            isolated.COMPILE_S, isolated.STALL_S
        ]  # fmt: skip
        # Two that hang leave half of the forms' time.
        assert 2 * isolated.LOADED_S < commands.speed(tmp_path, HOPPER, False)[4].budget_s

    def test_a_form_that_is_lost_takes_those_with_its_fields_along(self):
        chosen = ["hopper", "hopper:hopper_cluster=2", "hopper:hopper_cluster=2+hopper_skew=2", "hopper:hopper_skew=2"]
        for without, left in (
            ("hopper:hopper_cluster=2", [chosen[0], chosen[3]]),
            ("hopper:hopper_cluster=2+hopper_skew=2", [*chosen[:2], chosen[3]]),
            ("hopper", []),
            ("cuda:hopper_cluster=2", chosen),
        ):
            assert [name for name in chosen if not run._is_of(name, without)] == left

    def test_a_fault_of_no_provider_costs_its_case(self, tmp_path, monkeypatch):
        text = FAKE.replace("FAULT", "pass").replace('stage("timing, round 1")', "case == 1 and os._exit(9)")
        text = text.replace("for name in names:\n", 'stage("fp64 truth")\n    for name in ():\n', 1)
        monkeypatch.setattr(isolated, "RUN", [sys.executable, "-c", text])
        assert isolated.main(["--output", str(tmp_path / "bench")]) == Exit.FAILED
        made = json.loads((tmp_path / "bench" / "results.json").read_text())
        assert {row["case"] for row in made["rows"]} == {0, 2} and list(made["lost"]) == ["case 1, fp64 truth"]

    def test_one_that_cannot_begin_is_not_tried_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(isolated, "RUN", [sys.executable, "-c", "raise SystemExit(7)"])
        assert isolated.main(["--output", str(tmp_path / "bench")]) == Exit.FAILED

    def test_without_a_fault_it_is_the_program(self, tmp_path):
        program = [sys.executable, "bench/isolated.py", "--device", "cpu", "--batch", "16", "--classes", "8"]
        program += ["--providers", "reference,torch", "--repeats", "3", "--without", "torch"]
        program += ["--output", str(tmp_path / "new" / "bench")]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == Exit.OK, done.stderr
        made = json.loads((tmp_path / "new" / "bench" / "results.json").read_text())
        assert made["complete"] and {row["provider"] for row in made["rows"]} == {"reference"}


class TestLost:
    @pytest.mark.parametrize(
        "record",
        [
            {"status": "failed", "exit_code": 1, "context_lost": "hopper: 4096 x 1000"},
            {"status": "failed", "exit_code": 1, "unfinished": ["tests/test_hopper.py::test"]},  # pytest-timeout
            {"status": "failed", "exit_code": 1, "crashed": ["tests/test_hopper.py::test"]},  # pytest-xdist
        ],
        ids=["context", "unfinished", "crashed"],
    )
    def test_a_provider_that_poisons_its_process_is_not_measured(self, record):
        assert commands.lost({"errors-hopper": record}) == {"hopper"}
        assert commands.lost({"hopper-forms": record}) == set(), "the kernels as they are do not hang"
        assert commands.lost({"hopper": record | {"status": "ok", "unfinished": []}}) <= {"hopper"}
        assert commands.lost({"errors-cuda": {"status": "failed", "exit_code": 1, "unfinished": []}}) == set()

    @pytest.mark.parametrize(("exit_code", "gone"), [(-2, set()), (2, set()), (-9, {"triton"}), (None, {"triton"})])
    def test_one_that_is_slow_is_not_lost(self, exit_code, gone):
        """Where the time is up, one that ends when it is interrupted does not hang; one that must be killed does."""
        record = {"status": "timed out", "exit_code": exit_code, "unfinished": ["triton: 65536 x 1000"]}
        assert commands.lost({"errors-triton": record}) == gone
        assert commands.lost({"hopper": record}) == {"hopper"}, "pytest ends where its worker hangs"

    def test_a_lost_context_is_recorded(self, tmp_path):
        path = tmp_path / "errors.jsonl"
        path.write_text('{"begun": "cuda: a"}\n{"context_lost": "cuda: a"}\n')
        assert commands.read_errors(path)["context_lost"] == "cuda: a"

    def test_a_reference_without_memory_costs_its_own_check(self, tmp_path, monkeypatch):
        few, exact = list(correct.checks("cpu"))[:2], correct.in_eager

        def in_eager(check, *rest):
            if check == few[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return exact(check, *rest)

        monkeypatch.setattr(correct, "checks", lambda device_type: iter(few))
        monkeypatch.setattr(correct, "in_eager", in_eager)
        path = tmp_path / "errors.jsonl"
        options = ["--device", "cpu", "--providers", "torch", "--output", str(path)]
        assert correct.main(options) == Exit.FAILED
        record = commands.read_errors(path)
        assert record["counts"]["ok"] == 1 and not record["unfinished"] and record["context_lost"] is None
        assert "CUDA out of memory" in record["failed"][str(few[0])]

    def test_a_provider_can_be_left_out_of_every_phase(self):
        here = Machine(capability=(9, 0), workers=4, without=frozenset({"hopper"}))
        for command in commands.COMMANDS.values():
            for phase in command(Path("."), here, False):
                reason, line = phase.skip_reason({}), phase.command_line({})
                if reason is None and "hopper" in " ".join(line):
                    assert line[line.index("--without") + 1] == "hopper", phase.name
                    assert "hopper" not in line[line.index("--providers") + 1 :][0] if "--providers" in line else True


def test_a_hang_waits_for_no_more_than_the_phases_own_time(tmp_path, monkeypatch):
    """Left-over time is not for a phase that would only wait."""
    monkeypatch.setattr(phases, "GRACE_S", 0.3)
    hung = code("import signal, time\nsignal.signal(2, signal.SIG_IGN)\ntime.sleep(60)", budget_s=1, most_s=2)
    outcomes = {}
    phases.run([hung], tmp_path, time.monotonic() + 100, outcomes, lambda: None, lambda text: None)
    assert outcomes["try"]["status"] == "timed out" and outcomes["try"]["seconds"] < 10
    right = {p.name: p.most_s for p in commands.correct(tmp_path, HOPPER, False) if p.group == "right"}
    assert max(right.values()) <= 130 and set(right) >= {"errors-hopper", "layouts", "hopper"}


def test_every_file_with_gpu_tests_is_in_a_phase():
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if re.search(r"mark\.gpu\b", path.read_text())}
    given = " ".join(" ".join(phase.command_line({})) for phase in commands.correct(Path("."), HOPPER, False))
    assert marked and marked <= set(re.findall(r"tests/(\w+\.py)", given))


def run_live(folder, *options):
    """Run the tests of test_it.py there as a phase does; returns the file of their live results."""
    file = folder / "live.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.harness.live", "test_it.py"]
    environment = os.environ | {"MCLD_LIVE": str(file), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    subprocess.run([*command, *options], cwd=folder, capture_output=True, timeout=100, env=environment)
    return file


def test_a_traceback_is_kept_where_pytest_is_killed(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os\ndef helper(): raise ValueError('told')\n"
        "def test_bad(): helper()\ndef test_dies(): os.kill(os.getpid(), 9)\n"
    )
    file = run_live(tmp_path)
    assert "raise ValueError('told')" in file.read_text() and "test_it.py:2: ValueError" in file.read_text()
    assert [name.rpartition("::")[2] for name in live.read(file)["unfinished"]] == ["test_dies"]


def test_a_worker_without_its_context_costs_one_test(tmp_path):
    """A fake of torch.cuda whose context is lost by one test: those that follow run in another worker."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "conftest.py").write_text(
        "import sys, types\nlost = []\n"
        "def synchronize():\n    if lost: raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "yes = lambda: True\n"
        "cuda = types.SimpleNamespace(is_available=yes, is_initialized=yes, synchronize=synchronize)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest, torch\nfrom conftest import lost\n"
        "@pytest.mark.parametrize('i', range(6))\ndef test_it(i):\n"
        "    if i == 2: lost.append(i)\n    torch.cuda.synchronize()\n"
    )
    file = run_live(tmp_path, "-n", "1", "--max-worker-restart", "2")
    record = live.read(file)
    assert record["counts"]["passed"] == 5 and record["counts"]["failed"] == 1 and len(record["crashed"]) == 1
    (message,) = record["failed"].values()
    assert "illegal memory access" in message and "illegal memory access" in file.read_text()
    assert commands.lost({"hopper": {"status": "failed", "exit_code": 1, **record}}) == {"hopper"}
