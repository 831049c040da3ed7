r"""InfoNCE from any kernel set: loss, gradient by the anchors and gradient by the candidates of one contrast.

InfoNCE of unit rows A (n, d), the anchors, against unit rows K (m, d), the candidates; the positive of anchor i is
candidate i + offset, cosines are A_i . K_j and similarities a_ij = A_i . K_j / temperature. Everything is written for
the *negatives*, the sum over the other candidates, because late in training the positive is close to 1 and differences
with it cancel:

    neg_sum_i = sum_{j != i+offset} exp(a_ij)                    neg_lse_i = log(neg_sum_i)
    L_i       = log(1 + neg_sum_i / exp(a_i,i+offset))           = softplus(neg_lse_i - a_i,i+offset)
    q_i       = 1 - p_i,i+offset                                 = sigmoid(neg_lse_i - a_i,i+offset)
    dL_i/dA_i = (q_i / temperature) (N_i - K_i+offset),          N_i = sum_{j != i+offset} exp(a_ij) K_j / neg_sum_i

Label positives (the sample-wise term) share all of it; with M_c the mean of the candidates of class c,

    L'_i      = L_i + a_i,i+offset - A_i . M_y(i) / temperature
    dL'_i/dA_i = dL_i/dA_i + (K_i+offset - M_y(i)) / temperature

With soft labels M is a row of each anchor (`labels.SoftLabels`). Label positives need no partner: without one
(`Anchors.has_partner` False) the sums run over all candidates, and L'_i = lse_i - A_i . M_y(i) / temperature.

The gradient by the candidates is the transpose: dL/dK_j = sum_i w_i p_ij A_i / temperature less the positives. Both end
in `KernelSet.grad_epilogue`. With frozen candidates that is 4 n m d flop, and no matrix larger than a chunk of rows is
ever held. The gradient by the temperature is -(A_i . dL_i/dA_i) / temperature, whose dot product is that of the
projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import (
    AnchorPassArgs,
    AnchorTerms,
    Contrast,
    ContrastArgs,
    GradCoefficients,
    GradEpilogueArgs,
    KernelSet,
    MeanOf,
    NegativeSums,
    TermWeight,
    UnitRows,
)
from .labels import Labels, SoftLabels
from .options import grad_dtype


class GradBuffer:
    """The gradient by one side's logits, summed over the contrasts."""

    def __init__(self, logits: Tensor, needed: bool):
        self.needed = needed
        self.is_written = False  # the next contrast adds
        self._logits = logits
        self._buffer: Tensor | None = None  # made when it is first written: candidates' chunks are gone by then

    def view(self, transposed: bool) -> Tensor:
        """The buffer (n, d) as a contrast sees it: transposed for the columns of the logits."""
        if self._buffer is None:
            dtype = grad_dtype(self._logits.dtype)
            self._buffer = torch.empty(self._logits.shape, dtype=dtype, device=self._logits.device)
        return self._buffer.T if transposed else self._buffer

    def result(self) -> Tensor | None:
        """The gradient; None if it is not needed, zeros if no contrast has written it."""
        if not self.needed or self.is_written:
            return self._buffer
        return self.view(False).zero_()


@dataclass(slots=True, kw_only=True)
class Side:
    """One side of a contrast: its unit rows, where the gradient by its logits goes, and its labels."""

    unit: UnitRows
    grad: GradBuffer
    transposed: bool = False  # the rows are the columns of the logits
    labels: Labels | None = None
    soft: SoftLabels | None = None
    projection: UnitRows | None = None  # in place of `unit` where the gradient is projected; None: `unit`


@dataclass(slots=True, kw_only=True)
class Anchors:
    """One side as anchors: the weights of its terms and the rows that receive each anchor's part of them."""

    side: Side
    weights: tuple[TermWeight, ...]
    per_anchor: Tensor  # (len(weights), >= n)
    has_partner: bool = True  # False: label positives alone, for any offset
    anchor_weight: Tensor | None = None  # (n,) acc dtype; multiplies each anchor's gradient
    radial: Tensor | None = None  # (n,) acc dtype, to be written: A_i . gradient by A_i


