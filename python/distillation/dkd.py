r"""Decoupled knowledge distillation (Zhao et al., arXiv 2203.08679), in eager PyTorch: a baseline of the experiments.

With p = softmax(teacher / t), q = softmax(student / t), the target class y of a row and the distributions p', q' over
the other classes (the target taken out, the rest summing to 1),

    TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y)),    NCKD = KL(p' || q'),    L = t^2 mean(alpha TCKD + beta NCKD).

Knowledge distillation is TCKD + (1 - p_y) NCKD: a confident teacher mutes NCKD there, and a free beta does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation, the mean over the rows.

    Args:
        student, teacher: logits, (batch, classes) with 2 classes or more.
        target: labels, (batch,), int64, in [0, classes).
        alpha, beta: weights of the target-class and of the non-target-class part. The defaults are those of the
            authors' CIFAR-100 experiments with ResNet pairs; their ImageNet experiments use beta = 0.5 and
            temperature 1.
        temperature: > 0.

    Returns:
        Tensor of shape (); 0 for an empty batch.

    Raises:
        ValueError: shapes or the temperature do not fit.
        TypeError: the labels are not int64.
    """
    if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] < 2:
        raise ValueError(
            "student and teacher must be logits of one shape (batch, classes) with 2 classes or more; "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must hold labels (batch,), int64; got {tuple(target.shape)}, {target.dtype}")
    if target.shape != student.shape[:1]:
        raise ValueError(f"target must have shape {tuple(student.shape[:1])}; got {tuple(target.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0; got {temperature}")
    (q_target, q_others), (p_target, p_others) = (_decouple(x / temperature, target) for x in (student, teacher))
    rows = alpha * _divergence(p_target, q_target) + beta * _divergence(p_others, q_others)
    return temperature**2 * rows.sum() / max(1, len(rows))


def _decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, not target), (batch, 2), and of the other classes alone, (batch, classes - 1)."""
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = logits.gather(1, others + (others >= target[:, None]))  # without a boolean index, which waits for the GPU
    pair = torch.cat((logits.gather(1, target[:, None]), others.logsumexp(1, keepdim=True)), 1)
    return pair.log_softmax(1), others.log_softmax(1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, (batch,)."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


class DKDLoss(nn.Module):
    """:func:`dkd_loss` with its options kept."""

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0):
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        options = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        return dkd_loss(student, teacher, target, **options)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, temperature={self.temperature:g}"
