"""The family's losses as a user writes them from library calls, with autograd: the lines of their docstrings.

Unlike `mcld_kernels.reference` they check nothing, and give NaN where a row has no direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from bench.harness.cases import Case

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def _info_nce(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        similarities = F.normalize(student) @ F.normalize(teacher).T / case.temperature
        return F.cross_entropy(similarities, torch.arange(len(student), device=student.device))

    return loss


def mixed(target: Tensor, classes: int) -> Tensor:
    """Soft labels (B, classes) as mixup makes them: 0.7 of the row's class, 0.3 of another row's."""
    pairs = torch.stack((target, target.flip(0)), 1)
    soft = torch.zeros(len(target), classes, device=target.device)
    return soft.scatter_add_(1, pairs, soft.new_tensor((0.7, 0.3)).expand_as(pairs))


def _mcld_soft(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        rows = F.normalize(student) @ F.normalize(teacher).T / case.temperature
        columns = F.normalize(student, dim=0).T @ F.normalize(teacher, dim=0) / case.temperature
        soft = mixed(target, case.classes).to(rows.dtype)
        shared = F.normalize(soft @ soft.T, p=1)
        return (
            F.cross_entropy(rows, torch.arange(len(rows), device=rows.device))
            + F.cross_entropy(rows, shared)
            + F.cross_entropy(columns, torch.arange(len(columns), device=rows.device))
        )

    return loss


def _moco(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        s, t = F.normalize(student), F.normalize(teacher)
        keys, queue = t[: len(s)], t[len(s) :]
        similarities = torch.cat(((s * keys).sum(1, keepdim=True), s @ queue.T), 1) / case.temperature
        return F.cross_entropy(similarities, torch.zeros(len(s), dtype=torch.int64, device=s.device))

    return loss


def _ckd(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        similarities = F.normalize(teacher) @ F.normalize(student).T / case.temperature
        return 10 * F.cross_entropy(similarities, torch.arange(len(student), device=student.device))

    return loss


def _ckd_student(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        s, t = F.normalize(student), F.normalize(teacher)
        own = torch.eye(len(s), dtype=torch.bool, device=s.device)
        similarities = torch.where(own, s @ t.T, s @ s.T) / case.temperature
        return 10 * F.cross_entropy(similarities, torch.arange(len(s), device=s.device))

    return loss


def _kd(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        log_q, log_p = (F.log_softmax(x / case.temperature, 1) for x in (student, teacher))
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * case.temperature**2

    return loss


def _clkd(case: Case) -> LossFn:
    def correlation(x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return x.T @ x / (x.shape[1] - 1)

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return (
            0.5 * F.mse_loss(F.normalize(student), F.normalize(teacher))
            + F.mse_loss(F.normalize(student, dim=0), F.normalize(teacher, dim=0))
            + 0.4 * F.mse_loss(correlation(student), correlation(teacher))
        )

    return loss


def _others(matrix: Tensor) -> Tensor:
    n = len(matrix)
    return matrix[~torch.eye(n, dtype=torch.bool, device=matrix.device)].view(n, -1)


def _mlkd(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        s, t = F.normalize(student), F.normalize(teacher)
        log_p, log_q = (_others(x @ x.T / 0.5).log_softmax(1) for x in (t, s))
        correlation = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        alignment = (2 - 2 * (s * t).sum(1)).mean()
        z, y = torch.cat((s, t)), torch.cat((target, target))
        log_share = _others(z @ z.T / case.temperature).log_softmax(1)
        same = _others(y[:, None] == y)
        supervised = -((log_share * same).sum(1) / same.sum(1)).mean()
        return 50 * correlation + 20 * alignment + supervised

    return loss


def _simclr(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        z, n = F.normalize(torch.cat((student, teacher))), len(student)
        similarities = z @ z.T / case.temperature
        similarities.fill_diagonal_(-torch.inf)
        other_view = torch.arange(2 * n, device=z.device).roll(n)
        return F.cross_entropy(similarities, other_view)

    return loss


def _supcon(case: Case) -> LossFn:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        s = F.normalize(student)
        log_share = _others(s @ s.T / case.temperature).log_softmax(1)
        same = _others(target[:, None] == target)
        count = same.sum(1)
        return -((log_share * same).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)

    return loss


LINES: dict[str, Callable[[Case], LossFn]] = {
    "mcld-soft": _mcld_soft,
    "info_nce": _info_nce,
    "moco": _moco,
    "ckd": _ckd,
    "ckd-student": _ckd_student,
    "kd": _kd,
    "clkd": _clkd,
    "mlkd": _mlkd,
    "simclr": _simclr,
    "supcon": _supcon,
}
