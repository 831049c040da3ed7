"""The parts of a training, made from the settings: models, average, loss, optimizer, schedule, scaler."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer import losses, models, vision
from trainer.checkpoint import load_optimizer_state, unwrapped
from trainer.config import Config
from trainer.faults import ConfigFault
from trainer.ranks import Ranks, no_sync, wrapped
from trainer.step import Step


class Parts:
    """All that a step needs. Every rank makes its own, with the same first weights; a misfit raises on each."""

    def __init__(self, config: Config, ranks: Ranks, classes: tuple[str, ...], steps_an_epoch: int):
        self.config, self.ranks, self.classes = config, ranks, classes
        if config.schedule.warmup_epochs >= config.epochs:
            raise ConfigFault(
                f"schedule.warmup_epochs={config.schedule.warmup_epochs:g} must be less than epochs={config.epochs}"
            )
        ranks.all(self._make_models)
        group = dist.group.WORLD if ranks.size > 1 else None
        self.objective = ranks.all(lambda: losses.objective(config, ranks.size, group, len(classes))).to(ranks.device)
        soft = bool(config.augment.mixup or config.augment.cutmix)
        ranks.all(lambda: self.objective.check(ranks.device, soft=soft))
        self.average = self._make_average()
        if config.precision.compile:
            self.student.compile()  # in place: the names of its weights stay
        self.model = wrapped(self.student, config, ranks)
        if config.parallel.kind == "fsdp2":
            self._check_sharded()
        self.optimizer, self.rate = self._make_optimizer()
        self.scheduler = self._make_scheduler(steps_an_epoch)
        self.scaler = torch.amp.GradScaler(ranks.device.type) if config.precision.amp == "float16" else None
        self.step = Step(
            self.model, self.objective, self.optimizer, device=ranks.device, teacher=self.teacher,
            autocast=self.autocast, scaler=self.scaler, clip_norm=config.optimizer.clip_norm, no_sync=no_sync,
            reduce=ranks.mean,
        )  # fmt: skip

    @property
    def average_model(self) -> nn.Module | None:
        return None if self.average is None else self.average.module

    def autocast(self) -> contextlib.AbstractContextManager:
        amp = self.config.precision.amp
        if amp == "none":
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=getattr(torch, amp))

    def _make_models(self) -> None:
        config, device, classes = self.config, self.ranks.device, len(self.classes)
        self.teacher: nn.Module | None = None
        if config.loss.name != "ce":
            torch.manual_seed(config.seed + 1)
            self.teacher = models.teacher(config, self.classes, device)
            models.check_output(self.teacher, "teacher", config, classes, device)
        torch.manual_seed(config.seed)  # the student's first weights do not depend on the teacher
        self.student = models.student(config, self.classes, device)
        models.check_output(self.student, "student", config, classes, device)

    def _make_average(self) -> Any:
        if not self.config.ema.decay:
            return None
        section = self.config.ema
        # With fsdp2 batch-norm statistics stay whole beside sharded weights, and one call takes no mixture.
        return vision.timm.utils.ModelEmaV3(
            self.student, decay=section.decay, use_warmup=section.warmup,
            foreach=self.config.parallel.kind != "fsdp2",
        )  # fmt: skip

    def _check_sharded(self) -> None:
        if self.average is not None:
            self.average.module = wrapped(self.average.module, self.config, self.ranks)
        if list(self.objective.parameters()):
            raise ConfigFault("parallel.kind=fsdp2 shards the student alone: a loss that learns weights needs ddp")
        if self.config.precision.amp == "float16":
            raise ConfigFault(
                "parallel.kind=fsdp2 with precision.amp=float16: a GradScaler sees one shard; take bfloat16"
            )

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, float]:
        section = self.config.optimizer
        ratio = self.config.batch / section.base_batch
        rate = section.rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[section.scaling]
        if section.name not in (known := vision.timm.optim.list_optimizers()):
            raise ConfigFault(f"optimizer.name={section.name} is unknown to timm; it has {', '.join(known)}")
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in section.options.items()}
        try:
            optimizer = vision.timm.optim.create_optimizer_v2(
                unwrapped(self.model), opt=section.name, lr=rate, weight_decay=section.weight_decay,
                momentum=section.momentum, filter_bias_and_bn=not section.decay_norm_and_bias, **options,
            )  # fmt: skip
        except (TypeError, ValueError) as fault:
            raise ConfigFault(f"optimizer: {section.name} refuses its options: {fault}") from None
        if parameters := list(self.objective.parameters()):
            optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
        return optimizer, rate

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """The optimizer's state from a checkpoint, with the options of the settings where these have changed."""
        section = self.config.optimizer
        names = {"weight_decay", "momentum", *section.options}
        now = [{name: group[name] for name in names & group.keys()} for group in self.optimizer.param_groups]
        load_optimizer_state(self.model, self.optimizer, state)
        for group, options in zip(self.optimizer.param_groups, now):
            group.update(options)

    def _make_scheduler(self, steps_an_epoch: int) -> Any:
        section = self.config.schedule
        scheduler, _ = vision.timm.scheduler.create_scheduler_v2(
            self.optimizer,
            sched=section.name,
            num_epochs=self.config.epochs,
            warmup_epochs=section.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=section.warmup_rate,
            min_lr=section.min_rate,
            decay_epochs=section.decay_epochs,
            decay_milestones=section.milestones,
            decay_rate=section.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=steps_an_epoch,
        )
        assert scheduler is not None
        scheduler.step_update(0)
        return scheduler
