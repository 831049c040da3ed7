"""The flash path, for short rows: similarities, exponentials and their product with the candidates in one kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels import ContrastArgs, ContrastSums, GradCoefficients, NegativeSums, UnitRows
from . import hopper, tuning
from .launcher import LOG2E, Launcher
from .products import FP16_PEAK, TileSums, reduce_tiles
from .tuning import CudaTuning


class FlashContrast:
    """A contrast of one chunk; the gradient by the candidates is a second pass with the sides exchanged."""

    def __init__(self, launch: Launcher, tuning: CudaTuning, args: ContrastArgs):
        self.launch, self.tuning, self.args = launch, tuning, args
        self.dtype = args.anchors.rows.dtype
        self.fixed = args.has_fixed_shift()
        self._row_maxima: Tensor | None = None  # (n,), without a fixed shift
        self._candidate_product: Tensor | None = None

    def tile_chunks(self) -> Iterator[TileSums]:
        """The sums of the splits, with a fixed shift, for `anchor_pass`."""
        args = self.args
        kernel, splits = self._kernel()
        products, sums = self._run(
            kernel, args.anchors, args.candidates, args.offset, args.mask, splits, needs_product=True
        )
        assert products is not None
        yield TileSums(rows=slice(0, args.anchors.n), sums=sums, products=products)

    def chunks(self) -> Iterator[NegativeSums]:
        args, launch, n = self.args, self.launch, self.args.anchors.n
        kernel, splits = self._kernel()
        maxima = None if self.fixed else launch.empty(splits, launch.padded_rows(n))
        products, sums = self._run(
            kernel, args.anchors, args.candidates, args.offset, args.mask, splits, needs_product=args.anchor_grad,
            row_maxima=maxima,
        )  # fmt: skip
        neg_lse, inv_neg_sum = launch.empty(n), launch.empty(n)
        self._row_maxima = None if self.fixed else launch.empty(n)
        reduce_tiles(
            launch, sums, neg_lse, inv_neg_sum, shift=launch.fixed_shift(self.dtype, args.temperature),
            tile_maxima=maxima, row_maxima=self._row_maxima,
        )  # fmt: skip
        product = None if products is None else self._combine(products, n, maxima, self._row_maxima)
        yield NegativeSums(rows=slice(0, n), neg_lse=neg_lse, inv_neg_sum=inv_neg_sum, product=product)

    def add_candidates(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        args, launch = self.args, self.launch
        # partner_i p_ij = product_i exp(a_ij)
        factor, gain = coefficients.product, None
        if self.dtype == torch.float16:
            # The largest partner_i p_ij becomes FP16_PEAK at most; the product is divided again in fp32.
            gain = FP16_PEAK / coefficients.partner.abs().amax().clamp(min=1e-30)
            factor = factor * gain
        mask = None if args.mask is None else (args.mask[1], args.mask[0])
        splits = tuning.flash_splits(self.tuning, launch.constants, args.candidates.n, args.anchors.n)
        products, _ = self._run(
            "flash", args.candidates, args.anchors, -args.offset, mask, splits, needs_product=True,
            candidate_factor=factor, candidate_shift=self._row_maxima,
        )  # fmt: skip
        assert products is not None
        product = self._combine(products, args.candidates.n)
        self._candidate_product = product if gain is None else product.div_(gain)

    def sums(self) -> ContrastSums:
        return ContrastSums(candidate_product=self._candidate_product)

    def _kernel(self) -> tuple[str, int]:
        """The kernel of the first pass, and the parts into which it splits the candidates."""
        args, launch = self.args, self.launch
        n, m, constants = args.anchors.n, args.candidates.n, launch.constants
        if self.tuning.hopper and self.fixed and args.anchor_grad and args.mask is None:
            if hopper.unsupported_reason(launch.module, launch.device, self.dtype) is None:
                pitch = args.anchors.rows.shape[1]
                splits = tuning.hopper_flash_splits(self.tuning, constants, n, m, pitch)
                if splits:
                    return "hopper_flash", splits
        return "flash", tuning.flash_splits(self.tuning, constants, n, m)

    def _run(
        self,
        kernel: str,
        anchors: UnitRows,
        candidates: UnitRows,
        offset: int,
        mask: tuple[Tensor, Tensor] | None,
        splits: int,
        *,
        needs_product: bool,
        row_maxima: Tensor | None = None,
        candidate_factor: Tensor | None = None,
        candidate_shift: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Products (splits, n, d), if needed, and sums (splits, n); n and d padded."""
        launch, temperature = self.launch, self.args.temperature
        pitch, padded = anchors.rows.shape[1], launch.padded_rows(anchors.n)
        products = launch.empty(splits, padded, pitch) if needs_product else None
        sums = launch.empty(splits, padded)
        anchor_keys, candidate_keys = (None, None) if mask is None else mask
        launch(
            kernel,
            anchors=anchors.rows, candidates=candidates.rows, product=products, row_sums=sums, row_maxima=row_maxima,
            candidate_factor=candidate_factor, candidate_shift=candidate_shift, anchor_keys=anchor_keys,
            candidate_keys=candidate_keys, n=anchors.n, m=candidates.n, d=anchors.d, pitch=pitch, padded_rows=padded,
            offset=offset, splits=splits, scale_log2=LOG2E / temperature,
            shift=launch.fixed_shift(self.dtype, temperature), precision=launch.precision(self.dtype),
        )  # fmt: skip
        return products, sums

    def _combine(
        self, products: Tensor, rows: int, split_maxima: Tensor | None = None, row_maxima: Tensor | None = None
    ) -> Tensor:
        """The products of the splits, added in order: (rows, pitch)."""
        splits, padded, pitch = products.shape
        if splits == 1:
            return products[0, :rows]
        product = self.launch.empty(rows, pitch)
        self.launch(
            "combine_splits",
            products=products, split_maxima=split_maxima, row_maxima=row_maxima, out=product, rows=rows,
            padded_rows=padded, pitch=pitch, splits=splits,
        )  # fmt: skip
        return product
