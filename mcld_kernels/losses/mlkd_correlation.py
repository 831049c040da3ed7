r"""MLKD's correlation, and with it the supervised term, by chunks of symmetric matrices of similarities.

With unit rows s_i, t_i (n, d) and temperature t, a_ij = s_i . s_j / t and b_ij = t_i . t_j / t for j != i,
delta_ij = a_ij - b_ij, sums Zt_i = sum_j exp(b_ij) and Zs_i = sum_j exp(a_ij), and P, Q the softmaxes of b and a,

    Zs_i - Zt_i = sum_j exp(b_ij) expm1(delta_ij),    mean_i = sum_j P_ij delta_ij,
    KL(P_i || Q_i) = log1p((Zs_i - Zt_i) / Zt_i) - mean_i,
    dL/ds_i = sum_j (D_ij + D_ji) s_j / (t n),    D = Q - P,
    D_ij + D_ji = exp(b_ij) ((g_i + g_j) + expm1(delta_ij) (1 / Zs_i + 1 / Zs_j)),    g = 1 / Zs - 1 / Zt,
    dL/dt_i = sum_j (V_ij + V_ji) t_j / (t n),    V_ij = P_ij (mean_i - delta_ij).

No difference of nearly equal exponentials is taken, so that the term keeps digits when the student is close to its
teacher. Of rows with Zs_i < Zt_i / 2 it is Zs_i that would cancel: they take sums of exp(a_ij), and their part of D_ij
is exp(a_ij) / Zs_i - exp(b_ij) / Zt_i. D needs the sums of both rows of a pair: one pass gives the sums, a second the
products, and both the upper triangle alone. The supervised term (`losses.mlkd`) takes its exponentials from the same
similarities; its cross similarities s_i . t_j come in addition. Together 12 n^2 d flop, where eager takes 32.

Where exp(2 / t) is beyond the range of fp32, each row is shifted by its own largest similarity, and the differences of
logarithms are plain. A similarity of 1 / t has few digits after its point: P, Q, delta and the logarithms all take the
same rounded a and b, so that a row whose softmaxes are all but one pair gets no rounding error of that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..family_options import MLKDOptions
from ..gram import add_mm, mm, trapezoids
from ..kernels import UnitRows, has_fixed_shift, projection_coefficient, slices
from ..options import is_readable

LEAST_RATIO = -0.5  # of Zs / Zt - 1, down to which Zs loses no more than a bit in Zt + (Zs - Zt)


class Rows(NamedTuple):
    student: UnitRows
    teacher: UnitRows


@dataclass(slots=True, kw_only=True)
class Positives:
    """Sums over the rows of their labels, for the supervised term's N anchors."""

    cosine: Tensor  # (N,) mean cosine with the other rows of the label
    counted: Tensor  # (N,) bool: there is one
    factor: Tensor  # () 1 / number of counted anchors; NaN if a label is negative
    pull: Tensor  # (N,) 2 n_i / (n_i - 1) with n_i the rows of the label
    means: Tensor  # (labels, d) mean of the rows of a label
    class_index: Tensor  # (N,) int64: row of `means`


def of_anchors(value: Tensor, counted: Tensor) -> Tensor:
    """The supervised term of each row: 0 of one that is no anchor, unless it is NaN, which must show."""
    return torch.where(counted | value.isnan(), value, 0.0)