def contrast(
    kernels: KernelSet,
    anchors: Anchors,
    candidates: Side,
    *,
    temperature: float,
    offset: int = 0,
    mask_same_class: bool = False,
    reverse: Anchors | None = None,
    is_bounded: bool = True,
) -> None:
    """Add one contrast to `Anchors.per_anchor` and to the gradients of both sides.

    reverse: the candidates as anchors, where both directions come from one set of exponentials.
    is_bounded: as `ContrastArgs.is_bounded`.
    """
    side = anchors.side
    if not anchors.has_partner:
        offset = candidates.unit.n  # of no candidate: all are negatives
    mask = None
    if mask_same_class:
        assert side.labels is not None and candidates.labels is not None
        mask = side.labels.key, candidates.labels.key
    has_label_positives = any(weight.positives == "label" for weight in anchors.weights)
    args = ContrastArgs(
        anchors=side.unit,
        candidates=candidates.unit,
        temperature=temperature,
        offset=offset,
        mask=mask,
        anchor_grad=side.grad.needed or anchors.radial is not None,
        candidate_grad=candidates.grad.needed,
        reverse=reverse is not None,
        is_bounded=is_bounded,
        keeps_sums=has_label_positives,
    )
    means = class_index = None
    if has_label_positives:
        means, class_index = _class_means(kernels, anchors, candidates)
    if kernels.has_anchor_pass and _anchor_pass(kernels, args, anchors, means, class_index):
        return
    forward_terms = _anchor_terms(kernels, anchors, candidates, temperature, offset, means, class_index)
    if not is_bounded:
        _show_overflow(forward_terms)
    pass_ = kernels.contrast(args)
    partner: list[Tensor] = []
    class_mean: list[Tensor] = []
    loss_epilogue = kernels.loss_epilogue if anchors.has_partner else _loss_without_partner
    for sums in pass_.chunks():
        coefficients = loss_epilogue(forward_terms, sums)
        if anchors.anchor_weight is not None:
            _weigh(coefficients, anchors.anchor_weight[sums.rows])
        if anchors.radial is not None:
            anchors.radial[sums.rows] = _radial(side.unit, sums, coefficients, forward_terms)
        if side.grad.needed:
            assert sums.product is not None
            kernels.grad_epilogue(
                GradEpilogueArgs(
                    out=side.grad.view(side.transposed),
                    unit=side.projection or side.unit,
                    rows=sums.rows,
                    product=sums.product,
                    coefficients=coefficients,
                    partner=candidates.unit,
                    offset=offset,
                    class_means=means,
                    class_index=class_index,
                    accumulate=side.grad.is_written,
                )
            )
        if args.candidate_grad:
            pass_.add_candidates(sums, coefficients)
            partner.append(coefficients.partner)
            if not anchors.has_partner and coefficients.class_mean is not None:
                class_mean.append(coefficients.class_mean)
    if side.grad.needed:
        side.grad.is_written = True
    if not args.candidate_grad and not args.reverse:
        return
    if anchors.has_partner:
        _finish(kernels, pass_, args, anchors, candidates, partner, reverse)
    else:
        _finish_without_partner(kernels, pass_, anchors, candidates, torch.cat(class_mean))


def _anchor_pass(
    kernels: KernelSet, args: ContrastArgs, anchors: Anchors, means: Tensor | None, class_index: Tensor | None
) -> bool:
    """Compute the contrast by `KernelSet.anchor_pass`; False, with nothing done, where there is none for it."""
    side, grad = anchors.side, anchors.side.grad
    if args.candidate_grad or args.reverse:
        return False
    if not anchors.has_partner or anchors.anchor_weight is not None or anchors.radial is not None:
        return False
    if side.projection is not None:
        return False
    out = grad.view(anchors.side.transposed) if grad.needed else None
    mean_of: MeanOf | None = None if means is None else "class" if side.soft is None else "anchor"
    compute = kernels.anchor_pass(args, out, mean_of)
    if compute is None:
        return False
    compute(
        AnchorPassArgs(
            weights=anchors.weights,
            per_anchor=anchors.per_anchor,
            out=out,
            class_means=means,
            class_index=class_index,
            accumulate=grad.is_written,
        )
    )
    grad.is_written = grad.needed
    return True


