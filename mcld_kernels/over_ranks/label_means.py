r"""Label positives over ranks: means of the rows of a class, by hard labels (`ClassMeans`) or soft ones.

Local anchor i takes sum_j w_ij T_j over all remote rows and further candidates, a remote anchor j takes sum_i w_ji S_i
over the local rows of all ranks, w the weights of the positives. The gradient by the candidates takes the transposes.

Hard labels: one table of the classes of this rank's rows, from rows that are here anyway. Soft labels, w_ij =
<Y_i, Y_j> / (Y_i . sum_j Y_j): tables Y^T rows of (C, d), all-reduced, since any row may share a class with any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import Ranks
from ..infonce import Side
from ..kernels import GradCoefficients, KernelSet, UnitRows, slices
from ..labels import part_of_labels
from .remote import RemoteSide


class LabelMeans:
    """The interface, and what a contrast without label positives has: nothing."""

    class_index: Tensor | None = None  # (b,) rows of the tables
    means: Tensor | None = None  # table: the positives' mean of local anchors
    candidate_means: Tensor | None = None  # table: the pull of local rows as candidates of remote anchors
    cosines: Tensor | None = None  # (B,) this rank's part of T_j . mean of the positives of remote anchor j

    def begin(self, with_local: bool, with_remote: bool, remote_grad: bool) -> None:
        """Before the first block."""

    def take(self, rows: slice, block: UnitRows) -> None:
        """A block of remote rows; blocks have a row, and so has this rank."""

    def finish(self) -> None:
        """After the last block."""

    def pull(
        self, rows: slice, gradient: Tensor, of_local: GradCoefficients | None, of_remote: GradCoefficients | None
    ):
        """Add this rank's part of the gradient by remote rows (rows, d)."""

    def pull_own(self, gradient: Tensor, of_local: GradCoefficients | None, of_remote: GradCoefficients | None) -> None:
        """Add the gradient by this rank's own remote rows (b, d) that needs no sum over ranks."""


