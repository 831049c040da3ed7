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

from collections.abc import Iterator

import torch
from torch import Tensor

from ..distributed import Ranks
from ..infonce import Anchors, Side
from ..kernels import (
    AnchorTerms,
    ContrastArgs,
    GradCoefficients,
    GradEpilogueArgs,
    KernelSet,
    NegativeSums,
    UnitRows,
    has_fixed_shift,
)
from .label_means import ClassMeans, LabelMeans, SoftMeans
from .remote import RemoteSide


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
    terms = [weight for anchors in (local_anchors, remote_anchors) if anchors is not None for weight in anchors.weights]
    if any(weight.positives == "label" for weight in terms):
        contrast.keeps_sums = True
        is_soft = local.soft is not None
        contrast.labels = SoftMeans(ranks, local, remote) if is_soft else ClassMeans(kernels, ranks, local, remote)
        contrast.labels.begin(local_anchors is not None, remote_anchors is not None, contrast.remote_grad)
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
        self.remote_grad = self.has_second_pass = self.keeps_sums = False
        unit = local.unit
        self.acc = unit.inv_norm.dtype
        self.like = unit.inv_norm.new_empty(0)
        self.labels = LabelMeans()
        self.positive = self.like.new_zeros(unit.n)  # cosines of own pairs (b,)
        self.lse = self.like.new_full((ranks.total,), -torch.inf)  # of remote anchors over the local candidates
        self.of_local: GradCoefficients | None = None  # (b,)
        self.local_lse = self.like  # of local anchors over all candidates (b,), where they came by blocks
        self.of_remote: GradCoefficients | None = None  # (B,)
        self.remote_product: Tensor | None = None  # gradient by all remote rows (B, d), or by own (b, d) after a ring

    def first_pass(self, local_anchors: Anchors | None, with_remote: bool) -> None:
        """All of the local anchors, and the sums of the remote ones over the local candidates."""
        if self.local.unit.n == 0:
            for _ in self.remote.blocks():  # a rank without rows passes on those of the others
                pass
            return
        if self.remote.whole is not None and self.remote.further is None:
            rows = slice(0, self.ranks.total)
            self._begin_block(rows, self.remote.whole)
            self.labels.finish()
            if local_anchors is None:
                self._sum_remote(rows, self.remote.whole)
            else:
                self._local_anchors_of_all(local_anchors, self.remote.whole, with_remote)
            return
        sums = self._sums_by_blocks(local_anchors is not None, with_remote)
        self.labels.finish()
        if sums is None or local_anchors is None:
            return
        coefficients = self.kernels.loss_epilogue(self._local_terms(local_anchors), sums)
        self.of_local, self.local_lse = coefficients, sums.neg_lse
        if self.local.grad.needed:
            partner, first = self.remote.own()
            self._local_epilogue(sums.rows, sums.product, coefficients, partner, first, self.labels.means)
            self.local.grad.is_written = True

    def _begin_block(self, rows: slice, block: UnitRows) -> None:
        """Take from a block, beside its sums, the own positives and the sums for label positives."""
        own = self.ranks.own
        if rows.start <= own.start and own.stop <= rows.stop:
            offset = own.start - rows.start
            self.positive, _ = self.kernels.positive_cosines(self.local.unit, block, offset, None, None)
        self.labels.take(rows, block)

    def _sums_by_blocks(self, with_local: bool, with_remote: bool) -> NegativeSums | None:
        """The sums of local anchors over all blocks, and those of remote anchors."""
        sums = _RunningSums(self.local, self.acc) if with_local else None
        for rows, block in self.remote.blocks():
            if block.n == 0:
                continue
            self._begin_block(rows, block)
            reverse = with_local and with_remote and self._can_reverse()
            if sums is not None:
                pass_ = self.kernels.contrast(self._local_args(rows, block, self.local.grad.needed, False, reverse))
                for chunk in pass_.chunks():
                    sums.add(chunk)
                if reverse:
                    self._take_reverse(rows, pass_.sums().reverse)
            if with_remote and not reverse:
                self._sum_remote(rows, block)
        if sums is None:
            return None
        further = self.remote.further
        if further is not None:
            for chunk in self.kernels.contrast(self._further_args(further)).chunks():
                sums.add(chunk)
        return sums.result()

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
                self._local_epilogue(
                    chunk.rows, chunk.product, coefficients, whole, self.ranks.own.start, self.labels.means
                )
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
            assert self.labels.cosines is not None
            parts[2] = self.labels.cosines
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
        # Where the candidates came by blocks, their gradient needs the sums over all of them.
        by_blocks = with_local and (ring_grad or (self.remote_grad and self.remote.further is not None))
        if not local_grad and not ring_grad and not by_blocks and not (self.remote_grad and with_remote):
            return
        self.has_second_pass = True
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
                    if by_blocks:
                        assert gradient is not None
                        self._candidates_of_local(rows, block, gradient)
                    if gradient is not None:
                        self.labels.pull(rows, gradient, self.of_local, self.of_remote)
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
            if not self.has_second_pass and n > 0:  # nothing has pulled towards the class means
                self.labels.pull(slice(0, self.ranks.total), product, self.of_local, self.of_remote)
            self.remote_product = self.ranks.reduce_scatter(product)
        if n == 0:
            return
        assert self.remote_product is not None
        self.labels.pull_own(self.remote_product, self.of_local, self.of_remote)
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

    def _local_terms(self, anchors: Anchors) -> AnchorTerms:
        label_positive = self.positive
        if any(weight.positives == "label" for weight in anchors.weights):
            unit, labels = self.local.unit, self.labels
            _, label_positive = self.kernels.positive_cosines(unit, unit, 0, labels.means, labels.class_index)
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
            keeps_sums=self.keeps_sums,
        )

    def _further_args(self, further: UnitRows) -> ContrastArgs:
        """Local anchors, further candidates: no positive is among them."""
        mask = None
        if self.masked:
            assert self.local.labels is not None and self.remote.further_labels is not None
            mask = self.local.labels.key, self.remote.further_labels.key
        return ContrastArgs(
            anchors=self.local.unit,
            candidates=further,
            temperature=self.temperature,
            offset=further.n,
            mask=mask,
            anchor_grad=self.local.grad.needed,
            keeps_sums=self.keeps_sums,
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
            keeps_sums=self.keeps_sums,
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

    def _local_epilogue(
        self,
        rows: slice,
        product: Tensor | None,
        coefficients: GradCoefficients,
        partner: UnitRows,
        offset: int,
        means: Tensor | None,
    ) -> None:
        """Write, or add, a gradient by local rows."""
        assert product is not None
        self.kernels.grad_epilogue(
            GradEpilogueArgs(
                out=self.local.grad.view(self.local.transposed),
                unit=self.local.unit,
                rows=rows,
                product=product,
                coefficients=coefficients,
                partner=partner,
                offset=offset,
                class_means=means,
                class_index=self.labels.class_index,
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
        self._local_epilogue(
            slice(0, self.local.unit.n), product, coefficients, partner, first, self.labels.candidate_means
        )
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
