"""Contrast for short rows, where a row is one tile: both products in one kernel.

As in an attention forward with Q = anchors and K = V = candidates: a loaded tile of candidates serves the
similarities and the product, whose accumulator stays in registers. Fused: temperature, shift, masks, exponential, row
sums, log and both products. Neither similarities nor exponentials are ever written. The positive and the candidates
past the end are in few tiles, which take a loop of their own; the loop over the others has no mask.

The gradient by the candidates is the same kernel with the roles exchanged, once the anchors' sums are known: its
exponentials are probabilities, exp(a_ij) / neg_sum_i, times a coefficient per anchor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels import ContrastArgs, ContrastSums, GradCoefficients, NegativeSums
from . import autotune
from .common import LN2, LOG2E, headroom, tl_dtype, to_operand
from .configs import Configs, Launch
from .similarity import reduce_row_sums


# fmt: off
@triton.jit
def _tile(
    accumulator, neg_sum, row_max, q, rows, q_key, k, k_keys, known_lse, coefficient, first, m, offset, scale_log2,
    shift, MASK: tl.constexpr, KEYS: tl.constexpr, EXPONENT: tl.constexpr, PRODUCT: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):
    # fmt: on
    """Add the tile of K that begins at row ``first``."""
    place = k + first.to(tl.int64) * D + tl.arange(0, BLOCK_N)[:, None] * D + tl.arange(0, D)[None, :]
    tile = tl.load(place)  # (BLOCK_N, D)
    columns = first + tl.arange(0, BLOCK_N)
    # Similarities in base 2, (BLOCK_M, BLOCK_N)
    t = tl.dot(q, tl.trans(tile), input_precision=PRECISION, out_dtype=ACC) * scale_log2
    if MASK:
        keep = (columns < m)[None, :] & (columns[None, :] != (rows + offset)[:, None])
        if KEYS:
            k_key = tl.load(k_keys + columns, mask=columns < m, other=0).to(tl.int32)
            keep = keep & (k_key[None, :] != q_key[:, None])
        t = tl.where(keep, t, -float("inf"))
    if EXPONENT == "fixed":
        e = tl.exp2(t - shift)
        neg_sum += tl.sum(e, 1)
    elif EXPONENT == "online":
        # `shift` is minus the headroom here. A row without any candidate so far keeps its maximum at -inf.
        raised = tl.maximum(row_max, tl.max(t, 1))
        finite = tl.where(raised == -float("inf"), 0.0, raised)
        decay = tl.exp2(row_max - finite)
        e = tl.exp2(t - (finite + shift)[:, None])
        neg_sum = neg_sum * decay + tl.sum(e, 1)
        if PRODUCT:
            accumulator = accumulator * decay[:, None]
        row_max = raised
    else:
        known = tl.load(known_lse + columns, mask=columns < m, other=float("inf"))
        e = tl.exp2(t - known[None, :]) * tl.load(coefficient + columns, mask=columns < m, other=0.0)[None, :]
    if PRODUCT:
        accumulator = tl.dot(
            to_operand(e, tile.dtype, PRECISION), tile, accumulator, input_precision=PRECISION, out_dtype=ACC
        )
    return accumulator, neg_sum, row_max


@triton.jit(do_not_specialize=["n", "m", "offset", "padded_n"])
def flash_kernel(
    q,  # (padded n, D) anchors; the candidates if EXPONENT == "known"
    k,  # (padded m, D) candidates; the anchors if EXPONENT == "known"
    product,  # (padded n, D), or (splits, padded n, D) if SPLIT
    neg_lse,  # (n,), or the sums (splits, padded n) if SPLIT
    inv_neg_sum,  # (n,)
    q_keys,  # (n,) int64
    k_keys,  # (m,) int64
    known_lse,  # (m,) in base 2
    coefficient,  # (m,)
    gain,  # () multiplies the product if EXPONENT == "known"
    n,
    m,
    offset,
    padded_n,
    scale_log2,  # log2(e) / temperature
    shift,  # subtracted from a similarity in base 2; plus the maximum if EXPONENT == "online"
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    EXPONENT: tl.constexpr,  # "fixed", "online" or "known"
    PRODUCT: tl.constexpr,
    SPLIT: tl.constexpr,  # the candidates are split over the second axis of the grid; EXPONENT == "fixed"
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    block = start.to(tl.int64) * D + tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, D)[None, :]
    q_tile = tl.load(q + block)  # (BLOCK_M, D)
    if KEYS:
        q_key = tl.load(q_keys + rows, mask=rows < n, other=0).to(tl.int32)  # half the registers
    else:
        q_key = rows
    neg_sum = tl.zeros((BLOCK_M,), ACC)
    row_max = tl.full((BLOCK_M,), -float("inf"), ACC)
    if PRODUCT:
        accumulator = tl.zeros((BLOCK_M, D), ACC)
    else:
        accumulator = neg_sum

    # Tiles [low, high) hold positives, a last partial tile reaches past the end; with keys every tile needs masks.
    whole = m // BLOCK_N
    tiles = tl.cdiv(m, BLOCK_N)
    low = tl.minimum(tl.maximum(start + offset, 0) // BLOCK_N, whole)
    high = tl.minimum(tl.cdiv(tl.maximum(start + offset + BLOCK_M, 0), BLOCK_N), whole)
    if KEYS:
        low = low * 0
        high = whole
    masked = tiles - whole + (high - low)
    unmasked = whole - (high - low)
    from_unmasked = 0
    from_masked = 0
    if SPLIT:
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        from_unmasked = unmasked * split // splits
        unmasked = unmasked * (split + 1) // splits
        from_masked = masked * split // splits
        masked = masked * (split + 1) // splits
    for step in range(from_unmasked, unmasked):
        first = tl.where(step < low, step, step + (high - low)) * BLOCK_N
        accumulator, neg_sum, row_max = _tile(
            accumulator, neg_sum, row_max, q_tile, rows, q_key, k, k_keys, known_lse, coefficient, first, m, offset,
            scale_log2, shift, False, KEYS, EXPONENT, PRODUCT, D, BLOCK_N, PRECISION, ACC)  # fmt: skip
    for step in range(from_masked, masked):
        first = tl.where(step < high - low, low + step, whole) * BLOCK_N
        accumulator, neg_sum, row_max = _tile(
            accumulator, neg_sum, row_max, q_tile, rows, q_key, k, k_keys, known_lse, coefficient, first, m, offset,
            scale_log2, shift, True, KEYS, EXPONENT, PRODUCT, D, BLOCK_N, PRECISION, ACC)  # fmt: skip

    if SPLIT:
        part = tl.program_id(1).to(tl.int64) * padded_n
        tl.store(neg_lse + part + rows, neg_sum)
        if PRODUCT:
            product += part * D
    elif EXPONENT == "known":
        accumulator = accumulator * tl.load(gain)
    else:
        if EXPONENT == "online":
            # Without a negative the maximum is -inf, and so is the sum's logarithm.
            base = tl.where(row_max == -float("inf"), 0.0, row_max) + shift
            tl.store(neg_lse + rows, (tl.log2(neg_sum) + base) * LN2, mask=rows < n)
        else:
            tl.store(neg_lse + rows, (tl.log2(neg_sum) + shift) * LN2, mask=rows < n)
        tl.store(inv_neg_sum + rows, tl.where(neg_sum == 0.0, 0.0, 1.0 / neg_sum), mask=rows < n)
    if PRODUCT:
        tl.store(product + block, accumulator)


class FlashContrast:
    """As `kernels.Contrast`, all anchors in one chunk."""

    def __init__(self, args: ContrastArgs, configs: Configs):
        self._args, self._configs = args, configs
        self._candidate_product: Tensor | None = None

    def chunks(self) -> Iterator[NegativeSums]:
        yield _negative_sums(self._args, self._args.anchor_grad, self._configs)

    def add_candidates(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        self._candidate_product = _candidate_product(self._args, chunk.neg_lse, coefficients.partner, self._configs)

    def sums(self) -> ContrastSums:
        reverse = None
        if self._args.reverse:
            reverse = _negative_sums(_exchanged(self._args), self._args.candidate_grad, self._configs)
        return ContrastSums(candidate_product=self._candidate_product, reverse=reverse)


def _exchanged(args: ContrastArgs) -> ContrastArgs:
    """The contrast with the candidates as anchors and the anchors as candidates."""
    return ContrastArgs(
        anchors=args.candidates,
        candidates=args.anchors,
        temperature=args.temperature,
        offset=-args.offset,
        mask=None if args.mask is None else (args.mask[1], args.mask[0]),
        is_bounded=args.is_bounded,
    )


def _negative_sums(args: ContrastArgs, with_product: bool, configs: Configs) -> NegativeSums:
    """The sums over the negatives of all anchors."""
    anchors = args.anchors
    neg_lse, inv_neg_sum = torch.empty_like(anchors.inv_norm), torch.empty_like(anchors.inv_norm)
    fixed = args.has_fixed_shift()
    shift = (LOG2E / args.temperature if fixed else 0.0) - headroom(anchors.rows.dtype)
    tile = configs.flash(anchors.rows.dtype, anchors.rows.shape[1], "fixed")
    splits = configs.flash_splits(triton.cdiv(anchors.n, tile.block_m), triton.cdiv(args.candidates.n, tile.block_n))
    if fixed and splits > 1:
        product, sums = _split_sums(args, splits, with_product, shift, configs)
        reduce_row_sums(sums, neg_lse, inv_neg_sum, shift, configs)
        product = None if product is None else product[: anchors.n]
        return NegativeSums(rows=slice(0, anchors.n), neg_lse=neg_lse, inv_neg_sum=inv_neg_sum, product=product)
    product = torch.empty_like(anchors.rows, dtype=anchors.inv_norm.dtype) if with_product else None
    outputs = product, neg_lse, inv_neg_sum
    _launch(args, outputs, (None, None, None), shift, "fixed" if fixed else "online", configs)
    product = None if product is None else product[: anchors.n]
    return NegativeSums(rows=slice(0, anchors.n), neg_lse=neg_lse, inv_neg_sum=inv_neg_sum, product=product)


def _split_sums(
    args: ContrastArgs, splits: int, with_product: bool, shift: float, configs: Configs
) -> tuple[Tensor | None, Tensor]:
    """The product (padded n, pitch) and the sums (splits, padded n) of parts of the candidates side by side."""
    rows, acc = args.anchors.rows, args.anchors.inv_norm.dtype
    products = torch.empty(splits, *rows.shape, dtype=acc, device=rows.device) if with_product else None
    sums = torch.empty(splits, rows.shape[0], dtype=acc, device=rows.device)
    _launch(args, (products, sums, None), (None, None, None), shift, "fixed", configs, splits)
    return None if products is None else products.sum(0), sums


def _candidate_product(args: ContrastArgs, neg_lse: Tensor, partner: Tensor, configs: Configs) -> Tensor:
    """(m, pitch): sum_i partner_i p_ij A_i over the negatives' pairs."""
    dtype, candidates = args.anchors.rows.dtype, args.candidates
    peak = partner.abs().amax()  # the largest becomes 1, so that fp16 holds small ones too
    coefficient = partner / torch.where(peak == 0, 1.0, peak)
    # An anchor without a negative contributes nothing: its exponentials become 0.
    known_lse = torch.where(neg_lse == -torch.inf, torch.inf, neg_lse) * LOG2E - headroom(dtype)
    gain = peak * 2.0 ** -headroom(dtype)
    product = torch.empty_like(candidates.rows, dtype=neg_lse.dtype)
    known = known_lse, coefficient, gain
    _launch(_exchanged(args), (product, None, None), known, 0.0, "known", configs)
    return product[: candidates.n]


