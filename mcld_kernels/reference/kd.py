"""Knowledge distillation in eager PyTorch (Hinton et al., arXiv 1503.02531).

L = (t^2 / B) sum_i sum_k p_ik (log p_ik - log q_ik) with p = softmax(T / t), q = softmax(S / t) over the classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import acc_dtype, check_logits, check_positive, no_autocast


def evaluate(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The loss for arguments that are already checked."""
    acc = acc_dtype(torch.promote_types(student.dtype, teacher.dtype))
    with no_autocast(student.device):
        log_q = F.log_softmax(student.to(acc) / temperature, 1)
        log_p = F.log_softmax(teacher.to(acc) / temperature, 1)
        divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return divergence * (temperature**2 / max(student.shape[0], 1))


def kd_loss(student: Tensor, teacher: Tensor, target: Tensor | None = None, *, temperature: float = 4.0) -> Tensor:
    """The KD loss, shape (). Arguments and errors as :func:`mcld_kernels.kd_loss`."""
    temperature = check_positive("temperature", temperature)
    check_logits(student, teacher)
    return evaluate(student, teacher, temperature)
