"""The gradient by rows of logits from the product of a contrast: `GradEpilogueArgs` has the formula.

Fused: the four reads, the projection, the division by the norm, the cast and the addition to the gradient of another
term. Neither g nor the gathered partners and class means are ever written. Where a row fits one tile it is one kernel.
Longer rows, and gradients written through a transposed view (the category-wise term's), go in tiles of two dimensions:
one kernel sums g . x and x . x in parts, a second adds the parts in a fixed order and writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...kernels import GradEpilogueArgs
from .common import tl_dtype
from .configs import Configs


@triton.jit
def _gradient(product, unit, partner, means, rows, columns, inside, paired, first, offset, product_c, partner_c,
              mean_c, classes, pitch, product_pitch, CLASS_MEANS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """g and x of a tile, (BLOCK_R, BLOCK_D) each. ``rows`` count from the chunk's first row."""
    long = rows.to(tl.int64)[:, None]
    g = tl.load(product + long * product_pitch + columns[None, :], mask=inside, other=0.0) * product_c[:, None]
    x = tl.load(unit + (long + first) * pitch + columns[None, :], mask=inside, other=0.0).to(ACC)
    p = tl.load(
        partner + (long + first + offset) * pitch + columns[None, :], mask=inside & paired[:, None], other=0.0
    ).to(ACC)
    if CLASS_MEANS:
        m = tl.load(means + classes[:, None] * pitch + columns[None, :], mask=inside, other=0.0).to(ACC)
        g += (mean_c - partner_c)[:, None] * p - mean_c[:, None] * m
    else:
        g -= partner_c[:, None] * p
    return g, x


@triton.jit
def _per_row(product_coef, partner_coef, class_mean_coef, class_index, rows, n, first, offset, partners,
             CLASS_MEANS: tl.constexpr):  # fmt: skip
    """Coefficients and class of each row, and True where it has a partner."""
    valid = rows < n
    product_c = tl.load(product_coef + rows, mask=valid, other=0.0)
    partner_c = tl.load(partner_coef + rows, mask=valid, other=0.0)
    if CLASS_MEANS:
        mean_c = tl.load(class_mean_coef + rows, mask=valid, other=0.0)
        classes = tl.load(class_index + first + rows, mask=valid, other=0)
    else:
        mean_c = partner_c
        classes = rows
    place = rows + first + offset
    return product_c, partner_c, mean_c, classes, valid & (place >= 0) & (place < partners)


@triton.jit
def _write(out, g, x, gx, xx, inv_norm, rows, columns, inside, first, stride_n, stride_d, ACCUMULATE: tl.constexpr):
    # The projection divides by x . x: a rounded operand has |x| != 1.
    c = gx / tl.where(xx == 0.0, 1.0, xx)
    g = (g - c[:, None] * x) * inv_norm[:, None]
    place = out + (rows.to(tl.int64)[:, None] + first) * stride_n + columns.to(tl.int64)[None, :] * stride_d
    if ACCUMULATE:
        g += tl.load(place, mask=inside, other=0.0).to(g.dtype)
    tl.store(place, g.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "d", "first", "offset", "partners"])
def grad_epilogue_kernel(
    out,  # any strides; (n of all rows, d)
    unit,  # (padded, pitch)
    inv_norm,  # (n of all rows,)
    product,  # (n, product_pitch)
    product_coef,  # (n,)
    partner_coef,  # (n,)
    class_mean_coef,  # (n,)
    partner,  # (padded, pitch)
    means,  # (classes, pitch)
    class_index,  # (n of all rows,)
    n,  # rows of the chunk
    d,
    first,
    offset,
    partners,
    stride_n,
    stride_d,
    pitch,
    product_pitch,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLASS_MEANS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Rows that fit one tile: BLOCK_D >= d."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    product_c, partner_c, mean_c, classes, paired = _per_row(
        product_coef, partner_coef, class_mean_coef, class_index, rows, n, first, offset, partners, CLASS_MEANS
    )
    g, x = _gradient(product, unit, partner, means, rows, columns, inside, paired, first, offset, product_c, partner_c,
                     mean_c, classes, pitch, product_pitch, CLASS_MEANS, ACC)  # fmt: skip
    norm = tl.load(inv_norm + first + rows, mask=rows < n, other=0.0)
    gx, xx = tl.sum(g * x, 1), tl.sum(x * x, 1)
    _write(out, g, x, gx, xx, norm, rows, columns, inside, first, stride_n, stride_d, ACCUMULATE)


