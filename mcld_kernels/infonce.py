r"""The one-pass algorithm of every fast backend: loss and gradient of all terms from that backend's kernels.

InfoNCE of unit rows A (n, d), the anchors, against unit rows K (m, d), the candidates; the positive of anchor i is
candidate i + offset, cosines are A_i . K_j and similarities a_ij = A_i . K_j / temperature. Everything is written for
the *negatives*, the sum over the other candidates, because late in training the positive is close to 1 and differences
with it cancel:

    off_i  = sum_{j != i+offset} exp(a_ij)                       log_off_i = log(off_i)
    L_i    = log(1 + off_i / exp(a_i,i+offset))                  = softplus(log_off_i - a_i,i+offset)
    q_i    = 1 - p_i,i+offset                                    = sigmoid(log_off_i - a_i,i+offset)
    dL_i/dA_i = (q_i / temperature) (N_i - K_i+offset),          N_i = sum_{j != i+offset} exp(a_ij) K_j / off_i

Label positives (the sample-wise term) share all of it; with M_c the mean of the candidates of class c,

    L'_i   = L_i + a_i,i+offset - A_i . M_y(i) / temperature
    dL'_i/dA_i = dL_i/dA_i + (K_i+offset - M_y(i)) / temperature

The gradient by the candidates is the transpose: dL/dK_j = sum_i w_i p_ij A_i / temperature less the positives. Both end
in one step, `finish`, with per-row factors s, u, z (1 / temperature is in them), partner rows P and class means M:

    g = s G - u P + z (P - M);      d(loss)/dX = (g - (g . x) x) / ||X||

The category-wise term is the same on the transposed logits. With a frozen teacher that is 4 n m d flop, and no matrix
larger than a chunk of rows is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .arguments import Options, stat_dtype
from .labels import Labels


class Unit(NamedTuple):
    """Logits (n, d) divided by the norms of their rows; a row without direction (norm <= eps) is zeros."""

    matrix: Tensor  # (>= n, >= d) operand dtype; what lies beyond (n, d) is zeros
    inverse: Tensor  # (n,) statistics dtype: 1 / norm, 0 without direction, NaN where the norm is not finite
    n: int
    d: int


class Negatives(NamedTuple):
    """Sums over the negatives for anchors `rows`: what `Kernels.contrast` hands to its sink."""

    rows: slice
    log_off: Tensor  # (rows,) statistics dtype; -inf where there is no negative
    product: Tensor  # (rows, >= d) statistics dtype: `scale` times this is N
    scale: Tensor  # (rows,) statistics dtype; 0 where there is no negative


class Contrast(NamedTuple):
    """What `Kernels.contrast` returns; None for what was not asked for."""

    log_off: Tensor  # (n,)
    scale: Tensor  # (n,) as in `Negatives`
    candidate: Tensor | None = None  # (m, >= d) statistics dtype: sum_{i: i+offset != j} weight_i p_ij A_i
    reverse: Negatives | None = None  # the sums with the candidates as anchors and the anchors as candidates


class Problem(NamedTuple):
    """A contrast to compute: anchors a (n, d), candidates k (m, d), and what is wanted of it."""

    a: Unit
    k: Unit
    temperature: float
    offset: int  # the positive of anchor i is candidate i + offset
    same: tuple[Tensor, Tensor] | None  # labels (n,), (m,): equal ones are dropped from the negatives
    factors: Callable[[slice, Tensor, Tensor], Factors]  # of anchors `rows`, given their log_off and scale
    sink: Callable[[Negatives], None] | None  # takes the sums chunk by chunk, every anchor once
    candidate: bool  # compute that field of the result
    reverse: bool  # likewise; only where `Kernels.can_reverse` says so

    def turned(self) -> tuple[Tensor, Tensor] | None:
        """`same` with the sides changed."""
        return None if self.same is None else (self.same[1], self.same[0])


class Share(NamedTuple):
    """An anchor's part in the mean of a term: constant x factor, for the anchors that count."""

    term: int
    constant: float
    factor: Tensor | None  # () statistics dtype
    counted: Tensor | None  # (n,) bool; None: all
    scale: float  # the term's weight in the loss is scale x weight
    weight: Tensor | None  # () statistics dtype


