"""The equations in eager PyTorch: the oracle that every kernel is compared with.

``S``, ``T``: student and teacher logits, (B, C). ``rn`` divides every row by its L2 norm, ``cn`` every column. One
primitive, InfoNCE of anchors A (n, d) against candidates K (m, d) with similarities a_ij = A_i . K_j / temperature:

    L_i = logsumexp_j(a_ij) - positive_i

instance-wise: A = rn(S), K = rn(T), positive_i = a_ii;
sample-wise:   A = rn(S), K = rn(T), positive_i = mean of a_ij over the teacher rows j of the anchor's label; with soft
               labels Y (B, C) the mean weighted by <Y_i, Y_j>;
category-wise: A = cn(S)^T, K = cn(T)^T, positive_k = a_kk.

A reconstruction of Multi-perspective Contrastive Logit Distillation (Wang and Zhou, arXiv 2411.10693) from its
published description. Every matrix is materialized and the gradient is autograd's, of any order. Run it on fp64 logits
for the truth; on fp16 or bf16 logits it is what eager PyTorch gives at that dtype (operands and products in it, sums
in fp32).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Gather, Ranks, RanksOptions, gather_with_grad, join, ranks_options, report, same_on_all_ranks
from ..options import Direction, MCLDOptions, MCLDTerms, acc_dtype, check_mcld_inputs, mcld_options, no_autocast


class _Labels:
    """The labels of a batch and of further candidates, and the rows and classes that count.

    ranks: whose rows the batch has, over ranks.
    """

    def __init__(
        self,
        target: Tensor | None,
        ignore_index: int,
        num_classes: int,
        acc: torch.dtype,
        others: Tensor | None,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks
        if target is None:
            return
        class_id = torch.arange(num_classes, device=target.device)
        targets = (target,) if others is None else (target, others)
        hard, valid, bad = zip(*(self._hard(t, ignore_index, num_classes) for t in targets), strict=True)
        self.valid = valid[0]  # (B,)
        # On the CPU a bad label has already raised; elsewhere it turns the mean over the anchors into NaN.
        self.poison = torch.ones((), dtype=acc, device=target.device).masked_fill(torch.cat(bad).any(), torch.nan)
        self.same = (hard[0][:, None] == torch.cat(hard)) & valid[0][:, None] & torch.cat(valid)  # (B, B + q)
        self.present = ((hard[0][:, None] == class_id) & valid[0][:, None]).any(0)  # (C,) the class occurs
        self.shared = self.same  # how far two rows share their classes
        if any(t.is_floating_point() for t in targets):
            weights = [
                (t if t.is_floating_point() else t[:, None] == class_id).to(acc) * counts[:, None]
                for t, counts in zip(targets, valid, strict=True)
            ]
            self.shared = weights[0] @ torch.cat(weights).T

    @staticmethod
    def _hard(target: Tensor, ignore_index: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """The label of each row (n,), of soft labels that of the largest weight; if it counts, and if it is bad."""
        if not target.is_floating_point():
            valid = target != ignore_index
            return target, valid, valid & ((target < 0) | (target >= num_classes))
        total, label = target.sum(1, dtype=torch.float32), target.argmax(1)
        bad = ~(((total - 1).abs() <= 1e-2) | (total == 0)) | (target < 0).any(1)
        return label, (total != 0) & (label != ignore_index), bad

    def mean(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean of ``values`` (B,) over the rows that count; 0 where none does, NaN where any value is.

        Over ranks: (number of ranks) x (the part of this rank's rows), whose mean over ranks it is.
        """
        counted = torch.ones_like(values) if counted is None else counted
        total = counted.sum().clamp(min=1)
        if self.ranks is None:
            return (values * counted).sum() / total
        own = self.ranks.own
        return (values[own] * counted[own]).sum() / total * self.ranks.count


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """Every row divided by its L2 norm; a row with norm <= eps becomes zeros and gets no gradient. (n, d) -> (n, d)."""
    square = x.square().sum(1, keepdim=True)
    square = torch.where(square.isinf(), torch.nan, square)  # an overflow must show, not read as a zero direction
    zero = square.sqrt() <= eps  # False for NaN, which must spread
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, square).sqrt())


