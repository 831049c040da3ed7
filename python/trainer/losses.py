"""The loss of a run by its name: cross-entropy and one of the distillation losses that mcld_kernels exports, or DKD."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from distillation.dkd import DKDLoss
from torch import Tensor, nn

import mcld_kernels
from trainer.config import Config, Loss, Options
from trainer.faults import ConfigFault

# Their value for a row depends on that row alone, so that a mean over micro-batches and ranks is that of the batch.
BY_ROW = ("ce", "kd", "dkd")
CROSS_ENTROPY = "cross-entropy"
Parts = dict[str, Tensor]


def registry() -> dict[str, Callable[..., nn.Module]]:
    """The distillation losses by name: those of mcld_kernels, MCLDLoss as mcld, InfoNCELoss as info_nce; and dkd."""
    made: dict[str, Callable[..., nn.Module]] = {"dkd": DKDLoss}
    for name in mcld_kernels.__all__:
        if name.endswith("Loss"):
            made[_lower(name.removesuffix("Loss"))] = getattr(mcld_kernels, name)
    return dict(sorted(made.items()))


def _lower(name: str) -> str:
    return {"InfoNCE": "info_nce"}.get(name, name.lower())


def _construct(name: str, options: Options, group: Any) -> nn.Module:
    """The loss with its options checked by its signature, over a process group where one is given."""
    known = registry()
    if name not in known:
        raise ConfigFault(f"loss.name={name} is unknown; there are ce, {', '.join(known)}")
    make = known[name]
    signature = inspect.signature(make)
    accepted = [key for key in signature.parameters if key not in ("process_group", "args", "kwargs")]
    if unknown := sorted(options.keys() - set(accepted)):
        raise ConfigFault(f"loss.options: {name} has no {', '.join(unknown)}; it has {', '.join(accepted)}")
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if group is not None:
        if "process_group" not in signature.parameters:
            raise ConfigFault(
                f"{name} contrasts the rows of a batch, and has no process_group for the batch of all ranks: "
                "loss.over=rank gives each rank the loss of its own rows"
            )
        arguments["process_group"] = group
        if "even" in signature.parameters:
            arguments.setdefault("even", True)  # every rank has as many rows: nothing is read back from a GPU
    try:
        return make(**arguments)
    except (NotImplementedError, ValueError, TypeError) as fault:
        raise ConfigFault(f"loss.options of {name}: {fault}") from None


class Distillation(nn.Module):
    """``cross_entropy x CE + weight x ramp x loss`` of student and teacher logits, and its parts.

    Shapes:
        student, teacher: (batch, classes); target: (batch,) int64, or (batch, classes) soft; output: ().
    """

    def __init__(
        self,
        section: Loss,
        *,
        smoothing: float = 0.0,
        group: Any = None,
        classes: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """``group``: the ranks over which a loss that contrasts rows takes its batch; None: each its own.

        ``classes`` and ``dtype`` are those of the queue, where the section asks for one.
        """
        super().__init__()
        self.section, self.smoothing = section, smoothing
        self.name = section.name
        self.contrasts = section.name not in BY_ROW
        self.needs_teacher = section.name != "ce"
        self.ramp = 1.0
        self.loss: nn.Module | None = None
        self.queue: mcld_kernels.TeacherQueue | None = None
        if not self.needs_teacher:
            if section.options:
                raise ConfigFault(f"loss.options: ce has none; got {', '.join(section.options)}")
            return
        self.loss = _construct(section.name, section.options, group if self.contrasts else None)
        names = inspect.signature(self.loss.forward).parameters
        sides = ("target",) if "target" in names else ("anchor_target", "candidate_target")  # info_nce has both
        self.label_names = [name for name in sides if name in names]
        if section.queue:
            if "candidates" not in names:
                raise ConfigFault(f"loss.queue: {section.name} takes no further candidates")
            assert classes is not None
            self.queue = mcld_kernels.TeacherQueue(section.queue, classes, dtype=dtype)
        self.term_names = self._term_names()
        self.terms_alone = self._single_terms(group if self.contrasts else None) if section.gradient_norms else {}

    def check(self, device: torch.device, *, soft: bool) -> None:
        """Ask the loss once, on every rank, with the kinds of labels and candidates that it will get.

        A loss that refuses soft labels and needs no labels gets none.

        Raises:
            ConfigFault: it refuses what it will get.
        """
        if self.loss is None or self.name == "kd":
            return
        student = torch.linspace(-1, 1, 12, device=device).reshape(4, 3)
        target = torch.full((4, 3), 1 / 3, device=device) if soft else torch.arange(4, device=device) % 3
        more = {} if self.queue is None else {"candidates": student.flip(1)}
        training, refusal = self.loss.training, None
        self.loss.eval()  # no step is counted
        for names in (self.label_names, []) if soft else (self.label_names,):
            try:
                with torch.no_grad():
                    self.loss(student, student.flip(0), **dict.fromkeys(names, target), **more)
            except (ValueError, TypeError, AttributeError, RuntimeError) as fault:
                refusal = refusal or fault
                continue
            self.label_names = names
            self.loss.train(training)
            return
        what = "soft labels, as mixup and cutmix make them" if soft else "these labels"
        if self.queue is not None:
            what += ", with loss.queue"
        raise ConfigFault(
            f"{self.name} with these options refuses {what}: {str(refusal).partition(chr(10))[0]}. "
            "loss.over=rank is process_group=None"
        )

    def _term_names(self) -> tuple[str, ...]:
        """The names of the loss's terms; none where it is one term."""
        if not hasattr(self.loss, "terms"):
            return ()
        probe = _construct(self.name, self.section.options, None).eval()
        logits = torch.linspace(-1, 1, 12).reshape(4, 3)
        with torch.no_grad():
            result = probe.terms(logits, logits.flip(0), torch.arange(4) % 3)  # type: ignore[operator]
        names = tuple(name for name in result._fields if name != "loss")
        return names if len(names) > 1 else ()

    def _single_terms(self, group: Any) -> dict[str, nn.Module]:
        """For gradient norms: the loss with one of its terms each, unweighted and without warm-up."""
        ramps = ("warmup", "warmup_steps", "uncertainty_weighting")
        shared = {key: value for key, value in self.section.options.items() if key not in ("weight", *ramps)}
        weights = self.section.options.get("weight", 1.0)
        weights = weights if isinstance(weights, list) else [weights] * len(self.term_names)
        return {
            name: _construct(self.name, {**shared, "weight": [float(i == place) for i in range(len(weights))]}, group)
            for place, name in enumerate(self.term_names)
            if weights[place]
        }

    def set_epoch(self, epoch: float) -> None:
        """The epoch, counted from 0 with its fraction, for warm-ups."""
        warmup = self.section.warmup_epochs
        self.ramp = min(epoch / warmup, 1.0) if warmup else 1.0
        if self.loss is not None and hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(epoch)  # type: ignore[operator]

    def forward(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, Parts]:
        """The loss, and its detached parts before their weights."""
        total, parts = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32)), {}
        if self.section.cross_entropy or not self.needs_teacher:
            cross = self._cross_entropy(student, target)
            total, parts[CROSS_ENTROPY] = total + self.section.cross_entropy * cross, cross.detach()
        if self.loss is not None:
            assert teacher is not None
            value, terms = self._distillation(student, teacher, target)
            total, parts[self.name] = total + self.section.weight * self.ramp * value, value.detach()
            parts |= terms
        return total, parts

    def _cross_entropy(self, student: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            target = target.to(student.dtype)
        return F.cross_entropy(student, target, label_smoothing=self.smoothing)

    def _distillation(self, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        assert self.loss is not None
        more = self._more_arguments(target)
        if not hasattr(self.loss, "terms"):
            return self.loss(student, teacher, **more), {}
        result = self.loss.terms(student, teacher, **more)  # type: ignore[operator]
        return result.loss, {name: getattr(result, name) for name in self.term_names}

    def _more_arguments(self, target: Tensor) -> dict[str, Tensor]:
        """Labels, and the rows of the queue, by the names that the loss gives them."""
        more = dict.fromkeys(self.label_names, target)
        if self.queue is not None and len(self.queue):
            more["candidates"] = self.queue.candidates
            if self.label_names:
                more["candidate_target"] = self.queue.target
        return more

    def enqueue(self, teacher: Tensor, target: Tensor) -> None:
        """Keep the teacher's rows of a step, those of all ranks, for the steps that follow."""
        if self.queue is not None:
            self.queue.enqueue(teacher, target)

    def weights(self) -> dict[str, float]:
        """The weight of each part in the loss of this moment, warm-ups included."""
        made = {CROSS_ENTROPY: self.section.cross_entropy}
        if self.loss is not None:
            made[self.name] = self.section.weight * self.ramp
            made |= {name: made[self.name] * value for name, value in zip(self.term_names, self._term_weights())}
        return made

    def _term_weights(self) -> list[float]:
        """The weights of the terms within the loss, in the next step."""
        loss: Any = self.loss
        if not self.term_names:
            return []
        if hasattr(loss, "effective_weight"):
            return loss.effective_weight.tolist()
        return list(loss.options.term_weight) if loss.weight is None else loss.weight.tolist()

    def gradient_norms(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Parts:
        """The norm, over the rows here, of the gradient of each weighted part by the logits."""
        weights, norms = self.weights(), {}

        def norm(name: str, value: Callable[[Tensor], Tensor]) -> None:
            with torch.enable_grad():
                leaf = student.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(weights[name] * value(leaf), leaf)
            norms[name] = gradient.float().norm()

        if self.section.cross_entropy or not self.needs_teacher:
            norm(CROSS_ENTROPY, lambda leaf: self._cross_entropy(leaf, target))
        if self.loss is None or teacher is None:
            return norms
        if not self.terms_alone:
            training = self.loss.training
            self.loss.eval()  # no step is counted
            norm(self.name, lambda leaf: self._distillation(leaf, teacher, target)[0])
            self.loss.train(training)
        more = self._more_arguments(target)
        for name, term in self.terms_alone.items():
            norm(name, lambda leaf, term=term: term(leaf, teacher, **more))  # type: ignore[misc]
        return norms


def objective(config: Config, size: int, group: Any, classes: int) -> Distillation:
    """The loss of a run on ``size`` ranks, of which ``group`` is the process group."""
    return Distillation(
        config.loss,
        smoothing=config.augment.smoothing,
        group=group if size > 1 and config.loss.over == "global" else None,
        classes=classes,
        dtype=getattr(torch, config.precision.dtype),
    )
