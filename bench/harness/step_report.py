"""Table and figure of training steps: one run, or several recorded ones together."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from bench.harness import machine, plots, report
from bench.harness.measure import NOT_RUN, OK
from bench.harness.steps import EAGER, WITHOUT

Record = dict[str, Any]
FILLS = ("full", "none", "left", "right", "bottom", "top")  # of the markers of the first run, the second, ...
_FILL_NAMES = {"full": "filled markers", "none": "hollow markers"}
_ONE = ("loss", "dtype", "backbone")  # what the rows of one figure have in common

_CSV = (
    "batch", "classes", "dtype", "backbone", "variant", "status", "reason", "gate_ratio", "gate_batch", "step_ms",
    "step_p20_ms", "step_p80_ms", "loss_ms", "share", "step_speedup_over_reference", "loss_speedup_over_reference",
    "rounds", "steady", "backbone_flop_per_image", "loss_flop_per_image", "loss",
)  # fmt: skip


@dataclass(frozen=True)
class Joined:
    """The rows of several recorded runs, each with the name of its ``run``, and a line on each run.

    Raises ValueError where the runs are not of one machine, loss, dtype and backbone, or two measured the same row.
    """

    records: list[Record]
    caption: str

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Joined:
        """Of files ``results.json``, or the folders that hold them; a row that was not run gives way to one that was.

        Raises OSError where a file cannot be read.
        """
        if len(paths) > len(FILLS):
            raise ValueError(f"one figure takes at most {len(FILLS)} runs, got {len(paths)}")
        paths = [path / "results.json" if path.is_dir() else path for path in paths]
        runs = [_run_of(path) for path in paths]
        names = [path.resolve().parent.name for path in paths]
        if len(set(names)) < len(names):
            names = [str(path) for path in paths]
        _check_one("machine", [machine.name(run["machine"]) for run in runs], names)
        kept: dict[tuple[Any, ...], Record] = {}
        for name, run in zip(names, runs):
            for key in _ONE:
                _check_one(key, [str(row[key]) for row in [*kept.values(), *run["rows"]]])
            for row in run["rows"]:
                case = row["batch"], row["classes"], row["variant"]
                before = kept.get(case)
                if before is not None and NOT_RUN not in (before["status"], row["status"]):
                    what = f"B = {case[0]:,}, C = {case[1]:,}, {case[2]}"
                    raise ValueError(f"{what} stands in both {before['run']} and {name}: leave one out")
                if before is None or before["status"] == NOT_RUN:
                    kept[case] = {**row, "run": name}
        records = sorted(kept.values(), key=lambda row: (row["classes"], row["batch"]))
        lines = [_about(name, run, records, fill) for name, run, fill in zip(names, runs, FILLS)]
        return cls(records, "\n".join(lines))

    def markdown(self) -> str:
        """One line a batch size and number of classes: the loss's part, the step, and eager's step over each other."""
        variants = [v for v in dict.fromkeys(row["variant"] for row in self.records) if v != WITHOUT]
        others = [variant for variant in variants if variant != EAGER]
        heads = ["B", "C", "step without"]
        heads += [f"{'eager' if v == EAGER else v}: {what}" for v in variants for what in ("step", "loss's part")]
        heads += [f"eager's step over {variant}'s" for variant in others]
        lines = ["| " + " | ".join([*heads, "run"]) + " |", "|" + "---:|" * len(heads) + "---|"]
        cases: dict[tuple[int, int], dict[str, Record]] = {}
        for row in self.records:
            cases.setdefault((row["batch"], row["classes"]), {})[row["variant"]] = row
        for (batch, classes), rows in cases.items():
            cells = [str(batch), str(classes), _time(rows.get(WITHOUT))]
            for variant in variants:
                share = rows.get(variant, {}).get("share")
                cells += [_time(rows.get(variant)), "" if share is None else f"{100 * share:.0f} %"]
            for variant in others:
                ratio = rows.get(variant, {}).get("step_speedup_over_reference")
                cells.append("" if ratio is None else f"{ratio:.2f}x")
            lines.append("| " + " | ".join([*cells, next(iter(rows.values()))["run"]]) + " |")
        return "\n".join([*lines, "", *(f"- {line}" for line in self.caption.splitlines())]) + "\n"


def _run_of(path: Path) -> Record:
    try:
        run = json.loads(path.read_text())
        if not run["rows"] or "backbone" not in run["rows"][0]:
            raise KeyError("backbone")
    except (ValueError, KeyError, TypeError) as fault:
        raise ValueError(f"{path} is no results.json of bench/step_cost.py: {type(fault).__name__}: {fault}") from None
    return run


def _check_one(what: str, values: Sequence[str], names: Sequence[str] = ()) -> None:
    if len(set(values)) > 1:
        said = [f"{value} ({name})" for value, name in zip(values, names)] or sorted(set(values))
        raise ValueError(f"the runs differ in {what}, so their points make no line: {', '.join(said)}")


def _about(name: str, run: Record, records: Sequence[Record], fill: str) -> str:
    """Marker, name, cases, rounds, gate, and the caption of a run."""
    own = [row for row in records if row["run"] == name and row["step_time"]]
    cases: dict[int, list[int]] = {}
    for row in own:
        cases.setdefault(row["classes"], []).append(row["batch"])
    shown = "; ".join(
        f"C = {width:,}: B = {', '.join(f'{b:,}' for b in dict.fromkeys(at))}" for width, at in cases.items()
    )
    rounds = sorted({row["step_time"]["rounds"] for row in own})
    text = f"{_FILL_NAMES.get(fill, f'{fill} half filled')}: {name} ({shown or 'nothing measured'}"
    if rounds:
        text += f"; {rounds[0]}" + (f" to {rounds[-1]}" if rounds[-1] > rounds[0] else "") + " rounds"
    checked = {row["gate"]["batch"] for row in own if row["gate"] and row["gate"]["batch"] < row["batch"]}
    if checked:
        text += f"; larger batches checked on their first {max(checked):,} images"
    return f"{text}); {machine.caption(run)}"


def _time(row: Record | None) -> str:
    return report.seconds(row["step_time"]["median_s"]) if row and row["step_time"] else ""


_CSV = (
    "batch", "classes", "dtype", "backbone", "variant", "status", "reason", "gate_ratio", "gate_batch", "step_ms",
    "step_p20_ms", "step_p80_ms", "loss_ms", "share", "step_speedup_over_reference", "loss_speedup_over_reference",
    "rounds", "steady", "backbone_flop_per_image", "loss_flop_per_image", "loss",
)  # fmt: skip


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One line a row, from the records of a JSON; joined ones have their run's name too."""
    columns = [*_CSV, "run"] if any("run" in record for record in records) else _CSV
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for record in records:
            step, loss = record["step_time"] or {}, record["loss_time"] or {}
            flat = {
                "gate_ratio": (record["gate"] or {}).get("ratio"),
                "gate_batch": (record["gate"] or {}).get("batch"),
                "step_ms": step.get("median_s"),
                "step_p20_ms": step.get("p20_s"),
                "step_p80_ms": step.get("p80_s"),
                "loss_ms": loss.get("median_s"),
            }
            flat = {key: value if value is None or "ms" not in key else 1e3 * value for key, value in flat.items()}
            line = {**record, **flat, "rounds": step.get("rounds"), "steady": step.get("steady")}
            writer.writerow({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()})


