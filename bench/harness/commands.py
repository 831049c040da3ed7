"""The three commands of ``bench/gpu_report.py``: their phases, in order of value, and what they need of the machine."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.harness import forms, live, ncu
from bench.harness.phases import Outcomes, Phase, Record, json_lines, last_json
from mcld_kernels.backends.cuda import runs_on

PYTHON = sys.executable
MINUTES = 8.6  # of each command; its own deadline
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
OURS = ("triton", "cuda", "hopper")
# A sanitizer finds the processes that it watches on these ports of the machine: side by side, each has its own. By
# default all look at the same ten.
FIRST_PORT, PORTS = 49152, 32
BEGINS, ENDS = "begins: ", "ended: "  # before a combination, in the output of bench/sanitize.py
DIFFER = "  two runs differ"
RESULTS = range(6)  # exit codes that tell a result, of the programs here and of pytest; of no process that died
COMPARED = ("reference", "compile", "library", "torch", *OURS, "sdpa", "cudnn", "inf-cl")
# Where toolkits put nvcc, compute-sanitizer and ncu when the PATH does not name them.
TOOLKITS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*", "/usr/local/cuda/nsight-compute*")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The conditions that decide the plan."""

    capability: tuple[int, int] | None  # of the GPU; None without one
    workers: int  # of a test phase
    without: frozenset[str] = frozenset()  # providers that are left out of every phase

    @property
    def is_hopper(self) -> bool:
        return self.capability == (9, 0)

    @property
    def arch(self) -> str:
        """The GPU's architecture as CMake writes it; 9.0, 10.0 and so on need the "a" for wgmma and its heirs."""
        major, minor = self.capability or (9, 0)
        return f"{major}{minor}{'a' if major in (9, 10, 11) else ''}-real"


def search_path() -> str:
    """The PATH, and the folders of CUDA's tools behind it."""
    folders = [
        str(folder) for pattern in TOOLKITS for folder in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
    ]
    return os.pathsep.join([os.environ.get("PATH", ""), *folders])


def is_built(architectures: list[str] | None, capability: tuple[int, int]) -> bool:
    """True if a compiled module with code for ``architectures`` is what a build for this GPU would give."""
    real = [name for name in architectures or () if runs_on(name, capability, jit=False)]
    return any("a" in name for name in real) if capability[0] == 9 else bool(real)


