r"""InfoNCE over ranks: this rank's anchors against the candidates of all ranks, and the other way round.

Every rank holds its own rows of two sides: the *local* side stays, the *remote* side is gathered, or travels around the
ranks by blocks (`RemoteSide`). B rows in all, b of them here. Notation as in `infonce`. All sums run over negatives; a
sum over parts of them is again a log-sum-exp with a normalized product, so that blocks and ranks add up.

Local anchors need no communication but the remote rows. A remote anchor j meets the local candidates of every rank:
its sum over them is an all-reduce of (B,) numbers, and with it the gradient by the local candidates is local,

    dL/dK_i = sum_j w_j (1 - p_jj) exp(a_ji) / neg_sum_j A_j / temperature,   over all remote anchors j,

which takes the exponentials a second time. The gradient by the remote rows, if they need one, is summed over ranks at
its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .distributed import Ranks
from .infonce import Anchors, Side
from .kernels import (
    AnchorTerms,
    ContrastArgs,
    GradCoefficients,
    GradEpilogueArgs,
    KernelSet,
    NegativeSums,
    UnitRows,
    has_fixed_shift,
    slices,
)
from .labels import Labels, part_of_labels


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
    """

    def __init__(self, kernels: KernelSet, ranks: Ranks, make: Callable[[], UnitRows], labels: Labels | None = None):
        self.kernels, self.ranks, self.make, self.labels = kernels, ranks, make, labels
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


def contrast_over_ranks(
    kernels: KernelSet,
    ranks: Ranks,
    local: Side,
    remote: RemoteSide,
    *,
    temperature: float,
    local_anchors: Anchors | None = None,
    remote_anchors: Anchors | None = None,
    remote_side: Side | None = None,
    mask_same_class: bool = False,
) -> None:
    """Add one contrast, of either direction or of both, to `Anchors.per_anchor` and to the gradients of own rows.

    Row i of one side is the positive of row i of the other. Labels have the class indices of
    `labels.index_labels_over_ranks`.

    Args:
        local_anchors: the local rows as anchors of all remote rows; its side is ``local``.
        remote_anchors: the remote rows as anchors of all local rows. Its weights count all B rows, and its per_anchor
            takes the parts of this rank's own.
        remote_side: where the gradient by this rank's own remote rows goes, if it is needed; ``unit`` is not read.
    """
    contrast = _RankContrast(kernels, ranks, local, remote, temperature, mask_same_class)
    contrast.remote_grad = remote_side is not None and remote_side.grad.needed
    by_label = [
        weight.positives == "label"
        for anchors in (local_anchors, remote_anchors)
        if anchors is not None
        for weight in anchors.weights
    ]
    if any(by_label):
        contrast.begin_labels()
    contrast.first_pass(local_anchors, remote_anchors is not None)
    if remote_anchors is not None:
        contrast.finish_remote_anchors(remote_anchors)
    contrast.second_pass(local_anchors is not None, remote_anchors is not None)
    if remote_side is not None and contrast.remote_grad:
        contrast.remote_gradient(remote_side)


