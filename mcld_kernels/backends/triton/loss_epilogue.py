"""What an anchor adds to the terms and to the gradient, once the sum over its negatives is known.

Fused: the loss and its derivative, the shares of one or two terms, the mean over the anchors that count, and the
factors of the gradient's last step. One row a lane; nothing but the results is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pipeline import Anchors, Factors, Share
from . import configs


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
def _share(
    values, loss, gap, rows, absolute, inside, factor, counted, weight, constant, slope, LABELS: tl.constexpr
):  # fmt: skip
    """Write the share's values; returns weight / temperature, (BLOCK,)."""
    part = tl.full(loss.shape, 1.0, loss.dtype)
    # Products, not selections: a poison shows in the rows that do not count, too.
    if factor is not None:
        part = part * tl.load(factor)
    if counted is not None:
        part = part * tl.load(counted + absolute, mask=inside, other=0).to(loss.dtype)
    value = loss + gap if LABELS else loss
    tl.store(values + absolute, value * (part * constant), mask=inside)
    part = part * slope
    if weight is not None:
        part = part * tl.load(weight)
    return part


# Weights of terms and rows of `values` lie at any multiple of an entry.
@triton.jit(
    do_not_specialize=["n", "first", "stride"],
    do_not_specialize_on_alignment=["values", "weight_0", "weight_1"],
)
def factors_kernel(
    positive,  # (n of all rows,)
    by_label,  # (n of all rows,)
    log_off,  # (n,)
    scale,  # (n,)
    values,  # (shares, >= n of all rows)
    u,  # (n,)
    s,  # (n,)
    z,  # (n,) if one of the shares reads labels
    factor_0,  # () or None, and so below
    counted_0,  # (n of all rows,)
    weight_0,  # ()
    constant_0,
    slope_0,  # constant x scale / temperature
    factor_1,
    counted_1,
    weight_1,
    constant_1,
    slope_1,
    n,  # rows of the slice
    first,
    stride,  # of the rows of values
    inverse_temperature,
    LABELS_0: tl.constexpr,  # whether the share's positives are those of the label
    LABELS_1: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    absolute = first + rows
    inside = rows < n
    cosine = tl.load(positive + absolute, mask=inside, other=0.0)
    loss, q = _softplus(tl.load(log_off + rows, mask=inside, other=0.0) - cosine * inverse_temperature)
    gap = loss
    if LABELS_0 or LABELS_1:
        gap = (cosine - tl.load(by_label + absolute, mask=inside, other=0.0)) * inverse_temperature
    weight = _share(
        values, loss, gap, rows, absolute, inside, factor_0, counted_0, weight_0, constant_0, slope_0, LABELS_0
    )
    total = weight
    if LABELS_0:
        tl.store(z + rows, weight, mask=inside)
    if SHARES == 2:
        weight = _share(
            values + stride, loss, gap, rows, absolute, inside, factor_1, counted_1, weight_1, constant_1, slope_1,
            LABELS_1,
        )  # fmt: skip
        total += weight
        if LABELS_1:
            tl.store(z + rows, weight, mask=inside)
    q = q * total
    tl.store(u + rows, q, mask=inside)
    tl.store(s + rows, q * tl.load(scale + rows, mask=inside, other=0.0), mask=inside)


def factors(anchors: Anchors, rows: slice, log_off: Tensor, scale: Tensor) -> Factors:
    """As `pipeline.Kernels.factors`."""
    n, inverse = rows.stop - rows.start, 1 / anchors.temperature
    labels = [share.term == 1 for share in anchors.shares]
    u, s = torch.empty_like(log_off), torch.empty_like(log_off)
    z = torch.empty_like(log_off) if any(labels) else None

    def arguments(share: Share) -> tuple[Tensor | float | None, ...]:
        return share.factor, share.counted, share.weight, share.constant, share.constant * share.scale * inverse

    second = arguments(anchors.shares[1]) if len(labels) == 2 else (None, None, None, 0.0, 0.0)
    launch = configs.vectors(log_off.device, "factors")
    factors_kernel[(triton.cdiv(n, launch.block_n),)](
        anchors.positive, anchors.by_label, log_off, scale, anchors.values, u, s, z,
        *arguments(anchors.shares[0]), *second, n, rows.start, anchors.values.stride(0), inverse,
        LABELS_0=labels[0], LABELS_1=labels[-1], SHARES=len(labels), BLOCK=launch.block_n, num_warps=launch.warps,
    )  # fmt: skip
    return Factors(u, s, z)
