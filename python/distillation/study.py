"""The comparison as cells, each a file: one method at one batch size, either all its settings on the validation images
or its chosen setting on the test images. A run that stopped goes on with the cells that are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine
from distillation import engine, stack
from distillation.contenders import BY_NAME, Method, Run, Setting
from distillation.data import digits, loader
from distillation.models import MODELS
from distillation.objectives import CrossEntropy
from distillation.report import write_json

FIRST_TUNING_SEED = 1000  # far from those of the test


@dataclass(frozen=True)
class Plan:
    """The comparison's plan. Cells of another plan are not taken over."""

    images: int = 600  # training images of a student
    label_noise: float = 0.4
    model: str = "mlp"
    batches: tuple[int, ...] = (32, 128, 512)
    examples: int = 24_576  # that a student sees, repetitions counted: as many at every batch size
    seeds: int = 10
    tuning_seeds: int = 3
    settings: int | None = None  # of each method at most; None: all
    teacher_epochs: int = 30

    def steps(self, batch: int) -> int:
        return max(8, self.examples // batch)

    def grid(self, method: Method) -> Sequence[Setting]:
        return method.grid[:: -(-len(method.grid) // self.settings)] if self.settings else method.grid


class PlanMismatch(Exception):
    """The folder holds cells of another plan."""


@dataclass(frozen=True)
class Cell:
    """``phase`` "validation": every setting of the method; "test": the chosen one."""

    phase: str
    method: str
    batch: int

    @property
    def file(self) -> str:
        return f"{self.phase}-{self.method}-{self.batch}.json"

    def __str__(self) -> str:
        return f"{self.method}, batch {self.batch}, {self.phase}"


def cells(plan: Plan, methods: Sequence[str]) -> list[Cell]:
    """In an order in which all that a cell needs is done before it: the learning rate comes from ``alone``."""
    return [
        Cell(phase, name, batch)
        for name in sorted(methods, key=lambda name: name != "alone")
        for batch in plan.batches
        for phase in (("validation", "test") if BY_NAME[name].is_tuned else ("test",))
    ]


def chosen(record: dict[str, Any]) -> Setting:
    """The setting with the best mean accuracy over the seeds of a validation cell; the first of equals."""
    by_setting: dict[str, list[float]] = {}
    for student in record["students"]:
        by_setting.setdefault(json.dumps(student["setting"]), []).append(student["accuracy"])
    return json.loads(max(by_setting, key=lambda key: sum(by_setting[key]) / len(by_setting[key])))


class Study:
    """The cells of a plan in a folder."""

    def __init__(self, plan: Plan, folder: Path):
        """Raises PlanMismatch where the folder belongs to another plan, OSError where it cannot be made.

        A folder that has results.json alone, as a recorded run, is gone on with too; its teacher is trained again.
        """
        self.plan, self.folder = plan, folder
        self._recorded_teacher: dict[str, float] | None = None
        if (folder / "results.json").exists():
            results = json.loads((folder / "results.json").read_text())
            self._recorded_teacher = results["teacher"]
            if not (folder / "cells").exists():
                self._unpack(results)
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        head = folder / "plan.json"
        written = json.loads(json.dumps(asdict(plan)))
        if head.exists():
            before = json.loads(head.read_text())
            changed = [key for key in written if before.get(key) != written[key]]
            if changed:
                differences = ", ".join(f"{key} {before.get(key)} there, {written[key]} now" for key in changed)
                raise PlanMismatch(f"{folder} holds a run of another plan: {differences}. Choose another --output")
        else:
            write_json(head, written)
        self._teacher: torch.nn.Module | None = None
        self._pools: dict[int, stack.Pool] = {}
        self.splits = digits(plan.images, plan.label_noise, 0)

    def _unpack(self, results: dict[str, Any]) -> None:
        """Cells and plan of a recorded run, of which only results.json is kept."""
        (self.folder / "cells").mkdir()
        write_json(self.folder / "plan.json", results["plan"])
        for record in results["cells"]:
            cell = Cell(record["phase"], record["method"], record["batch"])
            write_json(self.folder / "cells" / cell.file, record)

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result; None where it has not run. PlanMismatch where the method had other settings then."""
        path = self.folder / "cells" / cell.file
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        tried = {json.dumps(student["setting"]) for student in record["students"]}
        offered = {json.dumps(setting) for setting in self.plan.grid(BY_NAME[cell.method])}
        if tried != offered if cell.phase == "validation" else not tried <= offered:
            raise PlanMismatch(f"{path} has other settings than {cell.method} has now. Choose another --output")
        return record

    def predicted_seconds(self, cell: Cell) -> float:
        """A rough time on one core, from calls of 0.6 ms and B x B matrices; corrected by what was measured."""
        plan, method = self.plan, BY_NAME[cell.method]
        students = len(plan.grid(method)) * plan.tuning_seeds if cell.phase == "validation" else plan.seeds
        matrix = 0.0 if cell.method in ("alone", "kd", "dkd") else 1e-8 * cell.batch**2
        return students * plan.steps(cell.batch) * ((1e-4 if cell.method == "alone" else 6e-4) + matrix)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train the cell's students and write its file."""
        start = time.perf_counter()
        method = BY_NAME[cell.method]
        if cell.phase == "validation":
            settings: Sequence[Setting] = self.plan.grid(method)
            seeds = self._tuning_seeds()
        else:
            settings = [self._choice(cell) if method.is_tuned else method.grid[0]]
            seeds = range(self.plan.seeds)
        jobs = [(setting, seed) for setting in settings for seed in seeds]
        images, labels = self.splits.held_out(cell.phase).tensors  # type: ignore[attr-defined]
        accuracies: list[float] = []
        for group, rate, decay in self._groups(cell, jobs):
            run = Run(self.plan.steps(cell.batch), cell.batch, self.splits.classes)
            students = [stack.Student(self.pool(seed), seed, method.make(setting, run)) for setting, seed in group]
            predict = stack.train(
                lambda: MODELS[self.plan.model](self.splits.classes),
                students,
                batch=cell.batch,
                steps=run.steps,
                rate=rate,
                decay=decay,
            )
            accuracies += stack.accuracies(predict, images, labels)
        record = {
            **asdict(cell),
            "students": [
                {"setting": setting, "seed": seed, "accuracy": accuracy}
                for (setting, seed), accuracy in zip(jobs, accuracies)
            ],
            "seconds": time.perf_counter() - start,
            "versions": machine.versions(),
            **machine.commit(),
        }
        write_json(self.folder / "cells" / cell.file, record)
        return record

    def _groups(
        self, cell: Cell, jobs: list[tuple[Setting, int]]
    ) -> list[tuple[list[tuple[Setting, int]], float, float]]:
        """Students that share a learning rate and a weight decay, in the order of the jobs."""
        if cell.method != "alone":
            optimizer = self._choice(Cell("test", "alone", cell.batch))
            return [(jobs, optimizer["rate"], optimizer["decay"])]
        groups: dict[tuple[float, float], list[tuple[Setting, int]]] = {}
        for setting, seed in jobs:
            groups.setdefault((setting["rate"], setting["decay"]), []).append((setting, seed))
        return [(group, *optimizer) for optimizer, group in groups.items()]

    def _choice(self, cell: Cell) -> Setting:
        record = self.record(Cell("validation", cell.method, cell.batch))
        if record is None:
            raise LookupError(f"{cell} needs the validation of {cell.method} at batch {cell.batch}, which has not run")
        return chosen(record)

    def pool(self, seed: int) -> stack.Pool:
        if seed not in self._pools:
            self._pools[seed] = stack.pool(self.teacher(), self.plan.images, self.plan.label_noise, seed)
        return self._pools[seed]

    def teacher(self, report: engine.EpochReport = lambda epoch, means: None) -> torch.nn.Module:
        """The teacher of the folder; it is trained once, on half of the images with their right labels."""
        if self._teacher is None:
            path, classes = self.folder / "teacher.pt", self.splits.classes
            if path.exists():
                self._teacher, _ = engine.load(path, classes=classes, data="digits")
            else:
                torch.manual_seed(0)
                model = MODELS["cnn"](classes)
                batches = loader(self.splits.teacher, 64, train=True)
                epochs, device = self.plan.teacher_epochs, torch.device("cpu")
                engine.fit(model, batches, CrossEntropy(), epochs=epochs, rate=3e-3, device=device, report=report)
                engine.save(path, model, "cnn", classes=classes, data="digits")
                self._teacher = model
            self._teacher.eval().requires_grad_(False)
        return self._teacher

    def prepare(self) -> None:
        """Train the teacher and compute its logits for every seed's images."""
        for seed in (*range(self.plan.seeds), *self._tuning_seeds()):
            self.pool(seed)

    def _tuning_seeds(self) -> range:
        return range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.plan.tuning_seeds)

    def teacher_accuracy(self) -> dict[str, float]:
        held_out = {name: loader(self.splits.held_out(name), 512, train=False) for name in ("validation", "test")}
        accuracies = {
            name: engine.accuracy(self.teacher(), data, torch.device("cpu")) for name, data in held_out.items()
        }
        if self._recorded_teacher not in (None, accuracies):
            raise PlanMismatch(
                f"the teacher that this machine trains has accuracies {accuracies}, that of the recorded run "
                f"{self._recorded_teacher}: the cells would not compare. Choose another --output"
            )
        return accuracies


class Remaining:
    """Seconds until the end: the predictions, corrected by the median ratio of the cells that have run."""

    def __init__(self, predict: Callable[[Cell], float]):
        self.predict, self.ratios = predict, [1.0]

    def learn(self, cell: Cell, seconds: float) -> None:
        self.ratios.append(seconds / self.predict(cell))

    def seconds(self, left: Sequence[Cell]) -> float:
        return sum(map(self.predict, left)) * sorted(self.ratios)[len(self.ratios) // 2]
