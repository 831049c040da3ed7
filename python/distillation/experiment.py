"""Distil a small network from a large one with cross-entropy + MCLD: ``python python/train.py`` without --config.

By default on the handwritten digits that come with scikit-learn, so nothing is downloaded. The teacher learns from
half of the images with their right labels; the student sees 200 of these, three in ten of them wrongly labelled.
Every student of a seed starts from the same weights and sees the same batches; they differ in the loss alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from bench.harness import machine, programs, screen
from bench.harness.programs import Exit, positive
from bench.harness.screen import say
from distillation import engine, report
from distillation.data import DATASETS, Splits, loader
from distillation.models import MODELS, parameters
from distillation.objectives import Contrastive, CrossEntropy, Objective, SoftTargets
from mcld_kernels import MCLDLoss, backends

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("alone", "soft-targets", "mcld")


def _methods(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(METHODS):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(METHODS)}; got {text!r}")
    return tuple(name for name in METHODS if name in names)


def parser() -> argparse.ArgumentParser:
    made = programs.Parser(
        prog="train.py",
        description="Distil a small network from a large one with cross-entropy + MCLD. Data, models and options of "
        "your own: train.py --config FILE, of which `train.py --config x --help` tells.",
        epilog=programs.EXIT_CODES,
    )
    data = made.add_argument_group("data and models")
    data.add_argument("--data", choices=list(DATASETS), default="digits")
    data.add_argument("--images", type=positive, default=200, help="the student's training images (default: 200)")
    data.add_argument("--label-noise", type=float, default=0.3, help="fraction of wrong labels (default: 0.3)")
    data.add_argument("--split", choices=("test", "validation"), default="test", help="validation: to choose options")
    data.add_argument("--teacher", type=Path, metavar="PATH", help="teacher.pt of an earlier run, not trained again")
    data.add_argument("--teacher-model", choices=list(MODELS), default="cnn")
    data.add_argument("--student-model", choices=list(MODELS), default="small-cnn")
    loss = made.add_argument_group("the loss")
    loss.add_argument("--methods", type=_methods, default=METHODS, help=f"comma-separated, of {','.join(METHODS)}")
    loss.add_argument("--weight", type=float, nargs=3, default=(3.0, 3.0, 3.0), metavar=("I", "S", "C"))
    loss.add_argument("--temperature", type=float, nargs="+", default=[0.5], help="one, or one a term (default: 0.5)")
    loss.add_argument("--warmup", type=float, default=10, help="epochs until the category term has its full weight")
    loss.add_argument("--backend", default="auto", help="of mcld_kernels (default: auto)")
    how = made.add_argument_group("training")
    how.add_argument("--seeds", type=positive, default=5, help="students of each kind (default: 5)")
    how.add_argument("--first-seed", type=int, default=0)
    how.add_argument("--epochs", type=positive, default=80, help="of a student (default: 80)")
    how.add_argument("--teacher-epochs", type=positive, default=30)
    how.add_argument("--batch", type=positive, default=64)
    how.add_argument("--rate", type=float, default=1e-2, help="a student's peak learning rate")
    how.add_argument("--teacher-rate", type=float, default=3e-3)
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--threads", type=programs.threads, default=1, help="on a CPU (default: 1, the fastest here)")
    how.add_argument("--output", type=Path, metavar="DIR", help="default: runs/<data>-<date and time>")
    return made


class Screen:
    """A progress bar with the means of the last epoch; in a pipe, a line for each training."""

    def __init__(self, console: Console):
        self.console = console
        columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(
            *columns, TextColumn("{task.fields[means]}"), console=console, disable=not console.is_terminal
        )

    def training(self, title: str, epochs: int) -> engine.EpochReport:
        task = self.bar.add_task(title, total=epochs, means="")

        def report_epoch(epoch: int, means: dict[str, float]) -> None:
            text = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "loss")
            self.bar.update(task, completed=epoch + 1, means=text)
            if not self.console.is_terminal and epoch + 1 == epochs:
                say(self.console, f"{title}: {epochs} epochs  {text}")
                self.console.file.flush()

        return report_epoch


def objective(name: str, options: argparse.Namespace) -> Objective:
    if name == "alone":
        return CrossEntropy()
    if name == "soft-targets":
        return SoftTargets()
    temperature = options.temperature[0] if len(options.temperature) == 1 else tuple(options.temperature)
    weight = tuple(options.weight)
    return Contrastive(MCLDLoss(temperature=temperature, weight=weight, warmup=options.warmup, backend=options.backend))


def make_teacher(
    options: argparse.Namespace, splits: Splits, device: torch.device, folder: Path, screen: Screen
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a teacher, or load one; save it in the folder and evaluate it."""
    held_out = loader(splits.held_out(options.split), 512, train=False)
    if options.teacher is not None:
        model, name = engine.load(options.teacher, classes=splits.classes, data=options.data)
    else:
        name = options.teacher_model
        torch.manual_seed(0)
        model = MODELS[name](splits.classes)
        engine.fit(
            model,
            loader(splits.teacher, options.batch, train=True),
            CrossEntropy(),
            epochs=options.teacher_epochs,
            rate=options.teacher_rate,
            device=device,
            held_out=held_out,
            report=screen.training("teacher", options.teacher_epochs),
        )
    score = engine.accuracy(model, held_out, device)
    engine.save(folder / "teacher.pt", model, name, classes=splits.classes, data=options.data)
    return model, {
        "model": name,
        "accuracy": score,
        "parameters": parameters(model),
        "loaded": options.teacher is not None,
    }


