"""Public implementations to compare with, where they are installed.

All of them compute the instance-wise term alone (InfoNCE with diagonal positives).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    name: str
    module: str
    title: str
    build: Callable[[float], Callable[[Tensor, Tensor], Tensor]]  # temperature -> loss(student, teacher)
    extra_bytes: Callable[[int], int]  # batch -> approximate peak in fp32, beside copies of the logits
    cuda_only: bool = False


def _info_nce(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    from info_nce import InfoNCE

    return InfoNCE(temperature=temperature, negative_mode="unpaired")


def _metric_learning(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=temperature)

    def apply(student: Tensor, teacher: Tensor) -> Tensor:
        labels = torch.arange(student.shape[0], device=student.device)
        # A copy: the same tensor on both sides would make it leave out the diagonal, which holds the positives.
        return loss(student, labels, ref_emb=teacher, ref_labels=labels.clone())

    return apply


def _inf_cl(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    from inf_cl import cal_flash_loss

    def apply(student: Tensor, teacher: Tensor) -> Tensor:
        # It works on heads of 256 columns in fp32; zero columns change no similarity.
        pad = -student.shape[1] % 256
        q = F.pad(F.normalize(student.float()), (0, pad))
        k = F.pad(F.normalize(teacher.float()), (0, pad))
        return cal_flash_loss(q, k, scale=1 / temperature).mean()

    return apply


PEERS = (
    Peer(
        "inf-cl",
        "inf_cl",
        "Inf-CL's Triton kernels (github.com/DAMO-NLP-SG/Inf-CLIP)",
        _inf_cl,
        lambda b: 0,
        cuda_only=True,
    ),
    Peer("info-nce", "info_nce", "info-nce-pytorch, eager", _info_nce, lambda b: 20 * b**2),
    # It sets every positive pair against every negative one: 4 arrays of B^3.
    Peer(
        "metric-learning",
        "pytorch_metric_learning",
        "NTXentLoss of pytorch-metric-learning",
        _metric_learning,
        lambda b: 17 * b**3,
    ),
)