class Anchors(NamedTuple):
    """The anchors' part of a contrast: what their sums over the negatives are turned into factors with."""

    positive: Tensor  # (n,) cosines A_i . K_(i+offset)
    by_label: Tensor  # (n,) cosines A_i . M_rank(i); `positive` without means
    temperature: float
    shares: tuple[Share, ...]  # one, or two of different terms
    values: Tensor  # (shares, >= n) every anchor's part of the unweighted terms, to be written


class Factors(NamedTuple):
    """What `Kernels.factors` returns, (rows,) each, statistics dtype."""

    u: Tensor  # weight q / temperature
    s: Tensor  # u x scale
    z: Tensor | None  # weight / temperature of the sample-wise term, if it is among the shares


class Finish(NamedTuple):
    """The last step for `rows` of the logits: g = s product - u P + z (P - M), then through the normalisation."""

    out: Tensor  # (n, d) gradient, a view of any strides and dtype
    unit: Unit
    rows: slice
    product: Tensor  # (rows, >= d) statistics dtype; may be overwritten
    s: Tensor  # (rows,), as u and z
    u: Tensor
    z: Tensor | None
    partner: Unit  # P of row r is its row r + shift, zeros where there is none
    shift: int
    means: Tensor | None  # M of row r is its row rank[r]
    rank: Tensor | None  # (n,)
    accumulate: bool  # add to `out` instead of writing it


class Kernels(Protocol):
    """What a backend provides. All tensors are on one device; nothing may synchronise with it or write an input."""

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which products of logits of ``dtype`` take their operands."""

    def normalise(self, x: Tensor, dtype: torch.dtype, eps: float) -> Unit:
        """Normalise the rows of a view x (n, d) of any strides into operands of ``dtype``."""

    def class_means(self, unit: Unit, labels: Labels, counts: Tensor) -> Tensor:
        """Sum of the rows of each rank divided by ``counts`` (ranks,): (ranks, >= d), statistics dtype."""

    def positives(
        self, a: Unit, k: Unit, offset: int, means: Tensor | None, rank: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A_i . K_(i+offset) and, given means, A_i . M_rank(i) (else the first again): (n,), (n,), statistics dtype."""

    def describe(
        self, sides: tuple[Tensor, ...], ignore_index: int, classes: int, dtype: torch.dtype
    ) -> tuple[Labels, ...]:
        """As `labels.describe`."""

    def factors(self, anchors: Anchors, rows: slice, log_off: Tensor, scale: Tensor) -> Factors:
        """The factors of `rows`, given their log_off and scale (rows,); also writes their columns of the values."""

    def totals(
        self, values: Tensor, terms: tuple[int, ...], scale: tuple[float, ...], weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss () and terms (3,) from the values (parts, width), of which part i belongs to terms[i].

        The loss is the sum of scale[t] x weight[t] x term t; weight is (3,), statistics dtype, or None.
        """

    def contrast(self, problem: Problem) -> Contrast:
        """Contrast anchors with candidates."""

    def can_reverse(self, dtype: torch.dtype, temperature: float) -> bool:
        """Whether `contrast` can give both directions from one set of exponentials."""

    def finish(self, step: Finish) -> None:
        """Write (or add) the gradient of some rows of the logits."""


class Call(NamedTuple):
    """What a backend is asked for: student (n, C) against a teacher (m, C), both non-empty, n = m but for a part of a
    batch, in which row i of the student pairs with row i + offset of the teacher.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor | None  # (n,) labels
    weight: Tensor | None  # (3,) or None: those of `chosen` alone
    chosen: Options
    student_grad: bool
    teacher_grad: bool
    offset: int = 0
    teacher_target: Tensor | None = None  # (m,) labels, where n != m

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.student.dtype, self.teacher.dtype)


