r"""CLKD, class-aware logit knowledge distillation: functions, module and the computation by chunks (arXiv 2211.14773).

The definitions are those of `reference.clkd`. With unit rows s_i, t_i and d_i = s_i - t_i,

    L_instance = mean of d^2,    dL/ds_i = 2 d_i / (B C), then back through the normalization;

columns do the same. The correlation of classes is a difference of two Gram matrices, which cancels late in training.
With D = S_c - T_c and M = (S_c + T_c) / 2 it is, without cancellation,

    G = S_c^T S_c - T_c^T T_c = X + X^T,    X = D^T M,    L_correlation = ||G||^2 / q,    q = (C - 1)^2 C^2,
    dL/dS = 4 S_c G / q,    dL/dT = -4 T_c G / q,

4 B C^2 flop for loss and gradient (eager: 8). With few rows the matrices are (B, B) instead: with H = M D^T,

    ||G||^2 = 2 <D D^T, M M^T> + 2 <H, H^T>,    S_c G = (S_c D^T) M + (S_c M^T) D,

10 B^2 C flop, since the products with S_c give those with M = S_c - D / 2; taken where that is less. S_c itself is
never M + D / 2, which has few digits of a student much smaller than its teacher. Where a (C, C) matrix is larger than a
chunk, G is taken by blocks of columns (`losses.clkd_correlation`). Over ranks the column norms, the batch means, the
dots of the projection and G are sums over the ranks; all else is local.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..distributed import Gather, Ranks, RanksOptions, ranks_options, report
from ..family_options import CLKDOptions, CLKDTerms, Reduction, check_gather, check_inputs, clkd_options
from ..kernels import KernelSet, LossInputs, LossOutputs, slices
from ..ops import LossOperator
from ..options import Backend, check_backend, grad_dtype
from .clkd_correlation import Batch, gram_of, is_by_rows
from .module_options import Option
from .module_over_ranks import ModuleOverRanks

# Constants of public re-implementations; they name one set for every data set.
PRESETS = MappingProxyType({"published": MappingProxyType({"weight": (0.5, 1.0, 0.4), "reduction": "mean"})})


def clkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    weight: Sequence[float] | Tensor = (0.5, 1.0, 0.4),
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    backend: Backend = "auto",
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> Tensor:
    r"""Class-aware logit knowledge distillation: rows, columns and the correlation of classes are to be the teacher's.

    In eager PyTorch::

        def correlation(x):
            x = x - x.mean(0)
            return x.T @ x / (x.shape[1] - 1)

        loss = (
            weight[0] * F.mse_loss(F.normalize(student), F.normalize(teacher))
            + weight[1] * F.mse_loss(F.normalize(student, dim=0), F.normalize(teacher, dim=0))
            + weight[2] * F.mse_loss(correlation(student), correlation(teacher))
        )

    Source: "Class-aware Information for Logit-based Knowledge Distillation", arXiv 2211.14773; terms and constants are
    those of public re-implementations: 0.5 (instance + 2 category) + 0.4 correlation.

    Backends "triton" and "cuda" have no kernel for this loss, and refuse it: the correlation is bound by its GEMMs,
    86 % of its time at B = 4096, C = 1000 in fp32 on one CPU thread, which the library runs at its own speed; the rest
    is elementwise work on matrices of the logits' size.

    Args:
        student: logits, or any embeddings, (batch, classes), float16, bfloat16, float32 or float64, any strides.
        teacher: the same shape and device. If it requires grad it gets its gradient.
        target: accepted and not used, so that losses can be exchanged for one another: no term reads labels, and a row
            without a class takes part as any other.
        weight: three numbers >= 0 (instance, category, correlation). 0 removes a term and its cost. A tensor of shape
            (3,) on the logits' device can change without recompiling and gets its gradient.
        reduction: of the squared error of unit vectors: "mean" over the elements, as published, which is at most
            4 / classes for rows and 4 / batch for columns; or "sum" over each vector and the mean over the vectors,
            whose size does not depend on the shape.
        eps: a row or column with L2 norm <= eps has no direction: it is normalised to zeros and gets no gradient.
        backend: "auto", "torch" or "reference".
        process_group, gather, even: as for :func:`mcld_kernels.mcld_loss`; the mean over the ranks is the loss of the
            global batch. ``gather`` must be "all": rows do not travel around the ranks here.

    Returns:
        Tensor of shape (), float64 for float64 logits and float32 otherwise; 0 for an empty batch. The gradient has
        the logits' dtype. Products are taken in the dtype of the loss and follow torch's float32 matmul precision.

    Raises:
        ValueError: shapes, devices, values or options do not fit.
        TypeError: a dtype or type does not fit.
        NotImplementedError: ``gather="ring"`` over ranks.
        RuntimeError: a collective failed: a rank has ended, or ran other code until the group's timeout.
        mcld_kernels.backends.BackendUnavailable: the backend asked for cannot run; the message says why.
    """
    options, weight_tensor, ranks = _arguments(weight, reduction, eps, process_group, gather, even)
    if ranks is not None or backend == "reference":
        return evaluate(student, teacher, weight_tensor, options, backend, ranks).loss
    check_inputs(student, teacher, weight_tensor, backend)
    return _OPERATOR(student, teacher, None, weight_tensor, options, backend)[0]


def clkd_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    weight: Sequence[float] | Tensor = (0.5, 1.0, 0.4),
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    backend: Backend = "auto",
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> CLKDTerms:
    """:func:`clkd_loss` and its parts: ``CLKDTerms(loss, instance, category, correlation)``, each of shape ().

    ``loss`` is what :func:`clkd_loss` returns, with its gradient; the terms are unweighted and detached, for logging. A
    term with weight 0 is not computed and reads 0. Arguments and errors as :func:`clkd_loss`.
    """
    options, weight_tensor, ranks = _arguments(weight, reduction, eps, process_group, gather, even)
    return evaluate(student, teacher, weight_tensor, options, backend, ranks)


def _arguments(
    weight: Any, reduction: Any, eps: Any, process_group: Any, gather: Any, even: Any
) -> tuple[CLKDOptions, Tensor | None, RanksOptions | None]:
    """The options, the weight tensor (3,) if one came, and how to run over ranks; all ranks raise if one refuses."""
    ranks = ranks_options(process_group, gather, even)
    try:
        options, tensor = clkd_options(weight=weight, reduction=reduction, eps=eps)
        check_gather(ranks, "CLKD")
    except (NotImplementedError, TypeError, ValueError) as error:
        report(ranks, error)
        raise
    return options, tensor, ranks


def evaluate(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    options: CLKDOptions,
    backend: str,
    ranks: RanksOptions | None = None,
) -> CLKDTerms:
    """Check the tensors and run a backend. weight: (3,) or None."""
    try:
        check_inputs(student, teacher, weight, backend)
    except (TypeError, ValueError) as error:
        report(ranks, error)
        raise
    if backend == "reference":
        return reference.clkd.evaluate(student, teacher, weight, options, ranks)
    loss, terms = _OPERATOR(student, teacher, None, weight, options, backend, ranks=ranks)
    return CLKDTerms(loss, *terms.unbind())


class CLKDLoss(ModuleOverRanks):
    """:func:`mcld_kernels.clkd_loss` with its options kept. The method has no warm-up.

    Args:
        weight, reduction, eps, backend, process_group, gather, even: as for :func:`mcld_kernels.clkd_loss`. ``weight``
            as a tensor becomes a buffer, or a parameter if it is one. Every option can be assigned.

    Shapes:
        student, teacher: (batch, classes); target: (batch,), not used; output: ().
    """

    reduction = Option[Reduction]()
    eps = Option[float]()
    _check_options = staticmethod(clkd_options)

    def __init__(
        self,
        *,
        weight: Sequence[float] | Tensor = (0.5, 1.0, 0.4),
        reduction: Reduction = "mean",
        eps: float = 1e-12,
        backend: Backend = "auto",
        process_group: dist.ProcessGroup | str | None = None,
        gather: Gather = "all",
        even: bool = False,
    ):
        super().__init__(process_group, gather, even)
        check_backend(backend)
        self.backend = backend
        self.options, _ = clkd_options(weight=weight, reduction=reduction, eps=eps)
        self._check_ranks(self.ranks, self.options)
        self._hold_weight(weight)

    def _check_ranks(self, ranks: RanksOptions | None, options: Any) -> None:
        check_gather(ranks, "CLKD")

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        return self.terms(student, teacher, target).loss

    def terms(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> CLKDTerms:
        """The loss and its three terms, as :func:`mcld_kernels.clkd_terms`."""
        return evaluate(student, teacher, self.weight, self.options, self.backend, self.ranks)

    def extra_repr(self) -> str:
        options = self.options
        weight = options.term_weight if self.weight is None else self.weight.detach()
        shown = f"weight={weight}, reduction={options.reduction!r}, eps={options.eps:g}"
        return f"{shown}, {self._shown_ranks()}backend={self.backend!r}"


def compute(kernels: KernelSet, inputs: LossInputs) -> LossOutputs:
    """Loss, terms and gradients, by chunks of rows: one pass each for column sums, for the terms, for the gradients."""
    if (low_latency := kernels.clkd_low_latency(inputs)) is not None:
        return low_latency(inputs)
    return _CLKD(kernels.tuning.chunk_bytes, inputs).outputs()


def compute_over_ranks(kernels: KernelSet, inputs: LossInputs, ranks: Ranks) -> LossOutputs:
    """The same of this rank's rows, for a global batch that is not empty; sums over the batch are all-reduced."""
    return _CLKD(kernels.tuning.chunk_bytes, inputs, ranks).outputs()


