"""The kernel set of a module of launchers: ``mcld_kernels._C``, or the same kernels compiled for the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import labels as labelling
from ...kernels import (
    AnchorPassArgs,
    AnchorTerms,
    Contrast,
    ContrastArgs,
    GradCoefficients,
    GradEpilogueArgs,
    KernelSet,
    LossInputs,
    LossOutputs,
    MeanOf,
    NegativeSums,
    TermWeight,
    UnitRows,
)
from ...labels import Labels
from ...options import float32_precision
from . import low_latency, plans
from .flash import FlashContrast
from .launcher import Launcher, pointer
from .plans import CallPlan
from .products import TwoProductContrast
from .tuning import CudaTuning

MOST_PLANS = 256  # shapes and options that a process is expected to come back to


class CudaKernels(KernelSet):
    """The portable kernels, and the Hopper kernels where the tuning takes them and they can run."""

    tuning: CudaTuning
    records_calls = True

    def __init__(self, launch: Launcher, tuning: CudaTuning):
        super().__init__(tuning)
        self.launch = launch
        self._plans: dict[object, CallPlan | None] = {}  # None: seen once, or without a plan
        self._unplanned: set[object] = set()

    def run(self, compute: Callable[[KernelSet, LossInputs], LossOutputs], inputs: LossInputs) -> LossOutputs:
        """`compute`, from the third call of a kind on by its plan."""
        key = plans.call_key(compute, inputs)
        plan = self._plans.get(key)
        if plan is not None:
            return plan.run(self.launch, inputs)
        if key is None or key in self._unplanned or not self.tuning.plans:
            return compute(self, inputs)
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = None
            return compute(self, inputs)
        module = self.launch.module
        recorder = plans.CallRecorder(module)
        with recorder:
            outputs = compute(CudaKernels(Launcher(module, self.launch.device, recorder), self.tuning), inputs)
        try:
            self._plans[key] = recorder.finish(inputs, outputs)
        except plans.NoPlan:
            if len(self._unplanned) >= MOST_PLANS:
                self._unplanned.clear()
            self._unplanned.add(key)
        return outputs

    def replay(
        self, compute: Callable[[KernelSet, LossInputs], LossOutputs], inputs: LossInputs
    ) -> Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None]] | None:
        plan = self._plans.get(plans.call_key(compute, inputs))
        return partial(plan.replay, self.launch) if plan is not None and plan.can_replay(inputs) else None

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float32 and float32_precision() == "medium":
            return torch.bfloat16
        return dtype

    def contrast(self, args: ContrastArgs) -> Contrast:
        if args.mask is not None:
            args = dataclasses.replace(args, mask=(args.mask[0].contiguous(), args.mask[1].contiguous()))
        operand = args.candidates.rows
        if not args.reverse and operand.shape[1] * operand.itemsize <= self.tuning.flash_row_bytes:
            return FlashContrast(self.launch, self.tuning, args)
        return TwoProductContrast(self.launch, self.tuning, args)

    has_anchor_pass = True

    def anchor_pass(
        self, args: ContrastArgs, out: Tensor | None, mean_of: MeanOf | None
    ) -> Callable[[AnchorPassArgs], None] | None:
        # The one epilogue takes a fixed shift, padded class means, and a gradient whose rows are contiguous.
        if mean_of == "anchor" or out is None or (out.stride(1) != 1 and out.shape[1] > 1):
            return None
        if not self.tuning.one_epilogue or not args.has_fixed_shift():
            return None
        return partial(self._anchor_pass, args)

    def _anchor_pass(self, args: ContrastArgs, whole: AnchorPassArgs) -> None:
        launch, unit = self.launch, args.anchors
        contrast = self.contrast(args)
        assert whole.out is not None and isinstance(contrast, FlashContrast | TwoProductContrast)
        class_index = None if whole.class_index is None else whole.class_index.contiguous()
        for chunk in contrast.tile_chunks():
            rows, products = chunk.rows, chunk.products
            gradient = whole.out[rows]
            launch(
                "anchor_epilogue",
                out=gradient.data_ptr(), row_stride=gradient.stride(0), unit=unit.rows[rows],
                partner=args.candidates.rows, class_means=whole.class_means,
                class_index=None if class_index is None else class_index[rows], inv_norm=unit.inv_norm[rows],
                products=products, tile_sums=chunk.sums, per_anchor=whole.per_anchor[0, rows],
                rows=rows.stop - rows.start, d=unit.d, pitch=unit.rows.shape[1], product_rows=products.shape[1],
                product_pitch=products.shape[2], sums_pitch=chunk.sums.shape[1],
                per_anchor_pitch=whole.per_anchor.stride(0), offset=rows.start + args.offset,
                partner_rows=args.candidates.n, splits=products.shape[0], tiles=chunk.sums.shape[0],
                shift=launch.fixed_shift(unit.rows.dtype, args.temperature), inv_temperature=1 / args.temperature,
                weights=_term_weights(whole.weights, rows), accumulate=whole.accumulate,
                type=launch.type(gradient.dtype), precision=launch.precision(unit.rows.dtype),
            )  # fmt: skip

    def mcld_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        operand_dtype = self.operand_dtype(inputs.dtype)
        if not low_latency.is_supported(inputs, operand_dtype, self.tuning.low_latency_limit):
            return None
        return partial(
            low_latency.evaluate,
            launch=self.launch,
            operand_dtype=operand_dtype,
            dependent=self.tuning.dependent_launches,
        )

    def l2_normalize(self, x: Tensor, operand_dtype: torch.dtype, eps: float) -> UnitRows:
        launch, (n, d) = self.launch, x.shape
        rows = torch.empty(self.operand_shape(n, d, operand_dtype), dtype=operand_dtype, device=x.device)
        inv_norm = launch.empty(n)
        by_columns = x.stride(0) < x.stride(1) and n > 1
        splits = max(1, min(64, d // 256)) if by_columns else 0
        launch(
            "normalize_columns" if by_columns else "normalize_rows",
            x=x.data_ptr(), row_stride=x.stride(0), column_stride=x.stride(1), out=rows, inv_norm=inv_norm,
            square_sums=launch.empty(splits, n) if by_columns else None, n=n, d=d, padded_rows=rows.shape[0],
            pitch=rows.shape[1], splits=splits, eps=eps, type=launch.type(x.dtype),
            precision=launch.precision(operand_dtype),
        )  # fmt: skip
        return UnitRows(rows=rows, inv_norm=inv_norm, n=n, d=d)

    def operand_shape(self, n: int, d: int, operand_dtype: torch.dtype) -> tuple[int, int]:
        return self.launch.padded_rows(n), self.launch.pitch(d)

    def index_labels(
        self, sides: tuple[Tensor, ...], ignore_index: int, num_classes: int, dtype: torch.dtype
    ) -> tuple[Labels, ...]:
        n, constants = sides[0].shape[0], self.launch.constants
        if len(sides) > 1 or num_classes >= min(n, constants["max_sorted_classes"]) or n >= 1 << 31:
            # A class index is not the class there, or there are too many to count: it takes a comparison sort.
            return labelling.index_labels(sides, ignore_index, num_classes, dtype)
        target = sides[0].contiguous()
        key, class_index = torch.empty_like(target), torch.empty_like(target)
        valid = torch.empty_like(target, dtype=torch.bool)
        poison, mean_factor = self.launch.empty(), self.launch.empty()
        present, unit = num_classes + 1, constants["sort_rows"]
        step = -(-n // (unit * constants["max_sort_blocks"])) * unit
        blocks = -(-n // step)
        # The counts by block, the places of its first rows, each row's place among them, and two sums by block.
        sizes = (blocks * present, blocks * present, n, 2 * blocks)
        histogram, first, rank, sums = torch.empty(sum(sizes), dtype=torch.int32, device=target.device).split(sizes)
        shared = {"n": n, "histogram": histogram, "rank": rank, "sums": sums, "blocks": blocks, "rows_per_block": step}
        self.launch(
            "index_labels",
            target=target, num_classes=num_classes, ignore_index=ignore_index, key=key, class_index=class_index,
            valid=valid, **shared,
        )  # fmt: skip
        labels = Labels(
            key=key,
            valid=valid,
            class_index=class_index,
            class_id=class_index,
            poison=poison,
            num_classes_present=present,
            num_classes=num_classes,
        )
        counts, starts, order = (target.new_empty(size) for size in (present, present + 1, n))
        self.launch(
            "sort_labels",
            class_index=class_index, num_classes_present=present, first=first, counts=counts, starts=starts,
            order=order, poison=poison, mean_factor=mean_factor, **shared,
        )  # fmt: skip
        return (labelling.with_tables(labels, counts=counts, order=order, starts=starts, mean_factor=mean_factor),)

    def class_means(self, unit: UnitRows, labels: Labels, counts: Tensor) -> Tensor:
        pitch = unit.rows.shape[1]
        means = self.launch.empty(counts.shape[0], pitch)
        self.launch(
            "class_means",
            unit=unit.rows, order=labels.order, starts=labels.starts, counts=counts, out=means,
            num_classes_present=counts.shape[0], pitch=pitch, precision=self.launch.precision(unit.rows.dtype),
        )  # fmt: skip
        return means

    def positive_cosines(
        self, anchors: UnitRows, candidates: UnitRows, offset: int, means: Tensor | None, class_index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        positive = self.launch.empty(anchors.n)
        label_positive = positive if means is None else self.launch.empty(anchors.n)
        self.launch(
            "positive_cosines",
            anchors=anchors.rows, candidates=candidates.rows, class_means=means,
            class_index=None if means is None or class_index is None else class_index.contiguous(),
            positive=positive, label_positive=label_positive, n=anchors.n, m=candidates.n, offset=offset,
            pitch=anchors.rows.shape[1], precision=self.launch.precision(anchors.rows.dtype),
        )  # fmt: skip
        return positive, label_positive

    def loss_epilogue(self, terms: AnchorTerms, sums: NegativeSums) -> GradCoefficients:
        rows, like = sums.rows, sums.neg_lse
        partner, product = torch.empty_like(like), torch.empty_like(like)
        by_label = any(weight.positives == "label" for weight in terms.weights)
        class_mean = torch.empty_like(like) if by_label else None
        self.launch(
            "loss_epilogue",
            neg_lse=like, inv_neg_sum=sums.inv_neg_sum, positive=terms.positive[rows],
            label_positive=terms.label_positive[rows], partner_coef=partner, product_coef=product,
            class_mean_coef=class_mean, per_anchor=terms.per_anchor[0, rows], rows=like.shape[0],
            pitch=terms.per_anchor.stride(0), inv_temperature=1 / terms.temperature,
            weights=_term_weights(terms.weights, rows),
        )  # fmt: skip
        return GradCoefficients(partner=partner, product=product, class_mean=class_mean)

    def reduce_terms(
        self, per_anchor: Tensor, terms: tuple[int, ...], term_weight: tuple[float, ...], weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        loss, values = self.launch.empty(), self.launch.empty(len(term_weight))
        self.launch(
            "reduce_terms",
            per_anchor=per_anchor, width=per_anchor.shape[1], parts=terms, term_weight=term_weight, weight=weight,
            loss=loss, terms=values,
        )  # fmt: skip
        return loss, values

    def grad_epilogue(self, args: GradEpilogueArgs) -> None:
        launch, unit, rows, coefficients = self.launch, args.unit, args.rows, args.coefficients
        product, class_mean = args.product, coefficients.class_mean
        assert product.stride(1) == 1
        gradient = args.out[rows]
        count = gradient.shape[0]
        transposed = gradient.stride(0) < gradient.stride(1) and count > 1
        class_means, class_index = (None, None) if class_mean is None else (args.class_means, args.class_index)
        launch(
            "grad_epilogue",
            out=gradient.data_ptr(), row_stride=gradient.stride(0), column_stride=gradient.stride(1),
            unit=unit.rows[rows], partner=args.partner.rows, class_means=class_means,
            inv_norm=unit.inv_norm[rows], product=product.data_ptr(), product_coef=coefficients.product.contiguous(),
            partner_coef=coefficients.partner.contiguous(),
            class_mean_coef=None if class_mean is None else class_mean.contiguous(),
            class_index=None if class_index is None else class_index[rows].contiguous(),
            projection=launch.empty(count) if transposed else None, rows=count, d=unit.d, pitch=unit.rows.shape[1],
            product_pitch=product.stride(0), offset=rows.start + args.offset, partner_rows=args.partner.n,
            accumulate=args.accumulate, type=launch.type(gradient.dtype), precision=launch.precision(unit.rows.dtype),
        )  # fmt: skip


def _term_weights(weights: tuple[TermWeight, ...], rows: slice) -> list[dict[str, Any]]:
    """The fields of `TermWeight` in csrc/launchers.h for the anchors `rows`."""
    return [
        {
            "factor": pointer(weight.factor),
            "counted": pointer(None if weight.counted is None else weight.counted[rows]),
            "weight": pointer(weight.weight),
            "constant": weight.constant,
            "term_weight": weight.term_weight,
            "label_positives": weight.positives == "label",
        }
        for weight in weights
    ]