class ClassMeans(LabelMeans):
    """Hard labels. Tables by class index: the classes of this rank's rows, and one more row."""

    def __init__(self, kernels: KernelSet, ranks: Ranks, local: Side, remote: RemoteSide):
        assert local.labels is not None and remote.labels is not None
        self.kernels, self.local, self.remote = kernels, local, remote
        self.own, self.everything = local.labels, remote.labels
        self.class_index = local.labels.class_index
        self.cosines = local.unit.inv_norm.new_zeros(ranks.total)
        self.local_means: Tensor | None = None  # the part of the local rows in the means of their side
        self.kept: Tensor | None = None  # (classes,) the part of the remote rows in all candidates of the class

    def begin(self, with_local: bool, with_remote: bool, remote_grad: bool) -> None:
        self.with_remote = with_remote
        if (with_remote or remote_grad) and self.local.unit.n > 0:
            self.local_means = self.kernels.class_means(self.local.unit, self.own, self.everything.counts)
            # The last row is that of ignored rows here, and of other ranks' classes elsewhere.
            self.local_means[-1].zero_()

    def take(self, rows: slice, block: UnitRows) -> None:
        labels = self.everything
        part = labels if block.n == labels.valid.shape[0] else part_of_labels(labels, rows)
        means = self.kernels.class_means(block, part, labels.counts)
        self.candidate_means = means if self.candidate_means is None else self.candidate_means.add_(means)
        if self.with_remote:
            assert self.cosines is not None
            index = part.class_index.contiguous()
            _, self.cosines[rows] = self.kernels.positive_cosines(block, block, 0, self.local_means, index)

    def finish(self) -> None:
        self.means, further = self.candidate_means, self.remote.further
        if self.candidate_means is None or further is None:
            return
        theirs = self.remote.further_labels
        assert theirs is not None
        counts = self.everything.counts + theirs.counts
        self.kept = self.everything.counts.to(self.candidate_means.dtype) / counts.clamp(min=1)
        means = self.kernels.class_means(further, theirs, counts)
        self.means = means.addcmul_(self.candidate_means, self.kept[:, None])

    def pull(
        self, rows: slice, gradient: Tensor, of_local: GradCoefficients | None, of_remote: GradCoefficients | None
    ):
        if self.local_means is None:
            return
        index = self.everything.class_index[rows]
        weight = gradient.new_zeros(index.shape)
        # A coefficient is the same for every row that counts, and 0 for the others.
        if of_local is not None and of_local.class_mean is not None:
            weight = weight + of_local.class_mean.amax() * (1.0 if self.kept is None else self.kept[index])
        if of_remote is not None and of_remote.class_mean is not None:
            weight = weight + of_remote.class_mean.amax()
        weight = weight * self.everything.valid[rows]
        n, d = weight.shape[0], gradient.shape[1]
        for some in slices(n, max(1, self.kernels.tuning.chunk_bytes // (d * gradient.itemsize))):
            gradient[some].addcmul_(self.local_means[index[some], :d], -weight[some, None])


class SoftMeans(LabelMeans):
    """Soft labels. Tables by row: class_index counts the rows of this rank."""

    def __init__(self, ranks: Ranks, local: Side, remote: RemoteSide):
        assert local.soft is not None
        self.ranks, self.local, self.remote, self.soft = ranks, local, remote, local.soft
        self.class_index = torch.arange(local.unit.n, device=local.unit.rows.device)
        self.by_local: Tensor | None = None  # (b, d) pull of own remote rows as candidates of local anchors
        self.by_remote: Tensor | None = None  # (b, d) mean of the positives of own remote rows as anchors

    def begin(self, with_local: bool, with_remote: bool, remote_grad: bool) -> None:
        unit, soft, ranks = self.local.unit, self.soft, self.ranks
        acc = unit.inv_norm.dtype
        local = unit.rows[: unit.n].to(acc)  # as wide as operands are, padding included
        whole, first = self.remote.own()
        remote = whole.rows[first : first + unit.n].to(acc)
        totals = ranks.all_reduce(soft.totals.clone())
        of_remote = soft.share(totals)  # (b,) of own rows as remote anchors
        of_local = of_remote
        if with_local:
            sums = self._summed(remote)
            if self.remote.further is not None:
                further, theirs = self.remote.further, self.remote.further_soft
                assert theirs is not None
                of_local = soft.share(totals + theirs.totals)
                sums = sums + theirs.class_sums(further.rows[: further.n])
            self.means = self._mixed(sums).mul_(of_local[:, None])
        if with_remote:
            self.by_remote = self._mixed(self._summed(local)).mul_(of_remote[:, None])
            self.cosines = local.new_zeros(ranks.total)
            self.cosines[ranks.own] = torch.linalg.vecdot(remote, self.by_remote)
        if with_remote and self.local.grad.needed:
            self.candidate_means = self._mixed(self._summed(remote * of_remote[:, None]))
        if with_local and remote_grad:
            self.by_local = self._mixed(self._summed(local * of_local[:, None]))

    def _summed(self, rows: Tensor) -> Tensor:
        """Y^T rows over all ranks: (C, >= d)."""
        table = rows.new_zeros(self.soft.totals.shape[0], rows.shape[1])
        if rows.shape[0] > 0:
            table = self.soft.class_sums(rows)
        return self.ranks.all_reduce(table)

    def _mixed(self, table: Tensor) -> Tensor:
        return self.soft.mix(table) if self.local.unit.n > 0 else table[:0]

    def pull_own(self, gradient: Tensor, of_local: GradCoefficients | None, of_remote: GradCoefficients | None) -> None:
        if of_local is not None and of_local.class_mean is not None and self.by_local is not None:
            # The same for every anchor that counts; rows that do not count share no class.
            gradient.addcmul_(self.by_local[:, : self.local.unit.d], -of_local.class_mean.amax())
        if of_remote is not None and of_remote.class_mean is not None and self.by_remote is not None:
            by_remote = self.by_remote[:, : self.local.unit.d]
            gradient.addcmul_(by_remote, -of_remote.class_mean[self.ranks.own, None])
