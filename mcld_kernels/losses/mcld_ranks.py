"""MCLD over ranks: this rank's part of the loss of the global batch, and its gradient.

Rank r returns (number of ranks) x (the part of its anchors), so that the plain mean over ranks, which
DistributedDataParallel takes of gradients too, is that of the global batch. The student's rows stay; the teacher's are
gathered or travel (`over_ranks`). docs/distributed.md has the collectives of each option.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..distributed import Ranks
from ..infonce import Anchors, GradBuffer, Side
from ..kernels import KernelSet, LossInputs, LossOutputs, TermWeight
from ..labels import Labels, SoftLabels, class_weights, hard_labels, index_labels_over_ranks
from ..options import CATEGORY, INSTANCE, SAMPLE, label_terms, row_groups
from ..over_ranks.columns import contrast_columns_over_ranks
from ..over_ranks.remote import RemoteSide, normalize_rows
from ..over_ranks.rows import contrast_over_ranks


def compute_over_ranks(kernels: KernelSet, inputs: LossInputs, ranks: Ranks) -> LossOutputs:
    """This rank's part of the loss, of the terms, and its gradients, for a global batch that is not empty."""
    composition = _RankComposition(kernels, inputs, ranks)
    instance, sample, category = inputs.options.active
    if category:
        composition.contrast_columns()
    if instance or sample:
        composition.contrast_rows()
    return composition.outputs()


