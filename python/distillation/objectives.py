"""The objectives of a student: student logits, teacher logits and labels to a loss and its named parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer.step import Objective, Parts

from mcld_kernels import MCLDLoss

__all__ = ["Contrastive", "CrossEntropy", "Objective", "Parts", "SoftTargets", "add"]


class CrossEntropy(nn.Module):
    """Cross-entropy with the labels, without a teacher."""

    needs_teacher = False

    def set_epoch(self, epoch: float) -> None:
        pass

    def forward(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, Parts]:
        loss = F.cross_entropy(student, target)
        return loss, {"cross-entropy": loss.detach()}


class SoftTargets(nn.Module):
    """Cross-entropy and the divergence from the teacher's softened distribution (Hinton et al., arXiv 1503.02531)."""

    needs_teacher = True

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def set_epoch(self, epoch: float) -> None:
        pass

    def forward(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, Parts]:
        assert teacher is not None
        cross = F.cross_entropy(student, target)
        soft = (F.log_softmax(x / self.temperature, 1) for x in (student, teacher))
        divergence = self.temperature**2 * F.kl_div(*soft, reduction="batchmean", log_target=True)
        return cross + divergence, {"cross-entropy": cross.detach(), "divergence": divergence.detach()}


class Contrastive(nn.Module):
    """Cross-entropy and the MCLD loss."""

    needs_teacher = True

    def __init__(self, mcld: MCLDLoss):
        super().__init__()
        self.mcld = mcld

    def set_epoch(self, epoch: float) -> None:
        self.mcld.set_epoch(epoch)

    def forward(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, Parts]:
        assert teacher is not None
        cross = F.cross_entropy(student, target)
        terms = self.mcld.terms(student, teacher, target)
        parts = {"instance": terms.instance, "sample": terms.sample, "category": terms.category}
        return cross + terms.loss, {"cross-entropy": cross.detach(), **parts}


@torch.no_grad()
def add(sums: dict[str, Tensor], parts: Parts, count: int) -> None:
    """Add a batch's parts, weighted by its size, without waiting for the device."""
    for name, value in parts.items():
        sums[name] = sums.get(name, torch.zeros_like(value)) + count * value
