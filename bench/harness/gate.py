"""The correctness gate: no speed is shown for a result that is wrong.

A provider passes where its loss and gradient differ from the fp64 truth by at most twice what eager PyTorch at the
same dtype differs. The truth is computed in chunks of anchors, so that the gate reaches batch sizes whose matrices
would not fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.cases import Case

FACTOR = 2.0
# Eager's own error can be zero by luck; below these no difference is a fault. Relative to the loss, and to the
# gradient's norm: two to four times the dtype's epsilon, for half precision a quarter of it.
LOSS_FLOOR = {"float64": 1e-13, "float32": 5e-7, "float16": 2.5e-4, "bfloat16": 2e-3}
GRADIENT_FLOOR = {"float64": 1e-13, "float32": 2.4e-7, "float16": 2.5e-4, "bfloat16": 2e-3}
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Error:
    """Relative errors against the truth: |loss - loss'| / |loss'| and ||grad - grad'|| / ||grad'|| (Frobenius)."""

    loss: float
    gradient: float | None = None


@dataclass(frozen=True)
class Verdict:
    passed: bool
    error: Error
    allowed: Error

    @property
    def ratio(self) -> float:
        """The worse of both errors as a fraction of what is allowed; above 1 the gate is shut."""
        ratios = [self.error.loss / self.allowed.loss]
        if self.error.gradient is not None and self.allowed.gradient is not None:
            ratios.append(self.error.gradient / self.allowed.gradient)
        return max(float("inf") if ratio != ratio else ratio for ratio in ratios)

    def record(self) -> dict[str, object]:
        error, allowed = asdict(self.error), asdict(self.allowed)
        return {"passed": self.passed, "ratio": self.ratio, "error": error, "allowed": allowed}


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def _contrast(
    anchors: Tensor,
    candidates: Tensor,
    dtype: torch.dtype,
    case: Case,
    positives: list[Callable[[Tensor, int], Tensor]],
    gradient: Tensor | None,
) -> Tensor:
    """Sum over the anchors and over ``positives`` of log-sum-exp minus the positive, chunk by chunk under autograd.

    ``anchors`` (n, d) and ``candidates`` (m, d) are not normalised. Each positive maps similarities (r, m) whose
    first anchor is number i to (r,). The gradient by the anchors is added to ``gradient`` (n, d).
    """
    total = anchors.new_zeros(())
    unit_candidates = _unit(candidates).to(dtype)
    rows = max(1, min(anchors.shape[0], _CHUNK_BYTES // (anchors.element_size() * candidates.shape[0])))
    for start in range(0, anchors.shape[0], rows):
        chunk = anchors[start : start + rows].detach().requires_grad_(gradient is not None)
        similarity = (_unit(chunk).to(dtype) @ unit_candidates.T).to(anchors.dtype) / case.temperature
        normaliser = similarity.logsumexp(1)
        loss = sum((normaliser - positive(similarity, start)).sum() for positive in positives)
        if gradient is not None:
            gradient[start : start + rows] += torch.autograd.grad(loss, chunk)[0]
        total = total + loss.detach()
    return total


def chunked(
    case: Case, student: Tensor, teacher: Tensor, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Loss () and gradient (B, C) by plain autograd over chunks of anchors: student anchors, a frozen teacher.

    ``dtype`` is that of the products; everything else is fp64 for fp64 products and fp32 for all others, as in
    eager PyTorch.
    """
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    s, t = student.detach().to(statistics), teacher.detach().to(statistics)
    gradient = torch.zeros_like(s) if case.backward else None
    loss = s.new_zeros(())

    def diagonal(similarity: Tensor, start: int) -> Tensor:
        return similarity.diagonal(start)

    def same_label(similarity: Tensor, start: int) -> Tensor:
        mask = (target[start : start + similarity.shape[0], None] == target[None, :]).to(similarity.dtype)
        return (similarity * mask).sum(1) / mask.sum(1)

    if case.row_terms:
        positives = [fn for term, fn in (("instance", diagonal), ("sample", same_label)) if term in case.terms]
        loss = loss + _contrast(s, t, dtype, case, positives, gradient) / case.batch
        if gradient is not None:
            gradient /= case.batch
    if case.category:
        columns = None if gradient is None else torch.zeros_like(s.T, memory_format=torch.contiguous_format)
        loss = loss + _contrast(s.T.contiguous(), t.T.contiguous(), dtype, case, [diagonal], columns) / case.classes
        if gradient is not None:
            gradient += columns.T / case.classes
    return loss, None if gradient is None else gradient.to(student.dtype if dtype != torch.float64 else dtype)


def truth(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """Loss and gradient in fp64 of the logits as given (a half logit is exact in fp64)."""
    return chunked(case, student, teacher, target, torch.float64)


def error(result: tuple[Tensor, Tensor | None], exact: tuple[Tensor, Tensor | None]) -> Error:
    """How far a result is from the truth. A result that is not finite reads infinity."""

    def relative(value: Tensor, reference: Tensor) -> float:
        difference = torch.linalg.vector_norm(value.to(torch.float64) - reference).item()
        scale = torch.linalg.vector_norm(reference).item()
        ratio = difference / scale if scale > 0 else difference
        return ratio if ratio == ratio else float("inf")

    loss, gradient = result
    if exact[1] is None:
        return Error(relative(loss.detach(), exact[0]))
    if gradient is None:
        raise ValueError("the case asks for a gradient and the provider returned none")
    if gradient.shape != exact[1].shape:
        raise ValueError(f"the gradient has shape {tuple(gradient.shape)}, the logits {tuple(exact[1].shape)}")
    return Error(relative(loss.detach(), exact[0]), relative(gradient, exact[1]))


def judge(case: Case, measured: Error, eager: Error) -> Verdict:
    """Whether ``measured`` keeps within twice eager's error, or the floor where that is lower still.

    Where eager itself is not finite it excuses nobody: the floor stands.
    """

    def bar(error: float, floor: float) -> float:
        return max(FACTOR * error, floor) if math.isfinite(error) else floor

    allowed = Error(
        bar(eager.loss, LOSS_FLOOR[case.dtype]),
        None if eager.gradient is None else bar(eager.gradient, GRADIENT_FLOOR[case.dtype]),
    )
    passed = measured.loss <= allowed.loss
    if allowed.gradient is not None:
        passed = passed and measured.gradient is not None and measured.gradient <= allowed.gradient
    return Verdict(passed, measured, allowed)