class _RankComposition:
    """One call over ranks as contrasts of rows and of columns."""

    def __init__(self, kernels: KernelSet, inputs: LossInputs, ranks: Ranks):
        self.kernels, self.inputs, self.ranks, self.options = kernels, inputs, ranks, inputs.options
        options, acc = self.options, inputs.acc_dtype
        self.weight = None if inputs.weight is None else inputs.weight.to(acc)
        self.poison = None if ranks.poison is None else ranks.poison.to(acc)
        self.student_grad = GradBuffer(inputs.student, inputs.student_grad)
        self.teacher_grad = GradBuffer(inputs.teacher, inputs.teacher_grad)
        rows = 5 if options.direction == "symmetric" else 3
        # What each anchor adds to a term: a row for every term and direction.
        self.per_anchor = inputs.student.new_zeros(rows, max(inputs.student.shape), dtype=acc)
        self.terms: list[int] = []  # the term of each row of `per_anchor` that is in use
        self.own_labels: Labels | None = None
        self.all_labels: Labels | None = None
        self.further_labels: Labels | None = None
        self.own_soft: SoftLabels | None = None
        self.further_soft: SoftLabels | None = None
        self.candidates: Tensor | None = inputs.extra.get("candidates")
        if any(label_terms(options)):
            assert inputs.target is not None
            self._index_labels(inputs.target)

    def _index_labels(self, target: Tensor) -> None:
        inputs, acc = self.inputs, self.inputs.acc_dtype
        ignore_index, classes = self.options.ignore_index, inputs.student.shape[1]
        theirs = None
        if self.candidates is not None:
            theirs = inputs.extra["candidate_target"]
            if theirs is None:  # candidates of no class
                theirs = target.new_full(self.candidates.shape[:1], ignore_index, dtype=torch.int64)
        if self.options.active[SAMPLE] and any(x is not None and x.is_floating_point() for x in (target, theirs)):
            self.own_soft = SoftLabels(class_weights(target, ignore_index, classes, acc))
            if theirs is not None:
                self.further_soft = SoftLabels(class_weights(theirs, ignore_index, classes, acc))
        own, further = (None if x is None else self._hard(x) for x in (target, theirs))
        assert own is not None
        everything = self.ranks.all_gather(own.contiguous())
        self.own_labels, self.all_labels, self.further_labels = index_labels_over_ranks(
            everything, self.ranks.own, ignore_index, classes, acc, further
        )

    def _hard(self, target: Tensor) -> Tensor:
        """Labels (n,); of soft ones those of the largest weight."""
        if not target.is_floating_point():
            return target
        return hard_labels(target.to(self.inputs.acc_dtype), self.options.ignore_index)

    def outputs(self) -> LossOutputs:
        loss, terms = self.per_anchor.new_zeros(()), self.per_anchor.new_zeros(3)
        if self.terms:
            loss, terms = self.kernels.reduce_terms(
                self.per_anchor[: len(self.terms)], tuple(self.terms), self.options.term_weight, self.weight
            )
        return LossOutputs(
            loss=loss,
            terms=terms,
            student_grad=self.student_grad.result(),
            teacher_grad=self.teacher_grad.result(),
        )

    def contrast_columns(self) -> None:
        """The category-wise term: the same value on every rank."""
        options, inputs, labels = self.options, self.inputs, self.all_labels
        constant, factor = 1 / inputs.student.shape[1], self.poison
        counted: Tensor | None = None
        if options.present_only:
            assert labels is not None
            constant, counted = 1.0, labels.present
            factor = self._poisoned(labels.poison / labels.present.sum().clamp(min=1))
        weight = self._term_weight(CATEGORY, constant, factor, counted)
        weight.term_weight *= self.ranks.count  # of the gradient: the value is not a part that ranks add up
        contrast_columns_over_ranks(
            self.kernels,
            self.ranks,
            inputs.student,
            inputs.teacher,
            operand_dtype=self.kernels.operand_dtype(inputs.dtype),
            eps=options.eps,
            temperature=options.temperature[CATEGORY],
            weight=weight,
            per_anchor=self._per_anchor((weight,)),
            anchor_grad=self.student_grad,
            candidate_grad=self.teacher_grad,
        )

    def contrast_rows(self) -> None:
        """The instance- and sample-wise terms."""
        options, inputs, kernels = self.options, self.inputs, self.kernels
        operand, direction = kernels.operand_dtype(inputs.dtype), options.direction
        student_unit = normalize_rows(kernels, inputs.student, operand, options.eps)
        student = Side(unit=student_unit, grad=self.student_grad, labels=self.own_labels, soft=self.own_soft)
        make = partial(normalize_rows, kernels, inputs.teacher, operand, options.eps)
        further = None
        if self.candidates is not None and self.candidates.shape[0] > 0 and direction != "teacher":
            further = normalize_rows(kernels, self.candidates.to(inputs.dtype), operand, options.eps)
        remote = RemoteSide(kernels, self.ranks, make, self.all_labels, further, self.further_labels, self.further_soft)
        teacher = Side(unit=student_unit, grad=self.teacher_grad, labels=self.all_labels)
        for group in row_groups(options):
            contrast_over_ranks(
                kernels,
                self.ranks,
                student,
                remote,
                temperature=options.temperature[group[0]],
                local_anchors=None if direction == "teacher" else self._anchors(student, group),
                remote_anchors=None if direction == "student" else self._anchors(teacher, group),
                remote_side=teacher,
                mask_same_class=options.mask_same_class and group == (INSTANCE,),
            )

    def _anchors(self, side: Side, group: tuple[int, ...]) -> Anchors:
        directions = 2 if self.options.direction == "symmetric" else 1
        weights = []
        for term in group:
            labels = side.labels
            if term == SAMPLE:
                assert labels is not None
                factor = self._poisoned(labels.mean_factor)
                weights.append(self._term_weight(SAMPLE, self.ranks.count / directions, factor, labels.valid))
                continue
            masked = labels is not None and self.options.mask_same_class
            poison = self._poisoned(labels.poison) if masked else self.poison  # type: ignore[union-attr]
            constant = self.ranks.count / (self.ranks.total * directions)
            weights.append(self._term_weight(INSTANCE, constant, poison))
        return Anchors(side=side, weights=tuple(weights), per_anchor=self._per_anchor(tuple(weights)))

    def _poisoned(self, factor: Tensor) -> Tensor:
        return factor if self.poison is None else factor * self.poison

    def _term_weight(
        self, term: int, constant: float, factor: Tensor | None = None, counted: Tensor | None = None
    ) -> TermWeight:
        return TermWeight(
            term=term,
            positives="label" if term == SAMPLE else "diagonal",
            constant=constant,
            factor=factor,
            counted=counted,
            term_weight=self.options.term_weight[term],
            weight=None if self.weight is None else self.weight[term],
        )

    def _per_anchor(self, weights: tuple[TermWeight, ...]) -> Tensor:
        first = len(self.terms)
        self.terms += [weight.term for weight in weights]
        return self.per_anchor[first : len(self.terms)]
