"""CLKD, class-aware logit knowledge distillation, in eager PyTorch (arXiv 2211.14773, from public re-implementations).

S, T: student and teacher logits, (B, C). rn, cn divide every row, column by its L2 norm; S_c, T_c: less the mean over
the batch.

    L_instance    = mean of (rn(S) - rn(T))^2 over the elements
    L_category    = mean of (cn(S) - cn(T))^2 over the elements
    L_correlation = ||S_c^T S_c - T_c^T T_c||_F^2 / (max(C - 1, 1)^2 C^2)
    L = w_instance L_instance + w_category L_category + w_correlation L_correlation

reduction="sum" takes the sum over each unit vector, and the mean over the vectors, in the first two terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Gather, Ranks, RanksOptions, ranks_options, report
from ..family_options import CLKDOptions, CLKDTerms, Reduction, check_gather, check_inputs, clkd_options
from ..options import acc_dtype, no_autocast
from .mcld import gather_logits, mean_of_own, unit_rows


def unit_error(s: Tensor, t: Tensor, options: CLKDOptions, ranks: Ranks | None, by_columns: bool = False) -> Tensor:
    """The squared distance of the unit rows, or columns, of s and t (B, C); over ranks the part of this rank's rows."""
    s, t = (unit_rows(x.T, options.eps).T if by_columns else unit_rows(x, options.eps) for x in (s, t))
    square = (s - t).square()
    vectors = s.shape[1] if by_columns else s.shape[0]
    return mean_of_own(square, ranks, s.numel() if options.reduction == "mean" else vectors)


def correlation(s: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """The squared distance of the class correlations, whose products are taken in ``dtype``."""

    def gram(x: Tensor) -> Tensor:
        centred = (x - x.mean(0)).to(dtype)
        return (centred.T @ centred).to(x.dtype)  # (C, C)

    classes = s.shape[1]
    return (gram(s) - gram(t)).square().sum() / (max(classes - 1, 1) ** 2 * classes**2)


def evaluate(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    options: CLKDOptions,
    over_ranks: RanksOptions | None = None,
) -> CLKDTerms:
    """The loss and its terms for arguments that are already checked; over ranks, from all logits, gathered."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    acc = acc_dtype(dtype)
    with no_autocast(student.device):
        s, t, ranks = student.to(acc), teacher.to(acc), None
        if over_ranks is not None:
            s, t, _, ranks = gather_logits(over_ranks, student, teacher, None, weight, options, s, t)
        loss = zero = s[:0].sum() + t[:0].sum()
        terms = [zero, zero, zero]
        if s.shape[0] > 0:
            if options.term_weight[0]:
                terms[0] = unit_error(s, t, options, ranks)
            if options.term_weight[1]:
                terms[1] = unit_error(s, t, options, ranks, by_columns=True)
            if options.term_weight[2]:
                terms[2] = correlation(s, t, dtype)
                if ranks is not None and ranks.poison is not None:
                    terms[2] = terms[2] * ranks.poison.to(acc)
        for i, term in enumerate(terms):
            if options.term_weight[i]:
                loss = loss + options.term_weight[i] * (term if weight is None else weight[i].to(acc) * term)
    return CLKDTerms(loss, *(term.detach().clone() for term in terms))


def clkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    weight: Sequence[float] | Tensor = (0.5, 1.0, 0.4),
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> Tensor:
    """The CLKD loss, shape (). Arguments and errors as :func:`mcld_kernels.clkd_loss`."""
    return clkd_terms(
        student,
        teacher,
        target,
        weight=weight,
        reduction=reduction,
        eps=eps,
        process_group=process_group,
        gather=gather,
        even=even,
    ).loss


def clkd_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    weight: Sequence[float] | Tensor = (0.5, 1.0, 0.4),
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> CLKDTerms:
    """The CLKD loss and its terms. Arguments and errors as :func:`mcld_kernels.clkd_terms`."""
    ranks = ranks_options(process_group, gather, even)
    try:
        options, weight_tensor = clkd_options(weight=weight, reduction=reduction, eps=eps)
        check_gather(ranks, "CLKD")
        check_inputs(student, teacher, weight_tensor)
    except (NotImplementedError, TypeError, ValueError) as error:
        report(ranks, error)
        raise
    return evaluate(student, teacher, weight_tensor, options, ranks)
