"""The record of a run: lines on the screen and in a file, CSV, TensorBoard, results.json and curves.png."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.harness import machine
from bench.harness.screen import say
from trainer import settings
from trainer.config import Config
from trainer.faults import OutputFault

SCHEMA = 1
PACKAGES = ("timm", "torchvision", "torchmetrics", "webdataset", "tensorboard", "numpy", "pillow", "PyYAML")
SHARES = ("data", "teacher", "student", "loss", "optimizer")
COLOURS = {
    "loss": "black", "cross-entropy": "#7f7f7f", "instance": "#1f6fb4", "sample": "#d1495b", "category": "#2a9d8f",
    "accuracy": "#1f6fb4", "ema_accuracy": "#c9a400",
    "share_data": "#c7c7c7", "share_teacher": "#c9a400", "share_student": "#1f6fb4", "share_loss": "#d1495b",
    "share_optimizer": "#2a9d8f",
}  # fmt: skip
OTHER = "#8e5ea2"  # the colour of a distillation loss as a whole


def versions() -> dict[str, str | None]:
    made: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            made[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            made[package] = None
    return machine.versions() | made


class Table:
    """A CSV file whose columns may become more. A run that is resumed loses the rows after its checkpoint."""

    def __init__(self, path: Path, key: str, last: float | None):
        self.path, self.rows, self.columns = path, [], [key]
        if last is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if row.get(key) and float(row[key]) <= last]
            self.columns = list(dict.fromkeys([key, *(name for row in self.rows for name in row)]))
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        new = [name for name in row if name not in self.columns]
        self.rows.append(row)
        if new:
            self.columns += new
            self._write()
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _write(self) -> None:
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)


class Silent:
    """The record of every rank but the first: it names its faulty images, and nothing else."""

    def __init__(self, folder: Path):
        self.folder = folder

    def line(self, text: str, style: str = "") -> None: ...

    def begin_epoch(self, epoch: int, steps: int, done: int) -> None: ...

    def advance(self, text: str) -> None: ...

    def step(self, row: dict[str, Any]) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...

    def faults(self, names: Sequence[str]) -> None:
        """Add images that could not be read to faults.txt."""
        if names:
            with (self.folder / "faults.txt").open("a", encoding="utf-8") as file:
                file.write("".join(f"{name}\n" for name in names))

    def save(self, **values: Any) -> None: ...

    def close(self) -> None: ...


class Record(Silent):
    """The record of the first rank, in the run folder."""

    def __init__(self, folder: Path, config: Config, console: Console, *, step: int | None = None):
        """``step``: that of the checkpoint that the run goes on from."""
        super().__init__(folder)
        self.config, self.console = config, console
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(settings.text(config), encoding="utf-8")
            self.log = (folder / "log.txt").open("a", encoding="utf-8")
            self.steps = Table(folder / "steps.csv", "step", step)
            self.epochs = Table(folder / "epochs.csv", "step", step)
        except OSError as fault:
            raise OutputFault(f"the run folder {folder} cannot be written: {fault}") from None
        self.board = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console,
            disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self.bar.start()
        self.task: Any = None
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "state": "running",
            "exit": None,
            "versions": versions(),
            **machine.commit(),
        }

    def line(self, text: str, style: str = "") -> None:
        """A line on the screen and, with the time, in log.txt."""
        say(self.console, text, style)
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.log.flush()

    def begin_epoch(self, epoch: int, steps: int, done: int) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(f"epoch {epoch + 1}", total=steps, completed=done, text="")

    def advance(self, text: str) -> None:
        self.bar.update(self.task, advance=1, text=text)

    def step(self, row: dict[str, Any]) -> None:
        """Values of the last steps, by name."""
        self.steps.add(row)
        self._to_board("train", row)

    def epoch(self, row: dict[str, Any]) -> None:
        self.epochs.add(row)
        self._to_board("epoch", row)

    def _to_board(self, group: str, row: dict[str, Any]) -> None:
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(f"{group}/{name}", value, int(row["step"]))

    def save(self, **values: Any) -> None:
        """Replace results.json and draw curves.png."""
        self.results |= values
        path = self.folder / "results.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(_finite(self.results), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def close(self) -> None:
        self.bar.stop()
        if self.board is not None:
            self.board.close()
        if self.steps.rows or self.epochs.rows:
            plot(self.folder / "curves.png", self)
        self.log.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN: text instead."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a column, where it has any."""
    pairs = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) not in (None, "")]
    return [x for x, _ in pairs], [y for _, y in pairs]


def plot(path: Path, record: Record) -> None:
    """Loss and its parts, accuracy, and where the time of a step went, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    parts = [name for name in record.steps.columns if f"weight_{name}" in record.steps.columns]
    for name in ("loss", *parts):
        x, y = series(record.steps.rows, name)
        style = {"linewidth": 2} if name == "loss" else {"linewidth": 1.4, "alpha": 0.9}
        axes[0].plot(x, y, color=COLOURS.get(name, OTHER), label=f"{name}: {y[-1]:.3g}", **style)
    axes[0].set_title("Training loss and its parts\nparts before their weights", loc="left", fontsize=10)
    axes[0].set(xlabel="step", ylabel="loss, nats")
    for name, label in (("accuracy", "student"), ("ema_accuracy", "average of the student (EMA)")):
        x, y = series(record.epochs.rows, name)
        if x:
            values = [100 * value for value in y]
            axes[1].plot(x, values, color=COLOURS[name], marker="o", markersize=3, label=f"{label}: {values[-1]:.1f}")
    teacher = record.results.get("teacher", {}).get("accuracy")
    if teacher is not None:
        axes[1].axhline(
            100 * teacher, color="black", linewidth=1, linestyle="--", label=f"teacher: {100 * teacher:.1f}"
        )
    axes[1].set_title("Accuracy on the validation images\ntop 1", loc="left", fontsize=10)
    axes[1].set(xlabel="step", ylabel="accuracy, %")
    shares = [(name, series(record.steps.rows, f"share_{name}")) for name in SHARES]
    shares = [(name, values) for name, values in shares if values[0]]
    if shares:
        rows = [[100 * value for value in values[1]] for _, values in shares]
        labels = [f"{name}: {row[-1]:.1f}" for (name, _), row in zip(shares, rows)]
        colours = [COLOURS[f"share_{name}"] for name, _ in shares]
        axes[2].stackplot(shares[0][1][0], rows, labels=labels, colors=colours)
    axes[2].set_title("Share of a step's time\nthe remainder is the program's own", loc="left", fontsize=10)
    axes[2].set(xlabel="step", ylabel="%", ylim=(0, 100))
    for axis in axes:
        axis.grid(alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3}  # inside, it would hide a curve
            axis.legend(frameon=False, fontsize=9, **below)
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color="#777777")
    figure.supxlabel(caption(record.results, record.config), fontsize=8, color="#555555")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def caption(results: dict[str, Any], config: Config) -> str:
    ranks = results.get("ranks", 1)
    run = (
        f"{config.teacher.name or 'no teacher'} to {config.student.name}, {config.loss.name}, {config.data.source}, "
        f"batch {config.batch}, {ranks} rank{'' if ranks == 1 else 's'}, seed {config.seed}"
    )
    return f"{run}\n{machine.caption(results)}" if "machine" in results else run
