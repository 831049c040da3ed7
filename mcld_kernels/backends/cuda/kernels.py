"""`pipeline.Kernels` by a module of launchers: ``mcld_kernels._C``, or the same kernels compiled for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import labels as labelling
from ..arguments import float32_precision
from ..labels import Labels
from ..pipeline import Anchors, Contrast, Factors, Finish, Problem, Unit
from . import configs, flash, products
from .common import TYPES, Launcher, floats, has_fixed_shift, padded_rows, pitch_of, pointer, precision_of


class CudaKernels:
    """The kernels of this package.

    hopper: whether to take the Hopper kernels where they can do it; library: whether torch.mm takes product 2, None for
    the choice of `configs`.
    """

    def __init__(self, launch: Launcher, *, hopper: bool = False, library: bool | None = None):
        self.launch, self.hopper, self.library = launch, hopper, library

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float32 and float32_precision() == "medium":
            return torch.bfloat16
        return dtype

    def can_reverse(self, dtype: torch.dtype, temperature: float) -> bool:
        # Sums by column need one shift for all rows, which in fp16 leaves the weighted anchors no range.
        return dtype != torch.float16 and has_fixed_shift(dtype, temperature)

    def normalise(self, x: Tensor, dtype: torch.dtype, eps: float) -> Unit:
        n, d = x.shape
        matrix = torch.empty(padded_rows(n), pitch_of(d), dtype=dtype, device=x.device)
        inverse = floats(x, n)
        columns = x.stride(0) < x.stride(1) and n > 1
        splits = max(1, min(64, d // 256)) if columns else 0
        self.launch(
            "normalise_columns" if columns else "normalise_rows",
            x=x.data_ptr(), row_stride=x.stride(0), column_stride=x.stride(1), out=matrix, inverse=inverse,
            work=floats(x, splits, n) if columns else None, n=n, d=d, padded_rows=matrix.shape[0],
            pitch=matrix.shape[1], splits=splits, eps=eps, type=TYPES[x.dtype], precision=precision_of(dtype),
        )  # fmt: skip
        return Unit(matrix, inverse, n, d)

    def describe(
        self, sides: tuple[Tensor, ...], ignore_index: int, classes: int, dtype: torch.dtype
    ) -> tuple[Labels, ...]:
        n = sides[0].shape[0]
        if len(sides) > 1 or classes >= n:
            return labelling.describe(sides, ignore_index, classes, dtype)  # ranks are not classes there: a sort
        target = sides[0].contiguous()
        same, rank = torch.empty_like(target), torch.empty_like(target)
        valid = torch.empty_like(target, dtype=torch.bool)
        poison, share = floats(target), floats(target)
        self.launch(
            "describe",
            target=target, n=n, classes=classes, ignore_index=ignore_index, same=same, rank=rank, valid=valid,
            poison=poison, share=share,
        )  # fmt: skip
        labels = Labels(same, valid, rank, rank, poison, classes + 1, classes)
        counts, starts, order = (rank.new_empty(size) for size in (classes + 1, classes + 2, n))
        self.launch("order", rank=rank, n=n, ranks=classes + 1, counts=counts, starts=starts, order=order)
        return (labelling.ready(labels, share=share, counts=counts, starts=starts, order=order),)

    def factors(self, anchors: Anchors, rows: slice, log_off: Tensor, scale: Tensor) -> Factors:
        u, s = torch.empty_like(log_off), torch.empty_like(log_off)
        z = torch.empty_like(log_off) if any(share.term == 1 for share in anchors.shares) else None
        shares = [
            {
                "factor": pointer(share.factor),
                "counted": pointer(None if share.counted is None else share.counted[rows]),
                "weight": pointer(share.weight),
                "constant": share.constant,
                "scale": share.scale,
                "by_label": share.term == 1,
            }
            for share in anchors.shares
        ]
        self.launch(
            "factors",
            log_off=log_off, scale=scale, positive=anchors.positive[rows], by_label=anchors.by_label[rows], u=u, s=s,
            z=z, values=anchors.values[0, rows], rows=log_off.shape[0], pitch=anchors.values.stride(0),
            inverse_temperature=1 / anchors.temperature, shares=shares,
        )  # fmt: skip
        return Factors(u, s, z)

    def totals(
        self, values: Tensor, terms: tuple[int, ...], scale: tuple[float, ...], weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        loss, found = floats(values), floats(values, 3)
        self.launch(
            "totals",
            values=values, width=values.shape[1], part=terms, scale=scale, weight=weight, loss=loss, terms=found,
        )  # fmt: skip
        return loss, found

    def class_means(self, unit: Unit, labels: Labels, counts: Tensor) -> Tensor:
        pitch = unit.matrix.shape[1]
        means = floats(unit.matrix, counts.shape[0], pitch)
        self.launch(
            "class_means",
            unit=unit.matrix, order=labels.order, starts=labels.starts, counts=counts, out=means,
            ranks=counts.shape[0], pitch=pitch, precision=precision_of(unit.matrix.dtype),
        )  # fmt: skip
        return means

    def positives(
        self, a: Unit, k: Unit, offset: int, means: Tensor | None, rank: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        positive = floats(a.matrix, a.n)
        by_label = positive if means is None else floats(a.matrix, a.n)
        self.launch(
            "positives",
            a=a.matrix, k=k.matrix, means=means, rank=None if means is None or rank is None else rank.contiguous(),
            positive=positive, by_label=by_label, n=a.n, m=k.n, offset=offset, pitch=a.matrix.shape[1],
            precision=precision_of(a.matrix.dtype),
        )  # fmt: skip
        return positive, by_label

    def contrast(self, problem: Problem) -> Contrast:
        if problem.same is not None:
            problem = problem._replace(same=(problem.same[0].contiguous(), problem.same[1].contiguous()))
        matrix = problem.k.matrix
        if not problem.reverse and matrix.shape[1] * matrix.itemsize <= configs.FLASH_BYTES:
            return flash.contrast(self.launch, problem, self.hopper)
        library = self.library
        if library is None:
            library = configs.by_library(matrix.dtype, float32_precision(), matrix.device)
        return products.contrast(self.launch, problem, self.hopper, library)

    def finish(self, step: Finish) -> None:
        out, unit, rows, product, s, u, z, partner, shift, means, rank, accumulate = step
        assert product.stride(1) == 1
        gradient = out[rows]
        count = gradient.shape[0]
        transposed = gradient.stride(0) < gradient.stride(1) and count > 1
        self.launch(
            "finish",
            out=gradient.data_ptr(), row_stride=gradient.stride(0), column_stride=gradient.stride(1),
            unit=unit.matrix[rows], partner=partner.matrix, means=None if z is None else means,
            inverse=unit.inverse[rows], product=product.data_ptr(), s=s.contiguous(), u=u.contiguous(),
            z=None if z is None else z.contiguous(),
            rank=None if rank is None or z is None else rank[rows].contiguous(),
            dots=floats(product, count) if transposed else None, rows=count, d=unit.d, pitch=unit.matrix.shape[1],
            product_pitch=product.stride(0), shift=rows.start + shift, partner_rows=partner.n, add=accumulate,
            type=TYPES[gradient.dtype], precision=precision_of(unit.matrix.dtype),
        )  # fmt: skip
