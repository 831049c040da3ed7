"""CLKD's correlation of classes: ||S_c^T S_c - T_c^T T_c||^2 and its gradient, in three forms (`losses.clkd`).

Over ranks a (C, C) matrix is a sum over the ranks: it is all-reduced. Where (B, B) matrices take its place, the rows of
D and M are gathered, and each rank computes those of its own rows. The value is the same on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import slices

if TYPE_CHECKING:
    from .clkd import _CLKD as Call


def gram_of(call: Call, budget: int) -> _ByClasses | _WholeBatch:
    """The form of the correlation that takes fewer flop and whose matrix fits."""
    num_classes = call.num_classes
    if is_by_rows(call.total, num_classes, call.ranks is not None):
        return _ByRows(call, budget)
    if 2 * num_classes**2 * call.acc.itemsize <= budget:
        return _ByClasses(call)
    return _ByBlocks(call, budget)


class _ByClasses:
    """G (C, C) whole."""

    def __init__(self, call: Call):
        self.call, self.product = call, None

    product: Tensor | None

    def add(self, rows: slice, difference: Tensor, middle: Tensor) -> None:
        """Add a chunk of D and M."""
        self.product = difference.T @ middle if self.product is None else self.product.addmm_(difference.T, middle)

    def finish(self, weight: Tensor | float, factor: float) -> Tensor:
        """The term, from the factor of ||G||^2; weight: of the term in the gradient."""
        call, product = self.call, self.product
        if product is None:  # a rank without rows
            product = call.column_square.new_zeros(call.num_classes, call.num_classes)
        if call.ranks is not None:
            call.ranks.all_reduce(product)
        gram = product + product.T
        # Not one dot product: over all C^2 entries it sums serially, with ten times the rounding error.
        term = torch.linalg.vecdot(gram, gram).sum() * factor
        self.product = gram.mul_(4 * factor * call.count * weight)
        return term

    def add_gradient(self, rows: slice, side: int, centred: Tensor, g: Tensor) -> None:
        """Add the gradient by a chunk of one side's rows, ``centred``, to g (rows, C)."""
        assert self.product is not None
        g.addmm_(centred, self.product, alpha=1 if side == 0 else -1)


class _WholeBatch:
    """Keeps D and M (B, C) of the whole batch: the base of both forms whose matrices come by chunks."""

    def __init__(self, call: Call, budget: int):
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
                gradient.mul_(sign * factor * self.call.count * weight)
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
        own, ranks = (self.difference, self.middle), self.call.ranks
        d, m = own
        if ranks is not None:
            d, m = ranks.all_gather(torch.stack(own, 1)).unbind(1)
        total = d.new_zeros(())
        chunks = slices(self.call.n, max(1, self.budget // (4 * self.call.total * d.itemsize)))
        for rows in chunks:
            own_d, own_m = own[0][rows], own[1][rows]
            dd, mm, h = own_d @ d.T, own_m @ m.T, own_m @ d.T  # (rows, B)
            transposed = h.T if len(chunks) == 1 and ranks is None else own_d @ m.T
            total = total + 2 * ((dd * mm).sum() + (h * transposed).sum())
            for gradient, half in zip(self.gradients, (0.5, -0.5), strict=True):
                if gradient is not None:
                    torch.mm(torch.add(h, dd, alpha=half), m, out=gradient[rows])
                    gradient[rows].addmm_(torch.add(mm, transposed, alpha=half), d)
        return total if ranks is None else ranks.all_reduce(total)


class _ByBlocks(_WholeBatch):
    """By blocks of columns of G (C, C)."""

    def _square(self) -> Tensor:
        d, m, num_classes = self.difference, self.middle, self.call.num_classes
        total = d.new_zeros(())
        sides = [None if g is None else m + d * half for g, half in zip(self.gradients, (0.5, -0.5), strict=True)]
        for columns in slices(num_classes, max(1, self.budget // (2 * num_classes * d.itemsize))):
            block = torch.addmm(d.T @ m[:, columns], m.T, d[:, columns])  # (C, columns)
            if self.call.ranks is not None:
                self.call.ranks.all_reduce(block)
            for gradient, centred in zip(self.gradients, sides, strict=True):
                if gradient is not None and centred is not None:
                    gradient[:, columns] = centred @ block
            total = total + block.square_().sum()
        return total


def is_by_rows(batch: int, num_classes: int, over_ranks: bool) -> bool:
    """True where (B, B) matrices take fewer flop: with two products of a symmetric pair saved in one process alone."""
    return 3 * batch < num_classes if over_ranks else 5 * batch < 2 * num_classes
