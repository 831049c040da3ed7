"""The interface of a kernel set: what a backend provides, and the structures that it exchanges with a loss.

Notation of `infonce`: unit anchors A (n, d), unit candidates K (m, d), similarities a_ij = A_i . K_j / temperature, the
positive of anchor i is candidate i + offset, all other candidates are its negatives.

`KernelSet` has defaults in PyTorch operations for every small step, so that a backend owes `contrast` and overrides
what it does differently. The accumulator dtype (`acc_dtype`) is fp64 for fp64 logits and fp32 for all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import labels as labelling
from .labels import Labels
from .options import acc_dtype

# exp(x) of fp32 and bf16 is a normal number down to exp(-87); the products of exponentials with unit rows should be
# normal as well. fp16 with a shift that uses its range: 2^14 exp(-20) is 2^-15, subnormal with 10 bits, more than bf16.
_SHIFT_RANGE = {torch.float16: 20.0}
_SHIFT_RANGE_DEFAULT = 80.0

Positives = Literal["diagonal", "label"]
MeanOf = Literal["class", "anchor"]  # of the candidates of a class, or for each anchor, as soft labels weigh them


def slices(n: int, step: int, first: int = 0) -> list[slice]:
    """Consecutive slices of at most ``step`` that cover range(first, n)."""
    return [slice(start, min(start + step, n)) for start in range(first, n, step)]


# Rows that several operations change one after another: so many numbers stay in a CPU's caches, and in memory that
# malloc keeps, since the first touch of a new page costs as much as the arithmetic on it.
_PART_NUMBERS = 1 << 18
_PART_COLUMNS = 256  # of logits, where they are the rows: a part then reads runs of so many numbers


def _cpu_parts(x: Tensor, first: int, stop: int) -> list[slice]:
    """Parts of the rows of x (n, d), from ``first`` to ``stop``, for which the operations of a step run in turn."""
    step = max(1, _PART_NUMBERS // x.shape[1])
    if x.stride(1) != 1:
        step = max(_PART_COLUMNS, step)
    return slices(stop, step, first)


def has_fixed_shift(operand_dtype: torch.dtype, temperature: float) -> bool:
    """True if one shift of the exponent serves all rows; otherwise a row needs its own maximum.

    Similarities lie in [-1 / temperature, 1 / temperature], so exponentials span at most exp(2 / temperature).
    """
    return 2 / temperature <= _SHIFT_RANGE.get(operand_dtype, _SHIFT_RANGE_DEFAULT)


def is_in_memory(*tensors: Tensor | None) -> bool:
    """True where the memory of all tensors holds their numbers.

    That of a negated view (a conjugate's imaginary part) holds the negated numbers; lazy zeros have none.
    """
    for x in tensors:
        if x is not None and (x.is_neg() or x._is_zerotensor()):
            return False
    return True


def projection_coefficient(gradient: Tensor, unit: Tensor) -> Tensor:
    """g . x / x . x of rows (n, d): (n,); 0 for a zero row.

    Dividing removes the radial component of g even though a rounded operand has |x| != 1.
    """
    square = torch.linalg.vecdot(unit, unit)
    return torch.linalg.vecdot(gradient, unit) / torch.where(square == 0, 1.0, square)


@dataclass(slots=True, kw_only=True)
class UnitRows:
    """Logits (n, d) divided by the L2 norm of each row; a row with norm <= eps is zeros."""

    rows: Tensor  # (>= n, >= d) operand dtype; zeros beyond (n, d)
    inv_norm: Tensor  # (n,) acc dtype: 1 / norm, 0 for norm <= eps, NaN for a norm that is not finite
    n: int
    d: int


@dataclass(slots=True, kw_only=True)
class ContrastArgs:
    """A contrast of unit anchors (n, d) with unit candidates (m, d), and the results that are needed."""

    anchors: UnitRows
    candidates: UnitRows
    temperature: float
    offset: int  # the positive of anchor i is candidate i + offset
    mask: tuple[Tensor, Tensor] | None = None  # label keys (n,), (m,): equal ones are not negatives
    anchor_grad: bool = False
    candidate_grad: bool = False
    reverse: bool = False  # also the sums with both sides exchanged; only where `KernelSet.can_reverse` allows it
    is_bounded: bool = True  # |A_i . K_j| <= 1; otherwise every row needs its own maximum
    keeps_sums: bool = False  # the products are sums whose rounding shows: means of rows are subtracted from them

    def has_fixed_shift(self) -> bool:
        """True if one shift of the exponent serves all rows."""
        return self.is_bounded and has_fixed_shift(self.anchors.rows.dtype, self.temperature)


@dataclass(slots=True, kw_only=True)
class NegativeSums:
    """Sums over the negatives of the anchors `rows`. Tensors of a chunk are valid until the next chunk is taken."""

    rows: slice
    neg_lse: Tensor  # (rows,) acc dtype: log sum_j exp(a_ij); -inf without a negative
    inv_neg_sum: Tensor  # (rows,) acc dtype: what normalizes `product`; 0 without a negative
    product: Tensor | None  # (rows, >= d) acc dtype: inv_neg_sum x product = sum_j exp(a_ij) K_j / sum_j exp(a_ij)


@dataclass(slots=True, kw_only=True)
class ContrastSums:
    """The sums of a contrast after its last chunk; None for those that the arguments do not request."""

    candidate_product: Tensor | None = None  # (m, >= d) acc dtype: sum_i partner_i p_ij A_i over the negatives' pairs
    reverse: NegativeSums | None = None  # of all candidates, taken as anchors


@dataclass(slots=True, kw_only=True)
class TermWeight:
    """The weight of each anchor in a term: constant x factor where counted; in the loss, x term_weight x weight."""

    term: int  # index of the term
    positives: Positives
    constant: float
    factor: Tensor | None = None  # () acc dtype
    counted: Tensor | None = None  # (n,) bool; None: every anchor
    term_weight: float = 1.0
    weight: Tensor | None = None  # () acc dtype


@dataclass(slots=True, kw_only=True)
class AnchorTerms:
    """The anchors' side of a contrast: the positives, and one or two terms that share the sums over the negatives."""

    positive: Tensor  # (n,) acc dtype: cosines A_i . K_(i + offset)
    label_positive: Tensor  # (n,) acc dtype: cosines A_i . class mean of i; `positive` without class means
    temperature: float
    weights: tuple[TermWeight, ...]
    per_anchor: Tensor  # (len(weights), >= n) acc dtype, to be written: each anchor's part of the unweighted term


@dataclass(slots=True, kw_only=True)
class GradCoefficients:
    """Coefficients of the gradient by anchors `rows`, (rows,) each, acc dtype; `GradEpilogueArgs` uses them."""

    partner: Tensor  # total weight x (1 - probability of the positive) / temperature
    product: Tensor  # partner x inv_neg_sum
    class_mean: Tensor | None  # weight / temperature of the term with label positives, if there is one


@dataclass(slots=True, kw_only=True)
class GradEpilogueArgs:
    """The gradient by rows x of logits, with P the partner's and M the class mean's row:

    g = product_coef product - partner_coef P + class_mean_coef (P - M), then (g - (g . x / x . x) x) inv_norm.
    """

    out: Tensor  # (n, d) gradient, a view of any strides and dtype
    unit: UnitRows
    rows: slice
    product: Tensor  # (rows, >= d) acc dtype; may be overwritten
    coefficients: GradCoefficients
    partner: UnitRows  # P of row r is its row r + offset; zeros where there is none
    offset: int
    class_means: Tensor | None  # (classes present, >= d) acc dtype; M of row r is its row class_index[r]
    class_index: Tensor | None  # (n,) int64
    accumulate: bool  # add to `out` instead of writing it


@dataclass(slots=True, kw_only=True)
class AnchorPassArgs:
    """The arguments of `KernelSet.anchor_pass` beside its contrast: the anchors' terms and their gradient."""

    weights: tuple[TermWeight, ...]
    per_anchor: Tensor  # (len(weights), >= n) acc dtype, to be written, as in `AnchorTerms`
    out: Tensor | None  # (n, d) gradient by the anchors' logits, a view of any strides and dtype; None: none is needed
    class_means: Tensor | None  # (classes present, >= d) acc dtype, of anchors (n, d); for label positives
    class_index: Tensor | None  # (n,) int64
    accumulate: bool  # add to `out` instead of writing it


@dataclass(slots=True, kw_only=True)
class LossInputs:
    """Student logits (n, C) and teacher logits (m, C), both non-empty; n = m except for a part of a batch.

    Its tensors hold their numbers in memory: kernels read them by their addresses.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor | None  # (n,) int64
    weight: Tensor | None  # (terms,), multiplies the options' term_weight
    options: Any  # of the loss
    student_grad: bool
    teacher_grad: bool
    offset: int = 0  # the positive of student row i is teacher row i + offset
    teacher_target: Tensor | None = None  # (m,) int64, where n != m
    labels_are_classes: bool = False  # known to be in [0, C), none ignored
    extra: Mapping[str, Tensor | None] = field(default_factory=dict)  # the further tensors of the loss's operator
    dtype: torch.dtype = field(init=False)  # the wider one of both sides
    acc_dtype: torch.dtype = field(init=False)  # of sums and of the loss

    def __post_init__(self) -> None:
        given = self.student, self.teacher, self.target, self.weight, self.teacher_target, *self.extra.values()
        if not is_in_memory(*given):
            self._copy_into_memory()
        student, teacher = self.student.dtype, self.teacher.dtype
        self.dtype = student if student == teacher else torch.promote_types(student, teacher)
        self.acc_dtype = acc_dtype(self.dtype)

    def _copy_into_memory(self) -> None:
        self.student, self.teacher = self.student.clone(), self.teacher.clone()
        for name in ("target", "weight", "teacher_target"):
            x = getattr(self, name)
            setattr(self, name, None if x is None else x.clone())
        self.extra = {name: None if x is None else x.clone() for name, x in self.extra.items()}


@dataclass(slots=True, kw_only=True)
class LossOutputs:
    """Loss, terms and gradients; a gradient is None where it was not asked for."""

    loss: Tensor  # () acc dtype
    terms: Tensor  # (terms,) acc dtype, unweighted; 0 for a term that is not computed
    student_grad: Tensor | None  # (n, C)
    teacher_grad: Tensor | None  # (m, C)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Constants that change the speed or memory of a kernel set, never its results beyond rounding."""

    chunk_bytes: int  # what a chunk of exponentials may take
    # A tensor of temperature is not read, as on a GPU, where reading it would synchronize. Tests set it on a CPU.
    scales_by_temperature: bool = False

    def replace(self, **fields: object) -> Tuning:
        return dataclasses.replace(self, **fields)  # type: ignore[arg-type]


class Contrast(Protocol):
    """A contrast under way. Take every chunk once, in order; `sums` is complete after the last one."""

    def chunks(self) -> Iterator[NegativeSums]:
        """Sums over the negatives, chunk by chunk; the chunks cover all anchors once."""

    def add_candidates(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        """Add the chunk's anchors to `ContrastSums.candidate_product`. Call it before the next chunk is taken."""

    def sums(self) -> ContrastSums:
        """The sums over all chunks."""


class SelfContrast(Protocol):
    """Rows A (n, d) against one another: the candidates of row i are all rows but itself.

    Take every chunk once, in order, and `add` it before the next one; `product` is complete after the last.
    """

    def chunks(self) -> Iterator[NegativeSums]:
        """Sums over the other rows, chunk by chunk; `NegativeSums.product` is not for the caller."""

    def add(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        """Give the coefficients of the chunk's rows: partner_i, and product_i = partner_i x inv_neg_sum_i."""

    def product(self) -> Tensor:
        """sum_{j != i} (partner_i p_ij + partner_j p_ji) A_j with p_ij = exp(a_ij) / neg_sum_i: (n, >= d), acc dtype.

        It is the gradient by A_i of sum_i partner_i x temperature x neg_lse_i.
        """


class KernelSet:
    """The kernels of one backend, for tensors of one device.

    No method may synchronize with the device or write to an input. The defaults are PyTorch operations.
    """

    def __init__(self, tuning: Tuning):
        self.tuning = tuning

    records_calls = False  # True: `run` is asked for a call, which may run a recorded one

    def run(self, compute: Callable[[KernelSet, LossInputs], LossOutputs], inputs: LossInputs) -> LossOutputs:
        """The outputs of ``compute`` with these kernels."""
        return compute(self, inputs)

    def replay(
        self, compute: Callable[[KernelSet, LossInputs], LossOutputs], inputs: LossInputs
    ) -> Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None]] | None:
        """A function that runs the recorded call of ``inputs`` for other tensors of their shapes, strides and dtypes.

        It takes student, teacher and the target that is there, and gives the loss () and the gradient by the student.
        None: no such call is recorded, or it takes other tensors or has a gradient by the teacher.
        """
        return None

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which GEMMs of logits of ``dtype`` take their operands."""
        return dtype

    def can_reverse(self, operand_dtype: torch.dtype, temperature: float) -> bool:
        """True if `contrast` can give both directions from one set of exponentials."""
        return operand_dtype != torch.float16 and has_fixed_shift(operand_dtype, temperature)

    def contrast(self, args: ContrastArgs) -> Contrast:
        """Begin a contrast."""
        raise NotImplementedError

    has_anchor_pass = False  # True: `anchor_pass` is asked

    def anchor_pass(
        self, args: ContrastArgs, out: Tensor | None, mean_of: MeanOf | None
    ) -> Callable[[AnchorPassArgs], None] | None:
        """The function that computes a contrast with frozen candidates whole, loss and gradient ``out`` by the anchors.

        ``out`` is None where no gradient is needed. mean_of: what the means of label positives belong to; None:
        there are no label positives.

        None: by `contrast`, `positive_cosines`, `loss_epilogue` and `grad_epilogue`, one after another.
        """
        return None

    def self_contrast(self, unit: UnitRows, temperature: float, with_grad: bool) -> SelfContrast:
        """Begin a contrast of rows with one another; ``with_grad``: `SelfContrast.add` and `product` will be used."""
        return _SelfContrast(self, unit, temperature, with_grad)

    def mcld_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        """The function that computes a whole call of `mcld_loss` in few launches; None without one for these inputs."""
        return None

    def info_nce_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        """The same for `info_nce`."""
        return None

    def ckd_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        """The same for `ckd_loss`."""
        return None

    def kd_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        """The same for `kd_loss`, a call of any size."""
        return None

    def clkd_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        """The same for `clkd_loss`."""
        return None

    def mlkd_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        """The same for `mlkd_loss`."""
        return None

    def l2_normalize(self, x: Tensor, operand_dtype: torch.dtype, eps: float) -> UnitRows:
        """Divide the rows of a view x (n, d) of any strides by their L2 norm."""
        acc = torch.promote_types(torch.promote_types(x.dtype, operand_dtype), torch.float32)
        # Not vector_norm: over the columns of a large batch it sums serially, at thirty times the rounding error.
        parts = [slice(0, x.shape[0])] if not x.is_cpu or x.numel() <= _PART_NUMBERS else _cpu_parts(x, 0, x.shape[0])
        # A part of columns would be written in pieces.
        by_parts = len(parts) > 1 and x.stride(1) == 1
        rows = torch.empty_like(x, dtype=operand_dtype) if by_parts else None
        inv_norms = []
        for part in parts:
            norm = x[part].to(acc).square().sum(1).sqrt()
            inv_norm = torch.where(norm <= eps, 0.0, 1 / torch.where(norm.isinf(), torch.nan, norm))
            inv_norms.append(inv_norm)
            if rows is not None:
                torch.mul(x[part], inv_norm[:, None], out=rows[part])
        if len(parts) > 1:
            inv_norm = torch.cat(inv_norms)
        if rows is None:
            rows = (x * inv_norm[:, None]).to(operand_dtype)
        return UnitRows(rows=rows, inv_norm=inv_norm, n=x.shape[0], d=x.shape[1])

    def operand_shape(self, n: int, d: int, operand_dtype: torch.dtype) -> tuple[int, int]:
        """The shape of operands (n, d) with their padding."""
        return n, d

    def operand_rows(self, x: Tensor, operand_dtype: torch.dtype) -> UnitRows:
        """The rows of a view x (n, d) as they are, in the layout of `l2_normalize`; ``inv_norm`` is 1."""
        n, d = x.shape
        acc = torch.promote_types(torch.promote_types(x.dtype, operand_dtype), torch.float32)
        shape = self.operand_shape(n, d, operand_dtype)
        if shape == (n, d):
            rows = x.to(operand_dtype)
        else:
            rows = torch.zeros(shape, dtype=operand_dtype, device=x.device)
            rows[:n, :d] = x
        return UnitRows(rows=rows, inv_norm=torch.ones(n, dtype=acc, device=x.device), n=n, d=d)

    def scale_rows(self, unit: UnitRows, factor: Tensor) -> UnitRows:
        """The rows times ``factor`` (), with ``inv_norm`` times it, so that a gradient by them ends as one by x."""
        rows = (unit.rows * factor.to(unit.inv_norm.dtype)).to(unit.rows.dtype)
        return UnitRows(rows=rows, inv_norm=unit.inv_norm * factor.to(unit.inv_norm.dtype), n=unit.n, d=unit.d)

    def index_labels(
        self, sides: tuple[Tensor, ...], ignore_index: int, num_classes: int, dtype: torch.dtype
    ) -> tuple[Labels, ...]:
        """As `labels.index_labels`."""
        return labelling.index_labels(sides, ignore_index, num_classes, dtype)

    def class_means(self, unit: UnitRows, labels: Labels, counts: Tensor) -> Tensor:
        """Sum of the rows of each class divided by ``counts``, both by class index: (counts, >= d), acc dtype."""
        device = unit.rows.device
        # embedding_bag sums rows in the given order, where index_add_ would use atomics on a GPU. With few classes it
        # adds hundreds of rows one by one, hence fp64 where the device has it, some columns at a time.
        wide = torch.float64 if device.type in ("cpu", "cuda") else unit.inv_norm.dtype
        means = torch.empty(counts.shape[0], unit.d, dtype=unit.inv_norm.dtype, device=device)
        divisor = counts.clamp(min=1)[:, None]
        budget = self.tuning.chunk_bytes // (8 if device.type == "cpu" else 1)  # in memory that malloc keeps
        for part in slices(unit.d, max(1, budget // (unit.n * wide.itemsize))):
            rows = unit.rows[:, part].to(wide).contiguous()
            means[:, part] = F.embedding_bag(labels.order, rows, labels.starts[:-1], mode="sum") / divisor
        return means

    def positive_cosines(
        self, anchors: UnitRows, candidates: UnitRows, offset: int, means: Tensor | None, class_index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A_i . K_(i + offset), 0 without such a candidate, and, given class means, A_i . means[class_index_i] (else
        the first again). (n,) each, acc dtype. ``class_index``: (n,) int64.
        """
        acc, device = anchors.inv_norm.dtype, anchors.rows.device
        positive = torch.empty(anchors.n, dtype=acc, device=device)
        label_positive = positive if means is None else torch.empty_like(positive)
        most = _PART_NUMBERS if anchors.rows.is_cpu else self.tuning.chunk_bytes // (4 * acc.itemsize)
        for rows in slices(anchors.n, max(1, most // anchors.d)):
            x = anchors.rows[rows].to(acc)
            if 0 <= rows.start + offset and rows.stop + offset <= candidates.n:
                positive[rows] = (x * candidates.rows[rows.start + offset : rows.stop + offset]).sum(1)
            else:
                first = min(max(rows.start, -offset), rows.stop)
                last = max(first, min(rows.stop, candidates.n - offset))
                positive[rows] = 0
                partner = candidates.rows[first + offset : last + offset]
                positive[first:last] = (x[first - rows.start : last - rows.start] * partner).sum(1)
            if means is not None and class_index is not None:
                label_positive[rows] = (x * means[class_index[rows]]).sum(1)
        return positive, label_positive

    def loss_epilogue(self, terms: AnchorTerms, sums: NegativeSums) -> GradCoefficients:
        """Write `per_anchor` of the chunk's anchors; return the coefficients of their gradient."""
        rows, temperature = sums.rows, terms.temperature
        positive = terms.positive[rows]
        x = sums.neg_lse - positive / temperature
        loss = torch.logaddexp(x, x.new_zeros(()))
        total: Tensor | float = 0.0
        class_mean = None
        for term, per_anchor in zip(terms.weights, terms.per_anchor, strict=True):
            part: Tensor | float = term.constant if term.factor is None else term.factor * term.constant
            if term.counted is not None:
                part = term.counted[rows] * part
            value = loss
            if term.positives == "label":
                value = loss + (positive - terms.label_positive[rows]) / temperature
            per_anchor[rows] = value * part
            weight = part * (term.term_weight / temperature)
            if term.weight is not None:
                weight = weight * term.weight
            total = weight + total
            if term.positives == "label":
                assert isinstance(weight, Tensor)
                class_mean = weight
        partner = torch.sigmoid(x) * total
        return GradCoefficients(partner=partner, product=partner * sums.inv_neg_sum, class_mean=class_mean)

    def reduce_terms(
        self, per_anchor: Tensor, terms: tuple[int, ...], term_weight: tuple[float, ...], weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss () and terms (len(term_weight),) from rows ``per_anchor`` (rows, width); row i belongs to terms[i].

        The loss is the sum of term_weight[t] x weight[t] x term t. ``weight``: (len(term_weight),) acc dtype, or None.
        """
        values, loss = per_anchor.new_zeros(len(term_weight)), per_anchor.new_zeros(())
        for row_sum, term in zip(per_anchor.sum(1), terms, strict=True):
            values[term] += row_sum
            loss = loss + row_sum * (term_weight[term] if weight is None else weight[term] * term_weight[term])
        return loss, values

    def grad_epilogue(self, args: GradEpilogueArgs) -> None:
        """Write, or add, the gradient by some rows of the logits."""
        unit, c, out, acc = args.unit, args.coefficients, args.out, args.product.dtype
        is_whole = not out.is_cpu or args.product.numel() <= _PART_NUMBERS
        for rows in [args.rows] if is_whole else _cpu_parts(out, args.rows.start, args.rows.stop):
            own = slice(rows.start - args.rows.start, rows.stop - args.rows.start)
            g = args.product[own, : unit.d].mul_(c.product[own, None])
            # Rows first to last have a partner.
            first = min(max(rows.start, -args.offset), rows.stop)
            last = max(first, min(rows.stop, args.partner.n - args.offset))
            partner = args.partner.rows[first + args.offset : last + args.offset].to(acc)
            paired = slice(first - args.rows.start, last - args.rows.start)
            pull = -c.partner[paired] if c.class_mean is None else c.class_mean[paired] - c.partner[paired]
            g[first - rows.start : last - rows.start].addcmul_(partner, pull[:, None])
            if c.class_mean is not None and args.class_means is not None and args.class_index is not None:
                g.addcmul_(args.class_means[args.class_index[rows]], -c.class_mean[own, None])
            x = unit.rows[rows].to(acc)
            g.addcmul_(x, -projection_coefficient(g, x)[:, None])
            inv_norm = unit.inv_norm[rows, None]
            if args.accumulate:
                out[rows].addcmul_(g, inv_norm) if out.dtype == acc else out[rows].add_(g.mul_(inv_norm))
            elif out.dtype == acc:
                torch.mul(g, inv_norm, out=out[rows])
            else:
                out[rows] = g.mul_(inv_norm)


class _SelfContrast:
    """As `SelfContrast`, by a contrast that knows nothing of the symmetry: the rows are anchors and candidates."""

    def __init__(self, kernels: KernelSet, unit: UnitRows, temperature: float, with_grad: bool):
        self._contrast = kernels.contrast(
            ContrastArgs(
                anchors=unit,
                candidates=unit,
                temperature=temperature,
                offset=0,
                anchor_grad=with_grad,
                candidate_grad=with_grad,
            )
        )
        self._of_anchors: list[Tensor] = []

    def chunks(self) -> Iterator[NegativeSums]:
        return self._contrast.chunks()

    def add(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        assert chunk.product is not None
        self._of_anchors.append(chunk.product * coefficients.product[:, None])
        self._contrast.add_candidates(chunk, coefficients)

    def product(self) -> Tensor:
        product = self._contrast.sums().candidate_product
        assert product is not None
        parts = self._of_anchors
        return (parts[0] if len(parts) == 1 else torch.cat(parts)) + product
