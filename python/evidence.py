"""Compare the distillation losses fairly: ``python python/evidence.py``; ``--help`` lists the options.

The digits of scikit-learn, a teacher that has seen every label right, a student with 600 images, four in ten of them
wrongly labelled. Every method has 16 settings, the best on the validation images is chosen at each batch size, and the
test images are asked once. A seed is a draw of the student's images, their wrong labels, its initial weights and the
order, the same for every method. The learning rate is the one that suits the student *without* a teacher.

Each cell (method, batch size, validation or test) is a file; a run that stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # after the installed packages: an installed mcld_kernels comes first

import torch  # noqa: E402
from distillation import contenders, evidence_report  # noqa: E402
from distillation.models import MODELS  # noqa: E402
from distillation.report import write_json  # noqa: E402
from distillation.study import Cell, Plan, PlanMismatch, Remaining, Study, cells  # noqa: E402
from rich.console import Console  # noqa: E402

from bench.harness import machine, programs  # noqa: E402
from bench.harness.programs import Exit, positive  # noqa: E402
from bench.harness.screen import console, duration, say, stages  # noqa: E402

QUICK: dict[str, Any] = {
    "images": 100,
    "batches": (64,),
    "examples": 1024,
    "seeds": 3,
    "tuning_seeds": 1,
    "settings": 2,
    "teacher_epochs": 3,
}
DEFAULT = Plan()


def _methods(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in contenders.BY_NAME]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {','.join(contenders.BY_NAME)}")
    return ("alone", *(name for name in contenders.BY_NAME if name in names and name != "alone"))


def parser() -> argparse.ArgumentParser:
    made = programs.Parser(
        description="Compare the distillation losses on digits, equally tuned.", epilog=programs.EXIT_CODES
    )
    made.add_argument("--methods", type=_methods, metavar="M,M", help="default: all; 'alone' is always among them")
    made.add_argument("--batch", type=positive, nargs="+", metavar="B", help="default: 32 128 512")
    made.add_argument("--seeds", type=positive, help=f"students of each method (default: {DEFAULT.seeds})")
    made.add_argument("--images", type=positive, help=f"training images of a student (default: {DEFAULT.images})")
    made.add_argument("--label-noise", type=float, help=f"fraction of wrong labels (default: {DEFAULT.label_noise})")
    made.add_argument("--model", choices=list(MODELS), help=f"the student (default: {DEFAULT.model})")
    made.add_argument("--examples", type=positive, help=f"images that a student sees (default: {DEFAULT.examples})")
    made.add_argument("--quick", action="store_true", help="a minute: shows that all runs; its figures say nothing")
    made.add_argument("--output", type=Path, metavar="DIR", help="default: runs/evidence; holds cells to go on with")
    made.add_argument("--draw", type=Path, metavar="JSON", help="only draw tables and plots of a results.json")
    return made


def plan(options: argparse.Namespace) -> Plan:
    """The plan that the options ask for. ValueError where they do not fit one another."""
    names = ("seeds", "images", "label_noise", "model", "examples")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.batch:
        given["batches"] = tuple(sorted(set(options.batch)))
    made = Plan(**{**(QUICK if options.quick else {}), **given})
    if max(made.batches) > made.images:
        raise ValueError(f"a batch of {max(made.batches)} needs as many training images; there are {made.images}")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and report; returns one of the exit codes of ``--help``."""
    options = parser().parse_args(arguments)
    programs.make_output_printable()
    screen = console()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        if options.draw is not None:
            results = json.loads(options.draw.read_text())
            folder = options.output or options.draw.parent
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return _report(results, folder, screen)
            except (KeyError, TypeError, AttributeError) as fault:
                raise ValueError(
                    f"{options.draw} is no results.json of this program: {type(fault).__name__}: {fault}"
                ) from None
        folder = options.output or ROOT / "runs" / ("evidence-quick" if options.quick else "evidence")
        study = Study(plan(options), folder)
        return _run(study, options.methods or tuple(contenders.BY_NAME), screen)
    except (ValueError, PlanMismatch) as fault:  # a file that is no JSON is a ValueError too
        return _fail(screen, str(fault), Exit.USAGE)
    except OSError as fault:
        return _fail(screen, f"the output cannot be written, or the input not read: {fault}", Exit.OUTPUT)
    finally:
        torch.set_num_threads(threads)


def _run(study: Study, methods: Sequence[str], screen: Console) -> int:
    absent = {name: reason for name, reason in contenders.absent().items() if name in methods}
    planned = cells(study.plan, [name for name in methods if name not in absent])
    left = [cell for cell in planned if study.record(cell) is None]
    for name, reason in absent.items():
        say(screen, f"not run: {name}: {reason}", "dim")
    results: dict[str, Any] = {
        "schema": evidence_report.SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe(torch.device("cpu")),
        "versions": machine.versions(),
        **machine.commit(),
        "plan": json.loads((study.folder / "plan.json").read_text()),
        "absent": absent,
    }
    code = Exit.OK
    try:
        screen.print(f"teacher: {study.plan.teacher_epochs} epochs, once", style="dim")
        results["teacher"] = study.teacher_accuracy()
        if left:
            study.prepare()
        remaining = Remaining(study.predicted_seconds)
        screen.print(f"{len(planned) - len(left)} of {len(planned)} cells are done", style="dim")
        _train(study, left, remaining, screen)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
        say(screen, "interrupted; the same command goes on with the cells that are missing", "yellow")
        if "teacher" not in results:
            return code
    records = [record for cell in planned if (record := study.record(cell)) is not None]
    if not records:
        screen.print("no cell was finished")
        return code
    results["machine"]["load_1min_end"] = machine.load()
    results |= {"complete": len(records) == len(planned), "cells": records}
    write_json(study.folder / "results.json", results)
    _report(results, study.folder, screen)
    return code


def _train(study: Study, left: Sequence[Cell], remaining: Remaining, screen: Console) -> None:
    with stages(screen, len(left)) as progress:
        for number, cell in enumerate(left):
            estimate = remaining.seconds(left[number:])
            progress.begin(f"{cell}; in all about {duration(estimate)} to go", remaining.seconds([cell]))
            progress.stage(f"about {duration(estimate)} to go")
            remaining.learn(cell, study.run(cell)["seconds"])
            progress.end()


def _report(results: dict[str, Any], folder: Path, screen: Console) -> int:
    """Tables, results.csv, results.png and settings.png from the content of a results.json."""
    if not any(cell["phase"] == "test" for cell in results["cells"]):
        say(screen, "no method has its test yet: there is nothing to compare", "yellow")
        return Exit.OK
    caption = machine.caption(results)
    if results["absent"]:
        caption += "; not in this version: " + ", ".join(results["absent"])
    evidence_report.write_csv(folder / "results.csv", results)
    evidence_report.plot(folder / "results.png", results, caption)
    written = [name for name in ("results.json", "results.csv", "results.png") if (folder / name).exists()]
    if evidence_report.plot_settings(folder / "settings.png", results, caption):
        written.append("settings.png")
    for table in evidence_report.tables(results, screen.width):
        screen.print(table)
    say(screen, evidence_report.NOTE, "dim")
    say(screen, f"written to {folder}: {', '.join(written)}")
    return Exit.OK


def _fail(screen: Console, message: str, code: Exit) -> Exit:
    say(screen, f"error: {message}", "red")
    return code


if __name__ == "__main__":
    sys.exit(main())
