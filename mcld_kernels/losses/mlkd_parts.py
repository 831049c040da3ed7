"""The parts that MLKD in one process and over ranks share: the positives of the supervised term, and the alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from ..family_options import MLKDOptions
from ..kernels import KernelSet, LossInputs, UnitRows, projection_coefficient, slices
from ..labels import index_labels
from .mlkd_correlation import Positives

# Labels are compared with one another: no table has a row for each possible one, and each int64 below this is one.
_ANY_LABEL = (1 << 63) - 1


def find_positives(kernels: KernelSet, target: Tensor, options: MLKDOptions, unit: UnitRows) -> Positives:
    """The positives of the supervised term's N rows, those of each view in turn; target: (N / views,)."""
    acc = unit.inv_norm.dtype
    (labels,) = index_labels((torch.cat((target,) * options.views),), options.ignore_index, _ANY_LABEL, acc)
    means = kernels.class_means(unit, labels, labels.counts)
    own, with_mean = kernels.positive_cosines(unit, unit, 0, means, labels.class_index)
    rows_of_class = labels.counts[labels.class_index].to(acc)
    others = (rows_of_class - 1).clamp_(min=1)
    counted = labels.valid & (rows_of_class > 1)
    return Positives(
        cosine=(rows_of_class * with_mean - own) / others,
        counted=counted,
        factor=labels.poison / counted.sum().clamp(min=1),
        pull=2 * rows_of_class / others,
        means=means,
        class_index=labels.class_index,
    )


def align(
    kernels: KernelSet, inputs: LossInputs, weight: Tensor | float, grads: list[Tensor | None], total_rows: int
) -> Tensor:
    """The sum of the alignment over ``total_rows``, by chunks of the rows that are here; adds its gradients."""
    n, d = inputs.student.shape
    acc, eps = inputs.acc_dtype, inputs.options.eps
    total = inputs.student.new_zeros((), dtype=acc)
    for rows in slices(n, max(1, kernels.tuning.chunk_bytes // (6 * d * acc.itemsize))):
        unit = [KernelSet.l2_normalize(kernels, x[rows], acc, eps) for x in (inputs.student, inputs.teacher)]
        difference = unit[0].rows - unit[1].rows
        # A row without direction is zeros: of its 2 - 2 s . t the square holds 1 less.
        missing = sum((x.inv_norm == 0).sum() for x in unit)
        total = total + difference.square().sum() + missing
        for side, grad in enumerate(grads):
            if grad is not None:
                x = unit[side]
                radial = projection_coefficient(difference, x.rows)[:, None]
                g = torch.addcmul(difference, x.rows, radial, value=-1)
                grad[rows] += g.mul_(x.inv_norm[:, None] * ((2 if side == 0 else -2) / total_rows * weight))
    return total / total_rows