def _launch(
    args: ContrastArgs,
    outputs: tuple[Tensor | None, ...],
    known: tuple[Tensor | None, ...],
    shift: float,
    exponent: str,
    configs: Configs,
    splits: int = 1,
) -> None:
    """outputs: product, neg_lse, inv_neg_sum; known: known_lse, coefficient, gain. With splits: products, sums."""
    q, k = args.anchors, args.candidates
    dtype, pitch, device = q.rows.dtype, q.rows.shape[1], q.rows.device
    precision = configs.precision(dtype)
    keys = (None, None) if args.mask is None else args.mask
    with_product = outputs[0] is not None

    def run(launch: Launch) -> None:
        flash_kernel[(triton.cdiv(q.n, launch.block_m), splits)](
            q.rows, k.rows, *outputs, *keys, *known, q.n, k.n, args.offset, q.rows.shape[0], LOG2E / args.temperature,
            shift, D=pitch, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, KEYS=args.mask is not None,
            EXPONENT=exponent, PRODUCT=with_product, SPLIT=splits > 1, PRECISION=precision,
            ACC=tl_dtype(q.inv_norm.dtype), num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    key = "flash", device, dtype, precision, pitch, exponent, args.mask is None, with_product, splits > 1
    default, tuning = configs.flash(dtype, pitch, exponent), configs.tuning
    run(autotune.choose(tuning, key, default, tuning.flash_alternatives, run))
