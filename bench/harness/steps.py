"""One training step of a fixed backbone, and the part of it that the distillation loss takes.

A step is: teacher forward, student forward, the loss with its gradient by the logits, cross-entropy, backward through
the student, SGD. The loss is timed inside the step, so that its part needs no difference of two times.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import gate, measure, memory, timing
from bench.harness.cases import Case
from bench.harness.losses import LOSSES, autograd
from bench.harness.measure import ERROR, FAILED, NOT_RUN, OK
from bench.harness.providers import LossFn, backend_unsupported_reason
from mcld_kernels import backends

WITHOUT = "without"  # the step with cross-entropy alone
EAGER = "reference"
_PROBE = 8  # images of the step that memory is predicted from; eight times as many small ones


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """``make(classes)`` gives student and teacher; ``shape`` is that of an image."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[int], tuple[nn.Module, nn.Module]]


def _mlp(classes: int) -> tuple[nn.Module, nn.Module]:
    def made(width: int) -> nn.Module:
        hidden = nn.Linear(width, width)
        return nn.Sequential(nn.Linear(256, width), nn.ReLU(), hidden, nn.ReLU(), nn.Linear(width, classes))

    return made(512), made(1024)


def backbone(name: str, size: int) -> Backbone:
    """``mlp``: three linear layers, 512 units on 256 features, the teacher 1024 units; else STUDENT,TEACHER of timm.

    Raises ValueError for a name that is neither, or without timm.
    """
    if name == "mlp":
        return Backbone(name=name, shape=(256,), make=_mlp)
    try:
        import timm
    except ImportError:
        raise ValueError(f"--backbone {name}: timm is not installed; there is mlp") from None
    names = name.split(",")
    if len(names) != 2 or not all(timm.is_model(model) for model in names):
        raise ValueError(f"--backbone must be mlp, or STUDENT,TEACHER of timm's models; got {name!r}")
    make = lambda classes: tuple(timm.create_model(model, num_classes=classes) for model in names)  # noqa: E731
    return Backbone(name=name, shape=(3, size, size), make=make)  # type: ignore[arg-type]


class TrainingStep:
    """The step of one batch size and number of classes; ``run`` takes it with a loss, or without one."""

    def __init__(self, backbone: Backbone, case: Case, device: torch.device):
        torch.manual_seed(case.seed)
        self.case, self.device = case, device
        student, teacher = backbone.make(case.classes)
        self.student, self.teacher = student.to(device).train(), teacher.to(device).eval().requires_grad_(False)
        generator = torch.Generator(device).manual_seed(case.seed)
        self.images = torch.randn(case.batch, *backbone.shape, generator=generator, device=device)
        self.target = torch.randint(case.classes, (case.batch,), generator=generator, device=device)
        # So small that the logits stay where they are, and every sample does the same work.
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-6)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = self.case.torch_dtype
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Student and teacher logits (batch, classes) of the case's dtype."""
        with self._autocast():
            with torch.no_grad():
                teacher = self.teacher(self.images)
            return self.student(self.images).to(self.case.torch_dtype), teacher.to(self.case.torch_dtype)

    def run(self, loss_fn: LossFn | None, mark: Callable[[], None] = lambda: None) -> None:
        """One step; ``mark`` is called before and after the loss, where there is one."""
        student, teacher = self.logits()
        cross = F.cross_entropy(student.float(), self.target)
        outputs, grads = [cross], [torch.ones_like(cross)]
        if loss_fn is not None:
            mark()
            leaf = student.detach().requires_grad_()
            grads.append(torch.autograd.grad(loss_fn(leaf, teacher, self.target), leaf)[0])
            outputs.append(student)
            mark()
        torch.autograd.backward(outputs, grads)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def flop_per_image(backbone: Backbone, classes: int) -> int:
    """Multiplications and additions of a step for one image: three times the student's forward, once the teacher's."""
    total = 0
    for model, times in zip(backbone.make(classes), (3, 1)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(1, *backbone.shape))
        total += times * counter.get_total_flops()
    return total


def bytes_per_image(backbone: Backbone, case: Case, device: torch.device) -> float:
    """Memory that an image takes in a step without the loss, from above: the weights' gradients count with it."""
    images = _PROBE if math.prod(backbone.shape) > 4096 else 8 * _PROBE
    small = TrainingStep(backbone, Case(images, case.classes, case.dtype, loss=case.loss), device)
    small.run(None)
    taken = memory.peak_extra(lambda: small.run(None), device)["allocator"] or 0
    return taken / images + 4 * math.prod(backbone.shape)