class Result(NamedTuple):
    """What a backend returns. Gradients are None where they were not asked for."""

    loss: Tensor  # () statistics dtype
    terms: Tensor  # (3,) statistics dtype, unweighted, 0 for a term that is not computed
    student: Tensor | None  # (n, C) gradient of the loss by the student
    teacher: Tensor | None  # (m, C) gradient of the loss by the teacher


class Gradient:
    """The gradient by one side's logits, summed over the terms."""

    def __init__(self, logits: Tensor, wanted: bool):
        self.wanted = wanted
        self.started = False  # whether a term has written it, so that the next one adds
        self.columns = False  # whether terms see its transpose
        dtype = gradient_dtype(logits.dtype)
        self._value = torch.empty(logits.shape, dtype=dtype, device=logits.device) if wanted else None

    @property
    def view(self) -> Tensor:
        assert self._value is not None
        return self._value.T if self.columns else self._value

    def result(self) -> Tensor | None:
        return self._value.zero_() if self._value is not None and not self.started else self._value


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that holds a gradient until the upstream scalar is known.

    A mean over a large batch has gradients below the range of fp16, and a GradScaler's factor comes only in backward.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def evaluate(kernels: Kernels, call: Call) -> Result:
    """Loss, terms and gradients of a call; the category-wise term and teacher anchors need n == m."""
    student, teacher, target, weight, chosen = call[:5]
    if student.shape[0] != teacher.shape[0] and (chosen.active[2] or chosen.direction != "student"):
        raise ValueError(
            f"{student.shape[0]} student rows against {teacher.shape[0]} teacher rows: only the row terms with "
            "direction='student' are defined for that"
        )
    stat = stat_dtype(call.dtype)
    weight = None if weight is None else weight.to(stat)
    run = _Run(kernels, chosen, weight, stat, kernels.operand_dtype(call.dtype), student)
    gradients = Gradient(student, call.student_grad), Gradient(teacher, call.teacher_grad)

    of_student = of_teacher = None
    if target is not None and any(chosen.label_terms):
        sides = (target,) if call.teacher_target is None else (target, call.teacher_target)
        described = kernels.describe(sides, chosen.ignore_index, student.shape[1], stat)
        of_student, of_teacher = described[0], described[-1]
    # The column copies are gone before the row copies are made.
    if chosen.active[2]:
        _category(run, student, teacher, of_student, gradients)
    if chosen.active[0] or chosen.active[1]:
        _rows(run, (student, teacher), (of_student, of_teacher), gradients, call.offset)
    loss, terms = kernels.totals(run.values, tuple(run.parts), chosen.scale, run.weight)
    return Result(loss, terms, gradients[0].result(), gradients[1].result())


class _Run:
    """One call: what holds for all terms, and what each anchor adds to them."""

    def __init__(
        self,
        kernels: Kernels,
        chosen: Options,
        weight: Tensor | None,
        stat: torch.dtype,
        operand: torch.dtype,
        student: Tensor,
    ):
        self.kernels, self.chosen, self.weight, self.stat, self.operand = kernels, chosen, weight, stat, operand
        directions = 2 if chosen.direction == "symmetric" else 1
        parts = directions * sum(chosen.active[:2]) + chosen.active[2]
        self.parts: list[int] = []  # the term of each row of `values` that is taken
        self.values = student.new_zeros(parts, max(student.shape), dtype=stat)

    def share(self, term: int, constant: float, factor: Tensor | None = None, counted: Tensor | None = None) -> Share:
        weight = None if self.weight is None else self.weight[term]
        return Share(term, constant, factor, counted, self.chosen.scale[term], weight)

    def take(self, shares: list[Share]) -> Tensor:
        """Rows of `values` for these shares."""
        first = len(self.parts)
        self.parts += [share.term for share in shares]
        return self.values[first : len(self.parts)]