def similarities(anchors: Tensor, candidates: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """a_ij = A_i . K_j / temperature for unit rows A (n, d), K (m, d): (n, m), the product taken in ``dtype``."""
    return (anchors.to(dtype) @ candidates.to(dtype).T).to(anchors.dtype) / temperature


def _both(direction: str, a: Tensor, of: Any) -> Tensor:
    """The term ``of(matrix)`` with student anchors (rows of a), teacher anchors (its first B columns), or both."""
    if direction == "student":
        return of(a)
    by_teacher = a[:, : a.shape[0]].T
    if direction == "teacher":
        return of(by_teacher)
    return (of(a) + of(by_teacher)) / 2


def instance(s: Tensor, t: Tensor, labels: _Labels, dtype: torch.dtype, options: MCLDOptions) -> Tensor:
    """Instance-wise: the positive of row i is row i of the other side; the mask drops its same-label candidates."""
    a = similarities(unit_rows(s, options.eps), unit_rows(t, options.eps), dtype, options.temperature[0])  # (B, B)
    if not options.mask_same_class:
        return _both(options.direction, a, lambda m: labels.mean(m.logsumexp(1) - m.diagonal()))
    dropped = labels.same.clone()
    dropped.diagonal().fill_(False)

    def of(m: Tensor) -> Tensor:
        # The block of the batch is symmetric: it serves both directions.
        return labels.mean(m.masked_fill(dropped[:, : m.shape[1]], -torch.inf).logsumexp(1) - m.diagonal())

    return _both(options.direction, a, of) * labels.poison


def sample(s: Tensor, t: Tensor, labels: _Labels, dtype: torch.dtype, options: MCLDOptions) -> Tensor:
    """Sample-wise: the positives of row i are all rows of the other side with its label, averaged."""
    a = similarities(unit_rows(s, options.eps), unit_rows(t, options.eps), dtype, options.temperature[1])  # (B, B)

    def of(m: Tensor) -> Tensor:
        shared = labels.shared[:, : m.shape[1]].to(m.dtype)
        total = shared.sum(1, keepdim=True)
        positives = shared / total.masked_fill(total == 0, 1)  # (B, B), rows sum to 1
        return labels.mean(m.logsumexp(1) - (m * positives).sum(1), labels.valid)

    return _both(options.direction, a, of) * labels.poison


def category(s: Tensor, t: Tensor, labels: _Labels, dtype: torch.dtype, options: MCLDOptions) -> Tensor:
    """Category-wise: the columns are contrasted; the positive of class k is class k of the other side."""
    a = similarities(unit_rows(s.T, options.eps), unit_rows(t.T, options.eps), dtype, options.temperature[2])  # (C, C)
    per_class = a.logsumexp(1) - a.diagonal()
    if not options.present_only:
        return per_class.mean()
    return (per_class * labels.present).sum() / labels.present.sum().clamp(min=1) * labels.poison


def gather_logits(
    over_ranks: RanksOptions,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    options: Any,
    s: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Ranks]:
    """Begin a call over ranks: the logits s, t (in the accumulator dtype) and labels of all ranks."""
    common = same_on_all_ranks(student, teacher, target, weight, options, "of the reference")
    common |= {"student gradient": student.requires_grad, "teacher gradient": teacher.requires_grad}
    ranks = join(over_ranks, student.shape[0], common, student.device)
    s, t = gather_with_grad(s, ranks), gather_with_grad(t, ranks)
    return s, t, None if target is None else ranks.all_gather(target.contiguous()), ranks


def mean_of_own(values: Tensor, ranks: Ranks | None, total: Tensor | int | None = None) -> Tensor:
    """The sum of ``values`` (n, ...) over ``total``, by default n; over ranks (number of ranks) x this rank's part."""
    total = values.shape[0] if total is None else total
    if ranks is None:
        return values.sum() / total
    mean = values[ranks.own].sum() * ranks.count / total
    return mean if ranks.poison is None else mean * ranks.poison.to(mean.dtype)


def evaluate(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    options: MCLDOptions,
    candidates: Tensor | None = None,
    candidate_target: Tensor | None = None,
    over_ranks: RanksOptions | None = None,
) -> MCLDTerms:
    """The loss and its terms for arguments that are already checked; over ranks, from all logits, gathered."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    acc = acc_dtype(dtype)
    with no_autocast(student.device):
        s, t, ranks = student.to(acc), teacher.to(acc), None
        if over_ranks is not None:
            s, t, target, ranks = gather_logits(over_ranks, student, teacher, target, weight, options, s, t)
        zero = s[:0].sum() + t[:0].sum()  # differentiable, also where no term is computed
        terms = [zero, zero, zero]
        if s.shape[0] > 0:
            others, rows = None, t
            if candidates is not None:
                rows = torch.cat((t, candidates.to(dtype).to(acc)))  # (B + q, C)
                others = candidate_target
                if others is None:
                    others = torch.full(candidates.shape[:1], options.ignore_index, device=candidates.device)
            labels = _Labels(target, options.ignore_index, student.shape[1], acc, others, ranks)
            if options.active[0]:
                terms[0] = instance(s, rows, labels, dtype, options)
            if options.active[1]:
                terms[1] = sample(s, rows, labels, dtype, options)
            if options.active[2]:
                terms[2] = category(s, t, labels, dtype, options)
        loss = zero
        for i, term in enumerate(terms):
            if options.active[i]:
                if ranks is not None and ranks.poison is not None:
                    term = term * ranks.poison
                loss = loss + options.term_weight[i] * (term if weight is None else weight[i].to(acc) * term)
    return MCLDTerms(loss, *(term.detach().clone() for term in terms))


def mcld_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    candidates: Tensor | None = None,
    candidate_target: Tensor | None = None,
    temperature: float | Sequence[float] = 0.1,
    weight: float | Sequence[float] | Tensor = (1.0, 1.0, 1.0),
    direction: Direction = "student",
    mask_same_class: bool = False,
    present_only: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> Tensor:
    """The MCLD loss, shape (). Arguments and errors as :func:`mcld_kernels.mcld_loss`."""
    return mcld_terms(
        student,
        teacher,
        target,
        candidates=candidates,
        candidate_target=candidate_target,
        temperature=temperature,
        weight=weight,
        direction=direction,
        mask_same_class=mask_same_class,
        present_only=present_only,
        ignore_index=ignore_index,
        eps=eps,
        process_group=process_group,
        gather=gather,
        even=even,
    ).loss


def mcld_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    candidates: Tensor | None = None,
    candidate_target: Tensor | None = None,
    temperature: float | Sequence[float] = 0.1,
    weight: float | Sequence[float] | Tensor = (1.0, 1.0, 1.0),
    direction: Direction = "student",
    mask_same_class: bool = False,
    present_only: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> MCLDTerms:
    """The MCLD loss and its three terms. Arguments and errors as :func:`mcld_kernels.mcld_terms`."""
    ranks = ranks_options(process_group, gather, even)
    further = candidates, candidate_target
    try:
        options, weight_tensor = mcld_options(
            temperature=temperature,
            weight=weight,
            direction=direction,
            mask_same_class=mask_same_class,
            present_only=present_only,
            ignore_index=ignore_index,
            eps=eps,
        )
        check_mcld_inputs(student, teacher, target, weight_tensor, options, "reference", *further)
    except (TypeError, ValueError) as error:
        report(ranks, error)
        raise
    return evaluate(student, teacher, target, weight_tensor, options, *further, ranks)
