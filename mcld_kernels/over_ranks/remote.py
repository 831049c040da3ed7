"""The rows of one side on all ranks: gathered once, or in blocks that travel around the ring each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..distributed import Ranks
from ..kernels import KernelSet, UnitRows
from ..labels import Labels, SoftLabels


def normalize_rows(kernels: KernelSet, x: Tensor, operand_dtype: torch.dtype, eps: float) -> UnitRows:
    """`KernelSet.l2_normalize`, also of no rows."""
    if x.shape[0] > 0:
        return kernels.l2_normalize(x, operand_dtype, eps)
    acc = torch.promote_types(torch.promote_types(x.dtype, operand_dtype), torch.float32)
    rows = x.new_zeros(kernels.operand_shape(0, x.shape[1], operand_dtype), dtype=operand_dtype)
    return UnitRows(rows=rows, inv_norm=x.new_zeros(0, dtype=acc), n=0, d=x.shape[1])


class RemoteSide:
    """The rows of one side on all ranks, in blocks: one that was gathered, or one of each rank in turn.

    make: this rank's own unit rows. They are made again where they are needed again: a ring overwrites them.
    labels: of all B rows.
    further: unit rows that are candidates of the local anchors beside all B, the same on every rank, and their labels.
    """

    def __init__(
        self,
        kernels: KernelSet,
        ranks: Ranks,
        make: Callable[[], UnitRows],
        labels: Labels | None = None,
        further: UnitRows | None = None,
        further_labels: Labels | None = None,
        further_soft: SoftLabels | None = None,
    ):
        self.kernels, self.ranks, self.make, self.labels = kernels, ranks, make, labels
        self.further, self.further_labels, self.further_soft = further, further_labels, further_soft
        self.whole: UnitRows | None = None
        if ranks.gather == "all":
            own = make()
            rows, _ = kernels.operand_shape(ranks.total, own.d, own.rows.dtype)
            buffer = own.rows.new_empty(rows, own.rows.shape[1])
            buffer[ranks.total :].zero_()
            ranks.all_gather(own.rows[: own.n].contiguous(), buffer[: ranks.total])
            self.whole = self._unit(buffer, ranks.total, own.d, own.inv_norm)

    def blocks(self) -> Iterator[tuple[slice, UnitRows]]:
        """Rows of the global batch and their unit rows, valid until the next are taken."""
        if self.whole is not None:
            yield slice(0, self.ranks.total), self.whole
            return
        own = self.make()
        d, dtype, inv_norm = own.d, own.rows.dtype, own.inv_norm
        shape = self.kernels.operand_shape(max(self.ranks.sizes), d, dtype)
        block = own.rows
        if tuple(block.shape) != shape or not block.is_contiguous():
            block = own.rows.new_zeros(shape)
            block[: own.n] = own.rows[: own.n]
        del own
        for rank, rows in self.ranks.ring(block):
            size = self.ranks.sizes[rank]
            padded, _ = self.kernels.operand_shape(size, d, dtype)
            yield self.ranks.rows(rank), self._unit(rows[:padded], size, d, inv_norm)

    def own(self) -> tuple[UnitRows, int]:
        """Unit rows that hold this rank's own, and the first of these."""
        return (self.make(), 0) if self.whole is None else (self.whole, self.ranks.own.start)

    @staticmethod
    def _unit(rows: Tensor, n: int, d: int, like: Tensor) -> UnitRows:
        # Candidates are unit rows already: their norms are used by the gradient of a rank's own rows alone.
        return UnitRows(rows=rows, inv_norm=like.new_ones(n), n=n, d=d)
