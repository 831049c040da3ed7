"""The kernel set of the "triton" backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import (
    AnchorTerms,
    Contrast,
    ContrastArgs,
    GradCoefficients,
    GradEpilogueArgs,
    KernelSet,
    NegativeSums,
    UnitRows,
)
from ...labels import Labels
from ...options import float32_precision
from . import class_means, flash, grad_epilogue, labels, loss_epilogue, normalize, reduce_terms, similarity
from .configs import Configs, TritonTuning


class TritonKernels(KernelSet):
    def __init__(self, tuning: TritonTuning):
        super().__init__(tuning)
        self.configs = Configs(tuning)

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        medium = dtype == torch.float32 and float32_precision() == "medium"
        return torch.bfloat16 if medium else dtype

    def l2_normalize(self, x: Tensor, operand_dtype: torch.dtype, eps: float) -> UnitRows:
        return normalize.l2_normalize(x, operand_dtype, eps, self.configs)

    def operand_shape(self, n: int, d: int, operand_dtype: torch.dtype) -> tuple[int, int]:
        return normalize.operand_shape(n, d, operand_dtype, self.configs)

    def operand_rows(self, x: Tensor, operand_dtype: torch.dtype) -> UnitRows:
        return normalize.rounded(super().operand_rows(x, operand_dtype), self.configs)

    def scale_rows(self, unit: UnitRows, factor: Tensor) -> UnitRows:
        return normalize.rounded(super().scale_rows(unit, factor), self.configs)

    def index_labels(
        self, sides: tuple[Tensor, ...], ignore_index: int, num_classes: int, dtype: torch.dtype
    ) -> tuple[Labels, ...]:
        return labels.index_labels(sides, ignore_index, num_classes, dtype, self.configs)

    def class_means(self, unit: UnitRows, labels: Labels, counts: Tensor) -> Tensor:
        return class_means.class_means(unit, labels, counts, self.configs)

    def positive_cosines(
        self, anchors: UnitRows, candidates: UnitRows, offset: int, means: Tensor | None, class_index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return class_means.positive_cosines(anchors, candidates, offset, means, class_index, self.configs)

    def contrast(self, args: ContrastArgs) -> Contrast:
        operands = args.anchors.rows
        if operands.shape[1] <= self.configs.flash_pitch(operands.dtype):
            return flash.FlashContrast(args, self.configs)
        return similarity.TwoProductContrast(args, self.configs)

    def loss_epilogue(self, terms: AnchorTerms, sums: NegativeSums) -> GradCoefficients:
        return loss_epilogue.loss_epilogue(terms, sums, self.configs)

    def reduce_terms(
        self, per_anchor: Tensor, terms: tuple[int, ...], term_weight: tuple[float, ...], weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if len(term_weight) > reduce_terms.MAX_TERMS:
            return super().reduce_terms(per_anchor, terms, term_weight, weight)
        return reduce_terms.reduce_terms(per_anchor, terms, term_weight, weight, self.configs)

    def grad_epilogue(self, args: GradEpilogueArgs) -> None:
        grad_epilogue.grad_epilogue(args, self.configs)
