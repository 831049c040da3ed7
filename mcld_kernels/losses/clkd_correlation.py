"""CLKD's correlation of classes: ||S_c^T S_c - T_c^T T_c||^2 and its gradient, in three forms (`losses.clkd`).

Over ranks a (C, C) matrix is a sum over the ranks: it is all-reduced. Where (B, B) matrices take its place, the rows of
D and M are gathered, and each rank computes those of its own rows. The value is the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import Ranks
from ..kernels import slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The batch of a call."""

    n: int  # rows of this process
    total: int  # rows of the global batch
    num_classes: int
    acc_dtype: torch.dtype
    device: torch.device
    needed: tuple[bool, bool]  # the gradients by student and teacher
    ranks: Ranks | None

    @property
    def count(self) -> int:
        """The number of ranks."""
        return 1 if self.ranks is None else self.ranks.count


def gram_of(batch: Batch, budget: int) -> _ByClasses | _WholeBatch:
    """The form of the correlation that takes fewer flop and whose matrix fits into ``budget`` bytes."""
    if is_by_rows(batch.total, batch.num_classes, batch.ranks is not None):
        return _ByRows(batch, budget)
    if 2 * batch.num_classes**2 * batch.acc_dtype.itemsize <= budget:
        return _ByClasses(batch)
    return _ByBlocks(batch, budget)


class _ByClasses:
    """G (C, C) whole."""

    def __init__(self, batch: Batch):
        self.batch, self.product = batch, None

    product: Tensor | None

    def add(self, rows: slice, difference: Tensor, middle: Tensor, sides: tuple[Tensor, Tensor], means: Tensor) -> None:
        """Add a chunk of D and M; sides: of S and T, means (2, C) of their columns."""
        self.product = difference.T @ middle if self.product is None else self.product.addmm_(difference.T, middle)

    def finish(self, weight: Tensor | float, factor: float) -> Tensor:
        """The term, from the factor of ||G||^2; weight: of the term in the gradient."""
        batch, product = self.batch, self.product
        if product is None:  # a rank without rows
            product = torch.zeros(batch.num_classes, batch.num_classes, dtype=batch.acc_dtype, device=batch.device)
        if batch.ranks is not None:
            batch.ranks.all_reduce(product)
        gram = product + product.T
        # Not one dot product: over all C^2 entries it sums serially, with ten times the rounding error.
        term = torch.linalg.vecdot(gram, gram).sum() * factor
        self.product = gram.mul_(4 * factor * batch.count * weight)
        return term

    def add_gradient(self, rows: slice, side: int, centred: Tensor, g: Tensor) -> None:
        """Add the gradient by a chunk of one side's rows, ``centred``, to g (rows, C)."""
        assert self.product is not None
        g.addmm_(centred, self.product, alpha=1 if side == 0 else -1)


class _WholeBatch:
    """Keeps D and M (B, C) of the whole batch: the base of both forms whose matrices come by chunks."""

    def __init__(self, batch: Batch, budget: int):
        self.batch, self.budget = batch, budget
        shape = 2, batch.n, batch.num_classes
        self.difference, self.middle = torch.empty(shape, dtype=batch.acc_dtype, device=batch.device).unbind()
        # They hold S_c and T_c until `_square`: M + D / 2 would have few digits of a side much smaller than the other.
        self.gradients = [torch.empty_like(self.middle) if needed else None for needed in batch.needed]

    def add(self, rows: slice, difference: Tensor, middle: Tensor, sides: tuple[Tensor, Tensor], means: Tensor) -> None:
        self.difference[rows], self.middle[rows] = difference, middle
        for gradient, side, mean in zip(self.gradients, sides, means, strict=True):
            if gradient is not None:
                torch.sub(side, mean, out=gradient[rows])

    def finish(self, weight: Tensor | float, factor: float) -> Tensor:
        term = self._square() * factor
        for gradient, sign in zip(self.gradients, (4, -4), strict=True):
            if gradient is not None:
                gradient.mul_(sign * factor * self.batch.count * weight)
        return term

    def add_gradient(self, rows: slice, side: int, centred: Tensor, g: Tensor) -> None:
        gradient = self.gradients[side]
        assert gradient is not None
        g.add_(gradient[rows])

    def _square(self) -> Tensor:
        """||G||^2; writes S_c G and T_c G over S_c and T_c."""
        raise NotImplementedError


class _ByRows(_WholeBatch):
    """By (B, B) matrices, a chunk of their rows at a time."""

    def _square(self) -> Tensor:
        own, ranks = (self.difference, self.middle), self.batch.ranks
        d, m = own
        if ranks is not None:
            d, m = ranks.all_gather(torch.stack(own, 1)).unbind(1)
        total = d.new_zeros(())
        chunks = slices(self.batch.n, max(1, self.budget // (4 * self.batch.total * d.itemsize)))
        for rows in chunks:
            own_d, own_m = own[0][rows], own[1][rows]
            dd = own_d @ d.T  # (rows, B), as all products here
            products = [
                (gradient[rows], half, gradient[rows] @ d.T, gradient[rows] @ m.T)
                for gradient, half in zip(self.gradients, (0.5, -0.5), strict=True)
                if gradient is not None
            ]
            # M is S_c - D / 2, and T_c + D / 2: the products of a side give those of M.
            h = torch.sub(products[0][2], dd, alpha=products[0][1]) if products else own_m @ d.T
            transposed = h.T if len(chunks) == 1 and ranks is None else own_d @ m.T
            mm = torch.sub(products[0][3], transposed, alpha=products[0][1]) if products else own_m @ m.T
            total = total + 2 * ((dd * mm).sum() + (h * transposed).sum())
            for out, _, by_d, by_m in products:
                torch.mm(by_d, m, out=out)
                out.addmm_(by_m, d)
        return total if ranks is None else ranks.all_reduce(total)


class _ByBlocks(_WholeBatch):
    """By blocks of columns of G (C, C)."""

    def _square(self) -> Tensor:
        d, m, num_classes = self.difference, self.middle, self.batch.num_classes
        total = d.new_zeros(())
        sides = [None if g is None else g.clone() for g in self.gradients]
        for columns in slices(num_classes, max(1, self.budget // (2 * num_classes * d.itemsize))):
            block = torch.addmm(d.T @ m[:, columns], m.T, d[:, columns])  # (C, columns)
            if self.batch.ranks is not None:
                self.batch.ranks.all_reduce(block)
            for gradient, centred in zip(self.gradients, sides, strict=True):
                if gradient is not None and centred is not None:
                    gradient[:, columns] = centred @ block
            total = total + block.square_().sum()
        return total


def is_by_rows(batch: int, num_classes: int, over_ranks: bool) -> bool:
    """True where (B, B) matrices take fewer flop: with two products of a symmetric pair saved in one process alone."""
    return 3 * batch < num_classes if over_ranks else 5 * batch < 2 * num_classes
