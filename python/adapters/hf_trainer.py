"""Hugging Face Trainer: a teacher and a distillation loss beside the model's own loss, for classification."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer


class DistillationTrainer(Trainer):
    """``Trainer`` with ``teacher`` and ``distill_loss(student, teacher, target)``; all other arguments are Trainer's.

    The teacher gets the student's inputs, in the Trainer's autocast. The loss is evaluated in training alone: its value
    depends on the batch size, so the evaluation loss stays the model's own.

    With mixed precision the Trainer converts the student's outputs to fp32, while the teacher's stay 16-bit: the
    student's logits are cast to the teacher's dtype, in which they were computed. ``state.epoch`` is a fraction that
    counts from 0, also after a resume: it goes to the loss's ``set_epoch``, and ``state.global_step`` to a warm-up by
    steps. The Trainer's own optimizer has the model's parameters alone, so a loss that learns its weights or its
    temperature needs ``optimizers=``. ``sync``: over several ranks, take the loss
    of the global batch, as `sync_over_ranks` says.
    """

    # compute_loss gives the mean of each micro-batch; the Trainer divides by their number. (Older Trainers look at
    # model_accepts_loss_kwargs instead, which is set below.)
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, teacher: nn.Module, distill_loss: nn.Module, sync: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        if self.optimizer is None and any(True for _ in distill_loss.parameters()):
            raise ValueError(
                f"{type(distill_loss).__name__} has parameters, and the Trainer's own optimizer has those of the model "
                "alone: pass optimizers=(optimizer, scheduler) with both"
            )
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.distill_loss = distill_loss.to(self.args.device)
        if sync:
            sync_over_ranks(self.distill_loss)
        self._has_counted = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        if model.training:
            if hasattr(self.distill_loss, "set_epoch"):
                self.distill_loss.set_epoch(self.state.epoch or 0.0)
            if not self._has_counted and getattr(self.distill_loss, "warmup_steps", 0):
                # The Trainer's checkpoints have no state of the loss.
                self.distill_loss.steps.fill_(self.state.global_step * self.args.gradient_accumulation_steps)
            self._has_counted = True
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher(**{key: value for key, value in inputs.items() if key != "labels"}).logits
            student = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
            loss = loss + self.distill_loss(student.to(teacher.dtype), teacher, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def sync_over_ranks(loss: nn.Module) -> None:
    """Where there are several ranks, let the loss be that of the global batch, the rows of all of them.

    ValueError for a loss without ``process_group``. One whose rows do not meet, as KDLoss, needs none: the mean of even
    ranks is the global one.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if not hasattr(loss, "process_group"):
            raise ValueError(
                f"sync=True: {type(loss).__name__} has no process_group, so each rank would see its own rows alone; "
                "pass sync=False if that is what you want"
            )
        loss.process_group = dist.group.WORLD