class _Side(NamedTuple):
    """One side's unit rows, where the gradient by its logits goes and, for row terms, its labels."""

    unit: Unit
    gradient: Gradient
    labels: Labels | None = None


class _Anchors:
    """The anchors' part of a contrast: positives, per-anchor weights, and what follows once log_off is known."""

    def __init__(
        self, run: _Run, anchors: _Side, candidates: _Side, offset: int, temperature: float, shares: list[Share]
    ):
        self.run, self.side, self.candidates, self.offset, self.shares = run, anchors, candidates, offset, shares
        self.means = self.rank = None
        if any(share.term == 1 for share in shares):
            assert anchors.labels is not None and candidates.labels is not None
            counts = candidates.labels.counts
            self.means = run.kernels.class_means(candidates.unit, candidates.labels, counts)  # (ranks, d)
            self.rank = anchors.labels.rank
        positive, by_label = run.kernels.positives(anchors.unit, candidates.unit, offset, self.means, self.rank)
        self.request = Anchors(positive, by_label, temperature, tuple(shares), run.take(shares))
        self._last: tuple[slice, Factors] | None = None

    def factors(self, rows: slice, log_off: Tensor, scale: Tensor) -> Factors:
        if self._last is None or self._last[0] != rows:
            self._last = rows, self.run.kernels.factors(self.request, rows, log_off, scale)
        return self._last[1]

    def sink(self, negatives: Negatives) -> None:
        """Finish the gradient by the anchors of a chunk."""
        rows = negatives.rows
        u, s, z = self.factors(rows, negatives.log_off, negatives.scale)
        gradient = self.side.gradient
        step = Finish(
            gradient.view, self.side.unit, rows, negatives.product, s, u, z,
            self.candidates.unit, self.offset, self.means, self.rank, gradient.started,
        )  # fmt: skip
        self.run.kernels.finish(step)


def _contrast(
    run: _Run,
    anchors: _Side,
    candidates: _Side,
    offset: int,
    temperature: float,
    shares: list[Share],
    masked: bool = False,
    reverse: list[Share] | None = None,
) -> None:
    """One direction of the terms of ``shares``, or both with the candidates' own ``reverse`` shares (offset 0)."""
    forward = _Anchors(run, anchors, candidates, offset, temperature, shares)
    backward = None if reverse is None else _Anchors(run, candidates, anchors, -offset, temperature, reverse)
    same = None
    if masked:
        assert anchors.labels is not None and candidates.labels is not None
        same = anchors.labels.same, candidates.labels.same
    problem = Problem(
        anchors.unit,
        candidates.unit,
        temperature,
        offset,
        same,
        forward.factors,
        sink=forward.sink if anchors.gradient.wanted else None,
        candidate=candidates.gradient.wanted,
        reverse=backward is not None,
    )
    sums = run.kernels.contrast(problem)
    if problem.sink is not None:
        anchors.gradient.started = True
    everything = slice(0, anchors.unit.n)
    if problem.sink is None or problem.candidate:  # the sink has written the values, but kept the factors of a chunk
        factors = forward.factors(everything, sums.log_off, sums.scale)
    if backward is not None:
        assert sums.reverse is not None
        back = backward.factors(slice(0, candidates.unit.n), sums.reverse.log_off, sums.reverse.scale)
    if sums.candidate is not None:
        _finish_candidates(forward, factors, sums, None if backward is None else back)


