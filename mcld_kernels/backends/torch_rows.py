"""The steps around the products of a contrast on a CPU, by the compiled module (csrc/cpu/rows.h): fp32 alone.

In torch operations each step reads and writes the rows several times, and at large batches most of these tensors
lie in new pages of memory. Compiled, a step reads its rows once and writes its result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import GradEpilogueArgs, KernelSet, UnitRows
from ..options import PLAIN_TYPES
from .torch_low_latency import LowLatencyTuning, isa_index, loaded_module


class RowKernels(KernelSet):
    """`KernelSet` with the steps that the compiled module has; torch operations where it does not serve the memory."""

    tuning: LowLatencyTuning

    def l2_normalize(self, x: Tensor, operand_dtype: torch.dtype, eps: float) -> UnitRows:
        plain = x.dtype == operand_dtype == torch.float32 and x.is_cpu and type(x) in PLAIN_TYPES
        (n, d), (row, column) = x.shape, x.stride()
        by_columns = not (column == 1 or d == 1)
        module = loaded_module() if plain and self.tuning.compiled and n * d > 0 else None
        if module is None or (by_columns and not (row == 1 or n == 1)):
            return super().l2_normalize(x, operand_dtype, eps)
        # new_empty: torch's default device may be another one.
        rows = x.new_empty((d, n)).T if by_columns else x.new_empty((n, d))
        inv_norm = x.new_empty(n)
        module.normalize(
            isa_index(self.tuning.isa),
            torch.get_num_threads(),
            x.data_ptr(),
            column if by_columns else row,
            rows.data_ptr(),
            n if by_columns else d,
            inv_norm.data_ptr(),
            n,
            d,
            eps,
            by_columns,
        )
        return UnitRows(rows=rows, inv_norm=inv_norm, n=n, d=d)

    def grad_epilogue(self, args: GradEpilogueArgs) -> None:
        if not (self.tuning.compiled and args.out.is_cpu and _grad_epilogue(args, self.tuning)):
            super().grad_epilogue(args)


def _grad_epilogue(args: GradEpilogueArgs, tuning: LowLatencyTuning) -> bool:
    """As `KernelSet.grad_epilogue`; False, with nothing done, where the module does not serve these tensors."""
    unit, partner, product, out, c = args.unit, args.partner, args.product, args.out, args.coefficients
    module = loaded_module()
    if module is None:
        return False
    first = min(max(args.rows.start, -args.offset), args.rows.stop)  # of the rows that have a partner, and their last
    last = max(first, min(args.rows.stop, partner.n - args.offset))
    paired = slice(first - args.rows.start, last - args.rows.start)
    partner_factor = -c.partner[paired] if c.class_mean is None else c.class_mean[paired] - c.partner[paired]
    start, n = args.rows.start, args.rows.stop - args.rows.start
    matrices, vectors, of_means = (
        [product, unit.rows, out, partner.rows],
        [c.product, unit.inv_norm, partner_factor],
        None,
    )
    if args.class_means is not None and args.class_index is not None and c.class_mean is not None:
        means, index = args.class_means, args.class_index
        matrices.append(means)
        vectors.append(c.class_mean)
        if index.stride(0) != 1:
            return False
        of_means = means.data_ptr(), means.stride(0), index.data_ptr() + 8 * start, c.class_mean.data_ptr()
    # An address and strides say all about plain tensors.
    for x in (*matrices, *vectors):
        if x.dtype != torch.float32 or not x.is_cpu or type(x) not in PLAIN_TYPES:
            return False
    for x in vectors:
        if x.stride(0) != 1:
            return False
    by_rows = by_columns = True
    for x in matrices:
        (rows, columns), (row, column) = x.shape, x.stride()
        by_rows = by_rows and (column == 1 or columns == 1)
        by_columns = by_columns and (row == 1 or rows == 1)
    by_columns = by_columns and not by_rows
    if n == 0 or not (by_rows or (by_columns and of_means is None and last - first in (0, n))):
        return False
    dim = int(by_columns)
    module.grad_epilogue(
        isa_index(tuning.isa),
        torch.get_num_threads(),
        product.data_ptr(),
        product.stride(dim),
        c.product.data_ptr(),
        partner.rows.data_ptr() + 4 * (first + args.offset) * partner.rows.stride(0),
        partner.rows.stride(dim),
        paired.start,
        paired.stop,
        partner_factor.data_ptr(),
        *(of_means or (0, 0, 0, 0)),
        unit.rows.data_ptr() + 4 * start * unit.rows.stride(0),
        unit.rows.stride(dim),
        unit.inv_norm.data_ptr() + 4 * start,
        out.data_ptr() + 4 * start * out.stride(0),
        out.stride(dim),
        n,
        unit.d,
        args.accumulate,
        by_columns,
    )
    return True
