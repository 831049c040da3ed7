"""Measure the losses: ``python bench/run.py``; ``--help`` lists the options, NOTES.md explains the result."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "bench"]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # after the installed packages: an installed mcld_kernels is the one measured

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from rich.console import Console  # noqa: E402

from bench.harness import (  # noqa: E402
    cases,
    forms,
    global_batch,
    kernels,
    machine,
    measure,
    memory,
    plots,
    profiling,
    programs,
    report,
)
from bench.harness.losses import LOSSES  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402
from bench.harness.providers import Provider, choose  # noqa: E402
from bench.harness.screen import Stages, console, duration, say, stages  # noqa: E402


def _terms(text: str) -> tuple[str, ...]:
    names = [term.strip() for term in text.split(",")]
    if not set(names) <= set(cases.TERMS):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(cases.TERMS)}; got {text!r}")
    return tuple(term for term in cases.TERMS if term in names)


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite; got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    made = programs.Parser(
        description="Compare every backend of a loss that can run on this machine.", epilog=programs.EXIT_CODES
    )
    grid = made.add_argument_group("the cases (default: a grid that suits the machine)")
    grid.add_argument(
        "--loss", choices=list(LOSSES), default="mcld", metavar="LOSS", help=f"of {', '.join(LOSSES)} (default: mcld)"
    )
    grid.add_argument("--batch", type=programs.positive, nargs="+", metavar="B", help="batch sizes")
    grid.add_argument("--classes", type=programs.positive, nargs="+", metavar="C", help="numbers of classes")
    grid.add_argument(
        "--candidates", type=programs.positive, metavar="M", help="of info_nce and moco: teacher rows, --batch at least"
    )
    grid.add_argument(
        "--dtype", choices=list(cases.DTYPES), nargs="+", metavar="D", help=f"of the logits: {', '.join(cases.DTYPES)}"
    )
    grid.add_argument("--terms", type=_terms, metavar="T,T", help=f"of mcld: some of {','.join(cases.TERMS)}")
    grid.add_argument(
        "--mode", choices=cases.MODES, nargs="+", metavar="M",
        help=f"{' or '.join(cases.MODES)} (default: forward-backward)",
    )  # fmt: skip
    grid.add_argument("--temperature", type=_temperature, help="default: the loss's own")
    grid.add_argument(
        "--providers",
        metavar="P,P",
        help="comma-separated; default: all that can run here; hopper:FIELD=VALUE+.. sets tuning",
    )
    grid.add_argument("--short", action="store_true", help="a case of each regime of a GPU, the most telling first")
    grid.add_argument("--forms", action="store_true", help="forms of the kernels against each other (harness/forms.py)")
    grid.add_argument("--host", action="store_true", help="instead, the host's cost of backend cuda, on a CPU")
    grid.add_argument("--smoke", action="store_true", help="a few small shapes, in under a minute on two cores")
    grid.add_argument("--kernels", action="store_true", help="beside each call, each kernel of the backends alone")
    grid.add_argument(
        "--global", action="store_true", dest="over_ranks",
        help="under torchrun, the loss over ranks: time, exposed communication and memory of each rank",
    )  # fmt: skip
    grid.add_argument(
        "--without", type=lambda text: text.split(","), default=[], metavar="P,P",
        help="providers to leave out, with their forms",
    )  # fmt: skip
    grid.add_argument("--first", type=int, default=0, metavar="N", help="begin with case N, counted from 0")
    how = made.add_argument_group("the measurement")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument(
        "--repeats", type=programs.positive, metavar="N", help="interleaved rounds (default: 15; CUDA: 50)"
    )
    how.add_argument("--seconds", type=float, default=60.0, help="time budget of a case's rounds (3 are taken anyway)")
    how.add_argument("--matmul-precision", choices=("highest", "high", "medium"), default="highest", help="of float32")
    how.add_argument("--threads", type=programs.threads, help="CPU threads of torch")
    how.add_argument(
        "--compile-seconds", type=float, default=float("inf"), metavar="S",
        help="leave torch.compile out of the cases after it has compiled for so long",
    )  # fmt: skip
    how.add_argument("--cold", action="store_true", help="CUDA: overwrite the L2 cache before every sample")
    how.add_argument("--seed", type=int, default=0)
    out = made.add_argument_group("the output")
    out.add_argument("--output", type=Path, metavar="DIR", help="default: bench/out/<date and time>")
    out.add_argument("--profile", action="store_true", help="also a profiler trace and kernel table of every row")
    return made


def check(options: argparse.Namespace, device: torch.device) -> str | None:
    """The reason why the options contradict each other or the machine; None if they do not."""
    shape_options = ("batch", "classes", "dtype", "terms", "mode")
    given = [f"--{name}" for name in shape_options if getattr(options, name) is not None]
    own = [f"--{name}" for name in ("smoke", "short", "forms", "host") if getattr(options, name)]
    if own and given:
        return f"{own[0]} has its own shapes: leave out {own[0]} or {' and '.join(given)}"
    if len(own) > 1:
        return f"{' and '.join(own)} exclude each other"
    if (options.forms or options.host) and options.providers is not None:
        return f"{own[0]} has its own providers: leave out --providers"
    if (options.short or options.forms or options.host) and options.loss != "mcld":
        return f"{own[0]} is of mcld"
    if options.over_ranks and not dist.is_torchelastic_launched():
        return "--global is for several processes: torchrun --nproc-per-node 2 bench/run.py --global"
    if options.over_ranks and options.loss != "mcld":
        return "--global measures mcld alone"
    if options.cold and device.type == "cpu":
        return "--cold is for CUDA: on a CPU no cache is overwritten"
    if options.candidates is not None:
        if options.loss not in cases.rectangular():
            return f"--candidates are for --loss {' or '.join(cases.rectangular())}"
        if options.smoke or options.batch is None or options.candidates < max(options.batch):
            return "--candidates needs --batch, and at least as many candidates as rows"
    if options.loss != "mcld" and options.terms is not None:
        return f"--terms are those of mcld; {options.loss} has one"
    return None


def grid(options: argparse.Namespace, device: torch.device) -> list[cases.Case]:
    """The cases that the options ask for."""
    shared = {"seed": options.seed, "temperature": options.temperature, "loss": options.loss}
    if options.smoke:
        return cases.smoke_grid(**shared)
    if options.short:
        return cases.short_grid(device, options.seed, options.temperature)
    if options.forms:
        return list(forms.FORMS if device.type == "cuda" else forms.SMALL_FORMS)
    if all(value is None for value in (options.batch, options.classes, options.dtype, options.terms, options.mode)):
        return cases.default_grid(device, **shared)
    return cases.product(
        options.batch or ([1024, 4096, 16384] if device.type == "cuda" else [256, 1024, 4096]),
        options.classes or [1000],
        options.dtype or ["bfloat16" if device.type == "cuda" else "float32"],
        options.terms,
        options.mode or ["forward-backward"],
        candidates=options.candidates or 0,
        **shared,
    )


def header(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The head of every recorded run."""
    return {
        "schema": report.SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "machine": machine.describe(device),
        "versions": machine.versions(),
        **machine.commit(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; returns one of the exit codes of ``--help``."""
    options = parser().parse_args(arguments)
    programs.make_output_printable()
    screen = console()
    if options.device == "cuda" and not torch.cuda.is_available():
        programs.complain("run: --device cuda: this machine, or this build of torch, has no CUDA device")
        return Exit.NO_DEVICE
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        providers = choose(options.providers)
    except ValueError as fault:
        parser().error(str(fault))
    contradiction = check(options, device)
    if contradiction:
        parser().error(contradiction)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    if options.smoke and device.type == "cpu" and options.providers is None:
        providers = [provider for provider in providers if provider.name != "compile"]
        say(screen, "smoke: compile is left out (starting it takes most of a minute); ask by --providers")
    default = ROOT / "bench" / "out" / time.strftime("%Y%m%d-%H%M%S")
    if options.over_ranks:
        return _over_ranks(options, device, screen, default)
    try:
        with programs.claimed(options.output, default, "host.json" if options.host else "results.json") as folder:
            if options.host:
                return measure_host(options, folder)
            return Run(options, device, providers, screen, folder).run()
    except programs.FolderInUse as fault:
        programs.complain(f"run: {fault}")
        return Exit.USAGE
    except OSError as fault:
        programs.complain(f"run: the output cannot be written: {fault}")
        return Exit.OUTPUT


def measure_host(options: argparse.Namespace, folder: Path) -> int:
    """The host's cost of a step, on a CPU with the launches stubbed: a table, and host.json."""
    from bench.harness import host

    costs = [host.measure(case, options.repeats or 400) for case in host.CASES]
    print(host.table(costs))
    head = header(options, torch.device("cpu"))
    report.write_json(folder / "host.json", head | {"rows": [dataclasses.asdict(cost) for cost in costs]})
    return Exit.OK


def _over_ranks(options: argparse.Namespace, device: torch.device, screen: Console, default: Path) -> int:
    """The measurement over ranks; the first of them writes."""
    with global_batch.group(device):
        if dist.get_rank() > 0:
            return global_batch.run(options, device, screen, None, {})
        with programs.claimed(options.output, default, "results.json") as folder:
            code = global_batch.run(options, device, screen, folder, header(options, device))
            say(screen, f"written to {_short(folder)}: results.json")
            return code


class Run:
    """One run of the grid into a folder."""

    def __init__(
        self,
        options: argparse.Namespace,
        device: torch.device,
        providers: list[Provider],
        screen: Console,
        folder: Path,
    ):
        self.options, self.providers, self.screen, self.folder = options, providers, screen, folder
        self.plan = measure.Plan(device, options.repeats or self._default_rounds(device), options.seconds, options.cold)
        self.cases = grid(options, device)[options.first :]
        self.head = header(options, device)
        self.rows: list[measure.Row] = []
        self.compiled_s = 0.0
        self.at = 0  # the number of the case under way
        self.kernel_records: list[dict[str, object]] = []
        self.report = report.Report(screen, device.type)

    def _providers(self, case: cases.Case) -> list[Provider]:
        """The providers of a case; torch.compile only while it has time left."""
        providers, without = self.providers, set(self.options.without)
        if self.options.forms:
            by_case = forms.FORMS if self.plan.device.type == "cuda" else forms.SMALL_FORMS
            providers = choose(",".join(by_case[case]))
        elif self.compiled_s >= self.options.compile_seconds:
            without.add("compile")
        return [one for one in providers if not any(_is_of(one.name, left_out) for left_out in without)]

    def _default_rounds(self, device: torch.device) -> int:
        if self.options.smoke:
            return 7
        return 50 if device.type == "cuda" else 15

    def run(self) -> int:
        device, interrupted = self.plan.device, False
        try:
            ceilings = measure.ceilings(device, sorted({case.dtype for case in self.cases}))
            self.head["ceilings"] = ceilings
            self._announce()
            estimate = measure.Estimate(self.plan, self.providers, ceilings)
            total = sum(map(estimate.seconds, self.cases))
            if total >= 60:
                self.screen.print(f"{len(self.cases)} cases, about {duration(total)}")
            with stages(self.screen, len(self.cases)) as progress:
                for number, case in enumerate(self.cases, self.options.first):
                    self.at = number
                    progress.begin(str(case), estimate.seconds(case))
                    begun = time.monotonic()
                    self._measure(case, progress, ceilings)
                    estimate.learn(case, time.monotonic() - begun)
                    progress.end()
                    self._write(complete=False)
        except KeyboardInterrupt:
            interrupted = True
            say(self.screen, "interrupted; what was measured is kept", "yellow")
        self.head["machine"]["load_1min_end"] = machine.load()
        written = self._write(complete=not interrupted) + self._write_tables_and_plot()
        say(self.screen, f"written to {_short(self.folder)}: {', '.join(written)}")
        if interrupted:
            return Exit.INTERRUPTED
        failed = (measure.FAILED, measure.ERROR)
        statuses = [row.status for row in self.rows] + [record["status"] for record in self.kernel_records]
        return Exit.FAILED if any(status in failed for status in statuses) else Exit.OK

    def _measure(self, case: cases.Case, progress: Stages, ceilings: dict[str, float]) -> None:
        def stage(text: str) -> None:
            programs.tell_stage(self.at, text)
            progress.stage(text)

        def profiled(provider: str, step: Any) -> None:
            stage(f"profile {provider}")
            name = f"{provider}_B{case.batch}_C{case.classes}_{case.dtype}_{'+'.join(case.terms)}_{case.mode}"
            name = re.sub(r"[^A-Za-z0-9+_.-]+", "-", name)
            table = profiling.profile_step(step, self.plan.device, self.folder, name)
            say(self.screen, f"{provider}, {profiling.STEPS} steps of {case}", "bold")
            self.screen.print(table)

        inspect = profiled if self.options.profile else None
        providers = self._providers(case)
        rows = measure.CaseRun(case, providers, self.plan, stage, inspect).run()
        self.compiled_s += sum(row.first_call_s or 0 for row in rows if row.provider == "compile")
        self.rows += rows
        kernel_rows: list[kernels.KernelRow] = []
        if self.options.kernels and case.loss == "mcld":
            names = [provider.name for provider in providers]
            kernel_rows = kernels.KernelRun(case, names, self.plan, ceilings, stage).run()
            self.kernel_records += [row.record(case) for row in kernel_rows]
        self.report.show(rows, kernel_rows)

    def _write(self, complete: bool) -> list[str]:
        content = self.head | {"complete": complete, "rows": [row.record() for row in self.rows]}
        if self.options.kernels:
            content["kernels"] = self.kernel_records
        report.write_json(self.folder / "results.json", content)
        return ["results.json"]

    def _write_tables_and_plot(self) -> list[str]:
        records = report.recordable([row.record() for row in self.rows])
        report.write_csv(self.folder / "results.csv", records)
        written = ["results.csv"]
        if self.kernel_records:
            report.write_kernels_csv(self.folder / "kernels.csv", report.recordable(self.kernel_records))
            written.append("kernels.csv")
        if plots.plot(records, self.folder / "results.png", machine.caption(self.head)):
            written.append("results.png")
        traces = len(list(self.folder.glob("trace_*.json.gz")))
        if traces:
            written.append(f"trace_*.json.gz and kernels_*.txt ({traces} of each)")
        return written

    def _announce(self) -> None:
        where, commit, versions = self.head["machine"], self.head["commit"], self.head["versions"]
        threads = f"{where['threads']} CPU thread{'' if where['threads'] == 1 else 's'}"
        say(
            self.screen,
            f"{where.get('gpu', where['cpu'])}, {threads}, torch {versions['torch']}, "
            f"float32 products at {where['float32_matmul_precision']!r}, "
            f"commit {commit[:10] + (' with changes' if self.head['dirty'] else '') if commit else 'unknown'}",
        )
        for name, value in self.head["ceilings"].items():
            text = f"{value / 1e9:,.0f} Gflop/s" if "flop" in name else f"{value / 1e9:,.1f} GB/s (reads and writes)"
            self.screen.print(f"  ceiling {name.rsplit('_', 3)[0].replace('_', ' ')}: {text}")
        load = where["load_1min"]
        if load is not None and load > 0.5 * where["threads"]:
            say(self.screen, f"  the machine is busy (load {load}): times will scatter", "yellow")
        free = memory.available(self.plan.device) / 2**30
        self.screen.print(f"  free memory: {free:.1f} GiB")
        self.screen.print()


def _is_of(name: str, other: str) -> bool:
    """True if a provider is the other one with or without further fields: "hopper:a=1+b=2" is of "hopper:b=2"."""
    (provider, _, fields), (of, _, fewer) = name.partition(":"), other.partition(":")
    return provider == of and set(filter(None, fewer.split("+"))) <= set(fields.split("+"))


def _short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
