"""CKD, contrastive knowledge distillation, in eager PyTorch (arXiv 2404.14109).

s, t: rows of student and teacher logits, each divided by its L2 norm; similarities over the temperature.

negatives="teacher" (the released code: teacher anchors against student candidates):
    a_ij = t_i . s_j / temperature,    L = mean_i (logsumexp_j a_ij - a_ii)

negatives="student" (the paper's summary: the other student rows are the negatives):
    a_ij = s_i . s_j / temperature for j != i,    a_ii = s_i . t_i / temperature,    L as above
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Gather, Ranks, RanksOptions, ranks_options, report
from ..family_options import CKDOptions, CKDTerms, Negatives, check_gather, check_inputs, ckd_options
from ..options import acc_dtype, no_autocast
from .mcld import gather_logits, mcld_terms, mean_of_own, similarities, unit_rows


def contrast(
    student: Tensor, teacher: Tensor, dtype: torch.dtype, options: CKDOptions, ranks: Ranks | None = None
) -> Tensor:
    """The term of logits (B, C) in the accumulator dtype; products are taken in ``dtype``."""
    s, t = unit_rows(student, options.eps), unit_rows(teacher, options.eps)
    if options.negatives == "teacher":
        a = similarities(t, s, dtype, options.temperature)  # (B, B)
        positive = a.diagonal()
    else:
        positive = (s.to(dtype) * t.to(dtype)).to(s.dtype).sum(1) / options.temperature
        is_self = torch.eye(s.shape[0], dtype=torch.bool, device=s.device)
        a = torch.where(is_self, positive[:, None], similarities(s, s, dtype, options.temperature))
    return mean_of_own(a.logsumexp(1) - positive, ranks)


def evaluate(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    options: CKDOptions,
    over_ranks: RanksOptions | None = None,
) -> CKDTerms:
    """The loss and its term for arguments that are already checked; over ranks, from all logits, gathered."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    acc = acc_dtype(dtype)
    with no_autocast(student.device):
        s, t, ranks = student.to(acc), teacher.to(acc), None
        if over_ranks is not None:
            s, t, _, ranks = gather_logits(over_ranks, student, teacher, None, weight, options, s, t)
        term = zero = s[:0].sum() + t[:0].sum()
        if s.shape[0] > 0 and options.term_weight != 0:
            term = contrast(s, t, dtype, options, ranks)
        loss = zero + options.term_weight * (term if weight is None else weight[0].to(acc) * term)
    return CKDTerms(loss, term.detach().clone())


def ckd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    weight: float | Tensor = 10.0,
    negatives: Negatives = "teacher",
    eps: float = 1e-12,
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> Tensor:
    """The CKD loss, shape (). Arguments and errors as :func:`mcld_kernels.ckd_loss`."""
    return ckd_terms(
        student,
        teacher,
        target,
        temperature=temperature,
        weight=weight,
        negatives=negatives,
        eps=eps,
        process_group=process_group,
        gather=gather,
        even=even,
    ).loss


def ckd_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    weight: float | Tensor = 10.0,
    negatives: Negatives = "teacher",
    eps: float = 1e-12,
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> CKDTerms:
    """The CKD loss and its term. Arguments and errors as :func:`mcld_kernels.ckd_terms`."""
    ranks = ranks_options(process_group, gather, even)
    try:
        options, weight_tensor = ckd_options(temperature=temperature, weight=weight, negatives=negatives, eps=eps)
        if negatives == "student":
            check_gather(ranks, 'CKD with negatives="student"')
        check_inputs(student, teacher, weight_tensor)
    except (NotImplementedError, TypeError, ValueError) as error:
        report(ranks, error)
        raise
    if ranks is not None and negatives == "teacher":  # MCLD's instance-wise term with teacher anchors
        terms = mcld_terms(
            student,
            teacher,
            temperature=options.temperature,
            weight=(options.term_weight, 0.0, 0.0),
            direction="teacher",
            eps=options.eps,
            process_group=process_group,
            gather=gather,
            even=even,
        )
        loss = terms.loss if weight_tensor is None else weight_tensor[0].to(terms.loss.dtype) * terms.loss
        return CKDTerms(loss, terms.instance)
    return evaluate(student, teacher, weight_tensor, options, ranks)