@dataclass
class StepRow:
    """One variant of a step: ``without`` the loss, with eager's, or with a backend's."""

    case: Case
    variant: str
    backbone: str
    flop_per_image: int
    status: str = NOT_RUN
    reason: str | None = None
    verdict: gate.Verdict | None = None
    gate_batch: int | None = None  # rows that the gate saw
    step: timing.Times | None = None
    loss: timing.Times | None = None
    step_speedup: float | None = None  # eager's step over this one's, paired by the round
    loss_speedup: float | None = None

    @property
    def share(self) -> float | None:
        """The median over the rounds of the loss's part of its own step."""
        if self.step is None or self.loss is None:
            return None
        return statistics.median(loss / step for loss, step in zip(self.loss.samples, self.step.samples))

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        case = self.case
        return {
            "loss": case.loss,
            "batch": case.batch,
            "classes": case.classes,
            "dtype": case.dtype,
            "backbone": self.backbone,
            "backbone_flop_per_image": self.flop_per_image,
            "loss_flop_per_image": case.flop / case.batch,
            "variant": self.variant,
            "status": self.status,
            "reason": self.reason,
            "gate": None if self.verdict is None else {**self.verdict.record(), "batch": self.gate_batch},
            "step_time": None if self.step is None else self.step.record(),
            "loss_time": None if self.loss is None else self.loss.record(),
            "share": self.share,
            "step_speedup_over_reference": self.step_speedup,
            "loss_speedup_over_reference": self.loss_speedup,
        }


@dataclass
class StepRun:
    """The measurement of one case: the gate on the step's own logits, then the variants, interleaved."""

    case: Case
    backbone: Backbone
    variants: Sequence[str]
    plan: measure.Plan
    announce: Callable[[str], None] = lambda text: None
    rows: list[StepRow] = field(default_factory=list)

    def run(self) -> list[StepRow]:
        """Fill and return the rows; a variant that is wrong, or would not fit, has a reason and no time."""
        flop = flop_per_image(self.backbone, self.case.classes)
        self.rows = [StepRow(self.case, name, self.backbone.name, flop) for name in self.variants]
        device = self.plan.device
        with memory.released(device):
            body = bytes_per_image(self.backbone, self.case, device) * self.case.batch
            images = _gate_case(self.case, self.plan).batch
            gate_bytes = 64 * images * self.case.classes + (2 << 30)  # fp64 copies, and the graph of a chunk
            shortage = memory.shortage(int(max(body, gate_bytes)), device)
            if shortage:
                for row in self.rows:
                    row.reason = f"backbone and truth: {shortage}"
                return self.rows
            step = TrainingStep(self.backbone, self.case, device)
            losses = self._gate(step, int(body))
            self._time(step, losses)
        return self.rows

    def _gate(self, step: TrainingStep, body: int) -> dict[str, LossFn | None]:
        case = _gate_case(self.case, self.plan)
        student, teacher = (logits.detach()[: case.batch] for logits in step.logits())
        tensors = student, teacher, step.target[: case.batch]
        self.announce("fp64 truth")
        exact = gate.truth(case, *tensors)
        allowed: gate.Error | None = None
        losses: dict[str, LossFn | None] = {}
        for row in self.rows:
            if row.variant == WITHOUT:
                row.status, losses[WITHOUT] = OK, None
                continue
            loss_fn, extra = loss_of(row.variant, self.case)
            if row.variant != EAGER:
                row.reason = backend_unsupported_reason(row.variant, False, student, teacher)
            row.reason = row.reason or memory.shortage(extra + body, self.plan.device)
            if row.reason:
                continue
            self.announce(f"gate {row.variant}")
            try:
                with memory.released(self.plan.device):
                    measured = gate.error(autograd(loss_fn, case, *tensors), exact)
            except Exception as fault:  # whatever a kernel raises is its row's reason; the others go on
                row.status, row.reason = ERROR, f"{type(fault).__name__}: {fault}"
                continue
            if allowed is None:
                of_eager = measured if row.variant == EAGER else gate.eager_error(case, *tensors, exact)
                allowed = gate.allowed_error(case, *tensors, exact, of_eager)
            row.verdict, row.gate_batch = gate.judge(measured, allowed), case.batch
            row.status = OK if row.verdict.passed else FAILED
            if row.verdict.passed:
                losses[row.variant] = loss_fn
            else:
                row.reason = f"error {row.verdict.ratio:.3g} times what is allowed"
        return losses

    def _time(self, step: TrainingStep, losses: dict[str, LossFn | None]) -> None:
        self.announce("timing")
        parts: dict[str, list[float]] = {name: [] for name in losses}
        samples = {name: _sample(step, loss_fn, parts[name]) for name, loss_fn in losses.items()}
        for sample in samples.values():
            sample()
        for kept in parts.values():
            kept.clear()
        rounds = iter(range(1, self.plan.rounds + 1))
        times = timing.interleave(
            samples,
            self.plan.rounds,
            self.plan.seconds,
            self.case.seed,
            lambda: self.announce(f"timing, round {next(rounds)}"),
            self.plan.least,
        )
        rows = {row.variant: row for row in self.rows if row.variant in times}
        for name, row in rows.items():
            row.step = times[name]
            row.loss = timing.Times(tuple(parts[name])) if parts[name] else None
        eager = rows.get(EAGER)
        for row in rows.values():
            if eager is not None and eager.step is not None and row.step is not None:
                row.step_speedup = _paired(eager.step, row.step)
                if eager.loss is not None and row.loss is not None:
                    row.loss_speedup = _paired(eager.loss, row.loss)


