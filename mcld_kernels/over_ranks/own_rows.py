"""Own rows against the rows of all ranks, where each row is an anchor and a candidate of every other.

The gradient by a row needs its coefficients as an anchor and as a candidate. Both follow from one cosine and the sums
of the two rows: once every rank has the sums of all rows, the gradient by own rows is a product with the gathered
rows, and nothing has to be added up over the ranks. Products are those of PyTorch's library on every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import Ranks
from ..gram import mm
from ..kernels import UnitRows, projection_coefficient, slices


class Chunk(NamedTuple):
    rows: slice  # of the own rows
    first: int  # the place among all rows of the first of them
    cosines: tuple[Tensor, ...]  # (rows, all rows) for each pair of sides

    def without_self(self, cosines: Tensor, temperature: float) -> Tensor:
        """cosines / temperature, -inf where a row meets itself."""
        a = cosines / temperature
        a.diagonal(self.first).fill_(-torch.inf)
        return a


class Chunks:
    """The cosines of own rows with all rows, by chunks of own rows; where one covers them it is computed once.

    pairs: (own rows, all rows) of unit rows; matrices: of a chunk's size that the caller holds at a time.
    """

    def __init__(
        self, pairs: Sequence[tuple[Tensor, Tensor]], ranks: Ranks, acc: torch.dtype, budget: int, matrices: int
    ):
        self.pairs, self.acc, self.start = pairs, acc, ranks.own.start
        step = max(1, budget // (matrices * ranks.total * acc.itemsize))
        self.parts = slices(pairs[0][0].shape[0], step)
        self.whole: Chunk | None = None

    def __iter__(self) -> Iterator[Chunk]:
        if self.whole is not None:
            yield self.whole
            return
        for rows in self.parts:
            cosines = tuple(mm(own[rows], everything.T, self.acc) for own, everything in self.pairs)
            chunk = Chunk(rows, self.start + rows.start, cosines)
            if len(self.parts) == 1:
                self.whole = chunk
            yield chunk


def finite(lse: Tensor) -> Tensor:
    """A log-sum-exp with 0 for that of no row, so that exp(-inf - lse) is 0."""
    return torch.where(lse == -torch.inf, 0.0, lse)


def through_normalization(g: Tensor, unit: UnitRows, rows: slice) -> Tensor:
    """The gradient by logits from that by their unit rows g (rows, d), which is overwritten."""
    x = unit.rows[rows].to(g.dtype)
    g.addcmul_(x, -projection_coefficient(g, x)[:, None])
    return g.mul_(unit.inv_norm[rows, None])
