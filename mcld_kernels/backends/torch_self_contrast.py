"""Rows contrasted with one another in plain PyTorch, by chunks of half of their symmetric matrix.

The coefficient of a pair, partner_i p_ij + partner_j p_ji, needs the sums of both rows, so there are two passes: the
first gives the sums, the second computes the similarities again and multiplies. With the symmetry both take
4 n^2 d flop, where one pass over the whole matrix takes 6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..gram import add_mm, similarities, trapezoids
from ..kernels import GradCoefficients, NegativeSums, UnitRows, has_fixed_shift


class TorchSelfContrast:
    """As `kernels.SelfContrast`, all rows in one chunk."""

    def __init__(self, unit: UnitRows, temperature: float, budget: int):
        self.unit, self.temperature = unit, temperature
        self.acc_dtype = unit.inv_norm.dtype
        # exp(a_ij) without a shift, and sums of it, stay far inside the range of the accumulator dtype.
        self.without_shift = has_fixed_shift(self.acc_dtype, temperature)
        # The second pass holds a matrix of coefficients beside the exponentials.
        rows = max(1, budget // (2 * unit.n * self.acc_dtype.itemsize))
        self.parts = trapezoids(unit.n, rows)
        self._largest: Tensor | None = None  # (n,) similarity of each row, with a shift
        self._product: Tensor | None = None

    def chunks(self) -> Iterator[NegativeSums]:
        n = self.unit.n
        # Without a shift the largest similarity of a row is not needed.
        largest = None if self.without_shift else self.unit.inv_norm.new_full((n,), -1 / self.temperature)
        total = self.unit.inv_norm.new_zeros(n)
        for rows, columns, a in self._similarities():
            right = slice(rows.stop - rows.start, None)
            if largest is None:
                e = a.exp_()
                total[columns] += e.sum(0)
                total[rows] += e[:, right].sum(1)
            else:
                _add_shifted(total[columns], largest[columns], a, 0)
                if columns.stop > rows.stop:
                    _add_shifted(total[rows], largest[rows], a[:, right], 1)
        self._largest = largest
        neg_lse = total.log() if largest is None else total.log() + largest
        inv_neg_sum = torch.where(total == 0, 0.0, 1 / total)
        yield NegativeSums(rows=slice(0, n), neg_lse=neg_lse, inv_neg_sum=inv_neg_sum, product=None)

    def add(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        rows_of, factor, largest = self.unit.rows, coefficients.product, self._largest
        product = torch.zeros_like(rows_of, dtype=self.acc_dtype)
        weights = torch.empty(self._size(), dtype=self.acc_dtype, device=rows_of.device)
        for rows, columns, a in self._similarities():
            w = weights[: a.numel()].view_as(a)
            if largest is None:
                torch.add(factor[rows, None], factor[columns], out=w).mul_(a.exp_())
            else:
                torch.sub(a, largest[columns], out=w).exp_().mul_(factor[columns])
                w.addcmul_(a.sub_(largest[rows, None]).exp_(), factor[rows, None])
            add_mm(product[rows], w, rows_of[columns], keeps_sums=True)
            if columns.stop > rows.stop:
                right = w[:, rows.stop - rows.start :]
                add_mm(product[rows.stop : columns.stop], right.T, rows_of[rows], keeps_sums=True)
        self._product = product

    def product(self) -> Tensor:
        assert self._product is not None
        return self._product

    def _size(self) -> int:
        """Elements of the largest chunk."""
        rows, columns = self.parts[0]
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def _similarities(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and similarities (rows, columns) of each chunk, -inf on the diagonal; valid until the next."""
        unit = self.unit.rows
        buffer = torch.empty(self._size(), dtype=self.acc_dtype, device=unit.device)
        for rows, columns in self.parts:
            shape = rows.stop - rows.start, columns.stop - columns.start
            a = similarities(unit[rows], unit[columns], self.temperature, buffer[: shape[0] * shape[1]].view(shape))
            a.diagonal().fill_(-torch.inf)
            yield rows, columns, a


def _add_shifted(total: Tensor, largest: Tensor, a: Tensor, dim: int) -> None:
    """Add the sums of exp(a) over ``dim`` to ``total``, both relative to exp(largest); changes both in place."""
    before = largest.clone()
    torch.maximum(largest, a.amax(dim), out=largest)
    total.mul_((before - largest).exp_()).add_((a - largest.unsqueeze(dim)).exp_().sum(dim))
