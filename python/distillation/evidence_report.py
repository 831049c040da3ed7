"""The comparison's table, CSV and plots, all from results.json alone."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich import box
from rich.table import Table
from scipy import stats

from distillation.contenders import BY_NAME, METHODS
from distillation.study import chosen

SCHEMA = 1
_WIDE = 110  # columns of a screen that has room for the settings
COLOURS = {"alone": "#7f7f7f", "kd": "#c9a400", "dkd": "#b0722a", "mcld": "#1f6fb4", "other": "#8e6bbf"}
Results = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % t-interval."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """The 95 % t-interval of the mean; infinitely wide for one value."""
    n = len(values)
    if n < 2:
        return Interval(values[0], math.inf)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), half)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one batch size; differences are paired by the seed."""

    method: str
    batch: int
    seeds: int
    accuracy: Interval
    against_alone: Interval | None
    against_kd: Interval | None
    setting: dict[str, float]
    at_edge: tuple[str, ...]  # values of the setting that stand at an end of their grid
    tried: int  # settings

    def record(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "batch": self.batch,
            "method": self.method,
            "title": BY_NAME[self.method].title,
            "seeds": self.seeds,
            "settings_tried": self.tried,
            "setting": " ".join(f"{name}={value:g}" for name, value in self.setting.items()),
            "at_edge_of_grid": " ".join(self.at_edge),
        }
        for name in ("accuracy", "against_alone", "against_kd"):
            interval = getattr(self, name)
            made[name] = None if interval is None else round(interval.mean, 5)
            made[f"{name}_half_width"] = None if interval is None else round(interval.half, 5)
        return made


def rows(results: Results) -> list[Row]:
    """The methods that have a test, by batch size, in the order of the table."""
    tests = {(cell["method"], cell["batch"]): cell for cell in results["cells"] if cell["phase"] == "test"}
    tuning = {(cell["method"], cell["batch"]): cell for cell in results["cells"] if cell["phase"] == "validation"}
    made = []
    for batch in sorted({batch for _, batch in tests}):
        for name in [method.name for method in METHODS if (method.name, batch) in tests]:
            own = _by_seed(tests[name, batch])
            compared = [
                None
                if base == name or (base, batch) not in tests
                else interval([own[seed] - other for seed, other in _by_seed(tests[base, batch]).items()])
                for base in ("alone", "kd")
            ]
            setting = tests[name, batch]["students"][0]["setting"]
            grid = _settings(tuning[name, batch]) if (name, batch) in tuning else [setting]
            made.append(
                Row(
                    method=name,
                    batch=batch,
                    seeds=len(own),
                    accuracy=interval(list(own.values())),
                    against_alone=compared[0],
                    against_kd=compared[1],
                    setting=setting,
                    at_edge=_edges(setting, grid),
                    tried=len(grid),
                )
            )
    return made


def _by_seed(cell: dict[str, Any]) -> dict[int, float]:
    return {student["seed"]: student["accuracy"] for student in cell["students"]}


def _settings(cell: dict[str, Any]) -> list[dict[str, float]]:
    settings: list[dict[str, float]] = []
    for student in cell["students"]:
        if student["setting"] not in settings:
            settings.append(student["setting"])
    return settings


def _edges(setting: dict[str, float], grid: Sequence[dict[str, float]]) -> tuple[str, ...]:
    if len(grid) == 1:
        return ()
    values = {name: [other[name] for other in grid] for name in setting}
    return tuple(name for name, value in setting.items() if value in (min(values[name]), max(values[name])))


def tables(results: Results, width: int) -> list[Table]:
    """A table for each batch size; accuracies in percent. The settings are left out where the screen is narrow."""
    made = []
    all_rows = rows(results)
    for batch in sorted({row.batch for row in all_rows}):
        seeds = max(row.seeds for row in all_rows if row.batch == batch)
        title = f"batch {batch}: accuracy on the test images, %, {seeds} seeds"
        table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
        for name in ("method", "mean", "against alone", "against KD"):
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        if width >= _WIDE:
            table.add_column("setting")
        else:
            table.caption, table.caption_justify = f"left out at {width} columns, see the CSV: setting", "left"
        for row in (row for row in all_rows if row.batch == batch):
            edges = "".join(f" ({name} at the grid's end)" for name in row.at_edge if name in ("weight", "rate"))
            setting = " ".join(f"{name} {value:g}" for name, value in row.setting.items())
            cells = [str(row.accuracy), signed(row.against_alone), signed(row.against_kd)]
            table.add_row(BY_NAME[row.method].title, *cells, *([setting + edges] if width >= _WIDE else []))
        made.append(table)
    return made


