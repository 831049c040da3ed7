"""Each anchor's part of the loss and of the gradient, once the sum over its negatives is known.

Fused: the loss and its derivative, the weights of one or two terms, the mean over the anchors that count, and the
coefficients of the gradient. One anchor a lane; only the results are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels import AnchorTerms, GradCoefficients, NegativeSums, TermWeight
from .configs import Configs


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) and its derivative; 0 and 0 at -inf, NaN at NaN."""
    e = tl.exp(-tl.abs(x))
    more = 1.0 + e
    # log1p(e): the logarithm of the rounded sum, corrected by what the rounding has changed.
    rest = tl.where(more == 1.0, 1.0, more - 1.0)
    log1p = tl.where(more == 1.0, e, tl.log(more) * (e / rest))
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0.0, 1.0, e) / more


@triton.jit
def _add_term(
    per_anchor, loss, pull, rows, absolute, inside, factor, counted, weight, constant, grad_constant,
    BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Write each anchor's part of the term; returns the term's weight in the gradient, (BLOCK,)."""
    part = tl.full(loss.shape, 1.0, loss.dtype)
    # Products, not selections: a poison shows in the rows that do not count, too.
    if factor is not None:
        part = part * tl.load(factor)
    if counted is not None:
        part = part * tl.load(counted + absolute, mask=inside, other=0).to(loss.dtype)
    value = loss + pull if BY_LABEL else loss
    tl.store(per_anchor + absolute, value * (part * constant), mask=inside)
    part = part * grad_constant
    if weight is not None:
        part = part * tl.load(weight)
    return part


# Weights of terms and rows of `per_anchor` lie at any multiple of an entry.
@triton.jit(
    do_not_specialize=["n", "first", "stride"],
    do_not_specialize_on_alignment=["per_anchor", "weight_0", "weight_1"],
)
def loss_epilogue_kernel(
    positive,  # (n of all rows,)
    label_positive,  # (n of all rows,)
    neg_lse,  # (n,)
    inv_neg_sum,  # (n,)
    per_anchor,  # (terms, >= n of all rows)
    partner_coef,  # (n,)
    product_coef,  # (n,)
    class_mean_coef,  # (n,) if a term has label positives
    factor_0,  # () or None, and so below
    counted_0,  # (n of all rows,)
    weight_0,  # ()
    constant_0,
    grad_constant_0,  # constant x term_weight / temperature
    factor_1,
    counted_1,
    weight_1,
    constant_1,
    grad_constant_1,
    n,  # rows of the chunk
    first,
    stride,  # of the rows of per_anchor
    inv_temperature,
    BY_LABEL_0: tl.constexpr,  # the term has label positives
    BY_LABEL_1: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    absolute = first + rows
    inside = rows < n
    cosine = tl.load(positive + absolute, mask=inside, other=0.0)
    # The loss, and 1 - probability of the positive.
    loss, q = _softplus(tl.load(neg_lse + rows, mask=inside, other=0.0) - cosine * inv_temperature)
    pull = loss
    if BY_LABEL_0 or BY_LABEL_1:
        pull = (cosine - tl.load(label_positive + absolute, mask=inside, other=0.0)) * inv_temperature
    weight = _add_term(
        per_anchor, loss, pull, rows, absolute, inside, factor_0, counted_0, weight_0, constant_0, grad_constant_0,
        BY_LABEL_0,
    )  # fmt: skip
    total = weight
    if BY_LABEL_0:
        tl.store(class_mean_coef + rows, weight, mask=inside)
    if TERMS == 2:
        weight = _add_term(
            per_anchor + stride, loss, pull, rows, absolute, inside, factor_1, counted_1, weight_1, constant_1,
            grad_constant_1, BY_LABEL_1,
        )  # fmt: skip
        total += weight
        if BY_LABEL_1:
            tl.store(class_mean_coef + rows, weight, mask=inside)
    q = q * total
    tl.store(partner_coef + rows, q, mask=inside)
    tl.store(product_coef + rows, q * tl.load(inv_neg_sum + rows, mask=inside, other=0.0), mask=inside)


def loss_epilogue(terms: AnchorTerms, sums: NegativeSums, configs: Configs) -> GradCoefficients:
    """As `KernelSet.loss_epilogue`."""
    n, inv_temperature = sums.rows.stop - sums.rows.start, 1 / terms.temperature
    by_label = [weight.positives == "label" for weight in terms.weights]
    partner, product = torch.empty_like(sums.neg_lse), torch.empty_like(sums.neg_lse)
    class_mean = torch.empty_like(sums.neg_lse) if any(by_label) else None

    def arguments(weight: TermWeight) -> tuple[Tensor | float | None, ...]:
        grad_constant = weight.constant * weight.term_weight * inv_temperature
        return weight.factor, weight.counted, weight.weight, weight.constant, grad_constant

    second = arguments(terms.weights[1]) if len(by_label) == 2 else (None, None, None, 0.0, 0.0)
    launch = configs.vectors("loss_epilogue")
    loss_epilogue_kernel[(triton.cdiv(n, launch.block_n),)](
        terms.positive, terms.label_positive, sums.neg_lse, sums.inv_neg_sum, terms.per_anchor,
        partner, product, class_mean, *arguments(terms.weights[0]), *second,
        n, sums.rows.start, terms.per_anchor.stride(0), inv_temperature,
        BY_LABEL_0=by_label[0], BY_LABEL_1=by_label[-1], TERMS=len(by_label), BLOCK=launch.block_n,
        num_warps=launch.warps,
    )  # fmt: skip
    return GradCoefficients(partner=partner, product=product, class_mean=class_mean)
