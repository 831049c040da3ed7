"""MCLD as contrasts of rows and of columns, in one process; `mcld_ranks` is the same over ranks.

Row terms share one contrast where their temperatures agree and nothing is masked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..infonce import Anchors, GradBuffer, Side, contrast
from ..kernels import KernelSet, LossInputs, LossOutputs, TermWeight, UnitRows
from ..labels import Labels, SoftLabels, class_weights, hard_labels
from ..options import CATEGORY, INSTANCE, SAMPLE, MCLDOptions, label_terms, row_groups


def compute(kernels: KernelSet, inputs: LossInputs) -> LossOutputs:
    """Loss, terms and gradients of a call; the category-wise term and teacher anchors need n == m."""
    options, student, teacher = inputs.options, inputs.student, inputs.teacher
    instance, sample, category = options.active
    if student.shape[0] != teacher.shape[0] and (category or options.direction != "student"):
        raise ValueError(
            f"{student.shape[0]} student rows against {teacher.shape[0]} teacher rows: only the row terms with "
            "direction='student' are defined for that"
        )
    is_soft = inputs.target is not None and inputs.target.is_floating_point() and any(label_terms(options))
    if inputs.extra.get("candidates") is None and not is_soft:
        if (low_latency := kernels.mcld_low_latency(inputs)) is not None:
            return low_latency(inputs)
    composition = _Composition(kernels, inputs, instance or sample, category)
    operand, eps = kernels.operand_dtype(inputs.dtype), options.eps
    # The column copies are gone before the row copies are made.
    if category:
        composition.contrast_columns(
            kernels.l2_normalize(student.T, operand, eps), kernels.l2_normalize(teacher.T, operand, eps)
        )
    if instance or sample:
        composition.contrast_rows(lambda rows: kernels.l2_normalize(rows, operand, eps))
    return composition.outputs()


class _Composition:
    """One call as contrasts of rows and of columns."""

    def __init__(self, kernels: KernelSet, inputs: LossInputs, by_row: bool, by_column: bool):
        self.kernels, self.inputs, self.options = kernels, inputs, inputs.options
        options, student, acc = self.options, inputs.student, inputs.acc_dtype
        self.weight = None if inputs.weight is None else inputs.weight.to(acc)
        self.student_grad = GradBuffer(student, inputs.student_grad)
        self.teacher_grad = GradBuffer(inputs.teacher, inputs.teacher_grad)
        # What each anchor adds to a term: a row for every term and direction.
        rows = 5 if options.direction == "symmetric" else 3
        n, classes = student.shape
        # Rows of one width are written whole.
        is_whole = n == inputs.teacher.shape[0] and (not by_row or not by_column or n == classes)
        width = max(n if by_row else 1, classes if by_column else 1)
        self.per_anchor = (student.new_empty if is_whole else student.new_zeros)((rows, width), dtype=acc)
        self.terms: list[int] = []  # the term of each row of `per_anchor` that is in use
        candidates = inputs.extra.get("candidates")
        self.candidates = candidates if candidates is not None and candidates.shape[0] > 0 else None
        self.extended_grad: GradBuffer | None = None  # by the teacher's rows and the further candidates
        self.student_labels: Labels | None = None
        self.teacher_labels: Labels | None = None
        self.extended_labels: Labels | None = None  # of the teacher's rows and the further candidates
        self.soft: SoftLabels | None = None
        self.extended_soft: SoftLabels | None = None
        if inputs.target is not None and any(label_terms(options)):
            if self.candidates is not None or inputs.target.is_floating_point():
                self._index_labels(inputs.target)
            else:
                sides = (inputs.target,) if inputs.teacher_target is None else (inputs.target, inputs.teacher_target)
                indexed = kernels.index_labels(sides, options.ignore_index, student.shape[1], acc)
                self.student_labels, self.teacher_labels = indexed[0], indexed[-1]

    def _index_labels(self, target: Tensor) -> None:
        """Labels where some are soft, or with those of the further candidates."""
        inputs, options, acc = self.inputs, self.options, self.inputs.acc_dtype
        num_classes, ignore_index = inputs.student.shape[1], options.ignore_index
        targets = [target]
        if self.candidates is not None:
            theirs = inputs.extra["candidate_target"]
            if theirs is None:
                theirs = target.new_full(self.candidates.shape[:1], ignore_index, dtype=torch.int64)
            targets.append(theirs)
        hard = [hard_labels(t.to(acc), ignore_index) if t.is_floating_point() else t for t in targets]
        sides = (hard[0],) if self.candidates is None else (hard[0], torch.cat(hard))
        indexed = self.kernels.index_labels(sides, ignore_index, num_classes, acc)
        self.student_labels = self.teacher_labels = indexed[0]
        self.extended_labels = indexed[-1]
        if options.active[SAMPLE] and any(t.is_floating_point() for t in targets):
            weights = [class_weights(t, ignore_index, num_classes, acc) for t in targets]
            self.soft = SoftLabels(weights[0])
            if self.candidates is not None:
                self.extended_soft = SoftLabels(torch.cat(weights))

    def outputs(self) -> LossOutputs:
        if self.terms:
            loss, terms = self.kernels.reduce_terms(
                self.per_anchor[: len(self.terms)], tuple(self.terms), self.options.term_weight, self.weight
            )
        else:
            loss, terms = self.per_anchor.new_zeros(()), self.per_anchor.new_zeros(3)
        teacher_grad = self.teacher_grad.result()
        if self.extended_grad is not None and teacher_grad is not None:
            by_candidates = self.extended_grad.result()
            assert by_candidates is not None
            teacher_grad += by_candidates[: teacher_grad.shape[0]]
        return LossOutputs(loss=loss, terms=terms, student_grad=self.student_grad.result(), teacher_grad=teacher_grad)

    def contrast_columns(self, student_unit: UnitRows, teacher_unit: UnitRows) -> None:
        """The category-wise term."""
        options, labels = self.options, self.student_labels
        student = Side(unit=student_unit, grad=self.student_grad, transposed=True)
        teacher = Side(unit=teacher_unit, grad=self.teacher_grad, transposed=True)
        if options.present_only:
            assert labels is not None
            factor = labels.poison / labels.present.sum().clamp(min=1)
            weight = self._term_weight(CATEGORY, 1.0, factor, labels.present)
        else:
            weight = self._term_weight(CATEGORY, 1 / student_unit.n)
        anchors = self._anchors(student, (weight,))
        contrast(self.kernels, anchors, teacher, temperature=options.temperature[CATEGORY])

    def contrast_rows(self, l2_normalize: Callable[[Tensor], UnitRows]) -> None:
        """The instance- and sample-wise terms."""
        options, offset, inputs = self.options, self.inputs.offset, self.inputs
        student = Side(
            unit=l2_normalize(inputs.student), grad=self.student_grad, labels=self.student_labels, soft=self.soft
        )
        teacher = extended = None
        if self.candidates is None or options.direction == "symmetric":
            teacher = Side(
                unit=l2_normalize(inputs.teacher), grad=self.teacher_grad, labels=self.teacher_labels, soft=self.soft
            )
        if self.candidates is not None:
            rows = torch.cat([x.to(inputs.dtype) for x in (inputs.teacher, self.candidates)])
            self.extended_grad = GradBuffer(rows, inputs.teacher_grad)
            extended = Side(
                unit=l2_normalize(rows), grad=self.extended_grad, labels=self.extended_labels, soft=self.extended_soft
            )
        pairs: list[tuple[Side | None, Side | None, int]] = []
        if options.direction != "teacher":
            pairs.append((student, extended or teacher, offset))
        if options.direction != "student":
            pairs.append((teacher, student, -offset))
        both = len(pairs) == 2 and not inputs.teacher_grad and extended is None and self.soft is None
        for group in row_groups(options):
            temperature = options.temperature[group[0]]
            masked = options.mask_same_class and group == (INSTANCE,)
            if both and self.kernels.can_reverse(student.unit.rows.dtype, temperature):
                assert teacher is not None
                anchors, reverse = (
                    self._anchors(side, self._row_weights(side, group, 2)) for side in (teacher, student)
                )
                contrast(
                    self.kernels, anchors, student,
                    temperature=temperature, offset=-offset, mask_same_class=masked, reverse=reverse,
                )  # fmt: skip
                continue
            for side, candidates, shift in pairs:
                assert side is not None and candidates is not None
                anchors = self._anchors(side, self._row_weights(side, group, len(pairs)))
                contrast(
                    self.kernels, anchors, candidates,
                    temperature=temperature, offset=shift, mask_same_class=masked,
                )  # fmt: skip

    def _row_weights(self, side: Side, group: tuple[int, ...], directions: int) -> tuple[TermWeight, ...]:
        weights = []
        for term in group:
            if term == SAMPLE:
                assert side.labels is not None
                labels = side.labels
                weights.append(self._term_weight(SAMPLE, 1 / directions, labels.mean_factor, labels.valid))
            else:
                poison = None
                if self.options.mask_same_class:
                    assert side.labels is not None
                    poison = side.labels.poison
                weights.append(self._term_weight(INSTANCE, 1 / (side.unit.n * directions), poison))
        return tuple(weights)

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

    def _anchors(self, side: Side, weights: tuple[TermWeight, ...]) -> Anchors:
        first = len(self.terms)
        self.terms += [weight.term for weight in weights]
        return Anchors(side=side, weights=weights, per_anchor=self.per_anchor[first : len(self.terms)])


def count_flops(batch: int, classes: int, options: MCLDOptions, grads: int, candidates: int) -> int:
    """2 n m d for the similarities of a contrast, and as many again for the gradient of each side.

    Gradients of both directions are two passes over the similarities, and a product of each pass for each side.
    """
    passes = 1 + grads
    of_rows = {0: 1, 1: 3, 2: 6}[grads] if options.direction == "symmetric" else passes
    rows = 2 * of_rows * batch * candidates * classes * len(row_groups(options))
    return rows + (2 * passes * classes * classes * batch if options.active[CATEGORY] else 0)
