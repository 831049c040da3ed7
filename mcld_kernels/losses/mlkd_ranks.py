r"""MLKD over ranks: this rank's part of the loss of the global batch, and its gradient.

With P, Q, delta and the sums of `mlkd_correlation` over all B rows, and gap_i = log Zs_i - log Zt_i,

    gap_i = log1p(sum_j P_ij expm1(delta_ij)),    D_ij = Q_ij - P_ij = P_ij expm1(delta_ij - gap_i),
    dL/ds_i = sum_j (D_ij + D_ji) s_j / (t B),    P_ji = exp(b_ij - log Zt_j),

so that the coefficients of a pair follow from its two cosines and from vectors (B,): log Zt, gap and mean. Where one
pair dominates, mean_i - delta_ij cancels: log Zt is kept as the largest b_ij and the rest, which round less. Where Zs
is small beside Zt, this form of gap cancels, and the logarithms are subtracted. Of the supervised term it is the
log-sum-exp of each of its anchors. Each rank computes those of its own rows; one gather gives the unit rows of both
sides to all, one the labels, and one, for the gradient, the vectors. Alignment is local.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import Ranks
from ..family_options import MLKDOptions
from ..gram import add_mm
from ..kernels import KernelSet, LossInputs, LossOutputs, UnitRows, has_fixed_shift
from ..options import grad_dtype, is_readable
from ..over_ranks.own_rows import Chunk, Chunks, finite, through_normalization
from .mlkd_correlation import LEAST_RATIO, Positives, has_small_student, of_anchors
from .mlkd_parts import align, find_positives


def compute_over_ranks(kernels: KernelSet, inputs: LossInputs, ranks: Ranks) -> LossOutputs:
    """This rank's part of loss and terms, and its gradients, for a global batch that is not empty."""
    options, acc = inputs.options, inputs.acc_dtype
    kernels_of_torch = KernelSet(kernels.tuning)
    poison: Tensor | float = 1.0 if ranks.poison is None else ranks.poison.to(acc)
    factors: Sequence[Tensor | float] = [f * poison for f in options.term_weight]
    if inputs.weight is not None:
        factors = [w * f for w, f in zip(inputs.weight.to(acc).unbind(), factors, strict=True)]
    correlation, alignment, supervised = (w != 0 for w in options.term_weight)
    zero = inputs.student.new_zeros((), dtype=acc)
    terms = [zero, zero, zero]
    grads = [
        torch.zeros(logits.shape, dtype=grad_dtype(logits.dtype), device=logits.device) if needed else None
        for logits, needed in ((inputs.student, inputs.student_grad), (inputs.teacher, inputs.teacher_grad))
    ]
    if correlation or supervised:
        operand = kernels.operand_dtype(inputs.dtype)
        pairs = _Pairs(kernels_of_torch, inputs, ranks, operand)
        terms[0], terms[2] = pairs.sum()
        pairs.write_gradients(grads, factors[0], factors[2])
    if alignment:
        terms[1] = align(kernels_of_torch, inputs, factors[1] * ranks.count, grads, ranks.total) * ranks.count
    loss = zero
    for factor, term, active in zip(factors, terms, options.term_weight, strict=True):
        if active:
            loss = loss + factor * term
    # A factor holds the NaN of ranks that disagree; so do the terms.
    return LossOutputs(loss=loss, terms=torch.stack(terms) * poison, student_grad=grads[0], teacher_grad=grads[1])


