r"""CLKD, class-aware logit knowledge distillation: functions, module and the computation by chunks (arXiv 2211.14773).

The definitions are those of `reference.clkd`. With unit rows s_i, t_i and d_i = s_i - t_i,

    L_instance = mean of d^2,    dL/ds_i = 2 d_i / (B C), then back through the normalization;

columns do the same. The correlation of classes is a difference of two Gram matrices, which cancels late in training.
With D = S_c - T_c and M = (S_c + T_c) / 2 it is, without cancellation,

    G = S_c^T S_c - T_c^T T_c = X + X^T,    X = D^T M,    L_correlation = ||G||^2 / q,    q = (C - 1)^2 C^2,
    dL/dS = 4 S_c G / q,    dL/dT = -4 T_c G / q,

4 B C^2 flop for loss and gradient (eager: 8). With few rows the matrices are (B, B) instead: with H = M D^T,

    ||G||^2 = 2 <D D^T, M M^T> + 2 <H, H^T>,    S_c G = (H + D D^T / 2) M + (M M^T + H^T / 2) D,

10 B^2 C flop, taken where that is less. Where a (C, C) matrix is larger than a chunk, G is taken by blocks of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..family_options import CLKDOptions, CLKDTerms, Reduction, check_inputs, clkd_options
from ..kernels import KernelSet, LossInputs, LossOutputs, slices
from ..ops import LossOperator
from ..options import Backend, check_backend, grad_dtype

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
    process_group: Any = None,
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
        process_group: None; the loss has no form over a global batch yet.

    Returns:
        Tensor of shape (), float64 for float64 logits and float32 otherwise; 0 for an empty batch. The gradient has
        the logits' dtype. Products are taken in the dtype of the loss and follow torch's float32 matmul precision.

    Raises:
        ValueError: shapes, devices, values or options do not fit.
        TypeError: a dtype or type does not fit.
        NotImplementedError: ``process_group`` is given.
        mcld_kernels.backends.BackendUnavailable: the backend asked for cannot run; the message says why.
    """
    options, weight_tensor = clkd_options(weight=weight, reduction=reduction, eps=eps, process_group=process_group)
    check_inputs(student, teacher, weight_tensor, backend)
    if backend == "reference":
        return reference.clkd.evaluate(student, teacher, weight_tensor, options).loss
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
    process_group: Any = None,
) -> CLKDTerms:
    """:func:`clkd_loss` and its parts: ``CLKDTerms(loss, instance, category, correlation)``, each of shape ().

    ``loss`` is what :func:`clkd_loss` returns, with its gradient; the terms are unweighted and detached, for logging. A
    term with weight 0 is not computed and reads 0. Arguments and errors as :func:`clkd_loss`.
    """
    options, weight_tensor = clkd_options(weight=weight, reduction=reduction, eps=eps, process_group=process_group)
    return evaluate(student, teacher, weight_tensor, options, backend)


def evaluate(student: Tensor, teacher: Tensor, weight: Tensor | None, options: CLKDOptions, backend: str) -> CLKDTerms:
    """Check the tensors and run a backend. weight: (3,) or None."""
    check_inputs(student, teacher, weight, backend)
    if backend == "reference":
        return reference.clkd.evaluate(student, teacher, weight, options)
    loss, terms = _OPERATOR(student, teacher, None, weight, options, backend)
    return CLKDTerms(loss, *terms.unbind())


