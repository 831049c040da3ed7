"""The results of a run: the table of accuracies, a JSON with everything, a plot of the curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich import box
from rich.table import Table

SCHEMA = 1
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


def trained(results: dict[str, Any]) -> dict[str, Any]:
    """The methods that have a student."""
    return {name: method for name, method in results["methods"].items() if method["accuracy"]}


def table(results: dict[str, Any]) -> Table:
    """Teacher and students: accuracy in percent, mean and standard deviation over the seeds."""
    seeds = max((len(method["accuracy"]) for method in trained(results).values()), default=0)
    made = Table(
        title=f"accuracy on the {results['options']['split']} images, {seeds} seeds",
        header_style="bold",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("model", min_width=29)
    made.add_column("parameters", justify="right")
    made.add_column("accuracy, %", justify="right")
    made.add_column("against\nalone", justify="right")
    made.add_column("s a\ntraining", justify="right")
    teacher = results["teacher"]
    made.add_row("teacher", f"{teacher['parameters']:,}", f"{100 * teacher['accuracy']:.2f}", "", "")
    methods = trained(results)
    alone = methods.get("alone")
    for name, method in methods.items():
        mean, deviation = spread(method["accuracy"])
        gain = "" if alone is None or name == "alone" else f"{100 * (mean - spread(alone['accuracy'])[0]):+.2f}"
        seconds = f"{statistics.fmean(method['seconds']):.1f}"
        cell = f"{100 * mean:.2f} ± {100 * deviation:.2f}"
        made.add_row(TITLES[name], f"{results['student']['parameters']:,}", cell, gain, seconds)
    return made


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one step, so that an interrupted run leaves a valid one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def plot(path: Path, results: dict[str, Any], caption: str) -> None:
    """Accuracy over the epochs for every method, and the terms of the MCLD student's loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    methods = trained(results)
    _plot_accuracy(left, methods, results)
    if "mcld" in methods:
        _plot_terms(right, methods["mcld"]["history"])
    else:
        right.set_axis_off()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    options = results["options"]
    data = f"{options['data']}: {options['images']} training images, {results['wrong_labels']} wrongly labelled"
    figure.supxlabel(f"{data}\n{caption}", fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_accuracy(axis: Any, methods: dict[str, Any], results: dict[str, Any]) -> None:
    split = results["options"]["split"]
    for name, method in methods.items():
        curves = [[100 * epoch["accuracy"] for epoch in history] for history in method["history"]]
        epochs = range(1, len(curves[0]) + 1)
        for curve in curves:
            axis.plot(epochs, curve, color=COLOURS[name], alpha=0.2, linewidth=0.8)
        mean = [statistics.fmean(values) for values in zip(*curves)]
        axis.plot(epochs, mean, color=COLOURS[name], linewidth=2, label=f"{TITLES[name]}: {mean[-1]:.1f}")
    teacher = 100 * results["teacher"]["accuracy"]
    axis.axhline(teacher, color="black", linewidth=1, linestyle="--", label=f"teacher: {teacher:.1f}")
    axis.set_title(f"Accuracy on the {split} images\nmean over the seeds; each seed faintly", loc="left", fontsize=10)
    axis.set(xlabel="epoch", ylabel="accuracy, %")
    axis.legend(frameon=False, loc="lower right", fontsize=9)


def _plot_terms(axis: Any, histories: Sequence[Sequence[dict[str, float]]]) -> None:
    for term, colour in TERMS.items():
        curves = [[epoch[term] for epoch in history if term in epoch] for history in histories]
        mean = [statistics.fmean(values) for values in zip(*curves)]
        axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2)
        axis.annotate(
            term, (len(mean), mean[-1]), (6, 0), textcoords="offset points", va="center", fontsize=9,
            color=colour, annotation_clip=False,
        )  # fmt: skip
    axis.set_title("Loss of the MCLD student on its training images\nunweighted terms", loc="left", fontsize=10)
    axis.set(xlabel="epoch", ylabel="loss, nats")
