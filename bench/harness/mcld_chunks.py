"""MCLD by plain autograd in chunks of anchors: the truth, and eager's error, where whole matrices do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.harness.cases import Case

CHUNK_BYTES = 256 << 20


def loss_and_gradient(
    case: Case, student: Tensor, teacher: Tensor, target: Tensor, dtype: torch.dtype, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor | None]:
    """Loss () and gradient (B, C) of student anchors against a frozen teacher.

    ``dtype`` is that of the products; everything else is fp64 for fp64 products and fp32 for all others, as in
    eager PyTorch.
    """
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    s, t = student.detach().to(acc_dtype), teacher.detach().to(acc_dtype)
    gradient = torch.zeros_like(s) if case.backward else None
    loss = s.new_zeros(())

    def diagonal(similarity: Tensor, start: int) -> Tensor:
        return similarity.diagonal(start)

    def label(similarity: Tensor, start: int) -> Tensor:
        mask = (target[start : start + similarity.shape[0], None] == target[None, :]).to(similarity.dtype)
        return (similarity * mask).sum(1) / mask.sum(1)

    contrast = _Contrast(dtype, case.temperature, chunk_bytes)
    if case.row_terms:
        positives = [fn for term, fn in (("instance", diagonal), ("sample", label)) if term in case.terms]
        loss = loss + contrast.add(s, t, positives, gradient) / case.batch
        if gradient is not None:
            gradient /= case.batch
    if case.category:
        columns = None if gradient is None else torch.zeros_like(s.T, memory_format=torch.contiguous_format)
        loss = loss + contrast.add(s.T.contiguous(), t.T.contiguous(), [diagonal], columns) / case.classes
        if gradient is not None:
            gradient += columns.T / case.classes
    return loss, None if gradient is None else gradient.to(student.dtype if dtype != torch.float64 else dtype)


class _Contrast:
    def __init__(self, dtype: torch.dtype, temperature: float, chunk_bytes: int):
        self.dtype, self.temperature, self.chunk_bytes = dtype, temperature, chunk_bytes

    def add(
        self,
        anchors: Tensor,
        candidates: Tensor,
        positives: list[Callable[[Tensor, int], Tensor]],
        gradient: Tensor | None,
    ) -> Tensor:
        """Sum over the anchors and over ``positives`` of log-sum-exp minus the positive.

        ``anchors`` (n, d) and ``candidates`` (m, d) are not normalized. Each positive maps similarities (r, m) whose
        first anchor is number i to (r,). The gradient by the anchors is added to ``gradient`` (n, d).
        """
        total = anchors.new_zeros(())
        unit_candidates = _unit(candidates).to(self.dtype)
        rows = max(1, min(anchors.shape[0], self.chunk_bytes // (anchors.element_size() * candidates.shape[0])))
        for start in range(0, anchors.shape[0], rows):
            chunk = anchors[start : start + rows].detach().requires_grad_(gradient is not None)
            products = _unit(chunk).to(self.dtype) @ unit_candidates.T
            similarity = products.to(anchors.dtype) / self.temperature
            lse = similarity.logsumexp(1)
            loss = sum((lse - positive(similarity, start)).sum() for positive in positives)
            if gradient is not None:
                gradient[start : start + rows] += torch.autograd.grad(loss, chunk)[0]
            total = total + loss.detach()
        return total


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)
