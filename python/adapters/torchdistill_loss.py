"""torchdistill: the losses of mcld_kernels as a registered middle-level loss, ``torchdistill_loss.yaml`` beside it.

Import this file before the YAML is read: list it under ``dependencies`` of a configuration for torchdistill's own
scripts (``- name: 'torchdistill_loss'``), or import it in yours.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torchdistill.core.interfaces.pre_epoch_proc import default_pre_epoch_process_with_teacher
from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func
from torchdistill.losses.registry import register_mid_level_loss

import mcld_kernels


@register_mid_level_loss
class LogitLoss(nn.Module):
    """A loss of mcld_kernels between the logits of two modules.

    ``loss`` names it, as in the package; further keys are its options. ``student_path``, ``teacher_path`` and ``io``
    name the modules in torchdistill's io-dicts; the defaults are the models' own outputs. ``sync``: over several ranks,
    take the loss of the global batch, as `sync_over_ranks` says.
    """

    def __init__(
        self,
        loss: str = "MCLDLoss",
        student_path: str = ".",
        teacher_path: str = ".",
        io: str = "output",
        sync: bool = True,
        **options: Any,
    ):
        super().__init__()
        if not loss.endswith("Loss") or not hasattr(mcld_kernels, loss):
            losses = ", ".join(name for name in mcld_kernels.__all__ if name.endswith("Loss"))
            raise ValueError(f"mcld_kernels has no loss {loss!r}; it has {losses}")
        self.student_path, self.teacher_path, self.io = student_path, teacher_path, io
        self.loss = getattr(mcld_kernels, loss)(**options)
        if any(True for _ in self.loss.parameters()):
            raise ValueError(
                f"{loss} has parameters, and torchdistill's optimizer has those of the models alone: weights and a "
                "temperature that are learned need a training loop of your own"
            )
        if sync:
            sync_over_ranks(self.loss)

    def forward(
        self, student_io_dict: Any, teacher_io_dict: Any, targets: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        student, teacher = student_io_dict[self.student_path][self.io], teacher_io_dict[self.teacher_path][self.io]
        return self.loss(student, teacher.detach(), targets)


@register_pre_epoch_proc_func
def pre_epoch_process_with_warmup(self: Any, epoch: int | None = None, **kwargs: Any) -> None:
    """torchdistill's default, and the epoch for the losses that have a warm-up; epochs count from 0.

    torchdistill saves no state of a loss: a warm-up by epochs is right after a resume, and one by steps begins again.
    """
    default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    for criterion, _ in self.criterion.term_dict.values():
        if isinstance(criterion, LogitLoss) and hasattr(criterion.loss, "set_epoch"):
            criterion.loss.set_epoch(epoch)


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
