"""What a run shows and leaves behind: the table of accuracies, a JSON of everything, a plot of the curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.table import Table

COLOURS = {"alone": "#7f7f7f", "soft-targets": "#c9a400", "mcld": "#1f6fb4"}
TERMS = {"cross-entropy": "#7f7f7f", "instance": "#1f6fb4", "sample": "#d1495b", "category": "#2a9d8f"}
TITLES = {
    "alone": "student alone (cross-entropy)",
    "soft-targets": "student, cross-entropy + soft targets",
    "mcld": "student, cross-entropy + MCLD",
}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: dict[str, Any]) -> Table:
    """Teacher and students: accuracy in percent, mean and standard deviation over the seeds."""
    seeds = results["options"]["seeds"]
    found = Table(title=f"accuracy on the {results['options']['split']} images, {seeds} seeds", header_style="bold")
    found.add_column("model")
    found.add_column("parameters", justify="right")
    found.add_column("accuracy, %", justify="right")
    found.add_column("against alone", justify="right")
    found.add_column("s a training", justify="right")
    teacher = results["teacher"]
    found.add_row("teacher", f"{teacher['parameters']:,}", f"{100 * teacher['accuracy']:.2f}", "", "")
    alone = results["methods"].get("alone")
    for name, method in results["methods"].items():
        mean, deviation = spread(method["accuracy"])
        gain = "" if alone is None or name == "alone" else f"{100 * (mean - spread(alone['accuracy'])[0]):+.2f}"
        seconds = f"{statistics.fmean(method['seconds']):.1f}"
        cell = f"{100 * mean:.2f} ± {100 * deviation:.2f}"
        found.add_row(TITLES[name], f"{results['student']['parameters']:,}", cell, gain, seconds)
    return found


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def plot(path: Path, results: dict[str, Any]) -> None:
    """Accuracy over the epochs for every method (mean, and each seed faintly); the parts of the MCLD student's loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, method in results["methods"].items():
        curves = [[100 * epoch["accuracy"] for epoch in history] for history in method["history"]]
        epochs = range(1, len(curves[0]) + 1)
        for curve in curves:
            left.plot(epochs, curve, color=COLOURS[name], alpha=0.2, linewidth=0.8)
        mean = [statistics.fmean(values) for values in zip(*curves)]
        left.plot(epochs, mean, color=COLOURS[name], linewidth=2, label=TITLES[name])
    teacher = 100 * results["teacher"]["accuracy"]
    left.axhline(teacher, color="black", linewidth=1, linestyle="--", label="teacher")
    left.set(xlabel="epoch", ylabel=f"accuracy on the {results['options']['split']} images, %")
    left.legend(frameon=False, loc="lower right")
    shown = results["methods"].get("mcld")
    if shown is not None:
        for term, colour in TERMS.items():
            curves = [[epoch[term] for epoch in history if term in epoch] for history in shown["history"]]
            mean = [statistics.fmean(values) for values in zip(*curves)]
            right.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2, label=term)
        right.set(xlabel="epoch", ylabel="the MCLD student's loss, unweighted terms")
        right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(TERMS))
    else:
        right.set_axis_off()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
