"""MLKD, multi-level knowledge distillation, in eager PyTorch (arXiv 2012.00573).

s, t: rows of the student's and the teacher's logits or embeddings, each divided by its L2 norm, (B, C).

    L_correlation = mean_i KL(P_i || Q_i),   P_i, Q_i = softmax over j != i of t_i . t_j / t_c, s_i . s_j / t_c
    L_alignment   = mean_i (2 - 2 s_i . t_i)
    L_supervised  = mean_i (logsumexp_{j != i} a_ij - mean_{j != i: y_j = y_i} a_ij),   a_ij = z_i . z_j / t_s
    L = w_correlation L_correlation + w_alignment L_alignment + w_supervised L_supervised

with temperatures t_c (correlation_temperature) and t_s (supervised_temperature), the 2 B rows z = [s; t] for views=2,
and z = s for views=1. The last mean is over the anchors that have a positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Gather, Ranks, RanksOptions, ranks_options, report
from ..family_options import (
    MLKDOptions,
    MLKDTerms,
    Views,
    check_gather,
    check_inputs,
    check_mlkd_target,
    mlkd_options,
)
from ..options import acc_dtype, no_autocast
from .mcld import gather_logits, mean_of_own, similarities, unit_rows


def off_diagonal(a: Tensor) -> Tensor:
    """A square matrix without its diagonal: (n, n) -> (n, n - 1)."""
    n = a.shape[0]
    return a.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def correlation(s: Tensor, t: Tensor, dtype: torch.dtype, temperature: float, ranks: Ranks | None) -> Tensor:
    """Of unit rows (B, C): the student's softmax over the other rows is to be the teacher's."""
    log_q, log_p = (off_diagonal(similarities(x, x, dtype, temperature)).log_softmax(1) for x in (s, t))
    return mean_of_own((log_p.exp() * (log_p - log_q)).sum(1), ranks)


def supervised(z: Tensor, y: Tensor, dtype: torch.dtype, options: MLKDOptions, ranks: Ranks | None) -> Tensor:
    """Supervised contrast of unit rows (N, C) with labels (N,)."""
    a = off_diagonal(similarities(z, z, dtype, options.supervised_temperature))
    valid = y != options.ignore_index
    same = off_diagonal((y[:, None] == y) & valid[:, None]).to(a.dtype)
    count = same.sum(1)
    counted = count > 0
    per_anchor = a.logsumexp(1) - (a * same).sum(1) / count.clamp(min=1)
    # On the CPU a negative label has already raised; elsewhere it turns the term into NaN.
    poison = torch.ones((), dtype=a.dtype, device=a.device).masked_fill((valid & (y < 0)).any(), torch.nan)
    # 0 of a row that is no anchor, but NaN of one that is NaN.
    of_views = torch.where(counted, per_anchor, 0 * z.sum(1)).view(options.views, -1).sum(0)  # (B,)
    return mean_of_own(of_views, ranks, counted.sum().clamp(min=1)) * poison


def evaluate(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    options: MLKDOptions,
    over_ranks: RanksOptions | None = None,
) -> MLKDTerms:
    """The loss and its terms for arguments that are already checked; over ranks, from all logits, gathered."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    acc = acc_dtype(dtype)
    with no_autocast(student.device):
        s, t, ranks = student.to(acc), teacher.to(acc), None
        if over_ranks is not None:
            s, t, target, ranks = gather_logits(over_ranks, student, teacher, target, weight, options, s, t)
        loss = zero = s[:0].sum() + t[:0].sum()
        terms = [zero, zero, zero]
        if s.shape[0] > 0:
            s, t = unit_rows(s, options.eps), unit_rows(t, options.eps)
            if options.term_weight[0]:
                terms[0] = correlation(s, t, dtype, options.correlation_temperature, ranks)
            if options.term_weight[1]:
                terms[1] = mean_of_own(2 - 2 * (s * t).sum(1), ranks)
            if options.term_weight[2]:
                assert target is not None
                z, y = (torch.cat((s, t)), torch.cat((target, target))) if options.views == 2 else (s, target)
                terms[2] = supervised(z, y, dtype, options, ranks)
        for i, term in enumerate(terms):
            if options.term_weight[i]:
                loss = loss + options.term_weight[i] * (term if weight is None else weight[i].to(acc) * term)
    return MLKDTerms(loss, *(term.detach().clone() for term in terms))


def mlkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    correlation_temperature: float = 0.5,
    supervised_temperature: float = 0.07,
    weight: Sequence[float] | Tensor = (50.0, 20.0, 1.0),
    views: Views = 2,
    ignore_index: int = -100,
    eps: float = 1e-12,
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> Tensor:
    """The MLKD loss, shape (). Arguments and errors as :func:`mcld_kernels.mlkd_loss`."""
    return mlkd_terms(
        student,
        teacher,
        target,
        correlation_temperature=correlation_temperature,
        supervised_temperature=supervised_temperature,
        weight=weight,
        views=views,
        ignore_index=ignore_index,
        eps=eps,
        process_group=process_group,
        gather=gather,
        even=even,
    ).loss


def mlkd_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    correlation_temperature: float = 0.5,
    supervised_temperature: float = 0.07,
    weight: Sequence[float] | Tensor = (50.0, 20.0, 1.0),
    views: Views = 2,
    ignore_index: int = -100,
    eps: float = 1e-12,
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> MLKDTerms:
    """The MLKD loss and its terms. Arguments and errors as :func:`mcld_kernels.mlkd_terms`."""
    ranks = ranks_options(process_group, gather, even)
    try:
        options, weight_tensor = mlkd_options(
            correlation_temperature=correlation_temperature,
            supervised_temperature=supervised_temperature,
            weight=weight,
            views=views,
            ignore_index=ignore_index,
            eps=eps,
        )
        check_gather(ranks, "MLKD")
        check_inputs(student, teacher, weight_tensor)
        check_mlkd_target(target, student, options)
    except (NotImplementedError, TypeError, ValueError) as error:
        report(ranks, error)
        raise
    return evaluate(student, teacher, target, weight_tensor, options, ranks)