class CLKDLoss(nn.Module):
    """:func:`mcld_kernels.clkd_loss` with its options kept. The method has no warm-up.

    Args:
        weight, reduction, eps, backend, process_group: as for :func:`mcld_kernels.clkd_loss`. ``weight`` as a tensor
            becomes a buffer, or a parameter if it is one.

    Shapes:
        student, teacher: (batch, classes); target: (batch,), not used; output: ().
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Sequence[float] | Tensor = (0.5, 1.0, 0.4),
        reduction: Reduction = "mean",
        eps: float = 1e-12,
        backend: Backend = "auto",
        process_group: Any = None,
    ):
        super().__init__()
        check_backend(backend)
        self.backend = backend
        self.options, _ = clkd_options(weight=weight, reduction=reduction, eps=eps, process_group=process_group)
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight if isinstance(weight, Tensor) else None)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        return self.terms(student, teacher, target).loss

    def terms(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> CLKDTerms:
        """The loss and its three terms, as :func:`mcld_kernels.clkd_terms`."""
        return evaluate(student, teacher, self.weight, self.options, self.backend)

    def extra_repr(self) -> str:
        options = self.options
        weight = options.term_weight if self.weight is None else self.weight.detach()
        return f"weight={weight}, reduction={options.reduction!r}, eps={options.eps:g}, backend={self.backend!r}"


def compute(kernels: KernelSet, inputs: LossInputs) -> LossOutputs:
    """Loss, terms and gradients by chunks of rows: one pass each for column sums, for the terms, for the gradients."""
    return _CLKD(kernels.tuning.chunk_bytes, inputs).outputs()


class _CLKD:
    """One call. Pairs hold the student's and the teacher's tensor; (rows, C) tensors are of one chunk of rows."""

    def __init__(self, budget: int, inputs: LossInputs):
        self.inputs, self.options = inputs, inputs.options
        self.n, self.num_classes = n, num_classes = inputs.student.shape
        self.acc, device = inputs.acc_dtype, inputs.student.device
        self.needed = inputs.student_grad, inputs.teacher_grad
        weights = self.options.term_weight
        if inputs.weight is not None:
            weights = [w * factor for w, factor in zip(inputs.weight.to(self.acc).unbind(), weights, strict=True)]
        self.weights = weights
        self.instance, self.category, self.correlation = (w != 0 for w in self.options.term_weight)
        # A chunk holds some eight temporaries of its size.
        self.chunks = slices(n, max(1, budget // (8 * num_classes * self.acc.itemsize)))
        self.kept: tuple[Tensor, Tensor] | None = None  # D and M of the chunk, where there is one
        is_mean = self.options.reduction == "mean"
        self.row_factor = 1 / (n * num_classes) if is_mean else 1 / n
        self.column_factor = 1 / (n * num_classes) if is_mean else 1 / num_classes
        zeros = torch.zeros(3, num_classes, dtype=self.acc, device=device)
        self.terms: list[Tensor] = [zeros[0, :0].sum()] * 3
        self.column_square = zeros[0]  # sum over the batch of (u - v)^2
        self.column_dots = zeros[1], zeros[2]  # of (u - v) u and (u - v) v
        self.row_inv_norm: list[tuple[Tensor, Tensor]] = []
        self.column_inv_norm = self.difference_mean = self.middle_mean = zeros[:0]
        self.gram = _gram(self, budget) if self.correlation else None

    def outputs(self) -> LossOutputs:
        if self.category or self.correlation:
            self._sum_columns()
        for rows in self.chunks:
            self._add_terms(rows)
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
        return LossOutputs(loss=loss, terms=torch.stack(self.terms), student_grad=grads[0], teacher_grad=grads[1])

    def _logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.inputs.student[rows].to(self.acc), self.inputs.teacher[rows].to(self.acc)

    def _sum_columns(self) -> None:
        """Norms of the columns, and the means over the batch of S - T and of (S + T) / 2."""
        squares = difference = middle = None
        for rows in self.chunks:
            s, t = self._logits(rows)
            if self.category:
                square = torch.stack((s.square().sum(0), t.square().sum(0)))
                squares = square if squares is None else squares.add_(square)
            if self.correlation:
                # Not the difference of the means: late in training it would have few digits.
                parts = (s - t).sum(0), (s + t).sum(0)
                difference = parts[0] if difference is None else difference.add_(parts[0])
                middle = parts[1] if middle is None else middle.add_(parts[1])
        if squares is not None:
            self.column_inv_norm = _inverse(squares.sqrt_(), self.options.eps)
        if difference is not None and middle is not None:
            self.difference_mean, self.middle_mean = difference.div_(self.n), middle.div_(2 * self.n)

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
            centred = (s - t).sub_(self.difference_mean), (s + t).div_(2).sub_(self.middle_mean)
            if len(self.chunks) == 1:
                self.kept = centred
            self.gram.add(rows, *centred)

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
                self.gram.add_gradient(rows, side, self._centred(rows, s, t, side), g)
            grad[rows] = 0 if g is None else g

    def _centred(self, rows: slice, s: Tensor, t: Tensor, side: int) -> Tensor:
        """S_c or T_c of a chunk."""
        if self.kept is not None:
            return torch.add(self.kept[1], self.kept[0], alpha=0.5 if side == 0 else -0.5)
        shift = self.difference_mean / (2 if side == 0 else -2)
        return (s, t)[side] - (self.middle_mean + shift)


def _inverse(norm: Tensor, eps: float) -> Tensor:
    """1 / norm, 0 for a norm <= eps, NaN for one that is not finite; ``norm`` is overwritten."""
    norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
    return torch.threshold_(norm, eps, torch.inf).reciprocal_()


def _gram(call: _CLKD, budget: int) -> _ByClasses | _WholeBatch:
    """The form of the correlation that takes fewer flop and whose matrix fits."""
    n, num_classes = call.n, call.num_classes
    if 5 * n < 2 * num_classes:
        return _ByRows(call, budget)
    if 2 * num_classes**2 * call.acc.itemsize <= budget:
        return _ByClasses(call)
    return _ByBlocks(call, budget)


class _ByClasses:
    """G (C, C) whole."""

    def __init__(self, call: _CLKD):
        self.call, self.product = call, None

    product: Tensor | None

    def add(self, rows: slice, difference: Tensor, middle: Tensor) -> None:
        """Add a chunk of D and M."""
        self.product = difference.T @ middle if self.product is None else self.product.addmm_(difference.T, middle)

    def finish(self, weight: Tensor | float, factor: float) -> Tensor:
        """The term, from the factor of ||G||^2; weight: of the term in the gradient."""
        assert self.product is not None
        gram = self.product + self.product.T
        term = torch.dot(gram.view(-1), gram.view(-1)) * factor
        self.product = gram.mul_(4 * factor * weight)
        return term

    def add_gradient(self, rows: slice, side: int, centred: Tensor, g: Tensor) -> None:
        """Add the gradient by a chunk of one side's rows, ``centred``, to g (rows, C)."""
        assert self.product is not None
        g.addmm_(centred, self.product, alpha=1 if side == 0 else -1)


