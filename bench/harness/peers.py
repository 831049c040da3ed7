"""Public implementations to compare with, where they are installed.

`PEERS` compute the instance-wise term of MCLD alone (InfoNCE with diagonal positives), `EMBEDDING_PEERS` the losses of
embeddings: "info_nce" and "moco" for any number of candidates, "simclr" and "supcon".
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


EmbeddingLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, candidates, target (B,) -> ()


Build = Callable[[float, int], EmbeddingLoss]  # temperature, batch -> loss


@dataclass(frozen=True)
class EmbeddingPeer:
    name: str
    module: str
    title: str
    losses: dict[str, tuple[Build, float]]  # and the (batch, candidates) matrices in fp32 at its peak, from above
    prepare: Callable[[], object] | None = None  # before the module is imported; raises ImportError


def _pairs_by_supcon(temperature: float, batch: int) -> EmbeddingLoss:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=temperature)

    def apply(rows: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        # A label for each pair: SupCon's mean over the positives is then the one positive.
        labels = torch.arange(candidates.shape[0], device=rows.device)
        return loss(rows, labels[:batch], ref_emb=candidates, ref_labels=labels)

    return apply


def _import_torchvision() -> object:
    """lightly imports it, and it cannot be imported beside every build of torch without the trainer's help."""
    from python.trainer.torchvision_import import import_torchvision

    return import_torchvision()


def _lightly(temperature: float, batch: int) -> EmbeddingLoss:
    from lightly.loss import NTXentLoss

    made: list[NTXentLoss] = []

    def apply(rows: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        keys, further = candidates[:batch], candidates[batch:]
        if not made:
            loss = NTXentLoss(temperature=temperature, memory_bank_size=tuple(further.shape)).to(rows.device)
            loss.memory_bank.bank = F.normalize(further)
            loss.memory_bank._dequeue_and_enqueue = lambda batch: None  # one bank for every step
            made.append(loss)
        return made[0](rows, keys)

    return apply


def _info_nce_with_negatives(temperature: float, batch: int) -> EmbeddingLoss:
    from info_nce import info_nce

    return lambda rows, candidates, target: info_nce(
        rows, candidates[:batch], candidates[batch:], temperature=temperature
    )


def _supcon(temperature: float, batch: int) -> EmbeddingLoss:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=temperature)
    return lambda rows, candidates, target: loss(rows, target)


def _simclr(temperature: float, batch: int) -> EmbeddingLoss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=temperature)
    return lambda rows, candidates, target: loss(rows, candidates)


EMBEDDING_PEERS = (
    EmbeddingPeer(
        "pml-supcon",
        "pytorch_metric_learning",
        "SupConLoss of pytorch-metric-learning",
        {"info_nce": (_pairs_by_supcon, 12), "supcon": (_supcon, 12)},
    ),
    EmbeddingPeer(
        "lightly",
        "lightly.loss",
        "NTXentLoss of lightly, with its memory bank for moco",
        {"moco": (_lightly, 8), "simclr": (_simclr, 24)},
        _import_torchvision,
    ),
    EmbeddingPeer(
        "info-nce-queue",
        "info_nce",
        "info-nce-pytorch with explicit negatives",
        {"moco": (_info_nce_with_negatives, 8)},
    ),
)
