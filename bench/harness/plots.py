"""Time and memory against batch size, from the records of a JSON: one row of panels a group, one colour a provider."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

# Fixed, so that a provider looks the same in every plot; told apart without red against green.
STYLE = {
    "reference": ("#7f7f7f", "o"),
    "compile": ("#b0722a", "s"),
    "library": ("#c9a400", "D"),
    "torch": ("#1f6fb4", "^"),
    "triton": ("#d1495b", "v"),
    "cuda": ("#2a9d8f", "P"),
    "hopper": ("#17594f", "p"),
    "sdpa": ("#8e6bbf", "X"),
    "cudnn": ("#5b3a8c", "*"),
    "inf-cl": ("#e58fb1", "<"),
    "info-nce": ("#9ec9e8", ">"),
    "metric-learning": ("#4d4d4d", "h"),
}


def plot(records: Iterable[dict[str, Any]], path: Path, caption: str) -> Path | None:
    """Write the figure; None where no row has a speed."""
    groups: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.get("time"):
            key = (record["classes"], record["dtype"], tuple(record["terms"]), record["mode"])
            groups[key][record["provider"]].append(record)
    if not groups:
        return None
    rows = len(groups)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.6 * rows + 1.0), squeeze=False, layout="constrained")
    shown: dict[str, Any] = {}
    for (left, right), (key, lines) in zip(axes, groups.items()):
        for provider, points in lines.items():
            points = sorted(points, key=lambda record: record["batch"])
            colour, marker = STYLE.get(provider, ("#000000", "."))
            batch = [record["batch"] for record in points]
            times = [[1e3 * record["time"][field] for record in points] for field in ("median_s", "p20_s", "p80_s")]
            (shown[provider],) = left.plot(batch, times[0], color=colour, marker=marker, markersize=6, linewidth=1.8)
            left.fill_between(batch, times[1], times[2], color=colour, alpha=0.18, linewidth=0)
            held = [(b, r["peak_extra_bytes"] / 2**20) for b, r in zip(batch, points) if r.get("peak_extra_bytes")]
            if held:
                right.plot(*zip(*held), color=colour, marker=marker, markersize=6, linewidth=1.8)
        batches = sorted({record["batch"] for points in lines.values() for record in points})
        classes, dtype, terms, mode = key
        what = "all three terms" if len(terms) == 3 else " + ".join(terms)
        left.set_title(f"C = {classes}, {dtype}, {what}, {mode}", loc="left", fontsize=10)
        _dress(left, batches, "time of a step, ms (median, p20 to p80)")
        _dress(right, batches, "peak extra memory, MiB")
    order = [name for name in STYLE if name in shown] + [name for name in shown if name not in STYLE]
    handles = [shown[name] for name in order]
    figure.legend(handles, order, loc="outside upper center", ncols=min(8, len(order)), frameon=False)
    figure.supxlabel(caption, fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _dress(axis: Any, batches: list[int], label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(batches[0] / 1.25, batches[-1] * 1.25)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    low, high = axis.get_ylim()
    widen = max(1.0, (8 / (high / low)) ** 0.5)  # less than a factor of eight would show differences that are noise
    low, high = low / widen, high * widen
    axis.set_ylim(low, high)
    if high / low < 100:  # a decade's ticks alone would leave the axis with one number
        axis.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:.0e}"[0] in "25" else "")
        )
    else:
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("batch size B")
    axis.set_ylabel(label)
    axis.grid(True, which="major", alpha=0.35, linewidth=0.7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
