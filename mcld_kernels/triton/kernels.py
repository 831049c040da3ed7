"""`pipeline.Kernels` in Triton."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import blocked
from ..arguments import float32_precision
from ..labels import Labels
from ..pipeline import Contrast, Negatives, Unit
from . import classes, configs, finish, flash, matmul, normalise, similarity
from .common import Negated, dot_precision, fixed_maximum


class TritonKernels:
    """The kernels of this package.

    flash_depth: the deepest padded row that the flash kernel takes, a power of two; None for the table's.
    library: whether torch.mm takes the second product of long rows; None for the table's choice.
    """

    def __init__(self, flash_depth: int | None = None, library: bool | None = None):
        self.flash_depth, self.library = flash_depth, library

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        medium = dtype == torch.float32 and float32_precision() == "medium"
        return torch.bfloat16 if medium else dtype

    def normalise(self, x: Tensor, dtype: torch.dtype, eps: float) -> Unit:
        return normalise.normalise(x, dtype, eps, self._flash_depth(dtype))

    def class_means(self, unit: Unit, labels: Labels, counts: Tensor) -> Tensor:
        return classes.class_means(unit, labels, counts)

    def positives(
        self, a: Unit, k: Unit, offset: int, means: Tensor | None, rank: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return classes.positives(a, k, offset, means, rank)

    def can_reverse(self, dtype: torch.dtype, temperature: float) -> bool:
        return dtype != torch.float16 and fixed_maximum(dtype, temperature)

    def contrast(
        self,
        a: Unit,
        k: Unit,
        *,
        temperature: float,
        offset: int,
        same: tuple[Tensor, Tensor] | None,
        positive: Tensor,
        weight: Tensor | None,
        sink: Callable[[Negatives], None] | None,
        candidate: bool,
        reverse: bool,
    ) -> Contrast:
        what = Negated(temperature, offset, same)
        dtype, device = a.matrix.dtype, a.matrix.device
        if a.matrix.shape[1] > self._flash_depth(dtype):
            library = self.library
            if library is None:
                library = configs.library_product(dtype, dot_precision(dtype), device)
            library = library and matmul.has_library_product(dtype, a.inverse.dtype)
            return similarity.contrast(
                a, k, what, positive=positive, weight=weight, sink=sink, candidate=candidate, reverse=reverse,
                budget=blocked.chunk_bytes(device), library=library,
            )  # fmt: skip
        sums = flash.negatives(a, k, what, sink is not None)
        if sink is not None:
            sink(sums)
        by_candidate = back = None
        if candidate:
            assert weight is not None
            by_candidate = flash.candidate_sums(a, k, what, sums.log_off, positive, weight)
        if reverse:
            swapped = None if same is None else (same[1], same[0])
            back = flash.negatives(k, a, Negated(temperature, -offset, swapped), candidate)
        return Contrast(sums.log_off, by_candidate, back)

    def finish(
        self,
        out: Tensor,
        unit: Unit,
        rows: slice,
        product: Tensor,
        s: Tensor,
        u: Tensor,
        z: Tensor | None,
        partner: Unit,
        shift: int,
        means: Tensor | None,
        rank: Tensor | None,
        accumulate: bool,
    ) -> None:
        finish.finish(out, unit, rows, product, s, u, z, partner, shift, means, rank, accumulate)

    def _flash_depth(self, dtype: torch.dtype) -> int:
        return configs.flash_depth(dtype, dot_precision(dtype)) if self.flash_depth is None else self.flash_depth
