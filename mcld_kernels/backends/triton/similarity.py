"""Contrast for long rows in chunks of anchors: two products, with the exponentials E of a chunk in between.

Fused into the first product: temperature, shift, masks, exponential, cast, and the sums of each tile's rows and, for
both directions at once, columns. Similarities are never written; E is, in the operand dtype, for one chunk at a time.
Sums of tiles go to a workspace and are added in a fixed order. With an online maximum a tile is shifted by its own
maximum, and E is brought to the rows' maxima in place before the second product.

Where tiles are few and rows are very long (the category-wise term) the first product is split over the depth, and the
cosines, then no larger than the inputs, are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pipeline import Contrast, Negatives, Problem, Unit
from . import configs, tuning
from .common import (
    HEADROOM,
    LN2,
    LOG2E,
    ROWS,
    Negated,
    dot_precision,
    fixed_maximum,
    headroom,
    round_up,
    rounded,
    tl_dtype,
)
from .matmul import product, split_product, tile_of


@triton.jit(do_not_specialize=["n", "m", "offset", "splits"])
def exponentials_kernel(
    a,  # (padded n, depth) anchors of the chunk
    k,  # (padded m, depth)
    e,  # (padded n, padded m)
    row_sums,  # (column tiles, padded n)
    maxima,  # (column tiles, padded n), in base 2
    column_sums,  # (row tiles, padded m)
    a_labels,  # (n,) int64
    k_labels,  # (m,) int64
    cosines,  # (splits, padded n, padded m) if GIVEN: their sum replaces the product
    n,  # anchors of the chunk
    m,
    offset,
    padded_n,
    padded_m,
    depth,
    splits,
    scale,  # log2(e) / temperature
    shift,  # subtracted from a similarity in base 2; plus the tile's maximum if ONLINE
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
    STORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAT: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), padded_n // BLOCK_M, padded_m // BLOCK_N, GROUP)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    t = tl.zeros((BLOCK_M, BLOCK_N), STAT)
    if GIVEN:
        place = rows.to(tl.int64)[:, None] * padded_m + columns[None, :]
        for split in range(splits):
            t += tl.load(cosines + tl.cast(split, tl.int64) * padded_n * padded_m + place)
    else:
        inner = tl.arange(0, BLOCK_K)
        a_tiles = a + first_row.to(tl.int64) * depth + tl.arange(0, BLOCK_M)[:, None] * depth + inner[None, :]
        k_tiles = k + first_column.to(tl.int64) * depth + tl.arange(0, BLOCK_N)[None, :] * depth + inner[:, None]
        for start in range(0, depth, BLOCK_K):
            a_tile, k_tile = tl.load(a_tiles + start), tl.load(k_tiles + start)
            t = tl.dot(a_tile, k_tile, t, input_precision=PRECISION, out_dtype=STAT)
    t = t * scale

    # Only tiles that hold a positive or reach past the end need masks.
    gap = first_column - first_row - offset
    dirty = (first_column + BLOCK_N > m) | (first_row + BLOCK_M > n) | ((gap > -BLOCK_N) & (gap < BLOCK_M))
    if LABELS:
        a_label = tl.load(a_labels + rows, mask=rows < n, other=0).to(tl.int32)  # half the registers
        k_label = tl.load(k_labels + columns, mask=columns < m, other=0).to(tl.int32)
        t = tl.where(a_label[:, None] == k_label[None, :], -float("inf"), t)
    if dirty:
        keep = (columns < m)[None, :] & (rows < n)[:, None] & (columns[None, :] != (rows + offset)[:, None])
        t = tl.where(keep, t, -float("inf"))
    sums = column_tile.to(tl.int64) * padded_n + rows
    if ONLINE:
        top = tl.max(t, 1)
        safe = tl.where(top == -float("inf"), 0.0, top)
        tl.store(maxima + sums, safe)
        t = tl.exp2(t - (safe + shift)[:, None])
    else:
        t = tl.exp2(t - shift)
    tl.store(row_sums + sums, tl.sum(t, 1))
    if COLUMNS:
        tl.store(column_sums + row_tile.to(tl.int64) * padded_m + columns, tl.sum(t, 0))
    if STORE:
        tl.store(
            e + rows.to(tl.int64)[:, None] * padded_m + columns[None, :], rounded(t, e.dtype.element_ty, PRECISION)
        )


@triton.jit(do_not_specialize=["n", "tiles"])
def row_sums_kernel(
    row_sums,  # (tiles, padded n)
    maxima,  # (tiles, padded n)
    top,  # (padded n,)
    log_off,  # (n,)
    inverse_off,  # (n,)
    n,
    tiles,
    padded_n,
    shift,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ONLINE: tl.constexpr,
    STAT: tl.constexpr,
):
    """Add the tiles' sums of each row; ONLINE: relative to the row's maximum, which is kept in `top`."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_R), STAT)
    highest = tl.full((BLOCK_R,), -float("inf"), STAT)
    if ONLINE:
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            place = tile.to(tl.int64)[:, None] * padded_n + rows[None, :]
            inside = (tile < tiles)[:, None]
            # A tile without a negative has sum 0; its maximum says nothing.
            counts = tl.load(row_sums + place, mask=inside, other=0.0) != 0.0
            maximum = tl.load(maxima + place, mask=inside, other=-float("inf"))
            highest = tl.maximum(highest, tl.max(tl.where(counts, maximum, -float("inf")), 0))
        highest = tl.where(highest == -float("inf"), 0.0, highest)
        tl.store(top + rows, highest)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        place = tile.to(tl.int64)[:, None] * padded_n + rows[None, :]
        inside = (tile < tiles)[:, None]
        part = tl.load(row_sums + place, mask=inside, other=0.0)
        if ONLINE:
            maximum = tl.load(maxima + place, mask=inside & (part != 0.0), other=-float("inf"))
            part = part * tl.exp2(maximum - highest[None, :])
        total += part
    off = tl.sum(total, 0)
    if ONLINE:
        tl.store(log_off + rows, (tl.log2(off) + (highest + shift)) * LN2, mask=rows < n)
    else:
        tl.store(log_off + rows, (tl.log2(off) + shift) * LN2, mask=rows < n)
    tl.store(inverse_off + rows, tl.where(off == 0.0, 0.0, 1.0 / off), mask=rows < n)


