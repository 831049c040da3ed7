"""`pipeline.Kernels` in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import blocked, library
from ..arguments import float32_precision
from ..labels import Labels
from ..pipeline import Anchors, Contrast, Factors, Finish, Problem, Unit
from . import classes, configs, factors, finish, flash, labels, normalise, similarity, totals
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

    def describe(
        self, sides: tuple[Tensor, ...], ignore_index: int, classes: int, dtype: torch.dtype
    ) -> tuple[Labels, ...]:
        return labels.describe(sides, ignore_index, classes, dtype)

    def factors(self, anchors: Anchors, rows: slice, log_off: Tensor, scale: Tensor) -> Factors:
        return factors.factors(anchors, rows, log_off, scale)

    def totals(
        self, values: Tensor, terms: tuple[int, ...], scale: tuple[float, ...], weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return totals.totals(values, terms, scale, weight)

    def class_means(self, unit: Unit, labels: Labels, counts: Tensor) -> Tensor:
        return classes.class_means(unit, labels, counts)

    def positives(
        self, a: Unit, k: Unit, offset: int, means: Tensor | None, rank: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return classes.positives(a, k, offset, means, rank)

    def can_reverse(self, dtype: torch.dtype, temperature: float) -> bool:
        return dtype != torch.float16 and fixed_maximum(dtype, temperature)

    def contrast(self, problem: Problem) -> Contrast:
        a, k = problem.a, problem.k
        dtype, device = a.matrix.dtype, a.matrix.device
        if a.matrix.shape[1] > self._flash_depth(dtype):
            by_library = self.library
            if by_library is None:
                by_library = configs.library_product(dtype, dot_precision(dtype), device)
            by_library = by_library and library.has_product(dtype, a.inverse.dtype)
            return similarity.contrast(problem, budget=blocked.chunk_bytes(device), by_library=by_library)
        what = Negated(problem.temperature, problem.offset, problem.same)
        sums = flash.negatives(a, k, what, problem.sink is not None)
        if problem.sink is not None:
            problem.sink(sums)
        by_candidate = back = None
        if problem.candidate:
            factors = problem.factors(sums.rows, sums.log_off, sums.scale)
            by_candidate = flash.candidate_sums(a, k, what, sums.log_off, factors.u * problem.temperature)
        if problem.reverse:
            turned = Negated(problem.temperature, -problem.offset, problem.turned())
            back = flash.negatives(k, a, turned, problem.candidate)
        return Contrast(sums.log_off, sums.scale, by_candidate, back)

    def finish(self, step: Finish) -> None:
        finish.finish(step)

    def _flash_depth(self, dtype: torch.dtype) -> int:
        return configs.flash_depth(dtype, dot_precision(dtype)) if self.flash_depth is None else self.flash_depth
