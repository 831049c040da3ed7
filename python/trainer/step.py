"""One step of the optimizer: teacher, student, loss, gradient. The digits experiment and the trainer both take it.

The loss is differentiated by the logits first, and the student from there: so the time that the loss takes is its own,
and micro-batches can be contrasted with one another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Parts = dict[str, Tensor]  # detached scalars, for the log


class Objective(Protocol):
    """Student logits, teacher logits and labels to a loss and its parts."""

    needs_teacher: bool

    def set_epoch(self, epoch: float) -> None: ...

    def __call__(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, Parts]: ...


@dataclass
class Micro:
    """A micro-batch on the device."""

    images: Tensor  # (b, channels, height, width)
    target: Tensor  # (b,) int64, or (b, classes) soft
    teacher: Tensor | None = None  # its logits (b, classes), where they are cached


@dataclass
class Outcome:
    """The results of a step."""

    loss: Tensor  # (), detached
    parts: Parts
    teacher: list[Tensor | None]  # logits of each micro-batch
    norms: Parts = field(default_factory=dict)


class Stopwatch:
    """Seconds by name. On a GPU they are those of its stream, and nobody waits until they are read."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """The seconds since the last reading."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self.seconds[name] = self.seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
            self._events.clear()
        read, self.seconds = self.seconds, {}
        return read


class Step:
    """Forward, loss, backward and optimizer over the micro-batches of a step.

    A loss by rows is averaged over the micro-batches. One that contrasts rows is over all of them: the student is run
    without gradient first, the loss differentiated by all logits, and the student run again, from the same state of
    the random generators and of its buffers, to take each micro-batch's gradient. That costs a second forward pass.

    Args:
        student: the model that is trained, wrapped for its ranks or not.
        objective: see Objective; ``contrasts`` (False where it is absent) says that its rows depend on one another.
        optimizer: of the student's parameters, and of the objective's.
        teacher: frozen, in evaluation mode; None where the objective needs none.
        autocast: a function that makes the context of the forward passes and of the loss.
        scaler: for float16.
        clip_norm: largest norm of the gradient; 0: none.
        no_sync: a context that keeps gradients on the rank, given the student and whether this micro-batch is the last.
        reduce: averages tensors over the ranks in place, for the objective's own parameters.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        teacher: nn.Module | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        scaler: Any = None,
        clip_norm: float = 0.0,
        no_sync: Callable[[nn.Module, bool], contextlib.AbstractContextManager] | None = None,
        reduce: Callable[[list[Tensor]], None] | None = None,
    ):
        if objective.needs_teacher and teacher is None:
            raise ValueError("this objective needs a teacher")
        self.student, self.objective, self.optimizer, self.teacher = student, objective, optimizer, teacher
        self.autocast, self.scaler, self.clip_norm, self.device = autocast, scaler, clip_norm, device
        self.no_sync, self.reduce = no_sync, reduce
        self.watch = Stopwatch(device)
        self.trained = [x for group in optimizer.param_groups for x in group["params"]]
        self.loss_parameters = list(objective.parameters()) if isinstance(objective, nn.Module) else []

    def __call__(self, micros: Sequence[Micro], *, norms: bool = False) -> Outcome:
        """Train on the micro-batches; ``norms`` asks for the norm of each part's gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        if len(micros) > 1 and getattr(self.objective, "contrasts", False):
            outcome = self._contrast(micros, norms)
        else:
            outcome = self._average(micros, norms)
        with self.watch("optimizer"):
            self._update()
        return outcome

    def _average(self, micros: Sequence[Micro], norms: bool) -> Outcome:
        outcomes = []
        for number, micro in enumerate(micros):
            teacher = self.ask_teacher(micro)
            with self._sync(number + 1 == len(micros)):
                with self.watch("student"), self.autocast():
                    logits = self.student(micro.images)
                outcome, gradient = self._loss(logits.detach(), teacher, micro.target, 1 / len(micros), norms)
                with self.watch("student"):
                    logits.backward(gradient)
            outcomes.append(outcome)
        if len(outcomes) == 1:
            return outcomes[0]
        share = 1 / len(outcomes)

        def mean(values: list[Parts]) -> Parts:
            return {name: torch.stack([value[name] for value in values]).mean() for name in values[0]}

        return Outcome(
            loss=torch.stack([outcome.loss for outcome in outcomes]).sum() * share,
            parts=mean([outcome.parts for outcome in outcomes]),
            teacher=[logits for outcome in outcomes for logits in outcome.teacher],
            # Rows of different micro-batches: their gradients stand beside one another.
            norms={
                name: torch.stack([outcome.norms[name] for outcome in outcomes]).norm() * share
                for name in outcomes[0].norms
            },
        )

    def _contrast(self, micros: Sequence[Micro], norms: bool) -> Outcome:
        teachers = [self.ask_teacher(micro) for micro in micros]
        wrapped = isinstance(self.student, nn.parallel.DistributedDataParallel)
        inner = self.student.module if wrapped else self.student  # without gradients there is nothing to synchronize
        buffers = [(buffer, buffer.clone()) for buffer in inner.buffers()]
        states, logits = [], []
        with self.watch("student"):
            for micro in micros:
                states.append(self._random_state())
                with torch.no_grad(), self.autocast():
                    logits.append(inner(micro.images))
            for buffer, before in buffers:
                buffer.copy_(before)
        teacher = None if teachers[0] is None else torch.cat(teachers)  # type: ignore[arg-type]
        target = torch.cat([micro.target for micro in micros])
        outcome, gradient = self._loss(torch.cat(logits), teacher, target, 1.0, norms)
        outcome.teacher = list(teachers)
        pieces = gradient.split([len(micro.images) for micro in micros])
        with self.watch("student"):
            for number, (micro, piece, state) in enumerate(zip(micros, pieces, states)):
                self._set_random_state(state)
                with self._sync(number + 1 == len(micros)):
                    with self.autocast():
                        again = self.student(micro.images)
                    again.backward(piece)
        return outcome

    def ask_teacher(self, micro: Micro) -> Tensor | None:
        if not self.objective.needs_teacher:
            return None
        if micro.teacher is not None:
            return micro.teacher
        with self.watch("teacher"), torch.no_grad():
            assert self.teacher is not None
            dtype = next(self.teacher.parameters()).dtype
            if dtype == micro.images.dtype:
                with self.autocast():
                    return self.teacher(micro.images)
            return self.teacher(micro.images.to(dtype))

    def _loss(
        self, logits: Tensor, teacher: Tensor | None, target: Tensor, share: float, norms: bool
    ) -> tuple[Outcome, Tensor]:
        """The loss at the logits, and its gradient by them: times ``share``, and by the scaler's factor."""
        leaf = logits.detach().requires_grad_()
        with self.watch("loss"):
            with self.autocast():
                loss, parts = self.objective(leaf, teacher, target)
            scaled = loss if share == 1 else loss * share
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
        gradient_norms: Parts = {}
        if norms:
            with self.autocast():
                gradient_norms = self.objective.gradient_norms(leaf, teacher, target)  # type: ignore[attr-defined]
        assert leaf.grad is not None
        return Outcome(loss=loss.detach(), parts=parts, teacher=[teacher], norms=gradient_norms), leaf.grad

    def _update(self) -> None:
        if self.reduce is not None and self.loss_parameters:
            self.reduce([x.grad for x in self.loss_parameters if x.grad is not None])
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _sync(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.no_sync is None else self.no_sync(self.student, last)

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        cuda = self.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None

    def _set_random_state(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.device)
