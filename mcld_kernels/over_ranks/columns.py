"""InfoNCE of the columns of logits over ranks: their norms and cosines are all-reduced, all else is local.

A column is as long as the global batch. Every rank computes all anchors from the summed (C, C) cosines, and so the
gradient by its own rows: with W the weights of the candidates' columns, dL/du_k = sum_l W_kl v_l, row by row, and the
projection needs dL/du_k . u_k = sum_l W_kl u_k . v_l, of cosines that are there already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.gemm import gemm, has_gemm
from ..distributed import Ranks
from ..infonce import GradBuffer
from ..kernels import AnchorTerms, KernelSet, NegativeSums, TermWeight, slices


def contrast_columns_over_ranks(
    kernels: KernelSet,
    ranks: Ranks,
    anchors: Tensor,
    candidates: Tensor,
    *,
    operand_dtype: torch.dtype,
    eps: float,
    temperature: float,
    weight: TermWeight,
    per_anchor: Tensor,
    anchor_grad: GradBuffer,
    candidate_grad: GradBuffer,
) -> None:
    """Add the contrast of the columns of both sides' logits (b, C), as they are over all ranks.

    Every rank computes all C anchors: the column norms and the (C, C) cosines are all-reduced, the latter by chunks of
    anchors, and the gradient by own rows of the logits is local. GEMMs are those of PyTorch's library on every backend.

    Args:
        weight: of the anchors, (C,) each; diagonal positives.
        per_anchor: (1, >= C), to be written, alike on every rank.
        anchor_grad, candidate_grad: the buffers of own rows; not written yet.
    """
    acc = per_anchor.dtype
    num_columns = anchors.shape[1]
    squares = torch.stack([x.to(acc).square().sum(0) for x in (anchors, candidates)])  # (2, C)
    norm = ranks.all_reduce(squares).sqrt()
    inv_norm = torch.where(norm <= eps, 0.0, 1 / torch.where(norm.isinf(), torch.nan, norm))
    u, v = ((x * inv).to(operand_dtype) for x, inv in zip((anchors, candidates), inv_norm, strict=True))  # (b, C)
    needs_grad = anchor_grad.needed or candidate_grad.needed
    if needs_grad:  # of the rounded operands, for the projection
        squares = ranks.all_reduce(torch.stack([x.to(acc).square().sum(0) for x in (u, v)]))
        squares = torch.where(squares == 0, 1.0, squares)
    positive = inv_norm.new_empty(num_columns)
    candidate_product = inv_norm.new_zeros(u.shape) if candidate_grad.needed else None  # (b, C) gradient by v
    candidate_projection = inv_norm.new_zeros(num_columns)
    for rows in slices(num_columns, max(1, kernels.tuning.chunk_bytes // (num_columns * acc.itemsize))):
        cosines = ranks.all_reduce(_product(u[:, rows].T, v, acc))  # (rows, C)
        positive[rows] = cosines.diagonal(rows.start)
        e = cosines / temperature
        e.diagonal(rows.start).fill_(-torch.inf)
        shift = e.amax(1).clamp_(min=-1 / temperature)
        e = e.sub_(shift[:, None]).exp_()
        neg_sum = e.sum(1)
        sums = NegativeSums(
            rows=rows,
            neg_lse=neg_sum.log() + shift,
            inv_neg_sum=torch.where(neg_sum == 0, 0.0, 1 / neg_sum),
            product=None,
        )
        terms = AnchorTerms(
            positive=positive,
            label_positive=positive,
            temperature=temperature,
            weights=(weight,),
            per_anchor=per_anchor,
        )
        coefficients = kernels.loss_epilogue(terms, sums)
        if not needs_grad:
            continue
        operand = e.to(operand_dtype)
        weighted = operand.to(acc) * coefficients.product[:, None]  # (rows, C) of the gradient, without positives
        projected = weighted * cosines
        pull = coefficients.partner * positive[rows]
        if anchor_grad.needed:
            g = (
                _product(v, operand.T, acc)
                .mul_(coefficients.product)
                .addcmul_(v[:, rows].to(acc), -coefficients.partner)
            )
            g.addcmul_(u[:, rows].to(acc), (pull - projected.sum(1)) / squares[0, rows])
            anchor_grad.view(False)[:, rows] = g.mul_(inv_norm[0, rows])
        if candidate_product is not None:
            # In fp16 the coefficients of a mean may be below the range: the largest becomes 1.
            peak = coefficients.product.abs().amax().clamp(min=torch.finfo(acc).tiny)
            scaled = (weighted / peak).to(operand_dtype)
            candidate_product.addcmul_(_product(u[:, rows], scaled, acc), peak)
            candidate_product[:, rows].addcmul_(u[:, rows].to(acc), -coefficients.partner)
            candidate_projection += projected.sum(0)
            candidate_projection[rows] -= pull
    anchor_grad.is_written = anchor_grad.is_written or anchor_grad.needed
    if candidate_product is not None:
        candidate_product.addcmul_(v.to(acc), -candidate_projection / squares[1])
        candidate_grad.view(False)[:] = candidate_product.mul_(inv_norm[1])
        candidate_grad.is_written = True


def _product(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """a @ b with sums and result in the accumulator dtype."""
    if a.dtype != acc and not (a.is_cuda and has_gemm(a.dtype, acc)):
        a, b = a.to(acc), b.to(acc)
    out = torch.empty(a.shape[0], b.shape[1], dtype=acc, device=a.device)
    gemm(a, b, out, accumulate=False)
    return out
