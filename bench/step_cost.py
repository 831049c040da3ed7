"""The loss's part of a training step, eager against the package: ``python bench/step_cost.py``.

The backbone is fixed, and its flop an image are stated: the part depends on them. A larger backbone makes it smaller.
"""

from __future__ import annotations

import argparse
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
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from bench.harness import cases, machine, measure, programs, report, step_report, steps, timing  # noqa: E402
from bench.harness.losses import LOSSES  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402
from bench.harness.screen import console, duration, say, stages  # noqa: E402

SCHEMA = 1


def parser() -> argparse.ArgumentParser:
    made = programs.Parser(description="Measure the loss's part of a training step.", epilog=programs.EXIT_CODES)
    made.add_argument(
        "--loss", choices=list(LOSSES), default="mcld", metavar="LOSS", help=f"of {', '.join(LOSSES)} (default: mcld)"
    )
    made.add_argument(
        "--batch", type=programs.positive, nargs="+", metavar="B", default=[256, 1024, 4096, 16384],
        help="default: 256 1024 4096 16384",
    )  # fmt: skip
    made.add_argument("--classes", type=programs.positive, nargs="+", metavar="C", default=[100, 1000])
    made.add_argument("--dtype", choices=list(cases.DTYPES)[:3], help="of autocast (default: float32; CUDA: bfloat16)")
    made.add_argument("--backbone", default="mlp", metavar="NAME", help="mlp (default), or STUDENT,TEACHER of timm")
    made.add_argument("--image-size", type=programs.positive, default=224, help="for timm's models (default: 224)")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    made.add_argument("--repeats", type=programs.positive, default=15, help="interleaved rounds (default: 15)")
    made.add_argument("--seconds", type=float, default=30.0, help="budget of a case's rounds")
    made.add_argument(
        "--least-rounds", type=programs.positive, default=timing.MIN_ROUNDS, metavar="N",
        help=f"rounds taken whatever they cost (default: {timing.MIN_ROUNDS})",
    )  # fmt: skip
    made.add_argument(
        "--gate-batch", type=programs.positive, metavar="N",
        help="check each loss on the first N images of the step alone, recorded as such (default: on all of them)",
    )  # fmt: skip
    made.add_argument("--limit", type=float, default=600.0, help="skip a case that would take longer (default: 600 s)")
    made.add_argument("--threads", type=programs.threads, help="CPU threads of torch")
    made.add_argument("--output", type=Path, metavar="DIR", help="default: bench/out/step-<date and time>")
    made.add_argument(
        "--from", type=Path, nargs="+", metavar="RUN", dest="recorded",
        help="measure nothing: one table and one figure of these recorded runs (folders, or their results.json)",
    )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the grid; returns one of the exit codes of ``--help``."""
    options = parser().parse_args(arguments)
    programs.make_output_printable()
    default = ROOT / "bench" / "out" / time.strftime("step-%Y%m%d-%H%M%S")
    if options.recorded:
        return _join(options, default)
    if options.device == "cuda" and not torch.cuda.is_available():
        programs.complain("step_cost: --device cuda: this machine, or this build of torch, has no CUDA device")
        return Exit.NO_DEVICE
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        backbone = steps.backbone(options.backbone, options.image_size)
    except ValueError as fault:
        programs.complain(f"step_cost: {fault}")
        return Exit.USAGE
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with programs.claimed(options.output, default, "results.json") as folder:
            return _run(options, device, backbone, folder, console())
    except programs.FolderInUse as fault:
        programs.complain(f"step_cost: {fault}")
        return Exit.USAGE
    except OSError as fault:
        programs.complain(f"step_cost: the output cannot be written: {fault}")
        return Exit.OUTPUT


def _join(options: argparse.Namespace, default: Path) -> int:
    """Table and figure of recorded runs."""
    try:
        joined = step_report.Joined.read(options.recorded)
    except (OSError, ValueError) as fault:
        programs.complain(f"step_cost: --from: {fault}")
        return Exit.USAGE
    try:
        with programs.claimed(options.output, default, "results.md") as folder:
            (folder / "results.md").write_text(joined.markdown(), encoding="utf-8")
            step_report.write_csv(folder / "results.csv", joined.records)
            written = ["results.md", "results.csv"]
            if step_report.plot(folder / "results.png", joined.records, joined.caption):
                written.append("results.png")
            print(joined.markdown())
            say(console(), f"written to {folder}: {', '.join(written)}")
    except programs.FolderInUse as fault:
        programs.complain(f"step_cost: {fault}")
        return Exit.USAGE
    except OSError as fault:
        programs.complain(f"step_cost: the output cannot be written: {fault}")
        return Exit.OUTPUT
    return Exit.OK


def _run(
    options: argparse.Namespace, device: torch.device, backbone: steps.Backbone, folder: Path, screen: Console
) -> int:
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    grid = cases.product(options.batch, options.classes, [dtype], None, ["forward-backward"], loss=options.loss)
    variants, reasons = steps.variants(device)
    plan = measure.Plan(
        device, options.repeats, options.seconds, least=options.least_rounds, gate_batch=options.gate_batch
    )
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "machine": machine.describe(device),
        "versions": machine.versions(),
        **machine.commit(),
    }
    for name, reason in reasons.items():  # on the screen alone: a reason may name a path
        say(screen, f"not run: {name}: {reason}", "dim")
    rows: list[steps.StepRow] = []
    code, shown = Exit.OK, set[str]()

    def write(complete: bool) -> None:
        records = [row.record() for row in rows]
        report.write_json(folder / "results.json", head | {"complete": complete, "rows": records})

    try:
        gemm = steps.gemm_speed(grid[0], device)
        head["gemm_flop_per_s"] = gemm
        estimates = {case: steps.predicted_seconds(case, backbone, len(variants), plan, gemm) for case in grid}
        wanted = [case for case in grid if estimates[case] <= options.limit]
        say(screen, f"{len(wanted)} cases, about {duration(sum(estimates[case] for case in wanted))}", "dim")
        with stages(screen, len(grid)) as progress:
            for case in grid:
                progress.begin(str(case), estimates[case])
                if case in wanted:
                    found = steps.StepRun(case, backbone, variants, plan, progress.stage).run()
                else:
                    reason = f"would take about {duration(estimates[case])}, --limit is {duration(options.limit)}"
                    flop = steps.flop_per_image(backbone, case.classes)
                    found = [steps.StepRow(case, name, backbone.name, flop, reason=reason) for name in variants]
                rows += found
                _show(screen, case, found, shown)
                progress.end()
                write(complete=False)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
        say(screen, "interrupted; what was measured is kept", "yellow")
    head["machine"]["load_1min_end"] = machine.load()
    write(complete=code == Exit.OK)
    records = report.recordable([row.record() for row in rows])
    step_report.write_csv(folder / "results.csv", records)
    written = ["results.json", "results.csv"]
    if step_report.plot(folder / "results.png", records, machine.caption(head)):
        written.append("results.png")
    say(screen, f"written to {folder}: {', '.join(written)}")
    if code == Exit.OK and any(row.status in (measure.FAILED, measure.ERROR) for row in rows):
        return Exit.FAILED
    return code


def _show(screen: Console, case: cases.Case, rows: Sequence[steps.StepRow], shown: set[str]) -> None:
    measured = [row for row in rows if row.status != measure.NOT_RUN]
    if measured:
        table = Table(title=Text(str(case), style="bold"), title_justify="left", box=None, header_style="bold")
        for title in ("variant", "error / allowed", "step", "loss", "part of step", "step vs eager", "loss vs eager"):
            table.add_column(title, justify="left" if title == "variant" else "right")
        for row in measured:
            table.add_row(*_cells(row))
        screen.print(table)
    seen = {row.gate_batch for row in measured if row.gate_batch and row.gate_batch < case.batch}
    if seen:
        say(screen, f"  checked on the first {seen.pop():,} images alone (--gate-batch)", "dim")
    for row in rows:
        if row.reason and (text := f"  {row.status}: {row.variant}: {row.reason}") not in shown:
            shown.add(text)
            say(screen, text, "dim" if row.status == measure.NOT_RUN else "red")


def _cells(row: steps.StepRow) -> list[str]:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    if row.step is None:
        return [row.variant, row.status, "", "", "", "", ""]
    return [
        row.variant,
        "" if row.verdict is None else f"{row.verdict.ratio:.2f}",
        report.seconds(row.step.median) + ("" if row.step.is_steady else " ~"),
        report.seconds(None if row.loss is None else row.loss.median),
        "" if row.share is None else f"{100 * row.share:.1f} %",
        ratio(row.step_speedup),
        ratio(row.loss_speedup),
    ]


if __name__ == "__main__":
    sys.exit(main())
