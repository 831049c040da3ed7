"""Measure the losses: ``python bench/run.py``; ``--help`` lists the options, NOTES.md says how to read the result."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "bench"]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # after the installed packages: an installed mcld_kernels is the one measured

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from bench import cases, machine, measure, plots, profiling, report  # noqa: E402
from bench.providers import Provider, choose  # noqa: E402


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _terms(text: str) -> tuple[str, ...]:
    wanted = [term.strip() for term in text.split(",")]
    if not set(wanted) <= set(cases.TERMS):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(cases.TERMS)}; got {text!r}")
    return tuple(term for term in cases.TERMS if term in wanted)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Compare every backend of the MCLD loss that can run on this machine.")
    grid = found.add_argument_group("what is measured (default: a grid that suits the machine)")
    grid.add_argument("--batch", type=_positive, nargs="+", metavar="B", help="batch sizes")
    grid.add_argument("--classes", type=_positive, nargs="+", metavar="C", help="numbers of classes")
    grid.add_argument("--dtype", choices=list(cases.DTYPES), nargs="+", help="dtypes of the logits")
    grid.add_argument("--terms", type=_terms, metavar="T,T", help=f"comma-separated, of {','.join(cases.TERMS)}")
    grid.add_argument("--mode", choices=cases.MODES, nargs="+", help="default: forward-backward")
    grid.add_argument("--temperature", type=float, default=0.1)
    grid.add_argument("--providers", metavar="P,P", help="comma-separated; default: all that can run here")
    grid.add_argument("--smoke", action="store_true", help="a few small shapes, in under a minute on two cores")
    how = found.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument("--repeats", type=_positive, metavar="N", help="interleaved rounds (default: 15; CUDA: 50)")
    how.add_argument("--seconds", type=float, default=60.0, help="time budget of a case's rounds (3 are taken anyway)")
    how.add_argument("--matmul-precision", choices=("highest", "high", "medium"), default="highest", help="of float32")
    how.add_argument("--threads", type=_positive, help="CPU threads of torch")
    how.add_argument("--cold", action="store_true", help="CUDA: overwrite the L2 cache before every sample")
    how.add_argument("--seed", type=int, default=0)
    out = found.add_argument_group("what is left behind")
    out.add_argument("--output", type=Path, metavar="DIR", help="default: bench/out/<date and time>")
    out.add_argument("--profile", action="store_true", help="also a profiler trace and kernel table of every row")
    return found


def grid(options: argparse.Namespace, device: torch.device) -> list[cases.Case]:
    """The cases that the options ask for."""
    if options.smoke:
        return cases.smoke_grid(options.seed)
    asked = (options.batch, options.classes, options.dtype, options.terms, options.mode)
    if all(value is None for value in asked):
        return cases.default_grid(device, options.seed)
    return cases.product(
        options.batch or ([1024, 4096, 16384] if device.type == "cuda" else [256, 1024, 4096]),
        options.classes or [1000],
        options.dtype or ["bfloat16" if device.type == "cuda" else "float32"],
        options.terms or cases.TERMS,
        options.mode or ["forward-backward"],
        options.temperature,
        options.seed,
    )


def pick_device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine, or this build of torch, has no CUDA device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def header(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What every recorded run says of itself."""
    chosen = {key: value for key, value in vars(options).items() if key != "output"}
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": chosen,
        "machine": machine.describe(device),
        "versions": machine.versions(),
        **machine.commit(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the grid. 0; 1 where a provider failed the gate or raised; 2 on bad arguments."""
    options = parser().parse_args(arguments)
    screen = report.console()
    try:
        providers = choose(options.providers)
    except ValueError as fault:
        parser().error(str(fault))
    if not options.temperature > 0:
        parser().error(f"--temperature must be positive; got {options.temperature}")
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    if options.smoke and device.type == "cpu" and options.providers is None:
        providers = [provider for provider in providers if provider.name != "compile"]
        screen.print("smoke: compile is left out (starting it takes most of a minute); ask by --providers")
    todo = grid(options, device)
    folder = options.output or ROOT / "bench" / "out" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)

    head = header(options, device)
    plan = measure.Plan(device, options.repeats or _rounds(options, device), options.seconds, options.cold)
    rows: list[measure.Row] = []
    try:
        with _progress(screen) as progress:
            head["ceilings"] = measure.ceilings(device, sorted({case.dtype for case in todo}))
            _announce(screen, head)
            task = progress.add_task("", total=len(todo))
            for case in todo:
                rows += _one(case, providers, plan, options, folder, screen, progress, task)
                report.write_json(folder / "results.json", head | {"complete": False}, rows)
    except KeyboardInterrupt:
        screen.print("[yellow]interrupted; what was measured is kept[/yellow]")
    complete = len({row.case for row in rows}) == len(todo)
    head["machine"]["load_1min_end"] = machine.describe(device)["load_1min"]
    report.write_json(folder / "results.json", head | {"complete": complete}, rows)
    records = report.finite([row.record() for row in rows])
    report.write_csv(folder / "results.csv", records)
    picture = plots.plot(records, folder / "results.png", caption(head))
    written = ["results.json", "results.csv"] + (["results.png"] if picture else [])
    screen.print(f"written to {_short(folder)}: {', '.join(written)}")
    return 1 if any(row.status in (measure.FAILED, measure.ERROR) for row in rows) or not complete else 0


def _one(
    case: cases.Case,
    providers: list[Provider],
    plan: measure.Plan,
    options: argparse.Namespace,
    folder: Path,
    screen: Console,
    progress: Progress,
    task: Any,
) -> list[measure.Row]:
    def announce(text: str) -> None:
        progress.update(task, description=f"B={case.batch} C={case.classes} {case.dtype}: {text}")

    def profiled(provider: str, step: Any) -> None:
        announce(f"profile {provider}")
        name = f"{provider}_B{case.batch}_C{case.classes}_{case.dtype}_{'+'.join(case.terms)}_{case.mode}"
        found = profiling.profile_step(step, plan.device, folder, name)
        screen.print(f"[bold]{provider}[/bold], {profiling.STEPS} steps of {case}")
        screen.print(found, markup=False, highlight=False, soft_wrap=True)

    rows = measure.CaseRun(case, providers, plan, announce, profiled if options.profile else None).run()
    progress.advance(task)
    report.show(rows, plan.device.type, screen)
    return rows


def _rounds(options: argparse.Namespace, device: torch.device) -> int:
    if options.smoke:
        return 7
    return 50 if device.type == "cuda" else 15


def _progress(screen: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=screen, transient=True)


def _announce(screen: Console, head: dict[str, Any]) -> None:
    where, commit = head["machine"], head["commit"]
    screen.print(
        f"{where.get('gpu', where['cpu'])}, {where['threads']} CPU threads, torch {head['versions']['torch']}, "
        f"float32 products at {where['float32_matmul_precision']!r}, "
        f"commit {commit[:10] + (' with changes' if head['dirty'] else '') if commit else 'unknown'}"
    )
    for name, value in head["ceilings"].items():
        text = f"{value / 1e9:,.0f} Gflop/s" if "flop" in name else f"{value / 1e9:,.1f} GB/s (reads and writes)"
        screen.print(f"  ceiling {name.rsplit('_', 3)[0].replace('_', ' ')}: {text}")
    load = where["load_1min"]
    if load is not None and load > 0.5 * where["threads"]:
        screen.print(f"[yellow]  the machine is busy (load {load}): times will scatter[/yellow]")
    screen.print()


def caption(head: dict[str, Any]) -> str:
    """One line under the plot: where and with what it was measured."""
    commit = (head["commit"] or "unknown")[:10] + ("+changes" if head["dirty"] else "")
    return (
        f"{machine.name(head['machine'])}; torch {head['versions']['torch']}; commit {commit}; {head['started'][:10]}"
    )


def _short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
