"""The steps around the products of a contrast on a CPU, by the compiled module (csrc/cpu/rows.h): fp32 alone.

In torch operations each step reads and writes the rows several times, and at large batches most of these tensors
lie in new pages of memory. Compiled, a step reads its rows once and writes its result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import GradEpilogueArgs, UnitRows
from .torch_low_latency import PLAIN_TYPES, LowLatencyTuning, compiled_module, isa_index


def l2_normalize(x: Tensor, operand_dtype: torch.dtype, eps: float, tuning: LowLatencyTuning) -> UnitRows | None:
    """As `KernelSet.l2_normalize`; None where the module is not there or does not serve this memory."""
    if operand_dtype != torch.float32 or (module := _module(tuning)) is None or not _is_plain(x) or x.numel() == 0:
        return None
    by_columns = not _by_rows(x)
    if by_columns and not _by_columns(x):
        return None
    n, d = x.shape
    rows = x.new_empty((d, n)).T if by_columns else x.new_empty((n, d))  # torch's default device may be another one
    inv_norm = x.new_empty(n)
    dim = int(by_columns)
    module.normalize(
        isa_index(tuning.isa),
        torch.get_num_threads(),
        x.data_ptr(),
        x.stride(dim),
        rows.data_ptr(),
        rows.stride(dim),
        inv_norm.data_ptr(),
        n,
        d,
        eps,
        by_columns,
    )
    return UnitRows(rows=rows, inv_norm=inv_norm, n=n, d=d)


def grad_epilogue(args: GradEpilogueArgs, tuning: LowLatencyTuning) -> bool:
    """As `KernelSet.grad_epilogue`; False, with nothing done, where the module does not serve these tensors."""
    unit, partner, product, out, c = args.unit, args.partner, args.product, args.out, args.coefficients
    first = min(max(args.rows.start, -args.offset), args.rows.stop)  # of the rows that have a partner, and their last
    last = max(first, min(args.rows.stop, partner.n - args.offset))
    n, d = args.rows.stop - args.rows.start, unit.d
    matrices = (product, unit.rows, out, partner.rows)
    module = _module(tuning)
    if module is None or n == 0 or not all(_is_plain(x) for x in matrices):
        return False
    by_columns = not all(_by_rows(x) for x in matrices)
    if by_columns and not (all(_by_columns(x) for x in matrices) and last - first in (0, n)):
        return False
    paired = slice(first - args.rows.start, last - args.rows.start)
    partner_factor = -c.partner[paired] if c.class_mean is None else c.class_mean[paired] - c.partner[paired]
    vectors = [c.product, unit.inv_norm, partner_factor]
    of_means = 0, 0, 0, 0
    if args.class_means is not None and args.class_index is not None and c.class_mean is not None:
        means, index = args.class_means, args.class_index
        if by_columns or not _is_plain(means) or not _by_rows(means) or index.stride(0) != 1:
            return False
        vectors.append(c.class_mean)
        of_means = means.data_ptr(), means.stride(0), _row(index, args.rows.start), c.class_mean.data_ptr()
    if not all(_is_plain(x) and x.stride(0) == 1 for x in vectors):
        return False
    dim = int(by_columns)
    module.grad_epilogue(
        isa_index(tuning.isa),
        torch.get_num_threads(),
        product.data_ptr(),
        product.stride(dim),
        c.product.data_ptr(),
        _row(partner.rows, first + args.offset),
        partner.rows.stride(dim),
        paired.start,
        paired.stop,
        partner_factor.data_ptr(),
        *of_means,
        _row(unit.rows, args.rows.start),
        unit.rows.stride(dim),
        _row(unit.inv_norm, args.rows.start),
        _row(out, args.rows.start),
        out.stride(dim),
        n,
        d,
        args.accumulate,
        by_columns,
    )
    return True


def _module(tuning: LowLatencyTuning) -> Any:
    return compiled_module() if tuning.compiled else None


def _is_plain(x: Tensor) -> bool:
    """True where an address and strides say all about a tensor of fp32 numbers."""
    return x.dtype == torch.float32 and x.is_cpu and type(x) in PLAIN_TYPES


def _by_rows(x: Tensor) -> bool:
    return x.stride(1) == 1 or x.shape[1] == 1


def _by_columns(x: Tensor) -> bool:
    return x.stride(0) == 1 or x.shape[0] == 1


def _row(x: Tensor, row: int) -> int:
    """The address of a row, which may lie beyond the last."""
    return x.data_ptr() + row * x.stride(0) * x.element_size()