def plot(path: Path, records: Sequence[dict[str, Any]], caption: str) -> bool:
    """The loss's part of the step, and the step's time, against the batch size; a column for each number of classes.

    Joined runs differ in their markers. False, and no file, where nothing was measured.
    """
    drawn = [record for record in records if record["status"] == OK and record["step_time"]]
    if not drawn:
        return False
    runs = list(dict.fromkeys(record.get("run") for record in records))
    classes = sorted({record["classes"] for record in drawn})
    text = "\n".join(map(_wrapped, caption.splitlines()))
    size = max(9.0, 5.2 * len(classes)), 6.8 + 0.15 * (text.count("\n") + 1)
    figure, axes = plt.subplots(2, len(classes), figsize=size, squeeze=False)
    for column, width in enumerate(classes):
        here = [record for record in drawn if record["classes"] == width]
        batches = sorted({record["batch"] for record in here})
        for variant in dict.fromkeys(record["variant"] for record in here):
            points = sorted((r for r in here if r["variant"] == variant), key=lambda r: r["batch"])
            colour, marker = plots.STYLE.get(variant, ("#222222", "."))
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.7}
            title = {WITHOUT: "cross-entropy alone", EAGER: "with eager's loss"}.get(variant, f"with {variant}'s loss")
            step_ms = [1e3 * r["step_time"]["median_s"] for r in points]
            _draw(axes[1][column], points, step_ms, runs, title, style)
            if variant != WITHOUT:
                shares = [100 * r["share"] for r in points]
                _draw(axes[0][column], points, shares, runs, title, style)
                axes[0][column].annotate(
                    f"{shares[-1]:.0f} %", (points[-1]["batch"], shares[-1]), (6, 0), textcoords="offset points",
                    va="center", fontsize=8, color=colour,
                )  # fmt: skip
        first = here[0]
        body = first["backbone_flop_per_image"] / 1e6
        axes[0][column].set_title(
            f"C = {width:,}, {first['dtype']}, {first['loss']}; {first['backbone']}, {body:,.3g} Mflop an image",
            loc="left", fontsize=9,
        )  # fmt: skip
        axes[0][column].set_ylim(0, 100)
        axes[0][column].set_ylabel("part of the step that the loss takes, %")
        axes[1][column].set_yscale("log")
        plots.number_ticks(axes[1][column])
        axes[1][column].set_ylabel("one training step, ms (median)")
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
            axis.set_xlim(batches[0] / (1.25 if len(batches) > 1 else 1.5), batches[-1] * 1.5)
            axis.set_xlabel("batch size B")
            axis.grid(True, alpha=0.35, linewidth=0.7)
            axis.legend(frameon=False, fontsize=8, loc="upper left")
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    figure.supxlabel(text, fontsize=8, color="#555555")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 150, break_on_hyphens=False)


def _draw(
    axis: Any, points: Sequence[Record], values: Sequence[float], runs: Sequence[Any], title: str, style: dict[str, Any]
) -> None:
    """One line through the points of all runs, whose markers differ in their fill."""
    if len(runs) > 1 and style["marker"] == ".":
        style = {**style, "marker": "o"}  # a point has no inside
    axis.plot([], [], label=title, **style)
    axis.plot([r["batch"] for r in points], values, color=style["color"], linewidth=style["linewidth"])
    for run, fill in zip(runs, FILLS):
        own = [(r["batch"], value) for r, value in zip(points, values) if r.get("run") == run]
        face = {"fillstyle": "full", "markerfacecolor": "white"} if fill == "none" else {"fillstyle": fill}
        dots = {**style, **face, "markerfacecoloralt": "white", "markersize": 6, "linewidth": 0}
        if own:
            axis.plot(*zip(*own), **dots)