def _gate_case(case: Case, plan: measure.Plan) -> Case:
    """The case of the gate: the first rows of the step's batch, where the plan bounds them."""
    return replace(case, batch=min(case.batch, plan.gate_batch or case.batch))


def _paired(eager: timing.Times, own: timing.Times) -> float:
    return statistics.median(a / b for a, b in zip(eager.samples, own.samples))


def variants(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The variants that can run on the device, and why the other backends cannot."""
    logits = torch.zeros(2, 2, device=device)
    reasons = {
        name: reason
        for name in backends.NAMES
        if name != EAGER and (reason := backend_unsupported_reason(name, False, logits, logits)) is not None
    }
    return [WITHOUT, EAGER, *(name for name in backends.NAMES if name != EAGER and name not in reasons)], reasons


def loss_of(variant: str, case: Case) -> tuple[LossFn, int]:
    """The loss of a variant, and the bytes that it takes at most beside its inputs."""
    loss, options = LOSSES[case.loss], LOSSES[case.loss].options(case)
    if variant == EAGER:
        return lambda s, t, y: loss.reference(s, t, y, **options), loss.eager_bytes(case)
    function = lambda s, t, y: loss.function(s, t, y, backend=variant, **options)  # noqa: E731
    return function, case.matrix_bytes(0, 0) + (768 << 20)


def _sample(step: TrainingStep, loss_fn: LossFn | None, parts: list[float]) -> timing.SampleFn:
    """A sample of the whole step, which appends the seconds of its loss to ``parts``."""
    if step.device.type == "cuda":
        return _cuda_sample(step, loss_fn, parts)

    def sample() -> float:
        gc.collect(0)
        gc.disable()
        marks: list[float] = []
        try:
            start = time.perf_counter()
            step.run(loss_fn, lambda: marks.append(time.perf_counter()))
            end = time.perf_counter()
        finally:
            gc.enable()
        if marks:
            parts.append(marks[1] - marks[0])
        return end - start

    return sample


def _cuda_sample(step: TrainingStep, loss_fn: LossFn | None, parts: list[float]) -> timing.SampleFn:
    """The same by events on the current stream."""

    def sample() -> float:
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)

        torch.cuda.synchronize(step.device)
        mark()
        step.run(loss_fn, mark)
        mark()
        torch.cuda.synchronize(step.device)
        if len(events) == 4:
            parts.append(events[1].elapsed_time(events[2]) * 1e-3)
        return events[0].elapsed_time(events[-1]) * 1e-3

    return sample


def predicted_seconds(case: Case, backbone: Backbone, variants: int, plan: measure.Plan, gemm: float) -> float:
    """About how long a case takes: the gate (fp64 truth and losses: some six of eager's) and the rounds."""
    body = case.batch * flop_per_image(backbone, case.classes) / gemm
    eager, of_gate = (1e-3 + 4 * each.flop / gemm for each in (case, _gate_case(case, plan)))
    one_round = variants * body + (variants - 1) * eager
    return 6 * of_gate + one_round + min(plan.rounds * one_round, max(plan.seconds, plan.least * one_round))


def gemm_speed(case: Case, device: torch.device) -> float:
    """flop/s of a GEMM of the case's dtype."""
    return next(iter(measure.ceilings(device, [case.dtype], rounds=3).values()))