def _class_means(kernels: KernelSet, anchors: Anchors, candidates: Side) -> tuple[Tensor, Tensor]:
    """For a term with label positives: class means of the candidates, and the row of each anchor's class."""
    labels, soft = anchors.side.labels, anchors.side.soft
    assert labels is not None and candidates.labels is not None
    if soft is None:
        return kernels.class_means(candidates.unit, candidates.labels, candidates.labels.counts), labels.class_index
    assert candidates.soft is not None
    table = candidates.soft.class_sums(candidates.unit.rows[: candidates.unit.n])
    means = soft.mix(table).mul_(soft.share(candidates.soft.totals)[:, None])
    return means, torch.arange(anchors.side.unit.n, device=means.device)


def _anchor_terms(
    kernels: KernelSet,
    anchors: Anchors,
    candidates: Side,
    temperature: float,
    offset: int,
    means: Tensor | None,
    class_index: Tensor | None,
) -> AnchorTerms:
    """The anchors' positives; ``means`` and ``class_index`` as `_class_means` gives them."""
    positive, label_positive = kernels.positive_cosines(anchors.side.unit, candidates.unit, offset, means, class_index)
    return AnchorTerms(
        positive=positive,
        label_positive=label_positive,
        temperature=temperature,
        weights=anchors.weights,
        per_anchor=anchors.per_anchor,
    )


def _show_overflow(terms: AnchorTerms) -> None:
    """Make positives of +inf NaN, as log-sum-exp less positive is: beside them all negatives would seem to be 0."""
    terms.positive.masked_fill_(terms.positive / terms.temperature == torch.inf, torch.nan)


def _loss_without_partner(terms: AnchorTerms, sums: NegativeSums) -> GradCoefficients:
    """As `KernelSet.loss_epilogue`, for one term of label positives, with the sums over all candidates."""
    (term,), rows = terms.weights, sums.rows
    part: Tensor | float = term.constant if term.factor is None else term.factor * term.constant
    if term.counted is not None:
        part = term.counted[rows] * part
    terms.per_anchor[0, rows] = (sums.neg_lse - terms.label_positive[rows] / terms.temperature) * part
    weight = torch.ones_like(sums.neg_lse).mul_(part).mul_(term.term_weight / terms.temperature)
    return GradCoefficients(partner=weight, product=weight * sums.inv_neg_sum, class_mean=weight)


def _weigh(coefficients: GradCoefficients, factor: Tensor) -> None:
    coefficients.partner = coefficients.partner * factor
    coefficients.product = coefficients.product * factor
    if coefficients.class_mean is not None:
        coefficients.class_mean = coefficients.class_mean * factor


def _radial(unit: UnitRows, sums: NegativeSums, coefficients: GradCoefficients, terms: AnchorTerms) -> Tensor:
    """A_i . gradient by A_i, before the projection, (rows,)."""
    product, rows, c = sums.product, sums.rows, coefficients
    assert product is not None
    dot = torch.linalg.vecdot(unit.rows[rows, : unit.d].to(product.dtype), product[:, : unit.d])
    radial = dot * c.product - terms.positive[rows] * c.partner
    if c.class_mean is not None:
        radial += (terms.positive[rows] - terms.label_positive[rows]) * c.class_mean
    return radial


def _finish_without_partner(
    kernels: KernelSet, pass_: Contrast, anchors: Anchors, candidates: Side, class_mean: Tensor
) -> None:
    """The gradient by the candidates of label positives; class_mean: coefficients of all anchors (n,)."""
    product, side, unit = pass_.sums().candidate_product, anchors.side, candidates.unit
    assert product is not None and side.labels is not None and candidates.labels is not None
    acc, n = product.dtype, side.unit.n
    rows = side.unit.rows[:n].to(acc)
    ones = torch.ones(unit.n, dtype=acc, device=product.device)
    class_index = candidates.labels.class_index
    if side.soft is None:
        weighted = UnitRows(rows=rows * class_mean[:, None], inv_norm=ones[:1].expand(n), n=n, d=rows.shape[1])
        means = KernelSet.class_means(kernels, weighted, side.labels, candidates.labels.counts)
        ones = ones * candidates.labels.valid
    else:
        assert candidates.soft is not None
        share = class_mean * side.soft.share(candidates.soft.totals)
        means = candidates.soft.mix(side.soft.class_sums(rows * share[:, None]))
        class_index = torch.arange(unit.n, device=product.device)
    kernels.grad_epilogue(
        GradEpilogueArgs(
            out=candidates.grad.view(candidates.transposed),
            unit=candidates.projection or unit,
            rows=slice(0, unit.n),
            product=product,
            coefficients=GradCoefficients(
                partner=torch.zeros_like(ones), product=torch.ones_like(ones), class_mean=ones
            ),
            partner=side.unit,
            offset=n,  # of no anchor
            class_means=means,
            class_index=class_index,
            accumulate=candidates.grad.is_written,
        )
    )
    candidates.grad.is_written = True