class _CLKD:
    """One call. Pairs hold the student's and the teacher's tensor; (rows, C) tensors are of one chunk of rows.

    Over ranks the rows are this rank's, and what a term sums over the rows is (number of ranks) x their part. The
    correlation is not such a sum: it is the same on every rank.
    """

    def __init__(self, budget: int, inputs: LossInputs, ranks: Ranks | None = None):
        self.inputs, self.options, self.ranks = inputs, inputs.options, ranks
        self.n, self.num_classes = n, num_classes = inputs.student.shape
        # Rows of the global batch, and the number of ranks.
        self.total, self.count = (n, 1) if ranks is None else (ranks.total, ranks.count)
        self.acc, device = inputs.acc_dtype, inputs.student.device
        self.needed = inputs.student_grad, inputs.teacher_grad
        weights = self.options.term_weight
        if inputs.weight is not None:
            weights = [w * factor for w, factor in zip(inputs.weight.to(self.acc).unbind(), weights, strict=True)]
        self.poison = None if ranks is None or ranks.poison is None else ranks.poison.to(self.acc)
        if self.poison is not None:
            weights = [w * self.poison for w in weights]
        self.weights = weights
        self.instance, self.category, self.correlation = (w != 0 for w in self.options.term_weight)
        # A chunk holds some eight temporaries of its size.
        self.chunks = slices(n, max(1, budget // (8 * num_classes * self.acc.itemsize)))
        is_mean = self.options.reduction == "mean"
        elements = self.total * num_classes
        self.row_factor = self.count / (elements if is_mean else self.total)
        self.column_factor = self.count / (elements if is_mean else num_classes)
        zeros = torch.zeros(3, num_classes, dtype=self.acc, device=device)
        self.terms: list[Tensor] = [zeros[0, :0].sum()] * 3
        self.column_square = zeros[0]  # sum over the batch of (u - v)^2
        self.column_dots = zeros[1], zeros[2]  # of (u - v) u and (u - v) v
        self.dots_needed = zeros[2 - self.needed[0] : 2 + self.needed[1]]  # of the sides with a gradient
        self.row_inv_norm: list[tuple[Tensor, Tensor]] = []
        self.column_inv_norm = self.difference_mean = self.means = zeros[:0]
        batch = Batch(
            n=n,
            total=self.total,
            num_classes=num_classes,
            acc_dtype=self.acc,
            device=device,
            needed=self.needed,
            ranks=ranks,
        )
        self.gram = gram_of(batch, budget) if self.correlation else None

    def outputs(self) -> LossOutputs:
        if self.category or self.correlation:
            self._sum_columns()
        for rows in self.chunks:
            self._add_terms(rows)
        if self.ranks is not None and self.category and any(self.needed):
            self.ranks.all_reduce(self.dots_needed)
        if self.instance:
            self.terms[0] = self.terms[0] * self.row_factor
        if self.category:
            self.terms[1] = self.column_square.sum() * self.column_factor
        if self.gram is not None:
            divisor = max(self.num_classes - 1, 1) ** 2 * self.num_classes**2
            self.terms[2] = self.gram.finish(self.weights[2], 1 / divisor)
        grads: list[Tensor | None] = [
            torch.empty(logits.shape, dtype=grad_dtype(logits.dtype), device=logits.device) if needed else None
            for logits, needed in zip((self.inputs.student, self.inputs.teacher), self.needed, strict=True)
        ]
        if any(self.needed):
            for index, rows in enumerate(self.chunks):
                self._write_gradients(index, rows, grads)
        loss = self.terms[0].new_zeros(())
        for weight, term, active in zip(self.weights, self.terms, self.options.term_weight, strict=True):
            if active:
                loss = loss + weight * term
        terms = torch.stack(self.terms)
        if self.poison is not None:
            terms = terms * self.poison
        return LossOutputs(loss=loss, terms=terms, student_grad=grads[0], teacher_grad=grads[1])

    def _logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.inputs.student[rows].to(self.acc), self.inputs.teacher[rows].to(self.acc)

    def _sum_columns(self) -> None:
        """Norms of the columns, and the means over the batch of S - T, of S and of T."""
        squares = difference = sides = None
        for rows in self.chunks:
            s, t = self._logits(rows)
            if self.category:
                square = torch.stack((s.square().sum(0), t.square().sum(0)))
                squares = square if squares is None else squares.add_(square)
            if self.correlation:
                # Neither follows from the others: the difference would have few digits late in training, a side's
                # mean would have few where the other side's logits are much larger.
                parts = (s - t).sum(0), torch.stack((s.sum(0), t.sum(0)))
                difference = parts[0] if difference is None else difference.add_(parts[0])
                sides = parts[1] if sides is None else sides.add_(parts[1])
        if self.ranks is not None:
            sums = [squares] * self.category + [difference, sides] * self.correlation
            sizes = [2] * self.category + [1, 2] * self.correlation
            whole = self.column_square.new_zeros(sum(sizes), self.num_classes)
            parts = whole.split(sizes)
            for part, x in zip(parts, sums, strict=True):
                if x is not None:  # this rank has rows
                    part.copy_(x)
            self.ranks.all_reduce(whole)
            squares = parts[0] if self.category else None
            difference, sides = (parts[-2][0], parts[-1]) if self.correlation else (None, None)
        if squares is not None:
            self.column_inv_norm = _inverse(squares.sqrt_(), self.options.eps)
        if difference is not None and sides is not None:
            self.difference_mean, self.means = difference.div_(self.total), sides.div_(self.total)

    def _add_terms(self, rows: slice) -> None:
        s, t = self._logits(rows)
        if self.instance:
            pair = (
                _inverse(s.square().sum(1, keepdim=True).sqrt_(), self.options.eps),
                _inverse(t.square().sum(1, keepdim=True).sqrt_(), self.options.eps),
            )
            self.row_inv_norm.append(pair)
            self.terms[0] = self.terms[0] + (s * pair[0]).sub_(t * pair[1]).square_().sum()
        if self.category:
            u, v = s * self.column_inv_norm[0], t * self.column_inv_norm[1]
            difference = u - v
            for unit, needed, dots in zip((u, v), self.needed, self.column_dots, strict=True):
                if needed:
                    dots += unit.mul_(difference).sum(0)
            self.column_square += difference.square_().sum(0)
        if self.gram is not None:
            difference, middle = (s - t).sub_(self.difference_mean), (s + t).div_(2).sub_(self.means.mean(0))
            self.gram.add(rows, difference, middle, (s, t), self.means)

    def _write_gradients(self, index: int, rows: slice, grads: list[Tensor | None]) -> None:
        s, t = self._logits(rows)
        for side, grad in enumerate(grads):
            if grad is None:
                continue
            g = None
            # By the student the gradient follows + (s - t), by the teacher - (s - t).
            factor = 2.0 if side == 0 else -2.0
            if self.instance:
                pair = self.row_inv_norm[index]
                unit = (s * pair[0], t * pair[1])
                g = unit[0] - unit[1]
                dots = (g * unit[side]).sum(1, keepdim=True)
                g.addcmul_(unit[side], dots, value=-1).mul_(pair[side] * (factor * self.row_factor * self.weights[0]))
            if self.category:
                unit = (s * self.column_inv_norm[0], t * self.column_inv_norm[1])
                more = unit[0] - unit[1]
                scale = self.column_inv_norm[side] * (factor * self.column_factor * self.weights[1])
                more.addcmul_(unit[side], self.column_dots[side], value=-1)
                g = more.mul_(scale) if g is None else g.addcmul_(more, scale)
            if self.gram is not None:
                if g is None:
                    g = torch.zeros_like(s)
                self.gram.add_gradient(rows, side, (s, t)[side] - self.means[side], g)
            grad[rows] = 0 if g is None else g


def _inverse(norm: Tensor, eps: float) -> Tensor:
    """1 / norm, 0 for a norm <= eps, NaN for one that is not finite; ``norm`` is overwritten."""
    norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
    return torch.threshold_(norm, eps, torch.inf).reciprocal_()


def _flops(batch: int, classes: int, options: CLKDOptions, grads: int) -> int:
    """Some ten operations an element for either normalization; of the correlation the products alone."""
    instance, category, correlation = (w != 0 for w in options.term_weight)
    total = (instance + category) * 10 * (1 + grads) * batch * classes
    if not correlation:
        return total
    if is_by_rows(batch, classes, False):
        return total + (6 + 4 * grads) * batch**2 * classes
    return total + 2 * (1 + grads) * batch * classes**2


_OPERATOR = LossOperator(
    "clkd",
    CLKDOptions,
    num_terms=3,
    compute=compute,
    flops=_flops,
    supported=("torch",),
    compute_over_ranks=compute_over_ranks,
)
