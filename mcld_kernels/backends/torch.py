"""The "torch" backend: the one-pass algorithm of `pipeline` in plain PyTorch, by chunks of anchors, on any device.

A chunk's exponentials E (rows, m) are the only thing of the size of a similarity matrix; E is written by one product,
changed in place, and read by a second. The float32 matmul precision holds for both, as for any torch.mm.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from . import labels as labelling
from .arguments import float32_precision
from .labels import Labels
from .pipeline import Anchors, Call, Contrast, Factors, Finish, Negatives, Problem, Result, Unit, evaluate

CHUNK_MB = {"cpu": 32, "cuda": 256}
_OTHER_MB = 128
# exp(a) needs no shift while exp(1 / temperature) m and its inverse stay far inside fp32 (and bf16): exp(40) = 2e17.
_PLAIN = 40.0


def chunk_bytes(device: torch.device) -> int:
    """Bytes that a chunk of exponentials may take: MCLD_CHUNK_MB, or the default of the device."""
    text = os.environ.get("MCLD_CHUNK_MB")
    if text is None:
        return CHUNK_MB.get(device.type, _OTHER_MB) << 20
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"MCLD_CHUNK_MB must be a positive whole number of MiB; got {text!r}")
    return int(text) << 20


class TorchKernels:
    """`pipeline.Kernels` in torch operations.

    fast_fp16, fast_bf16: whether the device multiplies them natively. Where it does not, fp16 logits take fp32 operands
    (a CPU is hundreds of times slower at fp16 products); where it does, fp32 logits at float32 matmul precision
    "medium" take bf16 operands.
    """

    def __init__(self, fast_fp16: bool = False, fast_bf16: bool = False):
        self.fast_fp16, self.fast_bf16 = fast_fp16, fast_bf16

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float16 and not self.fast_fp16:
            return torch.float32
        if dtype == torch.float32 and self.fast_bf16 and float32_precision() == "medium":
            return torch.bfloat16
        return dtype

    def normalise(self, x: Tensor, dtype: torch.dtype, eps: float) -> Unit:
        stat = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
        # Not vector_norm: over the columns of a large batch it sums serially, at thirty times the rounding error.
        norm = x.to(stat).square().sum(1).sqrt()
        inverse = torch.where(norm <= eps, 0.0, 1 / torch.where(norm.isinf(), torch.nan, norm))
        return Unit((x * inverse[:, None]).to(dtype), inverse, *x.shape)

    def class_means(self, unit: Unit, labels: Labels, counts: Tensor) -> Tensor:
        x, device = unit.matrix, unit.matrix.device
        # embedding_bag sums rows in the given order, where index_add_ would use atomics on a GPU. With few classes it
        # adds hundreds of rows one by one, hence fp64 where there is such a thing, some columns at a time.
        exact = torch.float64 if device.type in ("cpu", "cuda") else unit.inverse.dtype
        means = torch.empty(counts.shape[0], unit.d, dtype=unit.inverse.dtype, device=device)
        divisor = counts.clamp(min=1)[:, None]
        for part in _slices(unit.d, max(1, chunk_bytes(device) // (unit.n * exact.itemsize))):
            rows = x[:, part].to(exact).contiguous()
            means[:, part] = F.embedding_bag(labels.order, rows, labels.starts[:-1], mode="sum") / divisor
        return means

    def positives(
        self, a: Unit, k: Unit, offset: int, means: Tensor | None, rank: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        stat = a.inverse.dtype
        positive = torch.empty(a.n, dtype=stat, device=a.matrix.device)
        by_label = positive if means is None else torch.empty_like(positive)
        for rows in _slices(a.n, max(1, chunk_bytes(a.matrix.device) // (4 * a.d * stat.itemsize))):
            x = a.matrix[rows].to(stat)
            positive[rows] = (x * k.matrix[rows.start + offset : rows.stop + offset]).sum(1)
            if means is not None and rank is not None:
                by_label[rows] = (x * means[rank[rows]]).sum(1)
        return positive, by_label

    def describe(
        self, sides: tuple[Tensor, ...], ignore_index: int, classes: int, dtype: torch.dtype
    ) -> tuple[Labels, ...]:
        return labelling.describe(sides, ignore_index, classes, dtype)

    def factors(self, anchors: Anchors, rows: slice, log_off: Tensor, scale: Tensor) -> Factors:
        positive, temperature = anchors.positive[rows], anchors.temperature
        x = log_off - positive / temperature
        loss = torch.logaddexp(x, x.new_zeros(()))
        total: Tensor | float = 0.0
        z = None
        for share, values in zip(anchors.shares, anchors.values, strict=True):
            part: Tensor | float = share.constant if share.factor is None else share.factor * share.constant
            if share.counted is not None:
                part = share.counted[rows] * part
            value = loss
            if share.term == 1:
                value = loss + (positive - anchors.by_label[rows]) / temperature
            values[rows] = value * part
            weight = part * (share.scale / temperature)
            if share.weight is not None:
                weight = weight * share.weight
            total = weight + total
            if share.term == 1:
                assert isinstance(weight, Tensor)
                z = weight
        u = torch.sigmoid(x) * total
        return Factors(u, u * scale, z)

    def totals(
        self, values: Tensor, terms: tuple[int, ...], scale: tuple[float, ...], weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums = values.sum(1)
        found, loss = values.new_zeros(3), values.new_zeros(())
        for part, term in zip(sums, terms, strict=True):
            found[term] += part
            loss = loss + part * (scale[term] if weight is None else weight[term] * scale[term])
        return loss, found

    def can_reverse(self, dtype: torch.dtype, temperature: float) -> bool:
        return dtype != torch.float16 and 1 / temperature <= _PLAIN

    def contrast(self, problem: Problem) -> Contrast:
        a, k, temperature, offset, same, factors, sink, candidate, reverse = problem
        operand, stat = a.matrix.dtype, a.inverse.dtype
        plain = self.can_reverse(operand, temperature)
        log_off, scales = torch.empty_like(a.inverse), torch.empty_like(a.inverse)
        by_candidate = _sums_like(k, stat) if candidate else None
        reverse_product = _sums_like(k, stat) if reverse and candidate else None
        reverse_off = log_off.new_zeros(k.n) if reverse else None
        rows_of_chunk = max(1, chunk_bytes(a.matrix.device) // (k.n * stat.itemsize))
        buffer = torch.empty(min(rows_of_chunk, a.n), k.n, dtype=stat, device=a.matrix.device)
        for rows in _slices(a.n, rows_of_chunk):
            anchors = a.matrix[rows]
            e = _similarities(anchors, k.matrix, temperature, buffer[: rows.stop - rows.start])  # (rows, m)
            e.diagonal(rows.start + offset).fill_(-torch.inf)
            if same is not None:
                e.masked_fill_(same[0][rows, None] == same[1], -torch.inf)
            shift = None if plain else e.amax(1).clamp_(min=-1 / temperature)
            e = (e if shift is None else e.sub_(shift[:, None])).exp_()
            off = e.sum(1)
            log_off[rows] = off.log() if shift is None else off.log() + shift
            scale = scales[rows] = torch.where(off == 0, 0.0, 1 / off)
            half = e.to(operand)
            if sink is not None:
                sink(Negatives(rows, log_off[rows], _mm(half, k.matrix, stat), scale))
            if by_candidate is not None:
                factor = factors(rows, log_off[rows], scale).s * temperature
                top = None
                if operand == torch.float16:  # means over a large batch are below its range: the largest becomes 1
                    top = factor.amax().clamp(min=torch.finfo(stat).tiny)
                    factor = factor / top
                _add_mm(by_candidate, half.T, anchors * factor[:, None].to(operand), top)
            if reverse_product is not None:
                _add_mm(reverse_product, half.T, anchors)
            if reverse_off is not None:
                reverse_off += e.sum(0)
        if reverse_off is None:
            return Contrast(log_off, scales, by_candidate)
        scale = torch.where(reverse_off == 0, 0.0, 1 / reverse_off)
        product = reverse_off[:0] if reverse_product is None else reverse_product
        return Contrast(log_off, scales, by_candidate, Negatives(slice(0, k.n), reverse_off.log(), product, scale))

    def finish(self, step: Finish) -> None:
        out, unit, rows, product, s, u, z, partner, shift, means, rank, accumulate = step
        stat = product.dtype
        g = product.mul_(s[:, None])
        # Rows first to last have a partner.
        first, last = max(rows.start, -shift), min(rows.stop, partner.n - shift)
        paired = slice(first - rows.start, last - rows.start)
        p = partner.matrix[first + shift : last + shift].to(stat)
        pull = -u[paired] if z is None else z[paired] - u[paired]
        g[paired].addcmul_(p, pull[:, None])
        if z is not None and means is not None and rank is not None:
            g.addcmul_(means[rank[rows]], -z[:, None])
        x = unit.matrix[rows].to(stat)
        c = torch.linalg.vecdot(g, x)
        g.addcmul_(x, -c[:, None])
        inverse = unit.inverse[rows, None]
        if accumulate:
            out[rows].addcmul_(g, inverse) if out.dtype == stat else out[rows].add_(g.mul_(inverse))
        elif out.dtype == stat:
            torch.mul(g, inverse, out=out[rows])
        else:
            out[rows] = g.mul_(inverse)


def _slices(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _column_major(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) > 1


def _sums_like(unit: Unit, stat: torch.dtype) -> Tensor:
    """Zeros (n, d) in the memory order of the unit rows."""
    return torch.zeros_like(unit.matrix, dtype=stat)


def _similarities(anchors: Tensor, candidates: Tensor, temperature: float, out: Tensor) -> Tensor:
    """a_ij of a chunk into ``out`` (rows, m), statistics dtype."""
    if anchors.dtype == out.dtype:
        return torch.addmm(out, anchors, candidates.T, beta=0, alpha=1 / temperature, out=out)
    return out.copy_(_mm(anchors, candidates.T, out.dtype)).mul_(1 / temperature)


def _mm(a: Tensor, b: Tensor, stat: torch.dtype) -> Tensor:
    """a @ b in the statistics dtype, in the memory order of b."""
    if a.dtype == stat:
        if _column_major(b):
            return torch.mm(b.T, a.T).T
        return torch.mm(a, b)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=stat)  # keeps the fp32 sums; torch before 2.8 rounds them to the operand dtype
    return torch.mm(a, b).to(stat)


def _add_mm(total: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> None:
    """total += factor a @ b, summed in the dtype of ``total``. factor: ()."""
    if factor is not None:
        total.addcmul_(_mm(a, b, total.dtype), factor)
    elif a.dtype != total.dtype:
        total += _mm(a, b, total.dtype)
    elif _column_major(total):
        total.T.addmm_(b.T, a.T)
    else:
        total.addmm_(a, b)


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(probe is not None and probe() for probe in probes)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def forward(call: Call) -> Result:
    device = call.student.device
    return evaluate(TorchKernels(device.type != "cpu", _fast_bf16(device)), call)


def unavailable() -> str | None:
    """Why the backend cannot run on this machine; None: it always can."""
    return None


def reason(student: Tensor, teacher: Tensor) -> str | None:
    """Why the backend cannot run with these logits; None: it always can."""
    return None
