"""Contrast for short rows, where a row is one tile: both products in one kernel.

As in an attention forward with Q = anchors and K = V = candidates: a loaded tile of candidates serves the
similarities and the product, whose accumulator stays in registers. Fused: temperature, shift, masks, exponential, row
sums, log and both products. Neither similarities nor exponentials ever leave the chip. The positive and the
candidates past the end are in few tiles, so these go in a loop of their own, and the loop over the others has no
mask.

The gradient by the candidates is the same kernel with the roles swapped, once the anchors' sums are known: its
exponentials are probabilities, exp(a_ij) / off_i, times a coefficient per anchor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pipeline import Negatives, Unit
from . import configs, tuning
from .common import LN2, LOG2E, Negated, dot_precision, fixed_maximum, headroom, rounded, tl_dtype


# fmt: off
@triton.jit
def _tile(
    accumulator, off, top, q, rows, q_labels, k, k_labels, known_log_off, coefficient, first, m, offset, scale, shift,
    MASK: tl.constexpr, LABELS: tl.constexpr, EXPONENT: tl.constexpr, PRODUCT: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAT: tl.constexpr,
):
    # fmt: on
    """Add the tile of candidates that begins at row ``first``."""
    candidates = k + first.to(tl.int64) * D + tl.arange(0, BLOCK_N)[:, None] * D + tl.arange(0, D)[None, :]
    tile = tl.load(candidates)  # (BLOCK_N, D)
    columns = first + tl.arange(0, BLOCK_N)
    # Similarities in base 2, (BLOCK_M, BLOCK_N)
    t = tl.dot(q, tl.trans(tile), input_precision=PRECISION, out_dtype=STAT) * scale
    if MASK:
        keep = (columns < m)[None, :] & (columns[None, :] != (rows + offset)[:, None])
        if LABELS:
            labels = tl.load(k_labels + columns, mask=columns < m, other=0).to(tl.int32)
            keep = keep & (labels[None, :] != q_labels[:, None])
        t = tl.where(keep, t, -float("inf"))
    if EXPONENT == "fixed":
        e = tl.exp2(t - shift)
        off += tl.sum(e, 1)
    elif EXPONENT == "online":
        # `shift` is minus the headroom here. A row without any candidate so far keeps its maximum at -inf.
        raised = tl.maximum(top, tl.max(t, 1))
        safe = tl.where(raised == -float("inf"), 0.0, raised)
        decay = tl.exp2(top - safe)
        e = tl.exp2(t - (safe + shift)[:, None])
        off = off * decay + tl.sum(e, 1)
        if PRODUCT:
            accumulator = accumulator * decay[:, None]
        top = raised
    else:
        known = tl.load(known_log_off + columns, mask=columns < m, other=float("inf"))
        e = tl.exp2(t - known[None, :]) * tl.load(coefficient + columns, mask=columns < m, other=0.0)[None, :]
    if PRODUCT:
        accumulator = tl.dot(
            rounded(e, tile.dtype, PRECISION), tile, accumulator, input_precision=PRECISION, out_dtype=STAT
        )
    return accumulator, off, top


@triton.jit(do_not_specialize=["n", "m", "offset"])
def flash_kernel(
    q,  # (padded n, D) anchors; the candidates if EXPONENT == "known"
    k,  # (padded m, D) candidates; the anchors if EXPONENT == "known"
    product,  # (padded n, D)
    log_off,  # (n,)
    inverse_off,  # (n,)
    q_labels,  # (n,) int64
    k_labels,  # (m,) int64
    known_log_off,  # (m,) in base 2
    coefficient,  # (m,)
    gain,  # () scales the product if EXPONENT == "known"
    n,
    m,
    offset,
    scale,  # log2(e) / temperature
    shift,  # subtracted from a similarity in base 2; plus the maximum if EXPONENT == "online"
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LABELS: tl.constexpr,
    EXPONENT: tl.constexpr,  # "fixed", "online" or "known"
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAT: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    block = start.to(tl.int64) * D + tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, D)[None, :]
    q_tile = tl.load(q + block)  # (BLOCK_M, D)
    if LABELS:
        labels = tl.load(q_labels + rows, mask=rows < n, other=0).to(tl.int32)  # half the registers
    else:
        labels = rows
    off = tl.zeros((BLOCK_M,), STAT)
    top = tl.full((BLOCK_M,), -float("inf"), STAT)
    if PRODUCT:
        accumulator = tl.zeros((BLOCK_M, D), STAT)
    else:
        accumulator = off

    # Tiles [low, high) hold positives, a last partial tile what is past the end; with labels every tile needs masks.
    whole = m // BLOCK_N
    tiles = tl.cdiv(m, BLOCK_N)
    low = tl.minimum(tl.maximum(start + offset, 0) // BLOCK_N, whole)
    high = tl.minimum(tl.cdiv(tl.maximum(start + offset + BLOCK_M, 0), BLOCK_N), whole)
    if LABELS:
        low = low * 0
        high = whole
    for step in range(0, whole - (high - low)):
        first = tl.where(step < low, step, step + (high - low)) * BLOCK_N
        accumulator, off, top = _tile(
            accumulator, off, top, q_tile, rows, labels, k, k_labels, known_log_off, coefficient, first, m, offset,
            scale, shift, False, LABELS, EXPONENT, PRODUCT, D, BLOCK_N, PRECISION, STAT)  # fmt: skip
    for step in range(0, tiles - whole + (high - low)):
        first = tl.where(step < high - low, low + step, whole) * BLOCK_N
        accumulator, off, top = _tile(
            accumulator, off, top, q_tile, rows, labels, k, k_labels, known_log_off, coefficient, first, m, offset,
            scale, shift, True, LABELS, EXPONENT, PRODUCT, D, BLOCK_N, PRECISION, STAT)  # fmt: skip

    if EXPONENT == "known":
        accumulator = accumulator * tl.load(gain)
    else:
        if EXPONENT == "online":
            # Without a negative the maximum is -inf, and so is the sum's logarithm.
            base = tl.where(top == -float("inf"), 0.0, top) + shift
            tl.store(log_off + rows, (tl.log2(off) + base) * LN2, mask=rows < n)
        else:
            tl.store(log_off + rows, (tl.log2(off) + shift) * LN2, mask=rows < n)
        tl.store(inverse_off + rows, tl.where(off == 0.0, 0.0, 1.0 / off), mask=rows < n)
    if PRODUCT:
        tl.store(product + block, accumulator)


def _launch(q: Unit, k: Unit, outputs: tuple[Tensor | None, ...], what: Negated, known: tuple[Tensor | None, ...],
            shift: float, exponent: str) -> None:  # fmt: skip
    """outputs: product, log_off, inverse_off; known: log_off in base 2, coefficient, gain."""
    dtype, depth, device = q.matrix.dtype, q.matrix.shape[1], q.matrix.device
    precision = dot_precision(dtype)
    labels = (None, None) if what.same is None else what.same
    with_product = outputs[0] is not None

    def run(launch: configs.Launch) -> None:
        flash_kernel[(triton.cdiv(q.n, launch.block_m),)](
            q.matrix, k.matrix, *outputs, *labels, *known,
            q.n, k.n, what.offset, LOG2E / what.temperature, shift,
            D=depth, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, LABELS=what.same is not None,
            EXPONENT=exponent, PRODUCT=with_product, PRECISION=precision, STAT=tl_dtype(q.inverse.dtype),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    key = "flash", device, dtype, precision, depth, exponent, what.same is None, with_product
    default = configs.flash(device, dtype, precision, depth, exponent)
    run(tuning.choose(key, default, configs.FLASH_ALTERNATIVES, run))


def negatives(a: Unit, k: Unit, what: Negated, with_product: bool) -> Negatives:
    """The sums over the negatives of all anchors; without product where it is not wanted."""
    dtype, stat, device = a.matrix.dtype, a.inverse.dtype, a.matrix.device
    product = torch.empty(a.matrix.shape, dtype=stat, device=device) if with_product else None
    log_off, inverse_off = torch.empty_like(a.inverse), torch.empty_like(a.inverse)
    fixed = fixed_maximum(dtype, what.temperature)
    shift = (LOG2E / what.temperature if fixed else 0.0) - headroom(dtype)
    _launch(a, k, (product, log_off, inverse_off), what, (None, None, None), shift, "fixed" if fixed else "online")
    return Negatives(slice(0, a.n), log_off, a.inverse[:0] if product is None else product[: a.n], inverse_off)


def candidate_sums(a: Unit, k: Unit, what: Negated, log_off: Tensor, part: Tensor) -> Tensor:
    """(m, depth): sum_{i: i+offset != j} part_i p_ij A_i."""
    dtype, stat, device = a.matrix.dtype, a.inverse.dtype, a.matrix.device
    peak = part.abs().amax()  # the largest becomes 1, so that fp16 holds small ones too
    part = part / torch.where(peak == 0, 1.0, peak)
    # An anchor without a negative has no part: its exponentials become 0.
    known = torch.where(log_off == -torch.inf, torch.inf, log_off) * LOG2E - headroom(dtype)
    gain = peak * 2.0 ** -headroom(dtype)
    product = torch.empty(k.matrix.shape, dtype=stat, device=device)
    swapped = None if what.same is None else (what.same[1], what.same[0])
    back = Negated(what.temperature, -what.offset, swapped)
    _launch(k, a, (product, None, None), back, (known, part, gain), 0.0, "known")
    return product[: k.n]
