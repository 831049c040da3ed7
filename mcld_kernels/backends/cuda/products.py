"""The two-product path, for long rows: E = exp(similarities) of a chunk of anchors by one product, its sum with the
candidates (or of its columns with the anchors) by a second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import blocked, library
from ..pipeline import Contrast, Negatives, Problem
from . import configs, hopper
from .common import FP16_GAIN, LOG2E, ROWS, Launcher, fixed_shift, floats, has_fixed_shift, padded_rows, precision_of


class _Sums(NamedTuple):
    """What product 1 leaves beside E, by tile; None for what was not asked for."""

    rows: Tensor  # (tiles of columns, padded rows)
    maxima: Tensor | None  # the same
    columns: Tensor | None  # (tiles of rows, columns)
    tile: int  # rows of a tile


def contrast(launch: Launcher, problem: Problem, on_hopper: bool, by_library: bool) -> Contrast:
    """As `pipeline.Kernels.contrast`. on_hopper, by_library: take the Hopper kernel, torch.mm, where they can."""
    a, k, temperature, _, _, factors, sink, candidate, reverse = problem
    dtype, pitch = a.matrix.dtype, a.matrix.shape[1]
    columns = padded_rows(k.n)  # of E
    fixed = has_fixed_shift(dtype, temperature) and not (candidate and dtype == torch.float16)
    shift = fixed_shift(dtype, temperature)
    by_library = by_library and library.has_product(dtype, torch.float32)
    step = blocked.chunk_bytes(a.matrix.device) // (columns * a.matrix.itemsize)
    step = max(ROWS, min(step // ROWS * ROWS, padded_rows(a.n)))
    e = a.matrix.new_empty(step, columns) if sink is not None or candidate else None
    log_off, scales = floats(a.matrix, a.n), floats(a.matrix, a.n)
    by_candidate = floats(a.matrix, columns, pitch) if candidate else None
    reversed_product = floats(a.matrix, columns, pitch) if reverse and candidate else None
    reverse_off, reverse_log, reverse_scale = (floats(a.matrix, k.n) if reverse else None for _ in range(3))
    for start in range(0, a.n, step):
        rows = slice(start, min(start + step, a.n))
        count, padded = rows.stop - start, padded_rows(rows.stop - start)
        anchors = a.matrix[start : start + padded]
        chunk = None if e is None else e[:padded]
        sums = _similarities(launch, problem, rows, chunk, fixed, on_hopper)
        scale = scales[rows]
        row_maxima = None if fixed else floats(sums.rows, count)
        statistics(launch, sums.rows, sums.maxima, row_maxima, log_off[rows], scale, shift)
        if reverse_off is not None:
            assert sums.columns is not None and reverse_log is not None and reverse_scale is not None
            add = start > 0
            statistics(launch, sums.columns, None, None, reverse_log, reverse_scale, shift, reverse_off, add)
        if chunk is None:
            continue
        if sums.maxima is not None:
            launch(
                "rescale",
                e=chunk, maxima=sums.maxima, row_maxima=row_maxima, rows=count, padded_rows=padded, pitch_e=columns,
                tile=sums.tile, precision=precision_of(dtype),
            )  # fmt: skip
        if sink is not None:
            product = floats(sums.rows, padded, pitch)
            _product(launch, chunk, k.matrix, product, transposed=False, add=False, by_library=by_library)
            sink(Negatives(rows, log_off[rows], product[:count], scale))
        if by_candidate is not None:
            weighted, alpha = _weighted(launch, anchors, factors(rows, log_off[rows], scale).s * temperature)
            # Only the own kernel takes a factor.
            _product(
                launch, chunk, weighted, by_candidate, transposed=True, add=start > 0, alpha=alpha,
                by_library=by_library and alpha is None,
            )  # fmt: skip
        if reversed_product is not None:
            _product(launch, chunk, anchors, reversed_product, transposed=True, add=start > 0, by_library=by_library)
    if by_candidate is not None:
        by_candidate = by_candidate[: k.n]
    if reverse_log is None or reverse_scale is None:
        return Contrast(log_off, scales, by_candidate)
    back = reverse_log[:0] if reversed_product is None else reversed_product[: k.n]
    return Contrast(log_off, scales, by_candidate, Negatives(slice(0, k.n), reverse_log, back, reverse_scale))


def _similarities(
    launch: Launcher, problem: Problem, rows: slice, e: Tensor | None, fixed: bool, on_hopper: bool
) -> _Sums:
    """Product 1 for the anchors `rows`: E (padded rows, columns) if given, and its sums."""
    a, k, temperature, offset, same = problem[:5]
    dtype, pitch = a.matrix.dtype, a.matrix.shape[1]
    count, padded, columns = rows.stop - rows.start, padded_rows(rows.stop - rows.start), padded_rows(k.n)
    name, extra = "similarity", dict[str, Any]()
    tile_rows = tile_columns = splits = 1
    simple = fixed and not problem.reverse and same is None
    if on_hopper and simple and hopper.takes_similarity(count, columns):
        if hopper.refused(launch.module, launch.device, dtype) is None:
            name, tile_rows, tile_columns = "hopper_similarity", hopper.SIMILARITY_ROWS, hopper.SIMILARITY_COLUMNS
    if name == "similarity":
        tile_rows, splits = configs.similarity_tile(padded, columns, pitch)
        tile_columns = extra["tile"] = tile_rows
    sums = floats(a.matrix, -(-columns // tile_columns), padded)
    maxima = None if fixed else torch.empty_like(sums)
    column_sums = floats(sums, padded // tile_rows, columns) if problem.reverse else None
    launch(
        name,
        a=a.matrix[rows.start : rows.start + padded], k=k.matrix, e=e, row_sums=sums, row_maxima=maxima,
        column_sums=column_sums, parts=floats(sums, splits, padded, columns) if splits > 1 else None, splits=splits,
        same_a=None if same is None else same[0][rows], same_k=None if same is None else same[1], rows=count, m=k.n,
        pitch=pitch, pitch_e=columns, padded_rows=padded, diagonal=rows.start + offset, scale=LOG2E / temperature,
        shift=fixed_shift(dtype, temperature), precision=precision_of(dtype), **extra,
    )  # fmt: skip
    return _Sums(sums, maxima, column_sums, tile_rows)


def _weighted(launch: Launcher, a: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """factor_i A_i in the operand dtype and, for fp16, what the products of it are to be multiplied by."""
    alpha = None
    if a.dtype == torch.float16:
        # Factors of 1 / (n m) are below fp16's range: there they are relative to the chunk's largest.
        alpha = factor.amax().clamp(min=1e-30) / FP16_GAIN
        factor = factor / alpha
    weighted = torch.empty_like(a)
    launch(
        "scale_rows",
        a=a, out=weighted, factor=factor, rows=factor.shape[0], padded_rows=a.shape[0], pitch=a.shape[1],
        precision=precision_of(a.dtype),
    )  # fmt: skip
    return weighted, alpha


def _product(
    launch: Launcher,
    e: Tensor,
    k: Tensor,
    out: Tensor,
    *,
    transposed: bool,
    add: bool,
    by_library: bool,
    alpha: Tensor | None = None,
) -> None:
    """out (+)= alpha E K, or alpha E^T K: e (rows, columns), k (columns or rows, pitch), all sizes padded."""
    left = e.T if transposed else e
    rows, contraction = left.shape
    if by_library:
        library.product(left, k[:contraction], out, add)
        return
    launch(
        "product",
        e=e, k=k, out=out, alpha=alpha, rows=rows, contraction=contraction, pitch_e=e.shape[1], pitch=k.shape[1],
        transposed=transposed, add=add, precision=precision_of(e.dtype), tile=configs.tile(rows, k.shape[1]),
    )  # fmt: skip


def statistics(
    launch: Launcher,
    sums: Tensor,
    maxima: Tensor | None,
    row_maxima: Tensor | None,
    log_off: Tensor,
    scale: Tensor,
    shift: float,
    total: Tensor | None = None,
    add: bool = False,
) -> None:
    """Sums by tile (tiles, pitch) into log_off and scale = 1 / sum (rows,); total: running sums over chunks."""
    launch(
        "statistics",
        sums=sums, maxima=maxima, row_maxima=row_maxima, total=total, log_off=log_off, scale=scale,
        rows=log_off.shape[0], pitch=sums.shape[1], tiles=sums.shape[0], add=add, shift=shift,
    )  # fmt: skip