@triton.jit
def scale_kernel(
    e,  # (padded n, padded m), changed in place
    maxima,  # (column tiles, padded n)
    top,  # (padded n,)
    factor,  # (padded n,)
    padded_n,
    padded_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONLINE: tl.constexpr,
    STAT: tl.constexpr,
):
    """Multiply row i of E by factor_i or, ONLINE, bring every tile of it from its own maximum to the row's."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    if ONLINE:
        by = tl.exp2(tl.load(maxima + tile.to(tl.int64) * padded_n + rows) - tl.load(top + rows))
        by = tl.minimum(by, 1.0)  # a tile without a negative holds zeros and any maximum
    else:
        by = tl.load(factor + rows)
    place = e + rows.to(tl.int64)[:, None] * padded_m + (tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    tl.store(place, (tl.load(place).to(STAT) * by[:, None]).to(e.dtype.element_ty))


class _Chunk:
    """The workspace of a chunk: exponentials, sums of tiles and, for an online maximum, maxima of tiles and rows."""

    def __init__(
        self, rows: int, a: Unit, k: Unit, what: Negated, *, store: bool, columns: bool, launch: configs.Launch
    ):
        self.a, self.k, self.what, self.store, self.columns = a, k, what, store, columns
        dtype, self.stat = a.matrix.dtype, a.inverse.dtype
        self.online = not fixed_maximum(dtype, what.temperature)
        self.scale = LOG2E / what.temperature
        self.shift = (0.0 if self.online else self.scale) - headroom(dtype)
        self.precision = dot_precision(dtype)
        device = a.matrix.device
        self.launch = launch
        padded_m = k.matrix.shape[0]
        self.tiles = padded_m // self.launch.block_n
        empty = torch.empty
        self.e = empty(rows if store else 0, padded_m, dtype=dtype, device=device)
        self.row_sums = empty(self.tiles * rows, dtype=self.stat, device=device)
        self.maxima = empty(self.tiles * rows if self.online else 0, dtype=self.stat, device=device)
        self.top = empty(rows if self.online else 0, dtype=self.stat, device=device)
        self.column_sums = empty(
            rows // self.launch.block_m if columns else 0, padded_m, dtype=self.stat, device=device
        )

    def run(self, rows: slice, padded: int, log_off: Tensor, inverse_off: Tensor) -> None:
        """Exponentials of the chunk, and the sums of its rows into log_off, inverse_off (rows,)."""
        launch, padded_m = self.launch, self.k.matrix.shape[0]
        n = rows.stop - rows.start
        labels = (None, None) if self.what.same is None else (self.what.same[0][rows], self.what.same[1])
        anchors = self.a.matrix[rows.start : rows.start + padded]
        tiles, depth = padded // launch.block_m * self.tiles, anchors.shape[1]
        splits = configs.splits(tiles, depth)
        given = split_product(anchors, self.k.matrix.T, self.stat, launch, splits) if splits > 1 else None
        exponentials_kernel[(tiles,)](
            anchors, self.k.matrix, self.e, self.row_sums, self.maxima, self.column_sums, *labels, given,
            n, self.k.n, rows.start + self.what.offset, padded, padded_m, depth,
            0 if given is None else given.shape[0], self.scale, self.shift,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP=8, GIVEN=given is not None,
            LABELS=self.what.same is not None, ONLINE=self.online, STORE=self.store, COLUMNS=self.columns,
            PRECISION=self.precision, STAT=tl_dtype(self.stat), num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        sums = configs.sums(log_off.device)
        row_sums_kernel[(padded // sums.block_m,)](
            self.row_sums, self.maxima, self.top, log_off, inverse_off, n, self.tiles, padded, self.shift,
            BLOCK_R=sums.block_m, BLOCK_T=sums.block_n, ONLINE=self.online, STAT=tl_dtype(self.stat),
            num_warps=sums.warps,
        )  # fmt: skip
        if self.store and self.online:
            self._scale(padded, None)

    def scale_rows(self, padded: int, factor: Tensor) -> None:
        """E_ij *= factor_i, in place. factor: (padded,)."""
        self._scale(padded, factor)

    def _scale(self, padded: int, factor: Tensor | None) -> None:
        block = configs.sums(self.e.device).block_m
        scale_kernel[(padded // block, self.tiles)](
            self.e, self.maxima, self.top, factor, padded, self.k.matrix.shape[0],
            BLOCK_M=block, BLOCK_N=self.launch.block_n, ONLINE=factor is None, STAT=tl_dtype(self.stat), num_warps=4,
        )  # fmt: skip


def contrast(problem: Problem, *, budget: int, by_library: bool) -> Contrast:
    """As `pipeline.Kernels.contrast`. budget: bytes of a chunk's exponentials; by_library: torch.mm takes product 2."""
    a, k, temperature, offset, same, factors, sink, candidate, reverse = problem
    what = Negated(temperature, offset, same)
    dtype, stat, device = a.matrix.dtype, a.inverse.dtype, a.matrix.device
    padded_m, depth = k.matrix.shape
    store = sink is not None or candidate
    step = configs.chunk_rows(a.matrix.shape[0], padded_m * dtype.itemsize, budget, ROWS)
    log_off, inverse_off = torch.empty_like(a.inverse), torch.empty_like(a.inverse)

    def workspace(launch: configs.Launch) -> _Chunk:
        return _Chunk(step, a, k, what, store=store, columns=reverse, launch=launch)

    def trial(launch: configs.Launch) -> None:
        first = slice(0, min(step, a.n))
        workspace(launch).run(first, round_up(first.stop, ROWS), log_off[first], inverse_off[first])

    precision = dot_precision(dtype)
    key = "exponentials", device, dtype, precision, depth, what.same is None, store, reverse
    default = configs.product(device, dtype, precision)
    chunk = workspace(tuning.choose(key, default, configs.PRODUCT_ALTERNATIVES, trial))
    sums = torch.empty(step if sink is not None else 0, depth, dtype=stat, device=device)
    by_candidate = torch.zeros(padded_m, depth, dtype=stat, device=device) if candidate else None
    reverse_product = torch.zeros_like(by_candidate) if by_candidate is not None and reverse else None
    reverse_off = torch.zeros(padded_m, dtype=stat, device=device) if reverse else None
    for start in range(0, a.n, step):
        rows = slice(start, min(start + step, a.n))
        padded = round_up(rows.stop - start, ROWS)
        anchors, e = a.matrix[start : start + padded], chunk.e[:padded]
        chunk.run(rows, padded, log_off[rows], inverse_off[rows])
        if sink is not None:
            product(e, k.matrix, sums[:padded], by_library=by_library)
            sink(Negatives(rows, log_off[rows], sums[: rows.stop - start], inverse_off[rows]))
        if reverse_product is not None:
            product(e.T, anchors, reverse_product, add=True, by_library=by_library)
        if by_candidate is not None:
            part = torch.zeros(padded, dtype=stat, device=device)  # (padded,) weight_i q_i
            part[: rows.stop - start] = factors(rows, log_off[rows], inverse_off[rows]).u * temperature
            _add_candidates(chunk, anchors, part, inverse_off[rows], by_candidate, by_library)
        if reverse_off is not None:
            reverse_off += chunk.column_sums[: padded // chunk.launch.block_m].sum(0)
    if reverse_off is None:
        return Contrast(log_off, inverse_off, None if by_candidate is None else by_candidate[: k.n])
    off = reverse_off[: k.n]
    reverse_log_off = off.log() + chunk.shift / LOG2E
    back = off[:0] if reverse_product is None else reverse_product[: k.n]
    return Contrast(
        log_off,
        inverse_off,
        None if by_candidate is None else by_candidate[: k.n],
        Negatives(slice(0, k.n), reverse_log_off, back, torch.where(off == 0, 0.0, 1 / off)),
    )


def _add_candidates(
    chunk: _Chunk, anchors: Tensor, part: Tensor, inverse_off: Tensor, total: Tensor, by_library: bool
) -> None:
    """total_j += sum_i part_i e_ij / off_i A_i for the chunk's anchors (padded, depth). part: (padded,)."""
    n, padded = inverse_off.shape[0], part.shape[0]
    if anchors.dtype != torch.float16:
        part[:n] *= inverse_off
        product(chunk.e[:padded].T, (anchors * part[:, None]).to(anchors.dtype), total, add=True, by_library=by_library)
        return
    # fp16 does not hold the coefficients, but it holds probabilities with headroom where the largest coefficient is 1.
    peak = part.abs().amax()
    gain = 2.0**-HEADROOM * peak
    part = part / torch.where(peak == 0, 1.0, peak) * 2.0**HEADROOM
    part[:n] *= inverse_off
    chunk.scale_rows(padded, part)
    sums = torch.empty_like(total)
    product(chunk.e[:padded].T, anchors, sums, by_library=by_library)
    total.addcmul_(sums, gain)
