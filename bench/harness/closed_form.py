"""MCLD with library calls alone: normalize, GEMM, softmax, GEMM; gradient in closed form.

The two products and the softmax between them are an attention forward with Q = anchors, K = V = candidates;
``Attend`` is that step, so that PyTorch's attention kernels are measured through the same code. Student anchors, a
frozen teacher, no masks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.cases import Case
from mcld_kernels.options import acc_dtype

# unit anchors (n, d), unit candidates (n, d), temperature, True for the second result
# -> log-sum-exp minus the diagonal similarity (n,) in fp32 or fp64, softmax times candidates (n, d) or None
Attend = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, "Tensor | None"]]

ATTENTION_WIDTH = 256  # the most columns that the attention kernels take


def matrix(
    anchors: Tensor, candidates: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The (n, m) matrix written and read in the logits' dtype; row sums in fp32 (fp64)."""
    similarity = (anchors / temperature) @ candidates.T  # (n, m)
    # Both from the one rounded matrix: their errors cancel.
    excess = torch.logsumexp(similarity.to(acc_dtype(anchors.dtype)), 1) - similarity.diagonal()
    if not with_gradient:
        return excess, None
    return excess, torch.softmax(similarity, 1) @ candidates


def flash(anchors: Tensor, candidates: Tensor, temperature: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    q, k = _heads(anchors, candidates)
    if anchors.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=1 / temperature)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=1 / temperature)[:2]
    return _excess(lse, anchors, candidates, temperature), out[0, 0, :, : anchors.shape[1]]


def cudnn(anchors: Tensor, candidates: Tensor, temperature: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    q, k = _heads(anchors, candidates)
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, k, None, True, scale=1 / temperature)[:2]
    return _excess(lse, anchors, candidates, temperature), out[0, 0, :, : anchors.shape[1]]


def _excess(lse: Tensor, anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    lse = lse.flatten()
    return lse - (anchors.to(lse.dtype) * candidates).sum(1) / temperature


def _heads(anchors: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, n, d') with d' the next multiple of 8, which the kernels require."""
    pad = -anchors.shape[1] % 8
    return F.pad(anchors, (0, pad))[None, None], F.pad(candidates, (0, pad))[None, None]


def attention_unsupported_reason(name: str, case: Case, device: torch.device) -> str | None:
    """The reason why an attention kernel cannot take the case; None if it can."""
    widest = max(case.classes if case.row_terms else 0, case.batch if case.category else 0)
    if widest > ATTENTION_WIDTH:
        return f"attention takes at most {ATTENTION_WIDTH} columns, the case has {widest}"
    if device.type != "cuda" and name != "sdpa":
        return "needs a CUDA device"
    if device.type == "cuda" and case.dtype not in ("float16", "bfloat16"):
        return "takes half precision only"
    return None


def loss_and_gradient(
    case: Case, student: Tensor, teacher: Tensor, target: Tensor, attend: Attend
) -> tuple[Tensor, Tensor | None]:
    """The case's loss () and gradient by the student (B, C), or None in forward mode."""
    loss, gradient = student.new_zeros((), dtype=acc_dtype(student.dtype)), None
    if case.row_terms:
        loss, gradient = _rows(case, student, teacher, target, attend)
    if case.category:
        more, columns = _columns(case, student, teacher, attend)
        loss = loss + more
        if columns is not None:
            gradient = columns.T if gradient is None else gradient + columns.T
    return loss, gradient


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows in the dtype of ``x`` (n, d), and the reciprocal norms (n, 1)."""
    wide = x.to(acc_dtype(x.dtype))
    inv_norm = wide.square().sum(1, keepdim=True).rsqrt()
    return (wide * inv_norm).to(x.dtype), inv_norm


def _project(g: Tensor, unit: Tensor, inv_norm: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient by rows from ``g``, the gradient by their unit rows: the radial component is removed."""
    return ((g - (g * unit).sum(1, keepdim=True) * unit) * inv_norm).to(dtype)


def _rows(case: Case, student: Tensor, teacher: Tensor, target: Tensor, attend: Attend) -> tuple[Tensor, Tensor | None]:
    wide = acc_dtype(student.dtype)
    (s, inv_norm), (t, _) = _unit(student), _unit(teacher)
    excess, expected = attend(s, t, case.temperature, case.backward)
    w_instance, w_sample, _ = case.weight
    positive = w_instance * t.to(wide)  # (B, C), the weighted positives of every anchor
    if w_sample:
        sums = torch.zeros(case.classes, case.classes, dtype=wide, device=t.device).index_add_(0, target, t.to(wide))
        count = torch.bincount(target, minlength=case.classes)
        positive = positive + w_sample * sums[target] / count[target, None]
    s_wide = s.to(wide)
    weight = w_instance + w_sample
    off_diagonal = weight * t.to(wide) - positive
    loss = (weight * excess + (s_wide * off_diagonal).sum(1) / case.temperature).mean()
    if expected is None or not case.backward:
        return loss, None
    g = (weight * expected.to(wide) - positive) / (case.temperature * case.batch)
    return loss, _project(g, s_wide, inv_norm, student.dtype)


def _columns(case: Case, student: Tensor, teacher: Tensor, attend: Attend) -> tuple[Tensor, Tensor | None]:
    wide = acc_dtype(student.dtype)
    (s, inv_norm), (t, _) = _unit(student.T.contiguous()), _unit(teacher.T.contiguous())
    excess, expected = attend(s, t, case.temperature, case.backward)
    s_wide, t_wide = s.to(wide), t.to(wide)
    loss = excess.mean()
    if expected is None or not case.backward:
        return loss, None
    g = (expected.to(wide) - t_wide) / (case.temperature * case.classes)
    return loss, _project(g, s_wide, inv_norm, student.dtype)