def _finish_candidates(forward: _Anchors, factors: Factors, sums: Contrast, back: Factors | None) -> None:
    """Finish the gradient by the candidates and, with it, that of the reverse direction, whose anchors they are."""
    run, anchors, candidates = forward.run, forward.side, forward.candidates
    temperature, offset = forward.request.temperature, forward.offset
    product, u = sums.candidate, factors.u
    assert product is not None
    if anchors.unit.n != candidates.unit.n:
        u = u.new_zeros(candidates.unit.n)
        u[offset : offset + anchors.unit.n] = factors.u
    s = torch.full_like(u, 1 / temperature)
    means = rank = z = None
    if forward.means is not None:
        assert anchors.labels is not None and candidates.labels is not None
        # Candidates weigh as anchors of their class do, whichever row of it they are.
        share = next(share for share in forward.shares if share.term == 1)
        assert share.factor is not None
        z = candidates.labels.valid * (share.factor * (share.scale * share.constant / temperature))
        z = z if share.weight is None else z * share.weight
        means = run.kernels.class_means(anchors.unit, anchors.labels, candidates.labels.counts)
        rank = candidates.labels.rank
    if back is not None:
        assert sums.reverse is not None
        product = product.mul_(1 / temperature)
        product.addcmul_(sums.reverse.product, back.s[:, None])
        s, u = torch.ones_like(u), u + back.u
        # Both directions pull towards the same partner and the same class means: those of the anchors' side.
        z = None if z is None or back.z is None else z + back.z
    gradient = candidates.gradient
    step = Finish(
        gradient.view, candidates.unit, slice(0, candidates.unit.n), product, s, u, z,
        anchors.unit, -offset, means, rank, gradient.started,
    )  # fmt: skip
    run.kernels.finish(step)
    gradient.started = True


def _category(
    run: _Run, student: Tensor, teacher: Tensor, labels: Labels | None, gradients: tuple[Gradient, Gradient]
) -> None:
    sides: list[_Side] = []
    for logits, gradient in zip((student, teacher), gradients, strict=True):
        gradient.columns = True
        sides.append(_Side(run.kernels.normalise(logits.T, run.operand, run.chosen.eps), gradient))
    if run.chosen.present_only:
        assert labels is not None
        share = run.share(2, 1.0, labels.poison / labels.present.sum().clamp(min=1), labels.present)
    else:
        share = run.share(2, 1 / student.shape[1])
    _contrast(run, sides[0], sides[1], 0, run.chosen.temperature[2], [share])


def _rows(
    run: _Run,
    logits: tuple[Tensor, Tensor],
    labels: tuple[Labels | None, Labels | None],
    gradients: tuple[Gradient, Gradient],
    offset: int,
) -> None:
    chosen, kernels = run.chosen, run.kernels
    sides = []
    for x, described, gradient in zip(logits, labels, gradients, strict=True):
        gradient.columns = False
        sides.append(_Side(kernels.normalise(x, run.operand, chosen.eps), gradient, described))
    student, teacher = sides
    directions = {"student": [(student, teacher, offset)], "teacher": [(teacher, student, -offset)]}
    directions["symmetric"] = directions["student"] + directions["teacher"]
    pairs = directions[chosen.direction]
    masked = chosen.mask_same_class and chosen.active[0]
    shared = all(chosen.active[:2]) and chosen.temperature[0] == chosen.temperature[1] and not masked
    for group in [(0, 1)] if shared else [(term,) for term in (0, 1) if chosen.active[term]]:
        temperature, mask = chosen.temperature[group[0]], masked and group == (0,)
        if len(pairs) == 2 and not teacher.gradient.wanted and kernels.can_reverse(run.operand, temperature):
            of_teacher, of_student = (_shares(run, side, group, 2) for side in (teacher, student))
            _contrast(run, teacher, student, -offset, temperature, of_teacher, mask, reverse=of_student)
            continue
        for anchors, candidates, step in pairs:
            _contrast(run, anchors, candidates, step, temperature, _shares(run, anchors, group, len(pairs)), mask)


def _shares(run: _Run, side: _Side, group: tuple[int, ...], directions: int) -> list[Share]:
    shares = []
    for term in group:
        if term == 1:
            assert side.labels is not None
            shares.append(run.share(1, 1 / directions, side.labels.share, side.labels.valid))
        else:
            poison = None
            if run.chosen.mask_same_class:
                assert side.labels is not None
                poison = side.labels.poison
            shares.append(run.share(0, 1 / (side.unit.n * directions), poison))
    return shares