def correct(folder: Path, machine: Machine, rehearse: bool) -> list[Phase]:
    """Is it right, and is it fast on a short grid?"""
    device = ["--device", "cpu"] if rehearse else []
    checks = [
        Phase(
            name=f"errors-{provider}",
            command=[
                PYTHON, "bench/correct.py", *device, "--providers", provider, "--seconds", "75",
                "--output", str(folder / f"errors-{provider}.jsonl"),
            ],
            budget_s=85,
            most_s=95,  # it begins no check after 75 s, so that more would only wait for a hang
            group="right",
            read=lambda output, provider=provider: read_errors(folder / f"errors-{provider}.jsonl"),
            environment={"MCLD_HOPPER": "1" if provider == "hopper" else "0"},
            skip=needs(provider, machine, rehearse),
        )
        for provider in (("torch",) if rehearse else OURS)
    ]  # fmt: skip
    hopper = None if rehearse else needs("hopper", machine, rehearse)({})
    tests = [
        pytest_phase(folder, "layouts", ["tests/test_layouts.py"], 85, group="right", most_s=120),
        *(
            pytest_phase(
                folder,
                name,
                ["tests/test_hopper.py", "-k", selection],
                85,
                group="right",
                most_s=120,
                skip=hopper,
                hopper="1",
            )
            # Forms that are off by default: one that hangs is no reason to leave out the kernels as they are.
            for name, selection in (("hopper", "not form_on_hopper"), ("hopper-forms", "form_on_hopper"))
        ),
        *(
            pytest_phase(folder, name, [*files, "-k", selection], 115, group="tests", workers=workers)
            for name, files, selection, workers in (
                ("cuda", ["tests/test_cuda.py", *_KERNEL_TESTS], "not triton and not torch", machine.workers),
                # Compiles for most of its time, and the tests of "torch" compile nothing.
                ("triton", _KERNEL_TESTS, "triton", machine.workers + machine.workers // 2),
                ("torch", _KERNEL_TESTS, "torch and not triton", machine.workers - machine.workers // 2),
            )
        ),
        pytest_phase(folder, "boundary", _BOUNDARY_TESTS, 115, group="tests", workers=machine.workers),
    ]
    return [
        *first(folder, machine, rehearse),
        *checks,
        *tests,
        bench_phase(folder, "bench", 165, ["--short", "--repeats", "20", "--seconds", "4", "--compile-seconds", "40"],
                    ["--short", "--repeats", "3", "--seconds", "1"], rehearse, machine,
                    ("reference", "library", *OURS, "sdpa", "compile")),
    ]  # fmt: skip


_KERNEL_TESTS = ["tests/test_backends.py", "tests/test_kernels.py", "tests/test_info_nce.py"]
_BOUNDARY_TESTS = ["tests/test_choice.py", "tests/test_compile.py", "tests/test_ops.py", "tests/test_teacher_queue.py"]


def speed(folder: Path, machine: Machine, rehearse: bool) -> list[Phase]:
    """The reasons for the speed: the long grid, forms of the kernels, profiles, and ncu on the named kernels."""
    path = search_path()
    tool = shutil.which("ncu", path=path)
    profiled = [
        Phase(
            name=f"ncu-{provider}",
            command=ncu.command(tool or "ncu", [PYTHON, "bench/step.py", "--providers", provider]),
            budget_s=45 if provider != "library" else 25,
            read=lambda output: {"launches": ncu.read(output.splitlines())},
            environment={"PATH": path, "MCLD_HOPPER": "1" if provider == "hopper" else "0"},
            skip="a rehearsal has no kernels to watch"
            if rehearse
            else "ncu was not found" if tool is None else needs(provider, machine, rehearse),
        )
        for provider in ("hopper" if machine.is_hopper else "cuda", "triton", "library")
    ]  # fmt: skip
    return [
        *first(folder, machine, rehearse),
        bench_phase(folder, "grid", 170, ["--repeats", "25", "--seconds", "5", "--compile-seconds", "70"],
                    ["--smoke", "--repeats", "3"], rehearse, machine, COMPARED),
        bench_phase(folder, "forms", 60, ["--forms", "--repeats", "25", "--seconds", "3"],
                    ["--forms", "--repeats", "3"], rehearse, machine),
        profiled[0],
        bench_phase(
            folder, "profiles", 40,
            ["--batch", "256", "4096", "16384", "--classes", "100", "1000", "--dtype", "bfloat16", "--repeats", "3",
             "--seconds", "1", "--profile"],
            ["--batch", "32", "--classes", "10", "--dtype", "float32", "--repeats", "3", "--profile"],
            rehearse, machine, OURS,
        ),
        *profiled[1:],
    ]  # fmt: skip


def safe(folder: Path, machine: Machine, rehearse: bool) -> list[Phase]:
    """Is it safe: sanitizers on a small grid of every kernel, forced faults; and the table for "auto"."""
    path = search_path()
    tool = shutil.which("compute-sanitizer", path=path)
    no_gpu = "a rehearsal has no GPU" if rehearse else None

    ports = itertools.count(FIRST_PORT, PORTS)

    def sanitizer(check: str, provider: str, is_form: bool = False) -> Phase:
        needed = needs(provider.partition(":")[0], machine, rehearse)
        return Phase(
            name=f"{check}-{provider}",
            command=[
                tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "99", "--print-limit", "100",
                # PyTorch and Triton ask the driver for entry points that it may not have: reports of that would be
                # most of what is printed. What this package calls, it checks itself.
                "--report-api-errors", "no",
                # By default it waits a minute for the first CUDA call, and then lets the program run unwatched.
                "--launch-timeout", "0", "--port", str(next(ports)), "--max-connections", str(PORTS),
                *(["--racecheck-report", "all"] if check == "racecheck" else []),
                PYTHON, "bench/sanitize.py", "--providers", provider,
            ],
            budget_s=45 if is_form else 140,
            most_s=75 if is_form else 185,
            group="forms" if is_form else "sanitizers",
            read=read_sanitizer,
            told="SUMMARY: ",  # of a program that it did not watch it has none
            environment={"PATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            skip=no_gpu or (needed if tool else "compute-sanitizer was not found"),
        )  # fmt: skip

    watched = ("hopper", "triton", "cuda") if machine.is_hopper else ("cuda", "triton")
    sanitizers = [sanitizer(check, provider) for provider in watched for check in SANITIZERS]
    # Each in a process of its own, after everything that comes by default: one that hangs costs itself alone.
    of_kernels = [
        sanitizer(check, form, is_form=True)
        for form in forms.SANITIZED
        if form.partition(":")[0] in watched
        for check in SANITIZERS
    ]
    faults = [
        Phase(
            name=f"fault-{name}",
            command=[PYTHON, "bench/faults.py", name],
            budget_s=20,
            read=last_json,
            skip=no_gpu,
            fault=message,
        )
        for name, message in (
            ("launch", r"illegal memory access|CUDA error"),
            ("memory", r"OutOfMemoryError: CUDA out of memory"),
            ("hang", r"a kernel that does not end is launched"),
        )
    ]
    table = folder / "table.json"
    calibrate = Phase(
        name="calibrate",
        command=[
            PYTHON, "bench/calibrate.py", "--dtype", "bfloat16", "float32", "--batch", "256", "1024", "4096", "16384",
            "--seconds", "120", "--output", str(table),
        ],
        budget_s=140,
        read=lambda output: {"table": json.loads(table.read_text())},
        skip="a rehearsal has no GPU to choose for" if rehearse else None,
    )  # fmt: skip
    rehearsed = Phase(
        name="sanitize-grid",
        command=[PYTHON, "bench/sanitize.py", "--device", "cpu", "--providers", "torch"],
        budget_s=60,
        skip=None if rehearse else "the sanitizers run it",
    )
    # The hang comes last: what a driver does with such a kernel must not cost what is measured.
    return [*first(folder, machine, rehearse), *sanitizers, rehearsed, calibrate, *of_kernels, *faults]


COMMANDS: dict[str, Callable[[Path, Machine, bool], list[Phase]]] = {"correct": correct, "speed": speed, "safe": safe}


def first(folder: Path, machine: Machine, rehearse: bool) -> list[Phase]:
    """The phases that open every command: the compiled module, what the machine is, and its ceilings."""
    path = search_path()
    return [
        Phase(
            name="build",
            command=[PYTHON, "setup.py", "build_ext", "--inplace"],
            budget_s=90,
            environment={"PATH": path, "MCLD_BUILD_CUDA": "1", "MCLD_CUDA_ARCHS": machine.arch},
            skip="a rehearsal builds nothing" if rehearse else lambda outcomes: _build_skip(machine),
        ),
        Phase(
            name="info",
            command=[PYTHON, "-m", "mcld_kernels.info", "--json"],
            budget_s=25,
            group="machine",
            read=lambda output: {"info": json.loads(output[output.index("{") :])},
        ),
        Phase(
            name="ceilings",
            command=[PYTHON, "bench/ceilings.py"],
            budget_s=25,
            group="machine",
            read=last_json,
        ),
    ]


def _build_skip(machine: Machine) -> str | None:
    """The reason why nothing is compiled: a module for this GPU is there and loads."""
    from mcld_kernels.backends.cuda import extension

    module, _ = extension.load()
    architectures = module.info()["architectures"] if module is not None else None
    if machine.capability is not None and is_built(architectures, machine.capability):
        return f"the compiled module is for {', '.join(architectures or ())} already"
    return None


def needs(provider: str, machine: Machine, rehearse: bool) -> Callable[[Outcomes], str | None]:
    """The reason why a provider is not tried."""

    def reason(outcomes: Outcomes) -> str | None:
        if provider in machine.without:
            return "left out by --without"
        if provider == "hopper" and not machine.is_hopper:
            return "it needs a Hopper GPU"
        return None

    return reason


def lost(outcomes: Outcomes) -> set[str]:
    """The providers that hung, lost their CUDA context, or whose process died: what follows does without them."""
    gone = {name for record in outcomes.values() for name in record.get("lost", ())}
    for provider in OURS:
        for phase in (f"errors-{provider}", *(("hopper",) if provider == "hopper" else ())):
            record = outcomes.get(phase, {})
            status, code = record.get("status"), record.get("exit_code")
            # One that ends when it is asked to is slow, and does not hang; pytest ends also where its worker hangs.
            is_slow = phase != "hopper" and status == "timed out" and code in (*RESULTS, 130, -signal.SIGINT)
            ended = status in ("failed", "timed out") and not is_slow
            if ended and (code not in RESULTS or record.get("unfinished")):
                gone.add(provider)
            if record.get("context_lost") or record.get("crashed"):
                gone.add(provider)
    return gone


def pytest_phase(
    folder: Path,
    name: str,
    arguments: list[str],
    budget_s: float,
    *,
    group: str,
    workers: int = 1,
    skip: str | None = None,
    hopper: str = "0",
    most_s: float = math.inf,
) -> Phase:
    """The tests marked ``gpu`` among some, side by side where pytest-xdist is there."""
    file = folder / f"tests-{name}.jsonl"
    of_hopper = name.startswith("hopper")
    command = [PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "bench.harness.live"]
    if importlib.util.find_spec("xdist"):
        # One worker also: a test that hangs or takes the process with it costs itself alone.
        command += ["-n", str(workers), "--max-worker-restart", "2" if of_hopper else "20"]
    if importlib.util.find_spec("pytest_timeout"):
        # Inductor compiles for most of a minute where every core is busy; a Hopper kernel ends at once or never.
        limit = 25 if of_hopper else {"boundary": 100}.get(name, 60)
        command += ["--timeout", str(limit), "--timeout-method", "thread"]
    return Phase(
        name=name,
        command=[*command, *arguments],
        budget_s=budget_s,
        most_s=most_s,
        group=group,
        read=lambda output: live.read(file),
        environment={"PATH": search_path(), "MCLD_LIVE": str(file), "MCLD_HOPPER": hopper},
        skip=skip,
    )


def bench_phase(
    folder: Path,
    name: str,
    budget_s: float,
    options: list[str],
    rehearsed: list[str],
    rehearse: bool,
    machine: Machine,
    providers: tuple[str, ...] = (),
) -> Phase:
    """A run of bench/run.py by bench/isolated.py, without the providers that were lost before."""

    def command(outcomes: Outcomes) -> list[str]:
        gone = lost(outcomes) | machine.without
        chosen = [provider for provider in providers if provider not in gone]
        if rehearse and chosen:
            chosen = ["reference", "torch"]
        made = [
            PYTHON,
            "bench/isolated.py",
            "--device",
            "cpu" if rehearse else "cuda",
            *(rehearsed if rehearse else options),
        ]
        if chosen:
            made += ["--providers", ",".join(chosen)]
        elif gone:
            made += ["--without", ",".join(sorted(gone))]
        return [*made, "--output", str(folder / name)]

    return Phase(
        name=name,
        command=command,
        budget_s=budget_s,
        read=lambda output: read_rows(folder / name / "results.json"),
    )


def read_rows(path: Path) -> Record:
    """The results of the benchmark, which it writes after every case."""
    run = json.loads(path.read_text())
    keys = ("machine", "versions", "commit", "dirty", "started", "options", "ceilings", "complete", "rows")
    return {key: run[key] for key in keys} | {"lost": run.get("lost", {})}


def read_errors(path: Path) -> Record:
    """Counts of bench/correct.py's checks, the failures, the largest error by dtype, and a check that did not end."""
    lines = json_lines(path)
    rows = [line for line in lines if "check" in line]
    done = {f"{row['provider']}: {row['check']}" for row in rows}
    worst: dict[str, float] = {}
    for row in rows:
        if row.get("ratio") is not None:
            key = f"{row['dtype']} {row['precision']}" if row["dtype"] == "float32" else row["dtype"]
            worst[key] = max(worst.get(key, 0.0), row["ratio"])
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "FAILED", "error", "not run")}
    return {
        "counts": counts,
        "failed": {
            f"{row['check']}": row.get("reason") or f"error {row['ratio']:.3g} times what is allowed"
            for row in rows
            if row["status"] in ("FAILED", "error")
        },
        "unsupported": sorted({row["reason"] for row in rows if row["status"] == "not run"}),
        "largest_error_of_allowed": worst,
        "unfinished": [line["begun"] for line in lines if "begun" in line and line["begun"] not in done],
        "context_lost": next((line["context_lost"] for line in lines if "context_lost" in line), None),
    }


def read_sanitizer(output: str) -> Record:
    """The sanitizer's summary lines and first reports, the program's counts, and a combination that did not end."""
    reports, told, begun = [], [], {}
    for line in output.splitlines():
        if line.startswith("========="):
            reports.append(line.strip("= "))
        elif line.startswith(BEGINS):
            begun[line.removeprefix(BEGINS)] = True
        elif line.startswith(ENDS):
            begun.pop(line.removeprefix(ENDS), None)
        elif " combinations ran, " in line or line == DIFFER:
            told.append(line.strip())
    return {
        "summary": [line for line in reports if "SUMMARY" in line] + told,
        "reports": [line for line in reports if "SUMMARY" not in line][:40],
        "unfinished": list(begun),
    }
