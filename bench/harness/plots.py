"""Time and memory against batch size, from the records of a JSON.

A row of panels for each group of cases that differ in the batch size alone, a colour for each provider; bars where
there is one batch size. ``python -m bench.harness.plots results.json ... --output results.png`` draws recorded runs,
several in one figure.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench.harness import machine, memory, programs
from bench.harness.programs import Exit

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
    "pml-supcon": ("#6b6b6b", "H"),
    "lightly": ("#a5527a", "d"),
    "info-nce-queue": ("#7fb2d9", "8"),
}
_LABEL_POINTS = 11.0  # the least vertical distance of two labels
_LABEL_AWAY = 9.0  # points from the end of a line to its label
_LETTER_POINTS = 4.5  # about the width of a letter of a label
_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]

Record = dict[str, Any]
Piece = tuple[tuple[float, float], tuple[float, float]]  # of a line, from one point to the next
Lines = dict[str, dict[int, Record]]  # provider -> batch -> record with a time


@dataclass(frozen=True)
class Label:
    """The text at the end of a line; ``above`` it where the other lines go on to the right."""

    axis: Any
    provider: str
    x: float
    y: float
    text: str
    above: bool
    passing: tuple[Piece, ...] = ()  # pieces of lines that go on to the right


def plot(records: Iterable[Record], path: Path, caption: str) -> Path | None:
    """Write the figure; None where no row has a speed."""
    records = list(records)
    groups: dict[tuple[Any, ...], Lines] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record.get("time"):
            groups[_group(record)][record["provider"]][record["batch"]] = record
    if not groups:
        return None
    ended = {
        (_group(record), record["provider"])
        for record in records
        if record["status"] == "not run" and memory.SHORTAGE in (record["reason"] or "")
    }
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(13, 3.7 * len(groups) + 0.7), squeeze=False, layout="constrained"
    )
    labels: list[Label] = []
    for (left, right), (group, lines) in zip(axes, groups.items()):
        for axis, quantity, unit, values in ((left, *_TIME), (right, *_MEMORY)):
            axis.set_title(f"{quantity}\n{_title(group)}", loc="left", fontsize=10)
            shown = {name: lines[name] for name in sorted(lines, key=_order)}
            batches = sorted({batch for points in shown.values() for batch in points})
            if len(batches) == 1:
                _bars(axis, shown, batches[0], values, unit)
            else:
                stopped = {name for name in shown if (group, name) in ended}
                labels += _draw_lines(axis, shown, values, stopped)
                _dress(axis, batches, unit)
    figure.supxlabel(caption, fontsize=8, color="#555555")
    figure.canvas.draw()
    _place(labels)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.08)  # labels at the right edge are not cut
    plt.close(figure)
    return path


def _group(record: Record) -> tuple[Any, ...]:
    loss = record.get("loss", "mcld")
    columns = record["classes"], record.get("candidates", 0)
    return loss, *columns, record["dtype"], tuple(record["terms"]), record["mode"]


def _title(group: tuple[Any, ...]) -> str:
    loss, classes, candidates, dtype, terms, mode = group
    what = loss if loss != "mcld" else "all three terms" if len(terms) == 3 else " + ".join(terms)
    of_candidates = f"m = {candidates:,}, " if candidates else ""
    return f"{of_candidates}C = {classes:,}, {dtype}, {what}, {mode}"


def _order(provider: str) -> int:
    return list(STYLE).index(provider) if provider in STYLE else len(STYLE)


def _milliseconds(record: Record) -> tuple[float, float, float] | None:
    return tuple(1e3 * record["time"][field] for field in ("median_s", "p20_s", "p80_s"))  # type: ignore[return-value]


def _mebibytes(record: Record) -> tuple[float, float, float] | None:
    return (record["peak_extra_bytes"] / 2**20,) * 3 if record.get("peak_extra_bytes") else None


# The quantity, its unit, and the median with its spread from a record.
_TIME = ("Time of one step", "ms (median, p20 to p80)", _milliseconds)
_MEMORY = ("Peak extra memory", "MiB", _mebibytes)


def _ratio(values: Any, points: dict[int, Record], eager: dict[int, Record]) -> tuple[int, str] | None:
    """The largest batch of both, and the text of the ratio there: how many times as fast, or the part of the memory."""
    common = [batch for batch in points if batch in eager and values(points[batch]) and values(eager[batch])]
    if not common or points is eager:
        return None
    batch = max(common)
    own, of_eager = values(points[batch])[0], values(eager[batch])[0]
    ratio = of_eager / own if values is _milliseconds else own / of_eager
    return batch, f"{ratio:.2g}x" if ratio < 9.95 else f"{ratio:.0f}x"


def _draw_lines(axis: Any, lines: Lines, values: Any, stopped: set[str]) -> list[Label]:
    """Draw a line for each provider; returns the labels of their ends."""
    labels = []
    last = max(batch for points in lines.values() for batch in points)
    for provider, points in lines.items():
        drawn = [(batch, *value) for batch, record in sorted(points.items()) if (value := values(record))]
        if not drawn:
            continue
        colour, marker = STYLE.get(provider, ("#000000", "."))
        batch, median, low, high = zip(*drawn)
        axis.plot(batch, median, color=colour, marker=marker, markersize=5.5, linewidth=1.8)
        axis.fill_between(batch, low, high, color=colour, alpha=0.18, linewidth=0)
        text = provider
        ratio = _ratio(values, points, lines.get("reference", {}))
        if ratio is not None:
            text += f" {ratio[1]}" + (f" at {ratio[0]:,}" if ratio[0] != batch[-1] else "")
        if provider in stopped:
            axis.plot(batch[-1], median[-1], marker="x", markersize=11, markeredgewidth=2, color=colour)
            text += ", memory ends"
        others = [value[0] for line in lines.values() if batch[-1] in line and (value := values(line[batch[-1]]))]
        above = batch[-1] != last and median[-1] == max(others)
        passing = tuple(piece for line in lines.values() if (piece := _piece(line, batch[-1], values)) is not None)
        labels.append(Label(axis, provider, batch[-1], median[-1], text, above, passing))
    return labels


def _piece(points: dict[int, Record], batch: int, values: Any) -> Piece | None:
    """The piece of a line that begins at a batch size and goes on to the right."""
    drawn = [(at, value[0]) for at, record in sorted(points.items()) if at >= batch and (value := values(record))]
    return (drawn[0], drawn[1]) if len(drawn) > 1 and drawn[0][0] == batch else None


def _bars(axis: Any, lines: Lines, batch: int, values: Any, unit: str) -> None:
    """One bar for each provider, with its value and its ratio."""
    eager = lines.get("reference", {})
    names = [name for name in lines if values(lines[name][batch])]
    for position, name in enumerate(reversed(names)):
        median, low, high = values(lines[name][batch])
        colour, _ = STYLE.get(name, ("#000000", "."))
        axis.barh(position, median, color=colour, height=0.65)
        if high > low:
            axis.plot([low, high], [position, position], color="#222222", linewidth=1.2)
        ratio = _ratio(values, lines[name], eager)
        text = (f"{median:,.0f}" if median >= 100 else f"{median:.3g}") + (f"   {ratio[1]}" if ratio else "")
        axis.annotate(text, (max(median, high), position), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set_xlabel(f"{unit}, B = {batch:,}")
    axis.xaxis.set_major_formatter(_plain())
    axis.margins(x=0.2)
    axis.grid(True, axis="x", alpha=0.35, linewidth=0.7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _place(labels: Sequence[Label]) -> None:
    """Write each label beside the end of its line, those of one end apart from one another."""
    ends: dict[tuple[int, float], list[tuple[float, Label]]] = defaultdict(list)
    for label in labels:
        points = label.axis.transData.transform((label.x, label.y))[1] / label.axis.figure.dpi * 72
        if label.above:
            _annotate(label, (-8, 8), "right")
        else:
            ends[id(label.axis), label.x].append((points, label))
    for entries in ends.values():
        entries.sort(key=lambda entry: entry[0])
        placed: list[float] = []
        for points, _ in entries:
            placed.append(max(points, placed[-1] + _LABEL_POINTS) if placed else points)
        shift = sum(points - at for (points, _), at in zip(entries, placed)) / len(placed)  # centred on the line ends
        boxes = [(label, at + shift) for (_, label), at in zip(entries, placed)]
        if any(_crosses(piece, label, at) for label, at in boxes for piece in label.passing):
            shift = entries[0][0] - _LABEL_POINTS - placed[-1]  # below all ends: what goes on to the right rises
        for (points, label), at in zip(entries, placed):
            _annotate(label, (_LABEL_AWAY, at + shift - points), "left")


def _crosses(piece: Piece, label: Label, height: float) -> bool:
    """True where a piece of a line passes through the label, whose middle is at a height in points."""
    scale = 72 / label.axis.figure.dpi
    (x0, y0), (x1, y1) = (label.axis.transData.transform(end) * scale for end in piece)
    begin = label.axis.transData.transform((label.x, label.y))[0] * scale + _LABEL_AWAY
    end = begin + _LETTER_POINTS * len(label.text)
    at = [y0 + (y1 - y0) * (min(max(x, x0), x1) - x0) / (x1 - x0) for x in (begin, end)]
    return min(at) < height + _LABEL_POINTS / 2 and max(at) > height - _LABEL_POINTS / 2


def _annotate(label: Label, offset: tuple[float, float], align: str) -> None:
    colour, _ = STYLE.get(label.provider, ("#000000", "."))
    label.axis.annotate(
        label.text, (label.x, label.y), offset, textcoords="offset points", va="center", ha=align, fontsize=8,
        color=colour, annotation_clip=False, path_effects=_HALO,
    )  # fmt: skip


def _dress(axis: Any, batches: list[int], unit: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(batches[0] / 1.25, batches[-1] * 1.25)
    low, high = axis.get_ylim()
    widen = max(1.0, (8 / (high / low)) ** 0.5)  # less than a factor of eight would show differences that are noise
    low, high = low / widen, high * widen
    axis.set_ylim(low, high)
    number_ticks(axis)
    axis.set_xlabel("batch size B")
    axis.set_ylabel(unit)
    axis.grid(True, which="major", alpha=0.35, linewidth=0.7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def joined(runs: dict[str, dict[str, Any]]) -> list[Record]:
    """The rows of recorded runs, by their names. ValueError where a figure of them would show two runs as one line."""
    machines = {machine.name(run["machine"]): name for name, run in runs.items()}
    if len(machines) > 1:
        shown = ", ".join(f"{text} ({name})" for text, name in machines.items())
        raise ValueError(f"the runs are of different machines, so their points make no line: {shown}")
    taken: dict[tuple[Any, ...], str] = {}
    for name, run in runs.items():
        for row in run["rows"]:
            key = (*_group(row), row["provider"], row["batch"])
            if row.get("time") and taken.setdefault(key, name) != name:
                what = f"{row['provider']} at B = {row['batch']:,}, {_title(_group(row))}"
                raise ValueError(f"{what} stands in both {taken[key]} and {name}: leave one out")
    return [row for run in runs.values() for row in run["rows"]]


def _plain() -> FuncFormatter:
    """Numbers as 10,000, neither 10000 nor 10^4."""
    return FuncFormatter(lambda value, _: f"{value:,g}")


def number_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic y axis."""
    axis.yaxis.set_major_formatter(_plain())
    low, high = axis.get_ylim()
    if high / low < 100:  # the ticks of decades alone would leave the axis with one number
        axis.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:.0e}"[0] in "25" else "")
        )
    else:
        axis.yaxis.set_minor_formatter(NullFormatter())


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw recorded runs of one machine into one figure; returns one of the exit codes of ``--help``."""
    parser = programs.Parser(
        prog="python -m bench.harness.plots",
        description="Draw recorded runs of one machine, several in one figure.",
        epilog=programs.EXIT_CODES,
    )
    parser.add_argument("results", type=Path, nargs="+", help="results.json of bench/run.py")
    parser.add_argument("--output", type=Path, default=Path("results.png"))
    options = parser.parse_args(arguments)
    runs = {}
    for path in options.results:
        try:
            runs[str(path)] = run = json.loads(path.read_text())
            joined({str(path): run})
        except (OSError, ValueError, KeyError, TypeError) as fault:
            programs.complain(f"plots: {path} is no results.json of bench/run.py: {type(fault).__name__}: {fault}")
            return Exit.USAGE
    try:
        records = joined(runs)
    except ValueError as fault:
        programs.complain(f"plots: {fault}")
        return Exit.USAGE
    captions = dict.fromkeys(map(machine.caption, runs.values()))
    try:
        plot(records, options.output, "\n".join(captions))
    except OSError as fault:
        programs.complain(f"plots: the output cannot be written: {fault}")
        return Exit.OUTPUT
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
