"""Distil a small network from a large one with cross-entropy + MCLD and say what it gained: ``python python/train.py``.

By default on the handwritten digits that come with scikit-learn, so nothing is downloaded. The teacher learns from
half of the images with their right labels; the student sees 200 of these, three in ten of them wrongly labelled.
Every student of a seed starts from the same weights and sees the same batches; they differ in the loss alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # after the installed packages: an installed mcld_kernels comes first

import torch  # noqa: E402
from distillation import engine, report  # noqa: E402
from distillation.data import DATASETS, Splits, loader  # noqa: E402
from distillation.models import MODELS, parameters  # noqa: E402
from distillation.objectives import Contrastive, CrossEntropy, Objective, SoftTargets  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from torch import nn  # noqa: E402

from mcld_kernels import MCLDLoss  # noqa: E402

METHODS = ("alone", "soft-targets", "mcld")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _methods(text: str) -> tuple[str, ...]:
    wanted = [name.strip() for name in text.split(",")]
    if not set(wanted) <= set(METHODS):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(METHODS)}; got {text!r}")
    return tuple(name for name in METHODS if name in wanted)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.partition("\n")[0].partition(":")[0])
    data = found.add_argument_group("data and models")
    data.add_argument("--data", choices=list(DATASETS), default="digits")
    data.add_argument("--images", type=_positive, default=200, help="the student's training images (default: 200)")
    data.add_argument("--label-noise", type=float, default=0.3, help="share of wrong labels among them (default: 0.3)")
    data.add_argument("--split", choices=("test", "validation"), default="test", help="validation: to choose options")
    data.add_argument("--teacher", type=Path, metavar="PATH", help="teacher.pt of an earlier run, not trained again")
    data.add_argument("--teacher-model", choices=list(MODELS), default="cnn")
    data.add_argument("--student-model", choices=list(MODELS), default="small-cnn")
    loss = found.add_argument_group("the loss")
    loss.add_argument("--methods", type=_methods, default=METHODS, help=f"comma-separated, of {','.join(METHODS)}")
    loss.add_argument("--weight", type=float, nargs=3, default=(3.0, 3.0, 3.0), metavar=("I", "S", "C"))
    loss.add_argument("--temperature", type=float, nargs="+", default=[0.5], help="one, or one a term (default: 0.5)")
    loss.add_argument("--warmup", type=float, default=10, help="epochs until the category term has its full weight")
    loss.add_argument("--backend", default="auto", help="of mcld_kernels (default: auto)")
    how = found.add_argument_group("training")
    how.add_argument("--seeds", type=_positive, default=5, help="students of each kind (default: 5)")
    how.add_argument("--first-seed", type=int, default=0)
    how.add_argument("--epochs", type=_positive, default=80, help="of a student (default: 80)")
    how.add_argument("--teacher-epochs", type=_positive, default=30)
    how.add_argument("--batch", type=_positive, default=64)
    how.add_argument("--rate", type=float, default=1e-2, help="a student's peak learning rate")
    how.add_argument("--teacher-rate", type=float, default=3e-3)
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument(
        "--threads", type=_positive, default=1, help="on a CPU (default: 1; small networks gain by no more)"
    )
    how.add_argument("--output", type=Path, metavar="DIR", help="default: runs/<data>-<date and time>")
    return found


class Screen:
    """The progress bar, with the means of the last epoch beside it."""

    def __init__(self, console: Console):
        columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[means]}"), console=console)

    def training(self, what: str, epochs: int) -> engine.EpochReport:
        task = self.bar.add_task(what, total=epochs, means="")

        def report_epoch(epoch: int, means: dict[str, float]) -> None:
            text = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "loss")
            self.bar.update(task, completed=epoch + 1, means=text)

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
    """Train a teacher, or load one; either way it is saved in the folder and evaluated."""
    held_out = loader(splits.held_out(options.split), 512, train=False)
    if options.teacher is not None:
        model, saved = engine.load(options.teacher, splits.classes)
        name = saved["model"]
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
    engine.save(folder / "teacher.pt", model, name, splits.classes, data=options.data)
    return model, {
        "model": name,
        "accuracy": score,
        "parameters": parameters(model),
        "loaded": options.teacher is not None,
    }


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Train everything; the results as plain values."""
    device = torch.device(options.device)
    objectives = {name: objective(name, options) for name in options.methods}  # bad options raise before any training
    splits = DATASETS[options.data](options.images, options.label_noise, 0)
    held_out = loader(splits.held_out(options.split), 512, train=False)
    screen = Screen(console)
    with screen.bar:
        teacher, facts = make_teacher(options, splits, device, folder, screen)
        methods: dict[str, Any] = {name: {"accuracy": [], "seconds": [], "history": []} for name in objectives}
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name, loss in objectives.items():
                torch.manual_seed(seed)  # the same weights and the same shifts for every method
                student = MODELS[options.student_model](splits.classes)
                start = time.perf_counter()
                history = engine.fit(
                    student,
                    loader(splits.student, options.batch, train=True, seed=seed),
                    loss,
                    epochs=options.epochs,
                    rate=options.rate,
                    device=device,
                    teacher=teacher,
                    held_out=held_out,
                    report=screen.training(f"{name}, seed {seed}", options.epochs),
                )
                methods[name]["seconds"].append(time.perf_counter() - start)
                methods[name]["accuracy"].append(engine.accuracy(student, held_out, device))
                methods[name]["history"].append(history.epochs)
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {
        "options": {key: value for key, value in shown.items() if key not in ("output", "teacher")},
        "wrong_labels": splits.flipped,
        "torch": torch.__version__,
        "teacher": facts,
        "student": {"model": options.student_model, "parameters": parameters(student)},
        "methods": methods,
    }


def main(arguments: list[str] | None = None) -> int:
    """0; 2 on bad arguments."""
    options = parser().parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    threads = torch.get_num_threads()
    folder = options.output or ROOT / "runs" / f"{options.data}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError("this machine, or this build of torch, has no CUDA device")
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(options.threads)
        results = run(options, folder, console)
    except (ValueError, TypeError, RuntimeError, OSError) as fault:
        console.print(f"[red]error:[/red] {fault}", highlight=False)
        return 2
    finally:
        torch.set_num_threads(threads)
    report.write_json(folder / "results.json", results)
    report.plot(folder / "curves.png", results)
    console.print(
        f"students: {options.images} training images, {results['wrong_labels']} of them wrongly labelled; "
        f"the {options.split} images train nobody"
    )
    console.print(report.table(results))
    console.print(f"written to {folder}: results.json, curves.png, teacher.pt", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
