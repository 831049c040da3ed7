"""mdistiller: a Distiller with any loss. Import this file in mdistiller's train script: it is DISTILLER.TYPE MCLD then.

The trainer wraps the distiller in DataParallel, and then a contrast sees the rows of one GPU alone: train on one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._base import Distiller
from torch import Tensor, nn

from mcld_kernels import MCLDLoss


class LossDistiller(Distiller):
    """Cross-entropy and ``loss(student, teacher, target)``. Subclass and override ``make_loss`` for another loss."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any = None):
        super().__init__(student, teacher)
        self.loss = self.make_loss(cfg)

    def make_loss(self, cfg: Any) -> nn.Module:
        return MCLDLoss(temperature=0.5, weight=3.0, warmup=20)

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *self.loss.parameters()]

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(epoch - 1)  # mdistiller counts from 1
        student, _ = self.student(image)
        with torch.no_grad():
            teacher, _ = self.teacher(image)
        # The trainer adds up all values: a detached term for the log must stay out.
        return student, {"loss_ce": F.cross_entropy(student, target), "loss_kd": self.loss(student, teacher, target)}


distiller_dict["MCLD"] = LossDistiller