class _Pairs:
    """The terms of pairs of rows, correlation and supervised; sides are 0, the student, and 1, the teacher."""

    def __init__(self, kernels: KernelSet, inputs: LossInputs, ranks: Ranks, operand: torch.dtype):
        options: MLKDOptions = inputs.options
        self.options, self.ranks, self.acc = options, ranks, inputs.acc_dtype
        self.correlation, _, self.supervised = (w != 0 for w in options.term_weight)
        self.has_cross = self.supervised and options.views == 2
        sides = 2 if self.correlation or self.has_cross else 1
        self.unit: list[UnitRows] = [
            kernels.l2_normalize(x, operand, options.eps) for x in (inputs.student, inputs.teacher)[:sides]
        ]
        self.positives: Positives | None = None
        labels = None
        if self.supervised:
            assert inputs.target is not None
            labels = ranks.all_gather(inputs.target.contiguous())
        self.everything = ranks.all_gather(torch.stack([x.rows for x in self.unit], 1)).unbind(1)  # (B, C) each
        if labels is not None:
            rows = torch.cat(self.everything[: options.views])
            if options.views == sides:
                self.everything = rows.split(ranks.total)  # one copy is enough
            one = torch.ones(rows.shape[0], dtype=self.acc, device=rows.device)
            both = UnitRows(rows=rows, inv_norm=one, n=rows.shape[0], d=rows.shape[1])
            self.positives = find_positives(kernels, labels, options, both)
        self.pairs = [(side, side) for side in range(sides)] + [(0, 1), (1, 0)] * self.has_cross
        self.chunks = Chunks(
            [(self.unit[own].rows, self.everything[other]) for own, other in self.pairs],
            ranks,
            self.acc,
            kernels.tuning.chunk_bytes,
            4 + 2 * len(self.pairs),
        )
        # |delta_ij - gap_i| <= 4 / t: then its exponential is a number, and so is P_ij beside it.
        self.is_fixed = has_fixed_shift(operand, options.correlation_temperature / 2)
        # Vectors of own rows: of the correlation the two parts of log Zt, gap and mean, then a log-sum-exp for each
        # supervised view.
        count = 4 * self.correlation + options.views * self.supervised
        self.own = self.unit[0].inv_norm.new_zeros(self.unit[0].n, count)
        self.of_all = self.own

    def _of(self, chunk: Chunk, own: int, other: int) -> Tensor:
        """The cosines of a chunk's rows of one side with all rows of another."""
        return chunk.cosines[self.pairs.index((own, other))]

    def _delta(self, chunk: Chunk) -> Tensor:
        delta = (self._of(chunk, 0, 0) - self._of(chunk, 1, 1)).div_(self.options.correlation_temperature)
        delta.diagonal(chunk.first).zero_()
        return delta

    def sum(self) -> tuple[Tensor, Tensor]:
        """This rank's part of both terms."""
        options, ranks, own = self.options, self.ranks, self.ranks.own
        views = self.own[:, 4 * self.correlation :]
        divergence = self.own.new_zeros(self.own.shape[0])
        for chunk in self.chunks:
            rows = chunk.rows
            if self.correlation:
                temperature = options.correlation_temperature
                b = chunk.without_self(self._of(chunk, 1, 1), temperature)
                largest = finite(b.amax(1))
                b -= largest[:, None]
                rest = finite(b.logsumexp(1))
                p, delta = b.sub_(rest[:, None]).exp_(), self._delta(chunk)
                mean = (p * delta).sum(1)
                ratio = p.mul_(delta.expm1_()).sum(1) if self.is_fixed else None
                if ratio is not None and is_readable(ratio) and not has_small_student(ratio):
                    gap = ratio.log1p()
                else:
                    gap = finite(chunk.without_self(self._of(chunk, 0, 0), temperature).logsumexp(1)) - (largest + rest)
                    if ratio is not None:
                        gap = torch.where(ratio < LEAST_RATIO, gap, ratio.log1p())
                divergence[rows] = gap - mean
                self.own[rows, :4] = torch.stack((largest, rest, gap, mean), 1)
            for view in range(options.views * self.supervised):
                temperature = options.supervised_temperature
                lse = chunk.without_self(self._of(chunk, view, view), temperature).logsumexp(1)
                if self.has_cross:
                    lse = torch.logaddexp(lse, (self._of(chunk, view, 1 - view) / temperature).logsumexp(1))
                views[rows, view] = finite(lse)
        term = divergence.sum() * (ranks.count / ranks.total)
        more = term.new_zeros(())
        if self.positives is not None:
            for view in range(options.views):
                of_view = slice(view * ranks.total + own.start, view * ranks.total + own.stop)
                cosine, counted = self.positives.cosine[of_view], self.positives.counted[of_view]
                value = views[:, view] - cosine / options.supervised_temperature
                more = more + of_anchors(value, counted).sum()
            more = more * (self.positives.factor * ranks.count)
        return term, more

    def write_gradients(self, grads: list[Tensor | None], weight: Tensor | float, supervised: Tensor | float) -> None:
        """Write the gradients of both terms by own rows; their factors in the loss are given."""
        with_supervised = [self.supervised and view < self.options.views for view in range(2)]
        sides = [
            side for side, grad in enumerate(grads) if grad is not None and (self.correlation or with_supervised[side])
        ]
        if not sides:
            return
        self.of_all = self.ranks.all_gather(self.own)
        pull = None
        if self.positives is not None:
            positives, temperature = self.positives, self.options.supervised_temperature
            partner = positives.counted * (positives.factor * supervised * self.ranks.count / temperature)
            pull = (partner * positives.pull).view(self.options.views, -1)
            partner = partner.view(self.options.views, -1)  # (views, B)
        scale = weight * self.ranks.count / (self.ranks.total * self.options.correlation_temperature)
        for chunk in self.chunks:
            for side in sides:
                grad = grads[side]
                assert grad is not None
                w = self._correlation(chunk, side).mul_(scale) if self.correlation else None
                g = self.own.new_zeros(chunk.rows.stop - chunk.rows.start, self.unit[side].d)
                if with_supervised[side]:
                    assert pull is not None and self.positives is not None
                    own = self._supervised(chunk, side, side, partner)
                    w = own if w is None else w.add_(own)
                    if self.has_cross:
                        add_mm(
                            g,
                            self._supervised(chunk, side, 1 - side, partner),
                            self.everything[1 - side],
                            keeps_sums=True,
                        )
                    places = slice(chunk.first, chunk.first + g.shape[0])
                    class_index = self.positives.class_index.view(self.options.views, -1)[side, places]
                    g.addcmul_(self.positives.means[class_index], pull[side, places, None], value=-1)
                assert w is not None
                add_mm(g, w, self.everything[side], keeps_sums=with_supervised[side])
                grad[chunk.rows] = through_normalization(g, self.unit[side], chunk.rows)

    def _correlation(self, chunk: Chunk, side: int) -> Tensor:
        """The coefficients (rows, B) of the other rows in the gradient of the correlation, times t B."""
        temperature = self.options.correlation_temperature
        b, delta = chunk.without_self(self._of(chunk, 1, 1), temperature), self._delta(chunk)
        a = None
        if side == 0 and not self.is_fixed:
            a = chunk.without_self(self._of(chunk, 0, 0), temperature)
        total = None
        of_rows = self.own[chunk.rows, :4, None].unbind(1)  # (rows, 1) each
        for largest, rest, gap, mean in (of_rows, self.of_all[:, :4].unbind(1)):
            p = (b - largest).sub_(rest).exp_()
            if side == 1:
                w = p.mul_(mean - delta)
            elif a is None:
                w = p.mul_((delta - gap).expm1_())
            else:
                w = (a - (largest + rest + gap)).exp_().sub_(p)
            total = w if total is None else total.add_(w)
        assert total is not None
        return total

    def _supervised(self, chunk: Chunk, own: int, other: int, partner: Tensor) -> Tensor:
        """The coefficients (rows, B) of another side's rows in the gradient of the supervised term by own rows."""
        temperature, first = self.options.supervised_temperature, 4 * self.correlation
        cosines = self._of(chunk, own, other)
        a = chunk.without_self(cosines, temperature) if own == other else cosines / temperature
        places = slice(chunk.first, chunk.first + a.shape[0])
        w = (a - self.own[chunk.rows, first + own, None]).exp_().mul_(partner[own, places, None])
        return w.addcmul_(a.sub_(self.of_all[:, first + other]).exp_(), partner[other])