class _RankContrast:
    """One contrast over ranks under way."""

    def __init__(
        self, kernels: KernelSet, ranks: Ranks, local: Side, remote: RemoteSide, temperature: float, masked: bool
    ):
        self.kernels, self.ranks, self.local, self.remote = kernels, ranks, local, remote
        self.temperature, self.masked = temperature, masked
        self.remote_grad = False
        unit = local.unit
        self.acc = unit.inv_norm.dtype
        self.like = unit.inv_norm.new_empty(0)
        # Tables by class index (classes of this rank's rows and one more, d): means of the class over the global batch,
        # of all remote rows and of the part that the local rows have in those of the local side.
        self.means: Tensor | None = None
        self.local_means: Tensor | None = None
        self.positive = self.like.new_zeros(unit.n)  # cosines of own pairs (b,)
        self.lse = self.like.new_full((ranks.total,), -torch.inf)  # of remote anchors over the local candidates
        self.label_cosines = self.like.new_zeros(ranks.total)  # this rank's part of Y_j . mean of class j
        self.of_local: GradCoefficients | None = None  # (b,)
        self.local_lse = self.like  # of local anchors over all candidates (b,), after a ring
        self.of_remote: GradCoefficients | None = None  # (B,)
        self.remote_product: Tensor | None = None  # gradient by all remote rows (B, d), or by own (b, d) after a ring

    def begin_labels(self) -> None:
        """The class means that label positives take."""
        everything, own = self.remote.labels, self.local.labels
        assert everything is not None and own is not None
        counts = everything.counts
        if self.local.unit.n > 0:
            self.local_means = self.kernels.class_means(self.local.unit, own, counts)
            # The last row is that of ignored rows here, and of other ranks' classes elsewhere.
            self.local_means[-1].zero_()
        if self.remote.whole is not None and self.local.unit.n > 0:
            self.means = self.kernels.class_means(self.remote.whole, everything, counts)

    def first_pass(self, local_anchors: Anchors | None, with_remote: bool) -> None:
        """All of the local anchors, and the sums of the remote ones over the local candidates."""
        if self.local.unit.n == 0:
            for _ in self.remote.blocks():  # a rank without rows passes on those of the others
                pass
            return
        if self.remote.whole is not None:
            self._own_positives(slice(0, self.ranks.total), self.remote.whole)
            self._label_cosines(slice(0, self.ranks.total), self.remote.whole)
            if local_anchors is None:
                self._sum_remote(slice(0, self.ranks.total), self.remote.whole)
            else:
                self._local_anchors_of_all(local_anchors, self.remote.whole, with_remote)
            return
        sums = self._sums_around_the_ring(local_anchors is not None, with_remote)
        if sums is None or local_anchors is None:
            return
        coefficients = self.kernels.loss_epilogue(self._local_terms(local_anchors), sums)
        self.of_local, self.local_lse = coefficients, sums.neg_lse
        if self.local.grad.needed:
            partner, first = self.remote.own()
            self._local_epilogue(sums.rows, sums.product, coefficients, partner, first)
            self.local.grad.is_written = True

    def _sums_around_the_ring(self, with_local: bool, with_remote: bool) -> NegativeSums | None:
        """The sums of local anchors over all blocks, and those of remote anchors."""
        sums = _RunningSums(self.local, self.acc) if with_local else None
        for rows, block in self.remote.blocks():
            if block.n == 0:
                continue
            if rows == self.ranks.own:
                self._own_positives(rows, block)
            self._label_cosines(rows, block)
            if self.local_means is not None:
                assert self.remote.labels is not None
                part = part_of_labels(self.remote.labels, rows)
                means = self.kernels.class_means(block, part, self.remote.labels.counts)
                self.means = means if self.means is None else self.means.add_(means)
            reverse = with_local and with_remote and self._can_reverse()
            if sums is not None:
                pass_ = self.kernels.contrast(self._local_args(rows, block, self.local.grad.needed, False, reverse))
                for chunk in pass_.chunks():
                    sums.add(chunk)
                if reverse:
                    self._take_reverse(rows, pass_.sums().reverse)
            if with_remote and not reverse:
                self._sum_remote(rows, block)
        return None if sums is None else sums.result()

    def _local_anchors_of_all(self, anchors: Anchors, whole: UnitRows, with_remote: bool) -> None:
        """Local anchors where all candidates are here: a chunk is complete."""
        rows = slice(0, self.ranks.total)
        reverse = with_remote and self._can_reverse()
        args = self._local_args(rows, whole, self.local.grad.needed, self.remote_grad, reverse)
        terms = self._local_terms(anchors)
        pass_ = self.kernels.contrast(args)
        parts = []
        for chunk in pass_.chunks():
            coefficients = self.kernels.loss_epilogue(terms, chunk)
            if args.anchor_grad:
                self._local_epilogue(chunk.rows, chunk.product, coefficients, whole, self.ranks.own.start)
            if args.candidate_grad:
                pass_.add_candidates(chunk, coefficients)
                parts.append(coefficients)
        if args.anchor_grad:
            self.local.grad.is_written = True
        sums = pass_.sums() if reverse or args.candidate_grad else None
        if sums is not None and reverse:
            self._take_reverse(rows, sums.reverse)
        elif with_remote:
            self._sum_remote(rows, whole)
        if sums is not None and args.candidate_grad:
            assert sums.candidate_product is not None
            self.remote_product = sums.candidate_product[:, : whole.d]
            by_label = [part.class_mean for part in parts if part.class_mean is not None]
            self.of_local = GradCoefficients(
                partner=torch.cat([part.partner for part in parts]),
                product=torch.cat([part.product for part in parts]),
                class_mean=torch.cat(by_label) if by_label else None,
            )

    def finish_remote_anchors(self, anchors: Anchors) -> None:
        """The sums of remote anchors over all ranks, the losses of own ones, and the coefficients of all."""
        total, own = self.ranks.total, self.ranks.own
        fixed = has_fixed_shift(torch.float32, self.temperature)
        shift: Tensor | float = 1 / self.temperature
        if not fixed:
            shift = self.ranks.all_reduce(self.lse.clone(), "max")
            shift = torch.where(shift == -torch.inf, 0.0, shift)
        by_label = any(weight.positives == "label" for weight in anchors.weights)
        parts = self.like.new_zeros(3 if by_label else 2, total)
        torch.exp(self.lse - shift, out=parts[0])
        parts[1, own] = self.positive
        if by_label:
            parts[2] = self.label_cosines
        self.ranks.all_reduce(parts)
        neg_lse = parts[0].log() + shift
        per_anchor = parts.new_zeros(len(anchors.weights), total)
        terms = AnchorTerms(
            positive=parts[1],
            label_positive=parts[2] if by_label else parts[1],
            temperature=self.temperature,
            weights=anchors.weights,
            per_anchor=per_anchor,
        )
        sums = NegativeSums(
            rows=slice(0, total),
            neg_lse=neg_lse,
            inv_neg_sum=torch.ones_like(neg_lse),
            product=None,
        )
        self.of_remote = self.kernels.loss_epilogue(terms, sums)
        anchors.per_anchor[:, : own.stop - own.start] = per_anchor[:, own]
        self.lse = neg_lse

    def second_pass(self, with_local: bool, with_remote: bool) -> None:
        """The gradients that need every sum: by the candidates of remote anchors, and by remote rows."""
        local_grad = with_remote and self.local.grad.needed
        ring_grad = self.remote_grad and self.remote.whole is None
        if not local_grad and not ring_grad and not (self.remote_grad and with_remote):
            return
        products: list[Tensor] = []

        def parts() -> Iterator[Tensor]:
            for rows, block in self.remote.blocks():
                gradient = None
                if self.remote_grad:
                    size = max(self.ranks.sizes) if ring_grad else block.n
                    gradient = self.like.new_zeros(size, block.d)
                if self.local.unit.n > 0 and block.n > 0:
                    if with_remote:
                        self._remote_anchors(rows, block, gradient, products if local_grad else None)
                    if with_local and ring_grad:
                        assert gradient is not None
                        self._candidates_of_local(rows, block, gradient)
                    if gradient is not None:
                        self._label_pull(rows, gradient)
                yield gradient if gradient is not None else self.like

        if ring_grad:
            self.remote_product = self.ranks.ring_sum(parts())[: self.local.unit.n]
        else:
            for gradient in parts():
                if self.remote_grad:
                    self.remote_product = gradient.add_(0.0 if self.remote_product is None else self.remote_product)
        if local_grad and products:
            self._candidate_epilogue(products[0])

    def remote_gradient(self, side: Side) -> None:
        """The gradient by own remote rows, from what all ranks have added to it."""
        n, d = self.local.unit.n, self.local.unit.d
        if self.remote.whole is not None:
            product = self.remote_product
            if product is None:
                product = self.like.new_zeros(self.ranks.total, d)
            if self.of_remote is None and n > 0:  # no second pass has pulled towards the class means
                self._label_pull(slice(0, self.ranks.total), product)
            self.remote_product = self.ranks.reduce_scatter(product)
        if n == 0:
            return
        assert self.remote_product is not None
        pull = self.like.new_zeros(n)
        for part in (self.of_local, _part(self.of_remote, self.ranks.own)):
            if part is not None:
                pull += part.partner if part.class_mean is None else part.partner - part.class_mean
        self.kernels.grad_epilogue(
            GradEpilogueArgs(
                out=side.grad.view(side.transposed),
                unit=self.remote.make(),
                rows=slice(0, n),
                product=self.remote_product,
                coefficients=GradCoefficients(partner=pull, product=torch.ones_like(pull), class_mean=None),
                partner=self.local.unit,
                offset=0,
                class_means=None,
                class_index=None,
                accumulate=side.grad.is_written,
            )
        )
        side.grad.is_written = True

    def _own_positives(self, rows: slice, block: UnitRows) -> None:
        offset = self.ranks.own.start - rows.start
        self.positive, _ = self.kernels.positive_cosines(self.local.unit, block, offset, None, None)

    def _label_cosines(self, rows: slice, block: UnitRows) -> None:
        if self.local_means is None:
            return
        assert self.remote.labels is not None
        index = self.remote.labels.class_index[rows].contiguous()
        _, self.label_cosines[rows] = self.kernels.positive_cosines(block, block, 0, self.local_means, index)

    def _local_terms(self, anchors: Anchors) -> AnchorTerms:
        label_positive = self.positive
        if any(weight.positives == "label" for weight in anchors.weights):
            unit, labels = self.local.unit, self.local.labels
            assert labels is not None
            _, label_positive = self.kernels.positive_cosines(unit, unit, 0, self.means, labels.class_index)
        return AnchorTerms(
            positive=self.positive,
            label_positive=label_positive,
            temperature=self.temperature,
            weights=anchors.weights,
            per_anchor=anchors.per_anchor,
        )

    def _can_reverse(self) -> bool:
        # With a gradient by the candidates, the reverse direction would make a product that is not used.
        operand_dtype = self.local.unit.rows.dtype
        return not self.remote_grad and self.kernels.can_reverse(operand_dtype, self.temperature)

    def _local_args(
        self, rows: slice, block: UnitRows, anchor_grad: bool, candidate_grad: bool, reverse: bool
    ) -> ContrastArgs:
        """Local anchors, remote candidates."""
        mask = self._mask(rows)
        return ContrastArgs(
            anchors=self.local.unit,
            candidates=block,
            temperature=self.temperature,
            offset=self.ranks.own.start - rows.start,
            mask=mask,
            anchor_grad=anchor_grad,
            candidate_grad=candidate_grad,
            reverse=reverse,
        )

    def _remote_args(self, rows: slice, block: UnitRows, anchor_grad: bool, candidate_grad: bool) -> ContrastArgs:
        """Remote anchors, local candidates."""
        mask = self._mask(rows)
        return ContrastArgs(
            anchors=block,
            candidates=self.local.unit,
            temperature=self.temperature,
            offset=rows.start - self.ranks.own.start,
            mask=None if mask is None else (mask[1], mask[0]),
            anchor_grad=anchor_grad,
            candidate_grad=candidate_grad,
        )

    def _mask(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        if not self.masked:
            return None
        assert self.local.labels is not None and self.remote.labels is not None
        return self.local.labels.key, self.remote.labels.key[rows]

    def _take_reverse(self, rows: slice, reverse: NegativeSums | None) -> None:
        assert reverse is not None
        self.lse[rows] = reverse.neg_lse

    def _sum_remote(self, rows: slice, block: UnitRows) -> None:
        """The sums of remote anchors over the local candidates."""
        for chunk in self.kernels.contrast(self._remote_args(rows, block, False, False)).chunks():
            self.lse[_within(rows, chunk.rows)] = chunk.neg_lse

    def _remote_anchors(self, rows: slice, block: UnitRows, gradient: Tensor | None, products: list[Tensor] | None):
        """The gradients by a block of remote anchors and by their candidates, the local rows."""
        assert self.of_remote is not None
        pass_ = self.kernels.contrast(self._remote_args(rows, block, gradient is not None, products is not None))
        for chunk in pass_.chunks():
            coefficients = self._of_chunk(self.of_remote, self.lse, _within(rows, chunk.rows), chunk)
            if products is not None:
                pass_.add_candidates(chunk, coefficients)
            if gradient is not None:
                assert chunk.product is not None
                gradient[chunk.rows].addcmul_(chunk.product[:, : block.d], coefficients.product[:, None])
        if products is not None:
            product = pass_.sums().candidate_product
            assert product is not None
            if products:
                products[0].add_(product)
            else:
                products.append(product)

    def _candidates_of_local(self, rows: slice, block: UnitRows, gradient: Tensor) -> None:
        """The gradient by a block of remote rows as candidates of the local anchors."""
        assert self.of_local is not None
        pass_ = self.kernels.contrast(self._local_args(rows, block, False, True, False))
        for chunk in pass_.chunks():
            pass_.add_candidates(chunk, self._of_chunk(self.of_local, self.local_lse, chunk.rows, chunk))
        product = pass_.sums().candidate_product
        assert product is not None
        gradient[: block.n] += product[:, : block.d]

    @staticmethod
    def _of_chunk(whole: GradCoefficients, neg_lse: Tensor, rows: slice, chunk: NegativeSums) -> GradCoefficients:
        """The coefficients of some anchors for a part of their negatives, of which ``chunk`` has the sums."""
        # Of no negatives, here or at all, there is no part.
        part = torch.where(chunk.neg_lse == -torch.inf, 0.0, (chunk.neg_lse - neg_lse[rows]).exp())
        partner = whole.partner[rows] * part
        return GradCoefficients(partner=partner, product=partner * chunk.inv_neg_sum, class_mean=None)

    def _label_pull(self, rows: slice, gradient: Tensor) -> None:
        """The pull of remote rows towards this rank's part of the means of their class."""
        if self.local_means is None:
            return
        labels = self.remote.labels
        assert labels is not None
        weight = self.like.new_zeros(())
        for part in (self.of_local, self.of_remote):
            if part is not None and part.class_mean is not None:
                # The same for every row that counts, and 0 for the others.
                weight = weight + part.class_mean.amax()
        pull = labels.valid[rows] * weight
        n, d = pull.shape[0], gradient.shape[1]
        for some in slices(n, max(1, self.kernels.tuning.chunk_bytes // (d * gradient.itemsize))):
            index = labels.class_index[rows][some]
            gradient[some].addcmul_(self.local_means[index, :d], -pull[some, None])

    def _local_epilogue(
        self, rows: slice, product: Tensor | None, coefficients: GradCoefficients, partner: UnitRows, offset: int
    ) -> None:
        """The gradient by local anchors."""
        assert product is not None
        labels = self.local.labels
        self.kernels.grad_epilogue(
            GradEpilogueArgs(
                out=self.local.grad.view(self.local.transposed),
                unit=self.local.unit,
                rows=rows,
                product=product,
                coefficients=coefficients,
                partner=partner,
                offset=offset,
                class_means=self.means,
                class_index=None if labels is None else labels.class_index,
                accumulate=self.local.grad.is_written,
            )
        )

    def _candidate_epilogue(self, product: Tensor) -> None:
        """The gradient by local rows as candidates of all remote anchors."""
        assert self.of_remote is not None
        own = _part(self.of_remote, self.ranks.own)
        assert own is not None
        partner, first = self.remote.own()
        coefficients = GradCoefficients(
            partner=own.partner, product=torch.ones_like(own.partner), class_mean=own.class_mean
        )
        self._local_epilogue(slice(0, self.local.unit.n), product, coefficients, partner, first)
        self.local.grad.is_written = True


class _RunningSums:
    """Sums of local anchors over the blocks of their candidates so far: log-sum-exp and normalized product."""

    def __init__(self, side: Side, acc: torch.dtype):
        unit = side.unit
        self.neg_lse = unit.inv_norm.new_full((unit.n,), -torch.inf)
        shape = unit.n, unit.rows.shape[1]
        self.product = unit.rows.new_zeros(shape, dtype=acc) if side.grad.needed else None

    def add(self, chunk: NegativeSums) -> None:
        rows = chunk.rows
        before = self.neg_lse[rows]
        after = torch.logaddexp(before, chunk.neg_lse)
        if self.product is not None:
            assert chunk.product is not None
            kept, added = (torch.where(x == -torch.inf, 0.0, (x - after).exp()) for x in (before, chunk.neg_lse))
            product = self.product[rows].mul_(kept[:, None])
            product.addcmul_(chunk.product[:, : product.shape[1]], (added * chunk.inv_neg_sum)[:, None])
        self.neg_lse[rows] = after

    def result(self) -> NegativeSums:
        return NegativeSums(
            rows=slice(0, self.neg_lse.shape[0]),
            neg_lse=self.neg_lse,
            inv_neg_sum=torch.ones_like(self.neg_lse),
            product=self.product,
        )


def _within(rows: slice, part: slice) -> slice:
    return slice(rows.start + part.start, rows.start + part.stop)


def _part(coefficients: GradCoefficients | None, rows: slice) -> GradCoefficients | None:
    if coefficients is None:
        return None
    class_mean = coefficients.class_mean
    return GradCoefficients(
        partner=coefficients.partner[rows],
        product=coefficients.product[rows],
        class_mean=None if class_mean is None else class_mean[rows],
    )
