"""The two-product path, for long rows: the exponentials E of a chunk of anchors by one product, and by a second their
product with the candidates, or of their transpose with the anchors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import ContrastArgs, ContrastSums, GradCoefficients, NegativeSums, slices
from .. import gemm
from . import hopper, tuning
from .launcher import LOG2E, Launcher
from .tuning import CudaTuning

FP16_PEAK = 1024.0  # the largest weighted probability, or coefficient of an anchor, becomes this in fp16


@dataclass(slots=True, kw_only=True)
class _TileSums:
    """The sums of product 1 by tile."""

    rows: Tensor  # (tiles of columns, padded rows)
    maxima: Tensor | None  # the same shape; None with a fixed shift
    columns: Tensor | None  # (tiles of rows, columns), for the reverse direction
    tile: int  # rows of a tile


@dataclass(slots=True, kw_only=True)
class TileSums:
    """Sums of some anchors that are not yet reduced."""

    rows: slice
    sums: Tensor  # (tiles, >= rows)
    products: Tensor  # (splits, >= rows, pitch)


class TwoProductContrast:
    """A contrast by chunks of anchors, of which one E (rows, m) is held at a time."""

    def __init__(self, launch: Launcher, tuning: CudaTuning, args: ContrastArgs):
        self.launch, self.tuning, self.args = launch, tuning, args
        operand, m = args.anchors.rows, args.candidates.n
        self.dtype, self.pitch = operand.dtype, operand.shape[1]
        self.columns = launch.padded_rows(m)  # of E
        # In fp16 a fixed shift leaves the anchors weighted by their coefficients no range.
        self.fixed = args.has_fixed_shift() and not (args.candidate_grad and self.dtype == torch.float16)
        self.shift = launch.fixed_shift(self.dtype, args.temperature)
        self._exponentials: Tensor | None = None  # (padded rows of the chunk, columns), operand dtype
        grad = args.candidate_grad
        self._candidate_product = launch.empty(self.columns, self.pitch) if grad else None
        self._reverse_product = launch.empty(self.columns, self.pitch) if grad and args.reverse else None
        self._reverse: NegativeSums | None = None
        self._reverse_total = launch.empty(m) if args.reverse else None
        if args.reverse:
            product = None if self._reverse_product is None else self._reverse_product[:m]
            self._reverse = NegativeSums(
                rows=slice(0, m), neg_lse=launch.empty(m), inv_neg_sum=launch.empty(m), product=product
            )

    def tile_chunks(self) -> Iterator[TileSums]:
        """The sums of the tiles, with a fixed shift, for `anchor_pass`."""
        for rows, padded in self._row_chunks():
            sums = self._similarities(rows, padded)
            product = self.launch.empty(padded, self.pitch)
            self._product(self.args.candidates.rows, product, transposed=False, accumulate=False)
            yield TileSums(rows=rows, sums=sums.rows, products=product[None])

    def _row_chunks(self) -> Iterator[tuple[slice, int]]:
        """The rows of each chunk, and their number with padding; E has the room for them."""
        args, launch = self.args, self.launch
        itemsize, multiple = args.anchors.rows.itemsize, launch.constants["row_padding"]
        step = tuning.chunk_rows(self.tuning, args.anchors.n, self.columns, self.pitch, itemsize, multiple)
        needs_exponentials = args.anchor_grad or args.candidate_grad
        buffer = args.anchors.rows.new_empty(step, self.columns) if needs_exponentials else None
        for rows in slices(args.anchors.n, step):
            padded = launch.padded_rows(rows.stop - rows.start)
            self._exponentials = None if buffer is None else buffer[:padded]
            yield rows, padded

    def chunks(self) -> Iterator[NegativeSums]:
        args, launch = self.args, self.launch
        n = args.anchors.n
        neg_lse, inv_neg_sum = launch.empty(n), launch.empty(n)
        for rows, padded in self._row_chunks():
            sums = self._similarities(rows, padded)
            row_maxima = None if self.fixed else launch.empty(rows.stop - rows.start)
            reduce_tiles(
                launch, sums.rows, neg_lse[rows], inv_neg_sum[rows], shift=self.shift, tile_maxima=sums.maxima,
                row_maxima=row_maxima,
            )  # fmt: skip
            if sums.maxima is not None and self._exponentials is not None:
                launch(
                    "rescale",
                    exponentials=self._exponentials, tile_maxima=sums.maxima, row_maxima=row_maxima,
                    rows=rows.stop - rows.start, padded_rows=padded, exp_pitch=self.columns, tile=sums.tile,
                    precision=launch.precision(self.dtype),
                )  # fmt: skip
            self._add_reverse(rows, padded, sums)
            yield NegativeSums(
                rows=rows,
                neg_lse=neg_lse[rows],
                inv_neg_sum=inv_neg_sum[rows],
                product=self._product_with_candidates(rows, padded) if args.anchor_grad else None,
            )

    def add_candidates(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        assert self._candidate_product is not None
        padded = self.launch.padded_rows(chunk.rows.stop - chunk.rows.start)
        # partner_i p_ij A_i = exp(a_ij) (product_i A_i)
        factor, alpha = coefficients.product, None
        if self.dtype == torch.float16:
            # Coefficients of 1 / (n m) are below fp16's range: they are taken relative to the chunk's largest.
            alpha = factor.abs().amax().clamp(min=1e-30) / FP16_PEAK
            factor = factor / alpha
        anchors = self.args.anchors.rows[chunk.rows.start : chunk.rows.start + padded]
        weighted = torch.empty_like(anchors)
        self.launch(
            "scale_rows",
            x=anchors, out=weighted, factor=factor, rows=factor.shape[0], padded_rows=padded, pitch=self.pitch,
            precision=self.launch.precision(self.dtype),
        )  # fmt: skip
        self._product(weighted, self._candidate_product, transposed=True, accumulate=chunk.rows.start > 0, alpha=alpha)

    def sums(self) -> ContrastSums:
        product = self._candidate_product
        return ContrastSums(
            candidate_product=None if product is None else product[: self.args.candidates.n], reverse=self._reverse
        )

    def _similarities(self, rows: slice, padded: int) -> _TileSums:
        """Product 1 for the anchors `rows`: their exponentials and sums."""
        args, launch = self.args, self.launch
        count, constants = rows.stop - rows.start, launch.constants
        kernel, splits = "similarity", 1
        choice: dict[str, int] = {}
        if self._takes_hopper(count):
            kernel = "hopper_similarity"
            tile_rows, tile_columns = constants["hopper_similarity_rows"], constants["hopper_similarity_columns"]
            choice["skew"], choice["cluster"] = self.tuning.hopper_skew, self.tuning.hopper_cluster
        else:
            tile_rows, splits = tuning.similarity_tile(self.tuning, constants, padded, self.columns, self.pitch)
            tile_columns = choice["tile"] = tile_rows
        sums = launch.empty(-(-self.columns // tile_columns), padded)
        maxima = None if self.fixed else torch.empty_like(sums)
        column_sums = launch.empty(padded // tile_rows, self.columns) if args.reverse else None
        anchor_keys, candidate_keys = (None, None) if args.mask is None else (args.mask[0][rows], args.mask[1])
        launch(
            kernel,
            anchors=args.anchors.rows[rows.start : rows.start + padded], candidates=args.candidates.rows,
            exponentials=self._exponentials, row_sums=sums, row_maxima=maxima, column_sums=column_sums,
            split_products=launch.empty(splits, padded, self.columns) if splits > 1 else None, splits=splits,
            anchor_keys=anchor_keys, candidate_keys=candidate_keys, rows=count, m=args.candidates.n, pitch=self.pitch,
            exp_pitch=self.columns, padded_rows=padded, offset=rows.start + args.offset,
            scale_log2=LOG2E / args.temperature, shift=self.shift, precision=launch.precision(self.dtype), **choice,
        )  # fmt: skip
        return _TileSums(rows=sums, maxima=maxima, columns=column_sums, tile=tile_rows)

    def _takes_hopper(self, count: int) -> bool:
        launch = self.launch
        return (
            self.tuning.hopper
            and self.fixed
            and not self.args.reverse
            and self.args.mask is None
            and tuning.takes_hopper_similarity(self.tuning, launch.constants, count, self.columns)
            and hopper.unsupported_reason(launch.module, launch.device, self.dtype) is None
        )

    def _product_with_candidates(self, rows: slice, padded: int) -> Tensor:
        """sum_j exp(a_ij) K_j over the negatives: (rows, pitch)."""
        product = self.launch.empty(padded, self.pitch)
        self._product(self.args.candidates.rows, product, transposed=False, accumulate=False)
        return product[: rows.stop - rows.start]

    def _add_reverse(self, rows: slice, padded: int, sums: _TileSums) -> None:
        """Add a chunk to the sums with the candidates as anchors."""
        if self._reverse is None:
            return
        assert sums.columns is not None
        accumulate = rows.start > 0
        reduce_tiles(
            self.launch, sums.columns, self._reverse.neg_lse, self._reverse.inv_neg_sum, shift=self.shift,
            total=self._reverse_total, accumulate=accumulate,
        )  # fmt: skip
        if self._reverse_product is not None:
            anchors = self.args.anchors.rows[rows.start : rows.start + padded]
            self._product(anchors, self._reverse_product, transposed=True, accumulate=accumulate)

    def _product(
        self, operand: Tensor, out: Tensor, *, transposed: bool, accumulate: bool, alpha: Tensor | None = None
    ) -> None:
        """out (+)= alpha E operand, or alpha E^T operand."""
        e, launch = self._exponentials, self.launch
        assert e is not None
        left = e.T if transposed else e
        rows, contraction = left.shape
        # Only the portable kernel has a factor.
        if (
            alpha is None
            and tuning.takes_library_product(self.tuning, self.dtype, launch.device)
            and gemm.has_gemm(self.dtype, torch.float32)
        ):
            launch.gemm(left, operand[:contraction], out, accumulate)
            return
        launch(
            "product",
            exponentials=e, operand=operand, out=out, alpha=alpha, rows=rows, contraction=contraction,
            exp_pitch=self.columns, pitch=self.pitch, transposed=transposed, accumulate=accumulate,
            precision=launch.precision(self.dtype),
            tile=tuning.product_tile(self.tuning, launch.constants, rows, self.pitch),
        )  # fmt: skip


def reduce_tiles(
    launch: Launcher,
    tile_sums: Tensor,
    neg_lse: Tensor,
    inv_neg_sum: Tensor,
    *,
    shift: float,
    tile_maxima: Tensor | None = None,
    row_maxima: Tensor | None = None,
    **running: Any,
) -> None:
    """Sums by tile (tiles, pitch) into neg_lse and inv_neg_sum (rows,).

    tile_maxima, row_maxima: the shifts of tiles and, to be written, of rows, without a fixed shift. running: ``total``
    (rows,), a sum over chunks, and ``accumulate``, False for the first chunk.
    """
    launch(
        "row_sums",
        tile_sums=tile_sums, tile_maxima=tile_maxima, row_maxima=row_maxima, neg_lse=neg_lse, inv_neg_sum=inv_neg_sum,
        rows=neg_lse.shape[0], pitch=tile_sums.shape[1], tiles=tile_sums.shape[0], shift=shift,
        **{"total": None, "accumulate": False, **running},
    )  # fmt: skip