def correlate(
    unit: Rows,
    options: MLKDOptions,
    weight: Tensor | float,
    supervised_weight: Tensor | float,
    positives: Positives | None,
    grads: Sequence[Tensor | None],
    budget: int,
) -> tuple[Tensor, Tensor]:
    """The correlation and, given positives, the supervised term; writes their gradients to ``grads``."""
    chunks = _Chunks(unit, budget, cross=positives is not None and options.views == 2)
    correlation = _Correlation(unit, options.correlation_temperature)
    supervised = None
    if positives is not None:
        supervised = _Supervised(unit, options.supervised_temperature, options.views, positives)
    for chunk in chunks:
        correlation.add(chunk)
        if supervised is not None:
            supervised.add(chunk)
    if correlation.lacks_student_sums():
        for chunk in chunks:
            correlation.add_student(chunk)
    term = correlation.finish(weight)
    more = term.new_zeros(()) if supervised is None else supervised.finish(supervised_weight)
    needed = [grad is not None for grad in grads]
    keeps_sums = supervised is not None  # means of rows are subtracted from the products
    if any(needed):
        sums = [
            torch.zeros_like(x.rows, dtype=term.dtype) if need else None for x, need in zip(unit, needed, strict=True)
        ]
        for chunk in chunks:
            for side, total in enumerate(sums):
                if total is None:
                    continue
                w = correlation.coefficients(chunk, side)
                if supervised is not None and side < options.views:
                    w += supervised.own(chunk, side)
                rows, columns = chunk.rows, chunk.columns
                add_mm(total[rows], w, unit[side].rows[columns], keeps_sums=keeps_sums)
                if columns.stop > rows.stop:
                    right = w[:, rows.stop - rows.start :]
                    add_mm(total[rows.stop : columns.stop], right.T, unit[side].rows[rows], keeps_sums=keeps_sums)
            if supervised is not None and chunk.cross is not None:
                w = supervised.cross(chunk)
                if sums[0] is not None:
                    add_mm(sums[0][chunk.rows], w, unit.teacher.rows, keeps_sums=keeps_sums)
                if sums[1] is not None:
                    add_mm(sums[1], w.T, unit.student.rows[chunk.rows], keeps_sums=keeps_sums)
        for side, (total, grad) in enumerate(zip(sums, grads, strict=True)):
            if total is not None and grad is not None:
                _write(unit[side], total, None if supervised is None else supervised.pull(side), grad, budget)
    return term, more


class _Chunk(NamedTuple):
    rows: slice
    columns: slice  # from rows.start on
    student: Tensor  # (rows, columns) cosines s_i . s_j
    teacher: Tensor  # (rows, columns) cosines t_i . t_j
    cross: Tensor | None  # (rows, n) cosines s_i . t_j

    def exponentials(self, cosines: Tensor, temperature: float, shift: Tensor | None = None) -> Tensor:
        """exp(cosines / temperature - shift), 0 on the diagonal."""
        a = cosines / temperature
        e = (a if shift is None else a.sub_(shift)).exp_()
        e.diagonal().zero_()
        return e


