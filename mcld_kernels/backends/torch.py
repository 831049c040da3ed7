"""The "torch" backend: the one-pass algorithm in plain PyTorch, by chunks of anchors, on any device.

A chunk's exponentials E (rows, m) are the only thing of the size of a similarity matrix; E is written by one GEMM,
changed in place, and read by a second. The float32 matmul precision holds for both, as for any torch.mm.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..family_options import KDOptions
from ..kernels import (
    AnchorPassArgs,
    ContrastArgs,
    ContrastSums,
    GradCoefficients,
    LossInputs,
    LossOutputs,
    MeanOf,
    NegativeSums,
    SelfContrast,
    UnitRows,
    slices,
)
from ..options import MCLDOptions, float32_precision
from . import (
    torch_ckd,
    torch_clkd,
    torch_contrast,
    torch_info_nce,
    torch_kd,
    torch_low_latency,
    torch_mlkd,
    torch_teacher_anchors,
)
from .chunks import chunk_bytes
from .gemm import keeps_sums
from .torch_low_latency import LowLatencyTuning
from .torch_rows import RowKernels
from .torch_self_contrast import TorchSelfContrast


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchTuning(LowLatencyTuning):
    """fast_fp16, fast_bf16: the device multiplies them natively.

    Where it does not, fp16 logits take fp32 operands (a CPU is hundreds of times slower at fp16 GEMMs); where it does,
    fp32 logits at float32 matmul precision "medium" take bf16 operands.
    """

    fast_fp16: bool = False
    fast_bf16: bool = False


TUNING = TorchTuning
# The function of a low-latency path for these inputs; None where it does not apply.
_LowLatencyPath = Callable[[LossInputs, TorchTuning], Callable[[LossInputs], LossOutputs] | None]


class TorchKernels(RowKernels):
    """The kernel set in torch operations: what `KernelSet` has, and the contrast."""

    tuning: TorchTuning

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float16 and not self.tuning.fast_fp16:
            return torch.float32
        if dtype == torch.float32 and self.tuning.fast_bf16 and float32_precision() == "medium":
            return torch.bfloat16
        return dtype

    def contrast(self, args: ContrastArgs) -> _TorchContrast:
        without_shift = args.is_bounded and self.can_reverse(args.anchors.rows.dtype, args.temperature)
        return _TorchContrast(args, self.tuning.chunk_bytes, without_shift)

    has_anchor_pass = True

    def anchor_pass(
        self, args: ContrastArgs, out: Tensor | None, mean_of: MeanOf | None
    ) -> Callable[[AnchorPassArgs], None] | None:
        return torch_contrast.anchor_pass(args, out, mean_of, self.tuning)

    def self_contrast(self, unit: UnitRows, temperature: float, with_grad: bool) -> SelfContrast:
        return TorchSelfContrast(unit, temperature, self.tuning.chunk_bytes)

    def mcld_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        small = self._low_latency(torch_low_latency.mcld, inputs)
        return self._low_latency(torch_teacher_anchors.mcld, inputs) if small is None else small

    def info_nce_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        return self._low_latency(torch_info_nce.info_nce, inputs)

    def ckd_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        return self._low_latency(torch_ckd.ckd, inputs)

    def kd_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        # It multiplies no matrices, so the operands' dtype does not matter.
        return torch_kd.kd(inputs, self.tuning)

    def clkd_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        return self._low_latency(torch_clkd.clkd, inputs)

    def mlkd_low_latency(self, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        return self._low_latency(torch_mlkd.mlkd, inputs)

    def _low_latency(self, path: _LowLatencyPath, inputs: LossInputs) -> Callable[[LossInputs], LossOutputs] | None:
        if not self.tuning.low_latency or self.operand_dtype(inputs.dtype) != inputs.student.dtype:
            return None
        return path(inputs, self.tuning)


class _TorchContrast:
    """A contrast by chunks of anchors. without_shift: exp(a_ij) and sums of it stay far inside the range of fp32."""

    def __init__(self, args: ContrastArgs, budget: int, without_shift: bool):
        self.args, self.without_shift = args, without_shift
        anchors, candidates = args.anchors, args.candidates
        self.acc_dtype = anchors.inv_norm.dtype
        chunk_rows = max(1, budget // (candidates.n * self.acc_dtype.itemsize))
        # Chunks of one size: each GEMM reads and packs all candidates, whatever its rows.
        self.chunk_rows = -(-anchors.n // max(1, -(-anchors.n // chunk_rows)))
        # Anchors times their coefficients, of a part of a chunk at a time.
        self.weighted_rows = max(1, budget // (8 * candidates.d * self.acc_dtype.itemsize))
        self.candidate_product: Tensor | None = None
        self.reverse_product: Tensor | None = None
        self.reverse_grad = args.reverse and args.candidate_grad
        self.reverse_sum = anchors.inv_norm.new_zeros(candidates.n) if args.reverse else None
        # A CPU's GEMM of 16-bit operands rounds its sums, one of the accumulator dtype does not, at half the speed.
        in_acc = args.keeps_sums and anchors.rows.is_cpu
        self.product_dtype = self.acc_dtype if in_acc else anchors.rows.dtype
        self.exponentials = anchors.rows.new_empty(0)  # (rows of the chunk, m) product dtype
        # Of a row without a negative, whose maximum is -inf.
        self.lowest_shift = -1 / args.temperature if args.is_bounded else torch.finfo(self.acc_dtype).min

    def chunks(self) -> Iterator[NegativeSums]:
        args, acc = self.args, self.acc_dtype
        anchors, candidates = args.anchors, args.candidates
        rows_of_buffer = min(self.chunk_rows, anchors.n)
        buffer = torch.empty(rows_of_buffer, candidates.n, dtype=acc, device=anchors.rows.device)
        for rows in slices(anchors.n, self.chunk_rows):
            x = anchors.rows[rows]
            e = _similarities(x, candidates.rows, args.temperature, buffer[: rows.stop - rows.start])  # (rows, m)
            e.diagonal(rows.start + args.offset).fill_(-torch.inf)
            if args.mask is not None:
                e.masked_fill_(args.mask[0][rows, None] == args.mask[1], -torch.inf)
            shift = None if self.without_shift else e.amax(1).clamp_(min=self.lowest_shift)
            e = (e if shift is None else _flush(e.sub_(shift[:, None]))).exp_()
            neg_sum = e.sum(1)
            self.exponentials = e.to(self.product_dtype)
            if self.reverse_sum is not None:
                self.reverse_sum += e.sum(0)
            if self.reverse_grad:
                self.reverse_product = _add_mm(self.reverse_product, self.exponentials.T, x.to(self.product_dtype), acc)
            yield NegativeSums(
                rows=rows,
                neg_lse=neg_sum.log() if shift is None else neg_sum.log() + shift,
                inv_neg_sum=torch.where(neg_sum == 0, 0.0, 1 / neg_sum),
                product=self._product(candidates.rows) if args.anchor_grad else None,
            )

    def _product(self, rows: Tensor) -> Tensor:
        """The exponentials (rows of the chunk, m) times ``rows`` (m, d), in the accumulator dtype."""
        if rows.dtype == self.exponentials.dtype:
            return _mm(self.exponentials, rows, self.acc_dtype)
        total = rows.new_zeros(self.exponentials.shape[0], rows.shape[1], dtype=self.acc_dtype)
        for part in slices(rows.shape[0], self.weighted_rows):
            total.addmm_(self.exponentials[:, part], rows[part].to(self.acc_dtype))
        return total

    def add_candidates(self, chunk: NegativeSums, coefficients: GradCoefficients) -> None:
        x, factor, peak = self.args.anchors.rows[chunk.rows], coefficients.product, None
        if self.product_dtype == torch.float16:  # means over a large batch are below its range: the largest becomes 1
            peak = factor.abs().amax().clamp(min=torch.finfo(self.acc_dtype).tiny)
            factor = factor / peak
        factor = factor[:, None].to(self.product_dtype)
        for part in slices(x.shape[0], self.weighted_rows):
            self.candidate_product = _add_mm(
                self.candidate_product, self.exponentials[part].T, x[part] * factor[part], self.acc_dtype, peak
            )

    def sums(self) -> ContrastSums:
        self.exponentials = self.exponentials.new_empty(0)  # the last chunk's are not needed any more
        if self.reverse_sum is None:
            return ContrastSums(candidate_product=self.candidate_product)
        total = self.reverse_sum
        reverse = NegativeSums(
            rows=slice(0, self.args.candidates.n),
            neg_lse=total.log(),
            inv_neg_sum=torch.where(total == 0, 0.0, 1 / total),
            product=self.reverse_product,
        )
        return ContrastSums(candidate_product=self.candidate_product, reverse=reverse)


_LOWEST_EXPONENT = -80.0  # exp(-80) = 1.8e-35


def _flush(exponents: Tensor) -> Tensor:
    """Set exponents of at most 0 to -inf, in place, where exp is below 1e-35 of the largest.

    What is so small adds nothing to a sum in fp32, and CPUs multiply subnormal numbers at a tenth of the speed.
    """
    return exponents if exponents.dtype == torch.float64 else torch.threshold_(exponents, _LOWEST_EXPONENT, -torch.inf)


def _column_major(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) > 1


def _similarities(anchors: Tensor, candidates: Tensor, temperature: float, out: Tensor) -> Tensor:
    """a_ij of a chunk into ``out`` (rows, m), acc dtype."""
    if anchors.dtype == out.dtype:
        return torch.addmm(out, anchors, candidates.T, beta=0, alpha=1 / temperature, out=out)
    return out.copy_(_mm(anchors, candidates.T, out.dtype)).mul_(1 / temperature)


def _mm(a: Tensor, b: Tensor, acc_dtype: torch.dtype) -> Tensor:
    """a @ b in the accumulator dtype, in the memory order of b."""
    if a.dtype == acc_dtype:
        if _column_major(b):
            return torch.mm(b.T, a.T).T
        return torch.mm(a, b)
    if a.is_cuda and keeps_sums():
        return torch.mm(a, b, out_dtype=acc_dtype)  # keeps the fp32 sums; torch before 2.8 rounds them
    return torch.mm(a, b).to(acc_dtype)


def _add_mm(total: Tensor | None, a: Tensor, b: Tensor, acc_dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """total + factor a @ b, in place, in the accumulator dtype; without a total the product itself. factor: ()."""
    if total is None:
        product = _mm(a, b, acc_dtype)
        return product if factor is None else product.mul_(factor)
    if factor is not None:
        total.addcmul_(_mm(a, b, acc_dtype), factor)
    elif a.dtype != acc_dtype:
        total += _mm(a, b, acc_dtype)
    elif _column_major(total):
        total.T.addmm_(b.T, a.T)
    else:
        total.addmm_(a, b)
    return total


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(probe is not None and probe() for probe in probes)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


_TUNINGS: dict[tuple[str, int | None, int], TorchTuning] = {}


def kernel_set(student: Tensor, teacher: Tensor, **overrides: Any) -> TorchKernels:
    """The kernel set for the logits' device; ``overrides`` are fields of `TorchTuning`."""
    device = student.device
    key = device.type, device.index, chunk_bytes(device)
    tuning = _TUNINGS.get(key)
    if tuning is None:
        tuning = _TUNINGS[key] = TorchTuning(
            chunk_bytes=key[2], fast_fp16=device.type != "cpu", fast_bf16=_fast_bf16(device)
        )
    return TorchKernels(dataclasses.replace(tuning, **overrides) if overrides else tuning)


def plain_call(
    student: Tensor, teacher: Tensor, options: MCLDOptions | KDOptions, with_grad: bool
) -> tuple[Tensor, Tensor | None] | None:
    """As `backends.plain_call`, by the compiled module for a CPU."""
    if "MCLD_CHUNK_MB" in os.environ or float32_precision() == "medium":
        return None
    if isinstance(options, KDOptions):
        return torch_kd.plain_call(student, teacher, options, with_grad)
    return torch_low_latency.plain_call(student, teacher, options, with_grad)


def unavailable_reason() -> str | None:
    """None: the backend runs on every machine."""
    return None


def unsupported_reason(student: Tensor, teacher: Tensor) -> str | None:
    """None: the backend runs with all logits."""
    return None