def signed(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{100 * interval.mean:+.1f} ± {100 * interval.half:.1f}" + ("" if interval.excludes_zero else " ~")


NOTE = (
    "mean ± half of the 95 % t-interval over the seeds; differences are paired by the seed; ~: the interval holds 0. "
    "The intervals are not corrected for the number of comparisons."
)


def write_csv(path: Path, results: Results) -> None:
    records = [row.record() for row in rows(results)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _colour(name: str) -> str:
    return COLOURS.get(name.split("-")[0], COLOURS["other"])


def plot(path: Path, results: Results, caption: str) -> None:
    """Mean and interval of every method, a panel for each batch size."""
    all_rows = rows(results)
    batches = sorted({row.batch for row in all_rows})
    names = [method.name for method in METHODS if any(row.method == method.name for row in all_rows)]
    size = (max(9.0, 2.5 + 3.7 * len(batches)), 1.7 + 0.32 * len(names))
    figure, axes = plt.subplots(1, len(batches), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, batch in zip(axes[0], batches):
        here = {row.method: row for row in all_rows if row.batch == batch}
        if "alone" in here:
            axis.axvline(100 * here["alone"].accuracy.mean, color=COLOURS["alone"], linewidth=1, linestyle="--")
        for position, name in enumerate(names):
            if name not in here:
                continue
            accuracy, colour = here[name].accuracy, _colour(name)
            half = 0.0 if math.isinf(accuracy.half) else 100 * accuracy.half
            filled = BY_NAME[name].is_tuned
            axis.errorbar(
                100 * accuracy.mean, position, xerr=half, color=colour, marker="o", markersize=6, capsize=3,
                markerfacecolor=colour if filled else "white",
            )  # fmt: skip
            axis.annotate(
                f"{100 * accuracy.mean:.1f}", (100 * accuracy.mean + half, position), (5, 0),
                textcoords="offset points", va="center", fontsize=8, color=colour,
            )  # fmt: skip
        axis.set_title(f"batch {batch}", loc="left", fontsize=10)
        axis.set_xlabel("accuracy on the test images, %")
        axis.margins(x=0.14)
    axes[0][0].set_yticks(range(len(names)), [BY_NAME[name].title for name in names])
    axes[0][0].invert_yaxis()
    _finish(figure, axes[0], path, results, caption, "dots: means and 95 % t-intervals; hollow: not tuned here.")


def plot_settings(path: Path, results: Results, caption: str, method: str = "mcld") -> bool:
    """Validation accuracy over temperature and weight, a panel for each batch size; False where it was not tuned."""
    cells = [cell for cell in results["cells"] if cell["phase"] == "validation" and cell["method"] == method]
    if not cells:
        return False
    cells.sort(key=lambda cell: cell["batch"])
    figure, axes = plt.subplots(
        1, len(cells), figsize=(max(9.0, 1.0 + 3.9 * len(cells)), 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, cell in zip(axes[0], cells):
        settings = _settings(cell)
        temperatures, weights = (sorted({s[name] for s in settings}) for name in ("temperature", "weight"))
        grid = [[math.nan] * len(temperatures) for _ in weights]
        for setting in settings:
            values = [s["accuracy"] for s in cell["students"] if s["setting"] == setting]
            grid[weights.index(setting["weight"])][temperatures.index(setting["temperature"])] = statistics.fmean(
                values
            )
        axis.imshow([[100 * value for value in line] for line in grid], cmap="Blues", origin="lower", aspect="auto")
        best, low = max(map(max, grid)), min(map(min, grid))
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                dark = value > low + 0.6 * (best - low)
                text = f"{100 * value:.1f}" + ("*" if value == best else "")
                axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "#222222")
        axis.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
        axis.set_yticks(range(len(weights)), [f"{w:g}" for w in weights])
        axis.set_title(f"batch {cell['batch']}", loc="left", fontsize=10)
        axis.set_xlabel("temperature")
    axes[0][0].set_ylabel("weight of each term")
    seeds = results["plan"]["tuning_seeds"]
    _finish(
        figure, axes[0], path, results, caption,
        f"{BY_NAME[method].title}: accuracy on the validation images, %, mean of {seeds} seed{'s' * (seeds != 1)}; *: "
        "the best.",
    )  # fmt: skip
    return True


def _finish(figure: Any, axes: Any, path: Path, results: Results, caption: str, legend: str) -> None:
    for axis in axes:
        if not axis.images:
            axis.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    plan, teacher = results["plan"], results["teacher"]
    setting = (
        f"digits: {plan['images']} training images, {100 * plan['label_noise']:.0f} % of the labels wrong; "
        f"student {plan['model']}; teacher {100 * teacher['test']:.1f} % on the test images"
    )
    figure.supxlabel(f"{legend}\n{setting}\n{caption}", fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def choices(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """The chosen setting by method and batch size."""
    settings: dict[str, dict[str, dict[str, float]]] = {}
    for cell in results["cells"]:
        if cell["phase"] == "validation":
            settings.setdefault(cell["method"], {})[str(cell["batch"])] = chosen(cell)
    return settings