def _finish(
    kernels: KernelSet,
    pass_: Contrast,
    args: ContrastArgs,
    anchors: Anchors,
    candidates: Side,
    partner: list[Tensor],
    reverse: Anchors | None,
) -> None:
    """The loss of the reverse direction and the gradient by the candidates, which are its anchors."""
    sums = pass_.sums()
    reverse_coefficients = None
    if reverse is not None:
        assert sums.reverse is not None
        means = class_index = None
        if any(weight.positives == "label" for weight in reverse.weights):
            means, class_index = _class_means(kernels, reverse, anchors.side)
        reverse_terms = _anchor_terms(
            kernels, reverse, anchors.side, args.temperature, -args.offset, means, class_index
        )
        reverse_coefficients = kernels.loss_epilogue(reverse_terms, sums.reverse)
    if not args.candidate_grad:
        return
    product = sums.candidate_product
    assert product is not None
    coefficients, means, class_index = _candidate_coefficients(
        kernels, args, anchors, candidates, partner, product.dtype
    )
    if reverse_coefficients is not None:
        assert sums.reverse is not None and sums.reverse.product is not None
        product = product.addcmul_(sums.reverse.product, reverse_coefficients.product[:, None])
        # Both directions pull towards the same partner and the same class means, those of the anchors.
        coefficients.partner = coefficients.partner + reverse_coefficients.partner
        if coefficients.class_mean is not None and reverse_coefficients.class_mean is not None:
            coefficients.class_mean = coefficients.class_mean + reverse_coefficients.class_mean
    kernels.grad_epilogue(
        GradEpilogueArgs(
            out=candidates.grad.view(candidates.transposed),
            unit=candidates.projection or candidates.unit,
            rows=slice(0, candidates.unit.n),
            product=product,
            coefficients=coefficients,
            partner=anchors.side.unit,
            offset=-args.offset,
            class_means=means,
            class_index=class_index,
            accumulate=candidates.grad.is_written,
        )
    )
    candidates.grad.is_written = True


def _candidate_coefficients(
    kernels: KernelSet,
    args: ContrastArgs,
    anchors: Anchors,
    candidates: Side,
    partner: list[Tensor],
    acc_dtype: torch.dtype,
) -> tuple[GradCoefficients, Tensor | None, Tensor | None]:
    """The coefficients of the gradient by the candidates; the class sums of the anchors and their row for each."""
    m = candidates.unit.n
    of_anchors = partner[0] if len(partner) == 1 else torch.cat(partner)
    of_candidates = of_anchors
    if args.anchors.n != m:
        of_candidates = of_anchors.new_zeros(m)
        of_candidates[args.offset : args.offset + args.anchors.n] = of_anchors
    coefficients = GradCoefficients(
        partner=of_candidates, product=torch.ones(m, dtype=acc_dtype, device=of_anchors.device), class_mean=None
    )
    by_label = next((weight for weight in anchors.weights if weight.positives == "label"), None)
    if by_label is None:
        return coefficients, None, None
    assert anchors.side.labels is not None and candidates.labels is not None and by_label.factor is not None
    # Candidates weigh as anchors of their class do, whichever row of it they are.
    class_mean = candidates.labels.valid * (
        by_label.factor * (by_label.term_weight * by_label.constant / args.temperature)
    )
    coefficients.class_mean = class_mean if by_label.weight is None else class_mean * by_label.weight
    if anchors.side.soft is None:
        means = kernels.class_means(args.anchors, anchors.side.labels, candidates.labels.counts)
        return coefficients, means, candidates.labels.class_index
    assert candidates.soft is not None
    share = anchors.side.soft.share(candidates.soft.totals)
    table = anchors.side.soft.class_sums(args.anchors.rows[: args.anchors.n].to(acc_dtype) * share[:, None])
    return coefficients, candidates.soft.mix(table), torch.arange(m, device=table.device)