class Experiment:
    """Everything that a run trains. ``results`` is complete after every student."""

    def __init__(self, options: argparse.Namespace):
        """Bad options raise ValueError, TypeError or RuntimeError here, before any training."""
        self.options = options
        self.device = torch.device(options.device)
        self.objectives = {name: objective(name, options) for name in options.methods}
        self.splits = DATASETS[options.data](options.images, options.label_noise, 0)
        if options.teacher is not None:
            engine.load(options.teacher, classes=self.splits.classes, data=options.data)
        logits = torch.zeros(1, self.splits.classes, device=self.device)
        if options.backend != "auto" and "mcld" in options.methods:
            reason = backends.unsupported_reason(options.backend, logits, logits, False)
            if reason is not None:
                raise ValueError(f"backend {options.backend!r} cannot run: {reason}")
        shown = {key: value for key, value in vars(options).items() if key not in ("output", "teacher")}
        student = MODELS[options.student_model](self.splits.classes)
        self.results: dict[str, Any] = {
            "schema": report.SCHEMA,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "complete": False,
            "options": shown,
            "machine": machine.describe(self.device),
            "versions": machine.versions(),
            **machine.commit(),
            "wrong_labels": self.splits.flipped,
            "student": {"model": options.student_model, "parameters": parameters(student)},
            "methods": {name: {"accuracy": [], "seconds": [], "history": []} for name in self.objectives},
        }

    def run(self, folder: Path, screen: Screen, save: Callable[[dict[str, Any]], None]) -> None:
        """Train the teacher and every student; ``save`` receives the results after each of them."""
        teacher, self.results["teacher"] = make_teacher(self.options, self.splits, self.device, folder, screen)
        save(self.results)
        for seed in range(self.options.first_seed, self.options.first_seed + self.options.seeds):
            for name in self.objectives:
                self._train_student(name, seed, teacher, screen)
                self.results["machine"]["load_1min_end"] = machine.load()
                save(self.results)
        self.results["complete"] = True
        save(self.results)

    def _train_student(self, name: str, seed: int, teacher: nn.Module, screen: Screen) -> None:
        options, splits = self.options, self.splits
        held_out = loader(splits.held_out(options.split), 512, train=False)
        torch.manual_seed(seed)  # the same weights and the same shifts for every method
        student = MODELS[options.student_model](splits.classes)
        start = time.perf_counter()
        history = engine.fit(
            student,
            loader(splits.student, options.batch, train=True, seed=seed),
            self.objectives[name],
            epochs=options.epochs,
            rate=options.rate,
            device=self.device,
            teacher=teacher,
            held_out=held_out,
            report=screen.training(f"{name}, seed {seed}", options.epochs),
        )
        seconds = time.perf_counter() - start
        accuracy = engine.accuracy(student, held_out, self.device)
        method = self.results["methods"][name]  # from here on nothing waits: an interrupt leaves no half entry
        method["seconds"].append(seconds)
        method["accuracy"].append(accuracy)
        method["history"].append(history.epochs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and report; returns one of the exit codes of ``--help``."""
    options = parser().parse_args(arguments)
    programs.make_output_printable()
    console = screen.console()
    threads = torch.get_num_threads()
    default = ROOT / "runs" / f"{options.data}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        torch.set_num_threads(options.threads)
        try:
            if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
                return _fail(console, "this machine, or this build of torch, has no CUDA device", Exit.NO_DEVICE)
            experiment = Experiment(options)
        except (ValueError, TypeError, RuntimeError) as fault:
            return _fail(console, str(fault), Exit.USAGE)
        with programs.claimed(options.output, default, "results.json") as folder:
            return _train(experiment, folder, console)
    except programs.FolderInUse as fault:
        return _fail(console, str(fault), Exit.USAGE)
    except OSError as fault:
        return _fail(console, f"the output cannot be written: {fault}", Exit.OUTPUT)
    finally:
        torch.set_num_threads(threads)


def _train(experiment: Experiment, folder: Path, console: Console) -> int:
    """Run the experiment into the folder and report every student that was finished."""
    code, options, results = Exit.OK, experiment.options, experiment.results
    shown = Screen(console)
    try:
        with shown.bar:
            experiment.run(folder, shown, lambda current: report.write_json(folder / "results.json", current))
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
        say(console, "interrupted; the students that were finished are kept", "yellow")
    except engine.Diverged as fault:
        code = _fail(console, str(fault), Exit.FAILED)
    if not report.trained(results):
        console.print("no student was finished")
        return code
    report.plot(folder / "curves.png", results, machine.caption(results))
    say(
        console,
        f"students: {options.images} training images, {results['wrong_labels']} of them wrongly labelled; "
        f"no network is trained on the {options.split} images",
    )
    console.print(report.table(results))
    say(console, f"written to {folder}: results.json, curves.png, teacher.pt")
    return code


def _fail(console: Console, message: str, code: Exit) -> Exit:
    say(console, f"error: {message}", "red")
    return code
