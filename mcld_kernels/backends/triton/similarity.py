"""Contrast for long rows in chunks of anchors: two products, with the exponentials E of a chunk in between.

Fused into the first product: temperature, shift, masks, exponential, cast, and the sums of each tile's rows and, for
both directions at once, columns. Similarities are never written; E is, in the operand dtype, for one chunk at a time.
Sums of tiles go to a workspace and are added in a fixed order. With an online maximum a tile is shifted by its own
maximum, and E is brought to the rows' maxima in place before the second product.

Where tiles are few and rows are very long (the category-wise term) the first product is a split-k product, whose parts,
then no larger than the inputs, are written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels import ContrastArgs, ContrastSums, GradCoefficients, NegativeSums, slices
from . import autotune
from .common import HEADROOM, LN2, LOG2E, headroom, round_up, tl_dtype, to_operand
from .configs import ROWS, Configs, Launch
from .product import product, split_k_product, tile_of


@triton.jit(do_not_specialize=["n", "m", "offset", "splits"])
def similarity_kernel(
    anchors,  # (padded n, pitch) of the chunk
    candidates,  # (padded m, pitch)
    e,  # (padded n, padded m)
    row_sums,  # (column tiles, padded n)
    row_max,  # (column tiles, padded n), in base 2
    column_sums,  # (row tiles, padded m)
    anchor_keys,  # (n,) int64
    candidate_keys,  # (m,) int64
    cosines,  # (splits, padded n, padded m) if SPLIT_K: their sum replaces the product
    n,  # anchors of the chunk
    m,
    offset,
    padded_n,
    padded_m,
    pitch,
    splits,
    scale_log2,  # log2(e) / temperature
    shift,  # subtracted from a similarity in base 2; plus the tile's maximum if ONLINE
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    KEYS: tl.constexpr,
    ONLINE: tl.constexpr,
    STORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), padded_n // BLOCK_M, padded_m // BLOCK_N, GROUP)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    t = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if SPLIT_K:
        place = rows.to(tl.int64)[:, None] * padded_m + columns[None, :]
        for split in range(splits):
            t += tl.load(cosines + tl.cast(split, tl.int64) * padded_n * padded_m + place)
    else:
        k = tl.arange(0, BLOCK_K)
        a_tiles = anchors + first_row.to(tl.int64) * pitch + tl.arange(0, BLOCK_M)[:, None] * pitch + k[None, :]
        k_tiles = candidates + first_column.to(tl.int64) * pitch + tl.arange(0, BLOCK_N)[None, :] * pitch + k[:, None]
        for start in range(0, pitch, BLOCK_K):
            a_tile, k_tile = tl.load(a_tiles + start), tl.load(k_tiles + start)
            t = tl.dot(a_tile, k_tile, t, input_precision=PRECISION, out_dtype=ACC)
    t = t * scale_log2

    # Only tiles that hold a positive or reach past the end need masks.
    distance = first_column - first_row - offset
    masked = (first_column + BLOCK_N > m) | (first_row + BLOCK_M > n) | ((distance > -BLOCK_N) & (distance < BLOCK_M))
    if KEYS:
        a_key = tl.load(anchor_keys + rows, mask=rows < n, other=0).to(tl.int32)  # half the registers
        k_key = tl.load(candidate_keys + columns, mask=columns < m, other=0).to(tl.int32)
        t = tl.where(a_key[:, None] == k_key[None, :], -float("inf"), t)
    if masked:
        keep = (columns < m)[None, :] & (rows < n)[:, None] & (columns[None, :] != (rows + offset)[:, None])
        t = tl.where(keep, t, -float("inf"))
    sums = column_tile.to(tl.int64) * padded_n + rows
    if ONLINE:
        maximum = tl.max(t, 1)
        finite = tl.where(maximum == -float("inf"), 0.0, maximum)
        tl.store(row_max + sums, finite)
        t = tl.exp2(t - (finite + shift)[:, None])
    else:
        t = tl.exp2(t - shift)
    tl.store(row_sums + sums, tl.sum(t, 1))
    if COLUMNS:
        tl.store(column_sums + row_tile.to(tl.int64) * padded_m + columns, tl.sum(t, 0))
    if STORE:
        tl.store(
            e + rows.to(tl.int64)[:, None] * padded_m + columns[None, :], to_operand(t, e.dtype.element_ty, PRECISION)
        )


@triton.jit(do_not_specialize=["n", "tiles"])
def row_sums_kernel(
    row_sums,  # (tiles, padded n)
    row_max,  # (tiles, padded n)
    total_max,  # (padded n,)
    neg_lse,  # (n,)
    inv_neg_sum,  # (n,)
    n,
    tiles,
    padded_n,
    shift,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ONLINE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add the tiles' sums of each row; ONLINE: relative to the row's maximum, which is written to `total_max`."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    highest = tl.full((BLOCK_R,), -float("inf"), ACC)
    if ONLINE:
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            place = tile.to(tl.int64)[:, None] * padded_n + rows[None, :]
            inside = (tile < tiles)[:, None]
            # A tile without a negative has sum 0, and its maximum means nothing.
            counts = tl.load(row_sums + place, mask=inside, other=0.0) != 0.0
            maximum = tl.load(row_max + place, mask=inside, other=-float("inf"))
            highest = tl.maximum(highest, tl.max(tl.where(counts, maximum, -float("inf")), 0))
        highest = tl.where(highest == -float("inf"), 0.0, highest)
        tl.store(total_max + rows, highest)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        place = tile.to(tl.int64)[:, None] * padded_n + rows[None, :]
        inside = (tile < tiles)[:, None]
        part = tl.load(row_sums + place, mask=inside, other=0.0)
        if ONLINE:
            maximum = tl.load(row_max + place, mask=inside & (part != 0.0), other=-float("inf"))
            part = part * tl.exp2(maximum - highest[None, :])
        total += part
    neg_sum = tl.sum(total, 0)
    if ONLINE:
        tl.store(neg_lse + rows, (tl.log2(neg_sum) + (highest + shift)) * LN2, mask=rows < n)
    else:
        tl.store(neg_lse + rows, (tl.log2(neg_sum) + shift) * LN2, mask=rows < n)
    tl.store(inv_neg_sum + rows, tl.where(neg_sum == 0.0, 0.0, 1.0 / neg_sum), mask=rows < n)


def reduce_row_sums(sums: Tensor, neg_lse: Tensor, inv_neg_sum: Tensor, shift: float, configs: Configs) -> None:
    """Add sums (tiles, padded n) of one fixed shift into neg_lse, inv_neg_sum (n,)."""
    (tiles, padded), launch = sums.shape, configs.row_sums()
    row_sums_kernel[(padded // launch.block_m,)](
        sums, None, None, neg_lse, inv_neg_sum, neg_lse.shape[0], tiles, padded, shift,
        BLOCK_R=launch.block_m, BLOCK_T=launch.block_n, ONLINE=False, ACC=tl_dtype(sums.dtype), num_warps=launch.warps,
    )  # fmt: skip


@triton.jit
def scale_rows_kernel(
    e,  # (padded n, padded m), changed in place
    row_max,  # (column tiles, padded n)
    total_max,  # (padded n,)
    factor,  # (padded n,)
    padded_n,
    padded_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONLINE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Multiply row i of E by factor_i or, ONLINE, bring every tile of it from its own maximum to the row's."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    if ONLINE:
        by = tl.exp2(tl.load(row_max + tile.to(tl.int64) * padded_n + rows) - tl.load(total_max + rows))
        by = tl.minimum(by, 1.0)  # a tile without a negative holds zeros and any maximum
    else:
        by = tl.load(factor + rows)
    place = e + rows.to(tl.int64)[:, None] * padded_m + (tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    tl.store(place, (tl.load(place).to(ACC) * by[:, None]).to(e.dtype.element_ty))


class _Chunk:
    """The workspace of a chunk: exponentials, sums of tiles and, for an online maximum, maxima of tiles and rows."""

    def __init__(self, args: ContrastArgs, rows: int, launch: Launch, configs: Configs):
        self.args, self.configs, self.launch = args, configs, launch
        anchors, candidates = args.anchors.rows, args.candidates.rows
        dtype, self.acc, device = anchors.dtype, args.anchors.inv_norm.dtype, anchors.device
        self.stored = args.anchor_grad or args.candidate_grad
        self.online = not args.has_fixed_shift()
        self.scale_log2 = LOG2E / args.temperature
        self.shift = (0.0 if self.online else self.scale_log2) - headroom(dtype)
        padded_m = candidates.shape[0]
        self.tiles = padded_m // launch.block_n
        empty = torch.empty
        self.e = empty(rows if self.stored else 0, padded_m, dtype=dtype, device=device)
        self.row_sums = empty(self.tiles * rows, dtype=self.acc, device=device)
        self.row_max = empty(self.tiles * rows if self.online else 0, dtype=self.acc, device=device)
        self.total_max = empty(rows if self.online else 0, dtype=self.acc, device=device)
        row_tiles = rows // launch.block_m if args.reverse else 0
        self.column_sums = empty(row_tiles, padded_m, dtype=self.acc, device=device)

    def similarity(self, rows: slice, padded: int, neg_lse: Tensor, inv_neg_sum: Tensor) -> None:
        """Exponentials of the chunk, and the sums of its rows into neg_lse, inv_neg_sum (rows,)."""
        args, launch, configs = self.args, self.launch, self.configs
        anchors, candidates = args.anchors.rows[rows.start : rows.start + padded], args.candidates.rows
        padded_m, pitch = candidates.shape
        n = rows.stop - rows.start
        keys = (None, None) if args.mask is None else (args.mask[0][rows], args.mask[1])
        tiles = padded // launch.block_m * self.tiles
        splits = configs.splits(tiles, pitch)
        cosines = None
        if splits > 1:
            cosines = split_k_product(anchors, candidates.T, self.acc, launch, splits, configs)
        similarity_kernel[(tiles,)](
            anchors, candidates, self.e, self.row_sums, self.row_max, self.column_sums, *keys, cosines,
            n, args.candidates.n, rows.start + args.offset, padded, padded_m, pitch,
            0 if cosines is None else cosines.shape[0], self.scale_log2, self.shift,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP=8,
            SPLIT_K=cosines is not None, KEYS=args.mask is not None, ONLINE=self.online, STORE=self.stored,
            COLUMNS=args.reverse, PRECISION=configs.precision(anchors.dtype), ACC=tl_dtype(self.acc),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        sums = configs.row_sums()
        row_sums_kernel[(padded // sums.block_m,)](
            self.row_sums, self.row_max, self.total_max, neg_lse, inv_neg_sum, n, self.tiles, padded, self.shift,
            BLOCK_R=sums.block_m, BLOCK_T=sums.block_n, ONLINE=self.online, ACC=tl_dtype(self.acc),
            num_warps=sums.warps,
        )  # fmt: skip
        if self.stored and self.online:
            self._scale_rows(padded, None)

    def scale_rows(self, padded: int, factor: Tensor) -> None:
        """E_ij *= factor_i, in place. factor: (padded,)."""
        self._scale_rows(padded, factor)

    def _scale_rows(self, padded: int, factor: Tensor | None) -> None:
        block = self.configs.row_sums().block_m
        scale_rows_kernel[(padded // block, self.tiles)](
            self.e, self.row_max, self.total_max, factor, padded, self.e.shape[1],
            BLOCK_M=block, BLOCK_N=self.launch.block_n, ONLINE=factor is None, ACC=tl_dtype(self.acc), num_warps=4,
        )  # fmt: skip


class TwoProductContrast:
    """As `kernels.Contrast`: E of a chunk by the first product, sum_j e_ij K_j by the second."""

    def __init__(self, args: ContrastArgs, configs: Configs):
        self._args, self._configs = args, configs
        anchors, candidates = args.anchors.rows, args.candidates.rows
        dtype, acc, device = anchors.dtype, args.anchors.inv_norm.dtype, anchors.device
        padded_m, pitch = candidates.shape
        self._step = configs.chunk_rows(anchors.shape[0], padded_m * dtype.itemsize)
        self._neg_lse = torch.empty_like(args.anchors.inv_norm)
        self._inv_neg_sum = torch.empty_like(args.anchors.inv_norm)
        self._chunk = self._make_chunk()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=acc, device=device)

        self._candidate_product = zeros(padded_m, pitch) if args.candidate_grad else None
        self._reverse_product = zeros(padded_m, pitch) if args.candidate_grad and args.reverse else None
        self._reverse_neg_sum = zeros(padded_m) if args.reverse else None

    def chunks(self) -> Iterator[NegativeSums]:
        args, step, n = self._args, self._step, self._args.anchors.n
        if not self._chunk.stored:
            for rows in slices(n, step):
                self._similarity(rows)
            yield NegativeSums(rows=slice(0, n), neg_lse=self._neg_lse, inv_neg_sum=self._inv_neg_sum, product=None)
            return
        candidates = args.candidates.rows
        shape = step if args.anchor_grad else 0, candidates.shape[1]
        products = torch.empty(shape, dtype=self._neg_lse.dtype, device=candidates.device)
        for rows in slices(n, step):
            padded = self._similarity(rows)
            sums = None
            if args.anchor_grad:
                product(self._chunk.e[:padded], candidates, products[:padded], self._configs)
                sums = products[: rows.stop - rows.start]
            yield NegativeSums(
                rows=rows, neg_lse=self._neg_lse[rows], inv_neg_sum=self._inv_neg_sum[rows], product=sums
            )

    def add_candidates(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        total = self._candidate_product
        assert total is not None
        rows = chunk.rows
        n = rows.stop - rows.start
        padded = round_up(n, ROWS)
        anchors, e = self._args.anchors.rows[rows.start : rows.start + padded], self._chunk.e[:padded]
        factor = torch.zeros(padded, dtype=total.dtype, device=total.device)
        if anchors.dtype != torch.float16:
            torch.mul(coefficients.partner, chunk.inv_neg_sum, out=factor[:n])
            scaled = (anchors * factor[:, None]).to(anchors.dtype)
            product(e.T, scaled, total, self._configs, accumulate=True)
            return
        # fp16 does not hold the coefficients, but it holds probabilities with headroom where the largest coefficient
        # is 1.
        peak = coefficients.partner.abs().amax()
        torch.mul(coefficients.partner / torch.where(peak == 0, 1.0, peak), 2.0**HEADROOM, out=factor[:n])
        factor[:n] *= chunk.inv_neg_sum
        self._chunk.scale_rows(padded, factor)
        sums = torch.empty_like(total)
        product(e.T, anchors, sums, self._configs)
        total.addcmul_(sums, 2.0**-HEADROOM * peak)

    def sums(self) -> ContrastSums:
        m = self._args.candidates.n
        reverse = None
        if self._reverse_neg_sum is not None:
            neg_sum = self._reverse_neg_sum[:m]
            reverse = NegativeSums(
                rows=slice(0, m),
                neg_lse=neg_sum.log() + self._chunk.shift / LOG2E,
                inv_neg_sum=torch.where(neg_sum == 0, 0.0, 1 / neg_sum),
                product=None if self._reverse_product is None else self._reverse_product[:m],
            )
        total = self._candidate_product
        return ContrastSums(candidate_product=None if total is None else total[:m], reverse=reverse)

    def _similarity(self, rows: slice) -> int:
        """E and the sums of a chunk, and the chunk's part of the reverse direction's sums; returns the padded rows."""
        padded = round_up(rows.stop - rows.start, ROWS)
        self._chunk.similarity(rows, padded, self._neg_lse[rows], self._inv_neg_sum[rows])
        if self._reverse_product is not None:
            anchors = self._args.anchors.rows[rows.start : rows.start + padded]
            product(self._chunk.e[:padded].T, anchors, self._reverse_product, self._configs, accumulate=True)
        if self._reverse_neg_sum is not None:
            self._reverse_neg_sum += self._chunk.column_sums[: padded // self._chunk.launch.block_m].sum(0)
        return padded

    def _make_chunk(self) -> _Chunk:
        args, configs = self._args, self._configs
        operands = args.anchors.rows

        def trial(launch: Launch) -> None:
            first = slice(0, min(self._step, args.anchors.n))
            chunk = _Chunk(args, self._step, launch, configs)
            chunk.similarity(first, round_up(first.stop, ROWS), self._neg_lse[first], self._inv_neg_sum[first])

        stored = args.anchor_grad or args.candidate_grad
        kind = operands.device, operands.dtype, configs.precision(operands.dtype), operands.shape[1]
        key = "similarity", *kind, args.mask is None, stored, args.reverse
        launch, tuning = configs.product(operands.dtype), configs.tuning
        if tuning.product_stages is None:
            launch = autotune.choose(tuning, key, launch, tuning.product_alternatives, trial)
        return _Chunk(args, self._step, launch, configs)