@triton.jit(do_not_specialize=["n", "d", "first", "offset", "partners", "splits"])
def grad_dots_kernel(
    partial,  # (2, splits, n)
    unit,
    product,
    product_coef,
    partner_coef,
    class_mean_coef,
    partner,
    means,
    class_index,
    n,
    d,
    first,
    offset,
    partners,
    pitch,
    product_pitch,
    splits,
    span,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLASS_MEANS: tl.constexpr,
    ACC: tl.constexpr,
):
    """partial[0, split, row] = g . x and partial[1, split, row] = x . x over the split's columns."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    product_c, partner_c, mean_c, classes, paired = _per_row(
        product_coef, partner_coef, class_mean_coef, class_index, rows, n, first, offset, partners, CLASS_MEANS
    )
    gx = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    xx = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for start in range(split * span, tl.minimum(split * span + span, d), BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        g, x = _gradient(product, unit, partner, means, rows, columns, inside, paired, first, offset, product_c,
                         partner_c, mean_c, classes, pitch, product_pitch, CLASS_MEANS, ACC)  # fmt: skip
        gx += g * x
        xx += x * x
    place = partial + split.to(tl.int64) * n + rows
    tl.store(place, tl.sum(gx, 1), mask=rows < n)
    tl.store(place + tl.cast(splits, tl.int64) * n, tl.sum(xx, 1), mask=rows < n)


@triton.jit(do_not_specialize=["n", "d", "first", "offset", "partners", "splits"])
def grad_tiles_kernel(
    out,
    partial,
    unit,
    inv_norm,
    product,
    product_coef,
    partner_coef,
    class_mean_coef,
    partner,
    means,
    class_index,
    n,
    d,
    first,
    offset,
    partners,
    stride_n,
    stride_d,
    pitch,
    product_pitch,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLASS_MEANS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr,
):
    # Tiles of a row first, all on one axis: a grid's second one ends at 65,535.
    tiles = tl.cdiv(d, BLOCK_D)
    rows = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    gx = tl.zeros((BLOCK_R,), ACC)
    xx = tl.zeros((BLOCK_R,), ACC)
    for split in range(splits):
        place = partial + tl.cast(split, tl.int64) * n + rows
        gx += tl.load(place, mask=rows < n, other=0.0)
        xx += tl.load(place + tl.cast(splits, tl.int64) * n, mask=rows < n, other=0.0)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    product_c, partner_c, mean_c, classes, paired = _per_row(
        product_coef, partner_coef, class_mean_coef, class_index, rows, n, first, offset, partners, CLASS_MEANS
    )
    g, x = _gradient(product, unit, partner, means, rows, columns, inside, paired, first, offset, product_c, partner_c,
                     mean_c, classes, pitch, product_pitch, CLASS_MEANS, ACC)  # fmt: skip
    norm = tl.load(inv_norm + first + rows, mask=rows < n, other=0.0)
    _write(out, g, x, gx, xx, norm, rows, columns, inside, first, stride_n, stride_d, ACCUMULATE)


def grad_epilogue(args: GradEpilogueArgs, configs: Configs) -> None:
    """As `KernelSet.grad_epilogue`."""
    out, unit, product, c = args.out, args.unit, args.product, args.coefficients
    n, d, pitch = args.rows.stop - args.rows.start, unit.d, unit.rows.shape[1]
    class_mean = None if c.class_mean is None else c.class_mean.contiguous()
    operands = product, c.product.contiguous(), c.partner.contiguous(), class_mean
    gathered = args.partner.rows, args.class_means, args.class_index
    sizes = n, d, args.rows.start, args.offset, args.partner.n
    pitches = pitch, product.stride(0)
    flags = {"CLASS_MEANS": class_mean is not None, "ACC": tl_dtype(product.dtype)}
    transposed = out.stride(0) == 1 and out.stride(1) != 1
    if configs.fits_whole_row(d) and not transposed:
        launch = configs.whole_rows(d)
        grad_epilogue_kernel[(triton.cdiv(n, launch.block_m),)](
            out, unit.rows, unit.inv_norm, *operands, *gathered, *sizes, *out.stride(), *pitches,
            BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, ACCUMULATE=args.accumulate, num_warps=launch.warps,
            **flags,
        )  # fmt: skip
        return
    launch = configs.columns() if transposed else configs.rows(pitch)
    span = configs.span(d, launch.block_n)
    splits = triton.cdiv(d, span)
    partial = torch.empty(2, splits, n, dtype=product.dtype, device=product.device)
    blocks = {"BLOCK_R": launch.block_m, "BLOCK_D": launch.block_n, "num_warps": launch.warps}
    grad_dots_kernel[(triton.cdiv(n, launch.block_m), splits)](
        partial, unit.rows, *operands, *gathered, *sizes, *pitches, splits, span, **blocks, **flags
    )
    grad_tiles_kernel[(triton.cdiv(d, launch.block_n) * triton.cdiv(n, launch.block_m),)](
        out, partial, unit.rows, unit.inv_norm, *operands, *gathered, *sizes, *out.stride(), *pitches, splits,
        ACCUMULATE=args.accumulate, **blocks, **flags,
    )  # fmt: skip
