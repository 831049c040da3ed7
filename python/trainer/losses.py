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
    try:
        return make(**arguments)
    except NotImplementedError:
        raise ConfigFault(
            f"{name} over the batch of all ranks is not in mcld_kernels {mcld_kernels.__version__}: loss.over=rank "
            "gives each rank the loss of its own rows"
        ) from None
    except (ValueError, TypeError) as fault:
        raise ConfigFault(f"loss.options of {name}: {fault}") from None


class Distillation(nn.Module):
    """``cross_entropy x CE + weight x ramp x loss`` of student and teacher logits, and its parts.

    Shapes:
        student, teacher: (batch, classes); target: (batch,) int64, or (batch, classes) soft; output: ().
    """

    def __init__(self, section: Loss, *, smoothing: float = 0.0, soft: bool = False, group: Any = None):
        """``group``: the ranks over which a loss that contrasts rows takes its batch; None: each its own."""
        super().__init__()
        self.section, self.smoothing = section, smoothing
        self.name = section.name
        self.contrasts = section.name not in BY_ROW
        self.needs_teacher = section.name != "ce"
        self.ramp = 1.0
        self.loss: nn.Module | None = None
        if not self.needs_teacher:
            if section.options:
                raise ConfigFault(f"loss.options: ce has none; got {', '.join(section.options)}")
            return
        self.loss = _construct(section.name, section.options, group if self.contrasts else None)
        self.takes_target = "target" in inspect.signature(self.loss.forward).parameters
        if soft:
            self._check_soft()
        self.terms_alone = self._single_terms(section.options, group) if section.gradient_norms else {}

    def _check_soft(self) -> None:
        """Does the loss take soft labels? One that needs no labels gets none."""
        if not self.takes_target or self.name == "kd":
            return
        probe = _construct(self.name, self.section.options, None)
        logits = torch.linspace(-1, 1, 8).reshape(4, 2)
        refusal = None
        for target in (torch.full((4, 2), 0.5), None):
            try:
                with torch.no_grad():
                    probe(logits, logits.flip(0), target)
            except (ValueError, TypeError, AttributeError, RuntimeError) as fault:
                refusal = refusal or fault
                continue
            self.takes_target = target is not None
            return
        raise ConfigFault(
            f"mixup and cutmix make soft labels, and {self.name} with these options takes hard ones: "
            f"{str(refusal).partition(chr(10))[0]}"
        )

    def _single_terms(self, options: Options, group: Any) -> dict[str, nn.Module]:
        """For gradient norms: MCLD with one term each, unweighted; another loss is one term."""
        if self.name != "mcld":
            return {}
        shared = {key: value for key, value in options.items() if key not in ("weight", "warmup", "warmup_steps")}
        shared.pop("uncertainty_weighting", None)
        active = (self.loss.effective_weight if self.loss is not None else torch.zeros(3)).tolist()
        wanted = self.section.options.get("weight", 1.0)
        wanted = wanted if isinstance(wanted, list) else [wanted] * 3
        names = ("instance", "sample", "category")
        return {
            name: _construct("mcld", {**shared, "weight": [float(i == place) for i in range(3)]}, group)
            for place, name in enumerate(names)
            if wanted[place] or active[place]
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
        arguments = (student, teacher, target) if self.takes_target else (student, teacher)
        if not hasattr(self.loss, "terms"):
            return self.loss(*arguments), {}
        result = self.loss.terms(*arguments)  # type: ignore[operator]
        return result.loss, {name: value for name, value in result._asdict().items() if name != "loss"}

    def weights(self) -> dict[str, float]:
        """The weight of each part in the loss of this moment, warm-ups included."""
        made = {CROSS_ENTROPY: self.section.cross_entropy}
        if self.loss is not None:
            made[self.name] = self.section.weight * self.ramp
            if hasattr(self.loss, "effective_weight"):
                names = ("instance", "sample", "category")
                made |= dict(zip(names, (made[self.name] * self.loss.effective_weight).tolist()))  # type: ignore[operator]
        return made

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
        labels = (target,) if self.takes_target else ()
        for name, term in self.terms_alone.items():
            norm(name, lambda leaf, term=term: term(leaf, teacher, *labels))  # type: ignore[misc]
        return norms


def objective(config: Config, size: int, group: Any) -> Distillation:
    """The loss of a run on ``size`` ranks, of which ``group`` is the process group."""
    soft = bool(config.augment.mixup or config.augment.cutmix)
    use_group = group if size > 1 and config.loss.over == "global" else None
    return Distillation(config.loss, smoothing=config.augment.smoothing, soft=soft, group=use_group)
