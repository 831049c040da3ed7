"""The methods that are compared: what each adds to the cross-entropy, and the 16 settings that each may be tuned over.

Every tuned method has the same number of settings, so that none wins by a longer search. A method that this version of
the package does not have is listed with the reason, and not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mcld_kernels
from distillation.dkd import DKDLoss
from distillation.stack import Loss

SETTINGS = 16  # of every tuned method
Setting = dict[str, float]


@dataclass(frozen=True)
class Run:
    """The facts of the training that a loss may need."""

    steps: int
    batch: int
    classes: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """``make(setting, run)`` gives the loss of one student, None for cross-entropy alone."""

    name: str
    title: str
    grid: tuple[Setting, ...]
    make: Callable[[Setting, Run], Loss | None]
    missing: Callable[[], str | None] = lambda: None

    @property
    def is_tuned(self) -> bool:
        return len(self.grid) > 1


def product(**values: tuple[float, ...]) -> tuple[Setting, ...]:
    """Every combination of the values."""
    made: list[Setting] = [{}]
    for name, options in values.items():
        made = [{**setting, name: value} for setting in made for value in options]
    return tuple(made)


def _weighted(weight: float, module: torch.nn.Module) -> Loss:
    return lambda student, teacher, target: weight * module(student, teacher, target)


def _kd(setting: Setting, run: Run) -> Loss:
    return _weighted(setting["weight"], mcld_kernels.KDLoss(temperature=setting["temperature"]))


def _dkd(setting: Setting, run: Run) -> Loss:
    return _weighted(setting["weight"], DKDLoss(temperature=setting["temperature"]))


def _mcld(terms: tuple[int, int, int] = (1, 1, 1), ramp: float = 0.0, **options: Any) -> Callable[[Setting, Run], Loss]:
    """MCLD with some of its terms; ``ramp`` is the part of the training in which the category-wise term comes in."""

    def make(setting: Setting, run: Run) -> Loss:
        weight = tuple(setting["weight"] * active for active in terms)
        steps = round(ramp * run.steps)
        return mcld_kernels.MCLDLoss(temperature=setting["temperature"], weight=weight, warmup_steps=steps, **options)

    return make


def _absent(*names: str) -> Callable[[], str | None]:
    """The reason why exports that a method needs are not there."""

    def missing() -> str | None:
        absent = [name for name in names if not hasattr(mcld_kernels, name)]
        return f"mcld_kernels {mcld_kernels.__version__} has no {', '.join(absent)}" if absent else None

    return missing


def _no_soft_labels() -> str | None:
    try:
        mcld_kernels.mcld_loss(torch.eye(2), torch.eye(2), torch.eye(2))
    except (ValueError, TypeError):
        return f"mcld_kernels {mcld_kernels.__version__} takes hard labels only"
    return None


def _soft(setting: Setting, run: Run) -> Loss:
    """The sample-wise term's positives by the teacher's probabilities in place of the labels."""
    loss = _mcld()(setting, run)

    def with_probabilities(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return loss(student, teacher, teacher.softmax(1))

    return with_probabilities


class _Queue:
    """MCLD with the teacher rows of earlier steps as further candidates of the row terms."""

    def __init__(self, setting: Setting, run: Run):
        self.loss = _mcld()(setting, run)
        self.queue = mcld_kernels.TeacherQueue(QUEUE, run.classes)
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        if self.last is not None:  # the rows of a step are enqueued when the step is over
            self.queue.enqueue(*self.last)
        self.last = teacher, target
        further = (
            {"candidates": self.queue.candidates, "candidate_target": self.queue.target} if len(self.queue) else {}
        )
        return self.loss(student, teacher, target, **further)


def _ckd(negatives: str) -> Callable[[Setting, Run], Loss]:
    return lambda setting, run: mcld_kernels.CKDLoss(**setting, negatives=negatives)


def _clkd(setting: Setting, run: Run) -> Loss:
    """The published weights of rows and columns, all times ``weight``; ``correlation`` is 0.4 there."""
    weight = tuple(setting["weight"] * value for value in (0.5, 1.0, setting["correlation"]))
    return mcld_kernels.CLKDLoss(weight=weight)


def _mlkd(setting: Setting, run: Run) -> Loss:
    """The published weights, all times ``weight``; the temperature is that of the correlation, 0.5 there."""
    weight = tuple(setting["weight"] * value for value in (50.0, 20.0, 1.0))
    return mcld_kernels.MLKDLoss(correlation_temperature=setting["temperature"], weight=weight)


QUEUE = 512  # teacher rows
_WEIGHTS = (0.3, 1.0, 3.0, 10.0)
_CONTRAST = product(temperature=(0.1, 0.2, 0.5, 1.0), weight=_WEIGHTS)
_CKD = product(temperature=(0.1, 0.2, 0.5, 1.0), weight=(1.0, 3.0, 10.0, 30.0))
_SOFTENED = product(temperature=(1.0, 2.0, 4.0, 8.0), weight=_WEIGHTS)

METHODS: tuple[Method, ...] = (
    Method(
        name="alone",
        title="cross-entropy alone",
        grid=product(rate=(0.01, 0.02, 0.03, 0.06), decay=(1e-4, 1e-2, 1e-1, 5e-1)),
        make=lambda setting, run: None,
    ),
    Method(name="kd", title="KD", grid=_SOFTENED, make=_kd),
    Method(
        name="dkd",
        title="DKD",
        grid=product(temperature=(1.0, 2.0, 4.0, 8.0), weight=(0.03, 0.1, 0.3, 1.0)),  # beta = 8 is within
        make=_dkd,
    ),
    Method(name="mcld-instance", title="MCLD, instance term", grid=_CONTRAST, make=_mcld((1, 0, 0))),
    Method(name="mcld-sample", title="MCLD, sample term", grid=_CONTRAST, make=_mcld((0, 1, 0))),
    Method(name="mcld-category", title="MCLD, category term", grid=_CONTRAST, make=_mcld((0, 0, 1))),
    Method(name="mcld", title="MCLD", grid=_CONTRAST, make=_mcld()),
    Method(name="mcld-warmup", title="MCLD, warm-up", grid=_CONTRAST, make=_mcld(ramp=1 / 8)),
    Method(name="mcld-mask", title="MCLD, mask_same_class", grid=_CONTRAST, make=_mcld(mask_same_class=True)),
    Method(
        name="mcld-queue",
        title=f"MCLD, queue of {QUEUE} rows",
        grid=_CONTRAST,
        make=_Queue,
        missing=_absent("TeacherQueue"),
    ),
    Method(name="mcld-soft", title="MCLD, teacher's soft labels", grid=_CONTRAST, make=_soft, missing=_no_soft_labels),
    Method(name="ckd", title="CKD", grid=_CKD, make=_ckd("teacher"), missing=_absent("CKDLoss")),
    Method(
        name="ckd-student",
        title="CKD, student negatives",
        grid=_CKD,
        make=_ckd("student"),
        missing=_absent("CKDLoss"),
    ),
    Method(
        name="clkd",
        title="CLKD",
        grid=product(correlation=(0.0, 0.04, 0.4, 4.0), weight=(1.0, 10.0, 100.0, 1000.0)),
        make=_clkd,
        missing=_absent("CLKDLoss"),
    ),
    Method(
        name="mlkd",
        title="MLKD",
        grid=product(temperature=(0.1, 0.2, 0.5, 1.0), weight=(0.01, 0.03, 0.1, 0.3)),
        make=_mlkd,
        missing=_absent("MLKDLoss"),
    ),
    # Two settings that nobody tuned here: the library's defaults, and those of python/train.py.
    Method(
        name="mcld-0.1-1",
        title="MCLD at 0.1 and 1, untuned",
        grid=({"temperature": 0.1, "weight": 1.0},),
        make=_mcld(),
    ),
    Method(
        name="mcld-0.5-3",
        title="MCLD at 0.5 and 3, untuned",
        grid=({"temperature": 0.5, "weight": 3.0},),
        make=_mcld(),
    ),
)
BY_NAME = {method.name: method for method in METHODS}


def absent() -> dict[str, str]:
    """The methods that cannot run, with the reason."""
    return {method.name: reason for method in METHODS if (reason := method.missing()) is not None}