class _Chunks:
    """The chunks of cosines; where one covers the batch it is computed once."""

    def __init__(self, unit: Rows, budget: int, cross: bool):
        self.unit, self.with_cross = unit, cross
        n, self.acc = unit.student.n, unit.student.inv_norm.dtype
        # Cosines, exponentials and coefficients: some eight matrices of a chunk's size.
        rows = max(1, budget // (8 * n * self.acc.itemsize))
        self.parts = [(slice(0, n), slice(0, n))] if rows >= n else trapezoids(n, rows)
        self.whole: _Chunk | None = None

    def __iter__(self) -> Iterator[_Chunk]:
        student, teacher = (x.rows for x in self.unit)
        if self.whole is not None:
            yield self.whole
            return
        for rows, columns in self.parts:
            chunk = _Chunk(
                rows,
                columns,
                mm(student[rows], student[columns].T, self.acc),
                mm(teacher[rows], teacher[columns].T, self.acc),
                mm(student[rows], teacher.T, self.acc) if self.with_cross else None,
            )
            if len(self.parts) == 1:
                self.whole = chunk
            yield chunk


class _Sums:
    """Sums over the other rows of exp(similarity), by row, and of further quantities weighted by it."""

    def __init__(self, like: Tensor, temperature: float, count: int):
        self.temperature = temperature
        # Where one shift serves all rows it is not needed at all: exp(40) n is far inside the range of fp32.
        self.largest = None if has_fixed_shift(like.dtype, temperature) else torch.full_like(like, -1 / temperature)
        self.totals = like.new_zeros(count, like.shape[0])

    def add(self, chunk: _Chunk, cosines: Tensor, index: slice, dim: int, factors: Sequence[Tensor] = ()) -> None:
        """Add the sums over ``dim`` of a part of a chunk to the rows ``index``; for rows with their own shift."""
        assert self.largest is not None
        a = cosines / self.temperature
        largest, totals = self.largest[index], self.totals[:, index]
        before = largest.clone()
        torch.maximum(largest, a.amax(dim), out=largest)
        e = a.sub_(largest.unsqueeze(dim)).exp_()
        totals.mul_((before - largest).exp_())
        for total, factor in zip(totals, (None, *factors), strict=False):
            total += (e if factor is None else e * factor).sum(dim)

    def lse(self) -> Tensor:
        total = self.totals[0].log()
        return total if self.largest is None else total + self.largest


def _without_diagonal(cosines: Tensor) -> Tensor:
    return cosines.clone().fill_diagonal_(-torch.inf)


def _both_ways(total: Tensor, chunk: _Chunk, values: Tensor) -> None:
    """Add the sums of a symmetric matrix's chunk to the rows (n,) of both of its sides."""
    total[chunk.columns] += values.sum(0)
    if chunk.columns.stop > chunk.rows.stop:
        total[chunk.rows] += values[:, chunk.rows.stop - chunk.rows.start :].sum(1)


def _add_transpose(w: Tensor, right: Tensor) -> Tensor:
    """Add to the coefficients (rows, columns) seen from the columns of a chunk those seen from its rows.

    Those of the diagonal's square are its transpose, for there the shift of a row is the largest similarity of its
    column: a library's s_i . s_j and s_j . s_i may differ in the last bit.
    """
    square = w[:, : w.shape[0]]
    square += square.T.clone()
    w[:, w.shape[0] :] += right
    return w


def log_ratio(total: Tensor, ratio: Tensor, student_total: Tensor | None) -> Tensor:
    """log(Zs / Zt) of each row.

    total: Zt. ratio: Zs / Zt - 1. student_total: Zs as its own sum; None where no Zs cancels (`has_small_student`).
    """
    if student_total is None:
        return ratio.log1p()
    return torch.where(ratio < LEAST_RATIO, (student_total / total).log(), ratio.log1p())


def student_factors(total: Tensor, ratio: Tensor, student_total: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors of exp(b) expm1(delta), exp(b) and exp(a) in the part of D of each row; arguments as `log_ratio`."""
    inverse = 1 / (total * (1 + ratio))
    if student_total is None:
        return inverse, -ratio * inverse, None
    is_small = ratio < LEAST_RATIO
    of_student = torch.where(is_small, 1 / student_total, 0.0)
    of_teacher = torch.where(is_small, -1 / total, -ratio * inverse)
    return torch.where(is_small, 0.0, inverse), of_teacher, of_student


def has_small_student(ratio: Tensor) -> bool:
    """True where the sum Zs of a row cancels in Zt + (Zs - Zt). ratio: Zs / Zt - 1, is read."""
    return ratio.numel() > 0 and ratio.amin().item() < LEAST_RATIO


class _Correlation:
    def __init__(self, unit: Rows, temperature: float):
        like = unit.student.inv_norm
        self.n, self.temperature = unit.student.n, temperature
        self.of_teacher, self.of_student = _Sums(like, temperature, 3), _Sums(like, temperature, 1)
        self.without_shift = self.of_teacher.largest is None
        self.scale: Tensor | float = 0.0  # of D in the gradient
        self.vectors: tuple[Tensor, ...] = ()
        # Few batches need the sums of exp(a); a GPU would have to synchronize to know.
        self.has_student_sums = self.without_shift and not is_readable(like)
        self.of_student_alone: Tensor | None = None  # the factor of exp(a) in D

    def lacks_student_sums(self) -> bool:
        """True where `add` has not taken the sums of exp(a), and a row needs its own."""
        if not self.without_shift or self.has_student_sums:
            return False
        total, _, difference = self.of_teacher.totals
        self.has_student_sums = has_small_student(difference / total)
        return self.has_student_sums

    def add_student(self, chunk: _Chunk) -> None:
        """Sums of exp(a)."""
        _both_ways(self.of_student.totals[0], chunk, chunk.exponentials(chunk.student, self.temperature))

    def add(self, chunk: _Chunk) -> None:
        """Sums of exp(b), exp(b) delta and exp(b) expm1(delta) = exp(a) - exp(b)."""
        if self.has_student_sums:
            self.add_student(chunk)
        if self.without_shift:
            e = chunk.exponentials(chunk.teacher, self.temperature)
            delta = (chunk.student - chunk.teacher).div_(self.temperature)
            total, moment, difference = self.of_teacher.totals
            _both_ways(total, chunk, e)
            _both_ways(moment, chunk, e * delta)
            _both_ways(difference, chunk, e.mul_(delta.expm1_()))
            return
        student, teacher = _without_diagonal(chunk.student), _without_diagonal(chunk.teacher)
        delta = self._delta(chunk)
        right = slice(chunk.rows.stop - chunk.rows.start, None)
        parts = [(chunk.columns, 0, slice(None))]
        if chunk.columns.stop > chunk.rows.stop:
            parts.append((chunk.rows, 1, right))
        for index, dim, part in parts:
            self.of_student.add(chunk, student[:, part], index, dim)
            factor = delta[:, part]
            self.of_teacher.add(chunk, teacher[:, part], index, dim, (factor,))

    def _delta(self, chunk: _Chunk) -> Tensor:
        if self.without_shift:
            return (chunk.student - chunk.teacher).div_(self.temperature)
        return (chunk.student / self.temperature).sub_(chunk.teacher / self.temperature)

    def finish(self, weight: Tensor | float) -> Tensor:
        """The term; weight: of the term in the gradient."""
        total, moment, difference = self.of_teacher.totals
        alone = total == 0  # no other row
        mean = torch.where(alone, 0.0, moment / total)
        self.scale = weight / (self.n * self.temperature)
        if self.without_shift:
            # Without another row all sums are 0; so are the exponentials that the factors are for.
            total = torch.where(alone, 1.0, total)
            student_total = None
            if self.has_student_sums:
                student_total = torch.where(alone, 1.0, self.of_student.totals[0])
            sums = total, difference / total, student_total
            divergence = log_ratio(*sums) - mean
            inverse, gap, self.of_student_alone = student_factors(*sums)
            self.vectors = inverse, gap, 1 / total, mean
        else:
            totals = self.of_student.totals[0], total
            assert self.of_student.largest is not None and self.of_teacher.largest is not None
            shift = self.of_student.largest - self.of_teacher.largest
            divergence = torch.where(alone, 0.0, (shift - mean) + (totals[0] / totals[1]).log())
            of_student, of_teacher = (torch.where(alone, 0.0, 1 / x) for x in totals)
            self.vectors = of_student, of_student, of_teacher, mean
        return divergence.mean()

    def coefficients(self, chunk: _Chunk, side: int) -> Tensor:
        """The coefficients (rows, columns) of the other rows in the gradient by one side's rows."""
        rows, columns = chunk.rows, chunk.columns
        of_student, gap, of_teacher, mean = self.vectors
        delta = self._delta(chunk)
        if self.without_shift:
            e = chunk.exponentials(chunk.teacher, self.temperature)
            if side == 0:
                w = delta.expm1_().mul_(of_student[rows, None] + of_student[columns])
                w += gap[rows, None] + gap[columns]
                w.mul_(e)
                if (alone := self.of_student_alone) is not None:
                    e = chunk.exponentials(chunk.student, self.temperature)
                    w.addcmul_(e, alone[rows, None] + alone[columns])
                return w.mul_(self.scale)
            w = delta.neg_().mul_(of_teacher[rows, None] + of_teacher[columns])
            weighted = mean * of_teacher
            w += weighted[rows, None] + weighted[columns]
            return w.mul_(e).mul_(self.scale)

        count = rows.stop - rows.start

        def softmax(cosines: Tensor, sums: _Sums, inverse: Tensor) -> tuple[Tensor, Tensor]:
            """Of the pairs seen from their columns; right of the diagonal's square also from their rows."""
            assert sums.largest is not None
            of_columns = chunk.exponentials(cosines, self.temperature, sums.largest[columns])
            of_rows = (cosines[:, count:] / self.temperature).sub_(sums.largest[rows, None]).exp_()
            return of_columns.mul_(inverse[columns]), of_rows.mul_(inverse[rows, None])

        w, right = softmax(chunk.teacher, self.of_teacher, of_teacher)
        if side == 0:
            p, p_right = w, right
            w, right = softmax(chunk.student, self.of_student, of_student)
            w, right = w.sub_(p), right.sub_(p_right)
        else:
            w, right = w.mul_(mean[columns] - delta), right.mul_(mean[rows, None] - delta[:, count:])
        return _add_transpose(w, right).mul_(self.scale)


class _Supervised:
    def __init__(self, unit: Rows, temperature: float, views: int, positives: Positives):
        self.n, self.temperature, self.views, self.positives = unit.student.n, temperature, views, positives
        like = unit.student.inv_norm
        self.sums = [_Sums(like, temperature, 1) for _ in range(views)]
        self.without_shift = self.sums[0].largest is None
        self.factors: list[Tensor] = []  # by view: (n,) coefficient over the sum
        self.partner = like.new_zeros(0)

    def add(self, chunk: _Chunk) -> None:
        for view, sums in enumerate(self.sums):
            cosines = (chunk.student, chunk.teacher)[view]
            if self.without_shift:
                _both_ways(sums.totals[0], chunk, chunk.exponentials(cosines, self.temperature))
                continue
            a = _without_diagonal(cosines)
            sums.add(chunk, a, chunk.columns, 0)
            if chunk.columns.stop > chunk.rows.stop:
                sums.add(chunk, a[:, chunk.rows.stop - chunk.rows.start :], chunk.rows, 1)
        if chunk.cross is None:
            return
        if self.without_shift:
            e = (chunk.cross / self.temperature).exp_()
            self.sums[0].totals[0][chunk.rows] += e.sum(1)
            self.sums[1].totals[0] += e.sum(0)
        else:
            self.sums[0].add(chunk, chunk.cross, chunk.rows, 1)
            self.sums[1].add(chunk, chunk.cross, slice(None), 0)

    def finish(self, weight: Tensor | float) -> Tensor:
        """The term; weight: of the term in the gradient."""
        positives = self.positives
        self.partner = positives.counted * (positives.factor * weight / self.temperature)  # (N,)
        lse = torch.cat([sums.lse() for sums in self.sums])
        value = of_anchors(lse - positives.cosine / self.temperature, positives.counted)
        for sums, partner in zip(self.sums, self.partner.split(self.n), strict=True):
            total = sums.totals[0]
            self.factors.append(torch.where(total == 0, 0.0, partner / total))
        return value.sum() * positives.factor

    def own(self, chunk: _Chunk, side: int) -> Tensor:
        """The coefficients (rows, columns) among the rows of one side."""
        cosines, factor, largest = (chunk.student, chunk.teacher)[side], self.factors[side], self.sums[side].largest
        return self._symmetric(chunk, cosines, (factor[chunk.rows], factor[chunk.columns]), (largest, largest), True)

    def cross(self, chunk: _Chunk) -> Tensor:
        """The coefficients (rows, n) of student rows with teacher rows."""
        assert chunk.cross is not None
        largest = self.sums[0].largest, self.sums[1].largest
        factors = self.factors[0][chunk.rows], self.factors[1]
        return self._symmetric(chunk, chunk.cross, factors, largest, False)

    def _symmetric(
        self,
        chunk: _Chunk,
        cosines: Tensor,
        factors: tuple[Tensor, Tensor],
        largest: tuple[Tensor | None, Tensor | None],
        is_own: bool,
    ) -> Tensor:
        """exp(a_ij) (f_i + f_j), with the shifts of the rows and of the columns where there are any."""

        def exponentials(shift: Tensor | None) -> Tensor:
            if is_own:
                return chunk.exponentials(cosines, self.temperature, shift)
            a = cosines / self.temperature
            return (a if shift is None else a.sub_(shift)).exp_()

        if largest[0] is None or largest[1] is None:
            return exponentials(None).mul_(factors[0][:, None] + factors[1])
        of_columns = exponentials(largest[1][chunk.columns] if is_own else largest[1]).mul_(factors[1])
        first = cosines.shape[0] if is_own else 0
        of_rows = (cosines[:, first:] / self.temperature).sub_(largest[0][chunk.rows, None]).exp_()
        of_rows.mul_(factors[0][:, None])
        return _add_transpose(of_columns, of_rows) if is_own else of_columns.add_(of_rows)

    def pull(self, side: int) -> tuple[Tensor, Positives] | None:
        """The coefficient (n,) of the class mean in the gradient by a side's rows; None where there is none."""
        if side >= self.views:
            return None
        part = slice(side * self.n, (side + 1) * self.n)
        of_side = Positives(
            cosine=self.positives.cosine[part],
            counted=self.positives.counted[part],
            factor=self.positives.factor,
            pull=self.positives.pull[part],
            means=self.positives.means,
            class_index=self.positives.class_index[part],
        )
        return self.partner[part] * of_side.pull, of_side


def _write(unit: UnitRows, product: Tensor, pull: tuple[Tensor, Positives] | None, grad: Tensor, budget: int) -> None:
    """Write the gradient by a side's logits from the gradient by its unit rows, which is overwritten."""
    for rows in slices(unit.n, max(1, budget // (4 * unit.d * product.itemsize))):
        g, x = product[rows], unit.rows[rows].to(product.dtype)
        if pull is not None:
            coefficient, positives = pull
            g.addcmul_(positives.means[positives.class_index[rows]], coefficient[rows, None], value=-1)
        g.addcmul_(x, -projection_coefficient(g, x)[:, None])
        grad[rows] = g.mul_(unit.inv_norm[rows, None])
