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

The gradient by the candidates is the transpose: dL/dK_j = sum_i w_i p_ij A_i / temperature less the positives. Both end
in `KernelSet.grad_epilogue`. With frozen candidates that is 4 n m d flop, and no matrix larger than a chunk of rows is
ever held.
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
    TermWeight,
    UnitRows,
)
from .labels import Labels
from .options import grad_dtype


class GradBuffer:
    """The gradient by one side's logits, summed over the contrasts."""

    def __init__(self, logits: Tensor, needed: bool):
        self.needed = needed
        self.is_written = False  # the next contrast adds
        self._buffer = (
            torch.empty(logits.shape, dtype=grad_dtype(logits.dtype), device=logits.device) if needed else None
        )

    def view(self, transposed: bool) -> Tensor:
        """The buffer (n, d) as a contrast sees it: transposed for the columns of the logits."""
        assert self._buffer is not None
        return self._buffer.T if transposed else self._buffer

    def result(self) -> Tensor | None:
        """The gradient; None if it is not needed, zeros if no contrast has written it."""
        return self._buffer.zero_() if self._buffer is not None and not self.is_written else self._buffer


@dataclass(slots=True, kw_only=True)
class Side:
    """One side of a contrast: its unit rows, where the gradient by its logits goes, and its labels."""

    unit: UnitRows
    grad: GradBuffer
    transposed: bool = False  # the rows are the columns of the logits
    labels: Labels | None = None


@dataclass(slots=True, kw_only=True)
class Anchors:
    """One side as anchors: the weights of its terms and the rows that receive each anchor's part of them."""

    side: Side
    weights: tuple[TermWeight, ...]
    per_anchor: Tensor  # (len(weights), >= n)


def contrast(
    kernels: KernelSet,
    anchors: Anchors,
    candidates: Side,
    *,
    temperature: float,
    offset: int = 0,
    mask_same_class: bool = False,
    reverse: Anchors | None = None,
) -> None:
    """Add one contrast to `Anchors.per_anchor` and to the gradients of both sides.

    reverse: the candidates as anchors, where both directions come from one set of exponentials.
    """
    side = anchors.side
    mask = None
    if mask_same_class:
        assert side.labels is not None and candidates.labels is not None
        mask = side.labels.key, candidates.labels.key
    args = ContrastArgs(
        anchors=side.unit,
        candidates=candidates.unit,
        temperature=temperature,
        offset=offset,
        mask=mask,
        anchor_grad=side.grad.needed,
        candidate_grad=candidates.grad.needed,
        reverse=reverse is not None,
    )
    if _anchor_pass(kernels, args, anchors, candidates):
        return
    forward_terms, means = _anchor_terms(kernels, anchors, candidates, temperature, offset)
    pass_ = kernels.contrast(args)
    partner = []
    for sums in pass_.chunks():
        coefficients = kernels.loss_epilogue(forward_terms, sums)
        if args.anchor_grad:
            assert sums.product is not None
            kernels.grad_epilogue(
                GradEpilogueArgs(
                    out=side.grad.view(side.transposed),
                    unit=side.unit,
                    rows=sums.rows,
                    product=sums.product,
                    coefficients=coefficients,
                    partner=candidates.unit,
                    offset=offset,
                    class_means=means,
                    class_index=None if side.labels is None else side.labels.class_index,
                    accumulate=side.grad.is_written,
                )
            )
        if args.candidate_grad:
            pass_.add_candidates(sums, coefficients)
            partner.append(coefficients.partner)
    if args.anchor_grad:
        side.grad.is_written = True
    if args.candidate_grad or args.reverse:
        _finish(kernels, pass_, args, anchors, candidates, partner, reverse)


def _anchor_pass(kernels: KernelSet, args: ContrastArgs, anchors: Anchors, candidates: Side) -> bool:
    """Compute the contrast by `KernelSet.anchor_pass`; False, with nothing done, where there is none for it."""
    grad = anchors.side.grad
    if not grad.needed or args.candidate_grad or args.reverse:
        return False
    out = grad.view(anchors.side.transposed)
    compute = kernels.anchor_pass(args, out)
    if compute is None:
        return False
    means, class_index = _class_means(kernels, anchors, candidates)
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
    grad.is_written = True
    return True


def _class_means(kernels: KernelSet, anchors: Anchors, candidates: Side) -> tuple[Tensor | None, Tensor | None]:
    """For a term with label positives: class means of the candidates, and the row of each anchor's class."""
    if all(weight.positives != "label" for weight in anchors.weights):
        return None, None
    labels = anchors.side.labels
    assert labels is not None and candidates.labels is not None
    return kernels.class_means(candidates.unit, candidates.labels, candidates.labels.counts), labels.class_index


def _anchor_terms(
    kernels: KernelSet, anchors: Anchors, candidates: Side, temperature: float, offset: int
) -> tuple[AnchorTerms, Tensor | None]:
    """The anchors' positives, and the class means of the candidates if a term has label positives."""
    means, class_index = _class_means(kernels, anchors, candidates)
    positive, label_positive = kernels.positive_cosines(anchors.side.unit, candidates.unit, offset, means, class_index)
    terms = AnchorTerms(
        positive=positive,
        label_positive=label_positive,
        temperature=temperature,
        weights=anchors.weights,
        per_anchor=anchors.per_anchor,
    )
    return terms, means


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
        reverse_terms, _ = _anchor_terms(kernels, reverse, anchors.side, args.temperature, -args.offset)
        reverse_coefficients = kernels.loss_epilogue(reverse_terms, sums.reverse)
    if not args.candidate_grad:
        return
    product = sums.candidate_product
    assert product is not None
    coefficients, means = _candidate_coefficients(kernels, args, anchors, candidates, partner, product.dtype)
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
            unit=candidates.unit,
            rows=slice(0, candidates.unit.n),
            product=product,
            coefficients=coefficients,
            partner=anchors.side.unit,
            offset=-args.offset,
            class_means=means,
            class_index=None if means is None or candidates.labels is None else candidates.labels.class_index,
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
) -> tuple[GradCoefficients, Tensor | None]:
    """The coefficients of the gradient by the candidates, and the class sums of the anchors that go with them."""
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
        return coefficients, None
    assert anchors.side.labels is not None and candidates.labels is not None and by_label.factor is not None
    # Candidates weigh as anchors of their class do, whichever row of it they are.
    class_mean = candidates.labels.valid * (
        by_label.factor * (by_label.term_weight * by_label.constant / args.temperature)
    )
    coefficients.class_mean = class_mean if by_label.weight is None else class_mean * by_label.weight
    means = kernels.class_means(args.anchors, anchors.side.labels, candidates.labels.counts)
    return coefficients, means