class _WholeBatch:
    """What keeps D and M (B, C) of the whole batch: both of the forms whose matrices come by chunks."""

    def __init__(self, call: _CLKD, budget: int):
        self.call, self.budget = call, budget
        student = call.inputs.student
        shape = 2, call.n, call.num_classes
        self.difference, self.middle = torch.empty(shape, dtype=call.acc, device=student.device).unbind()
        self.gradients = [torch.empty_like(self.middle) if needed else None for needed in call.needed]

    def add(self, rows: slice, difference: Tensor, middle: Tensor) -> None:
        self.difference[rows], self.middle[rows] = difference, middle

    def finish(self, weight: Tensor | float, factor: float) -> Tensor:
        term = self._square() * factor
        for gradient, sign in zip(self.gradients, (4, -4), strict=True):
            if gradient is not None:
                gradient.mul_(sign * factor * weight)
        return term

    def add_gradient(self, rows: slice, side: int, centred: Tensor, g: Tensor) -> None:
        gradient = self.gradients[side]
        assert gradient is not None
        g.add_(gradient[rows])

    def _square(self) -> Tensor:
        """||G||^2; writes S_c G and T_c G where they are needed."""
        raise NotImplementedError


class _ByRows(_WholeBatch):
    """By (B, B) matrices, a chunk of their rows at a time."""

    def _square(self) -> Tensor:
        d, m, n = self.difference, self.middle, self.call.n
        total = d.new_zeros(())
        chunks = slices(n, max(1, self.budget // (4 * n * d.itemsize)))
        for rows in chunks:
            dd, mm, h = d[rows] @ d.T, m[rows] @ m.T, m[rows] @ d.T  # (rows, B)
            transposed = h.T if len(chunks) == 1 else d[rows] @ m.T
            total = total + 2 * ((dd * mm).sum() + (h * transposed).sum())
            for gradient, half in zip(self.gradients, (0.5, -0.5), strict=True):
                if gradient is not None:
                    torch.mm(torch.add(h, dd, alpha=half), m, out=gradient[rows])
                    gradient[rows].addmm_(torch.add(mm, transposed, alpha=half), d)
        return total


class _ByBlocks(_WholeBatch):
    """By blocks of columns of G (C, C)."""

    def _square(self) -> Tensor:
        d, m, num_classes = self.difference, self.middle, self.call.num_classes
        total = d.new_zeros(())
        sides = [None if g is None else m + d * half for g, half in zip(self.gradients, (0.5, -0.5), strict=True)]
        for columns in slices(num_classes, max(1, self.budget // (2 * num_classes * d.itemsize))):
            block = torch.addmm(d.T @ m[:, columns], m.T, d[:, columns])  # (C, columns)
            for gradient, centred in zip(self.gradients, sides, strict=True):
                if gradient is not None and centred is not None:
                    gradient[:, columns] = centred @ block
            total = total + block.square_().sum()
        return total


def _flops(batch: int, classes: int, options: CLKDOptions, with_grad: bool) -> int:
    """Some ten operations an element for either normalization; of the correlation the products alone."""
    instance, category, correlation = (w != 0 for w in options.term_weight)
    total = (instance + category) * (20 if with_grad else 10) * batch * classes
    if not correlation:
        return total
    if 5 * batch < 2 * classes:
        return total + (10 if with_grad else 6) * batch**2 * classes
    return total + (4 if with_grad else 2) * batch * classes**2


_OPERATOR = LossOperator("clkd", CLKDOptions, num_terms=3, compute=compute, flops=_flops, supported=("torch",))
