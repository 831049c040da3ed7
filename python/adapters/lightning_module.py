"""Lightning: a LightningModule that trains a student with cross-entropy and any loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Distillation(L.LightningModule):
    """Batches are (images, target). The teacher is frozen and left out of the checkpoints.

    Args:
        student, teacher: images to logits (batch, classes).
        loss: ``loss(student, teacher, target)``. One with ``set_epoch`` gets the epoch and its fraction, one with
            ``terms`` has them logged. It is a part of the checkpoint.
        sync: over several ranks, take the loss of the global batch, as `sync_over_ranks` says.
        optimizer: parameters to what ``configure_optimizers`` may return; the parameters of the loss are among them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Any],
        sync: bool = True,
    ):
        super().__init__()
        self.student, self.teacher, self.loss = student, teacher.eval().requires_grad_(False), loss
        self.make_optimizer, self.sync = optimizer, sync
        self.strict_loading = False  # the teacher is not in a checkpoint

    def on_fit_start(self) -> None:
        if self.sync:
            sync_over_ranks(self.loss)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, target = batch
        if hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(self.current_epoch + index / self.trainer.num_training_batches)
        student = self.student(images)
        with torch.no_grad():
            teacher = self.teacher(images)
        cross = F.cross_entropy(student, target)
        if hasattr(self.loss, "terms"):
            terms = self.loss.terms(student, teacher, target)
            distillation = terms.loss
            self.log_dict(
                {f"train/{name}": value.detach() for name, value in terms._asdict().items() if name != "loss"}
            )
        else:
            distillation = self.loss(student, teacher, target)
        self.log_dict({"train/cross_entropy": cross.detach(), "train/distillation": distillation.detach()})
        return cross + distillation

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, target = batch
        accuracy = (self.student(images).argmax(dim=1) == target).float().mean()
        self.log("val/accuracy", accuracy, prog_bar=True, sync_dist=True, batch_size=len(target))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([*self.student.parameters(), *self.loss.parameters()])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("teacher.")}


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
