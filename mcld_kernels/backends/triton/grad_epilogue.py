"""The last step of a gradient: g = s G - u P + z (P - M), its way back through the normalisation, and the cast.

Fused: the four reads, the projection g - (g . x) x, the division by the norm, the cast and the addition to what
another term left. Neither g nor the gathered partners and class means are ever materialised. Where a row fits one
tile it is one kernel. Longer rows, and gradients written through a transposed view (the category-wise term's), go in
tiles of two dimensions: one kernel sums g . x in parts, a second adds the parts in a fixed order and writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pipeline import Finish
from . import configs
from .common import tl_dtype


@triton.jit
def _gradient(product, unit, partner, means, rows, columns, inside, paired, first, shift, s, u, z, classes,
              depth, product_depth, LABELS: tl.constexpr, STAT: tl.constexpr):  # fmt: skip
    """g and x of a tile, (BLOCK_R, BLOCK_D) each. ``rows`` count from the slice's first row."""
    long = rows.to(tl.int64)[:, None]
    g = tl.load(product + long * product_depth + columns[None, :], mask=inside, other=0.0) * s[:, None]
    x = tl.load(unit + (long + first) * depth + columns[None, :], mask=inside, other=0.0).to(STAT)
    p = tl.load(
        partner + (long + first + shift) * depth + columns[None, :], mask=inside & paired[:, None], other=0.0
    ).to(STAT)
    if LABELS:
        m = tl.load(means + classes[:, None] * depth + columns[None, :], mask=inside, other=0.0).to(STAT)
        g += (z - u)[:, None] * p - z[:, None] * m
    else:
        g -= u[:, None] * p
    return g, x


@triton.jit
def _per_row(s, u, z, rank, rows, n, first, shift, partners, LABELS: tl.constexpr):
    valid = rows < n
    s_row = tl.load(s + rows, mask=valid, other=0.0)
    u_row = tl.load(u + rows, mask=valid, other=0.0)
    if LABELS:
        z_row = tl.load(z + rows, mask=valid, other=0.0)
        classes = tl.load(rank + first + rows, mask=valid, other=0)
    else:
        z_row = u_row
        classes = rows
    place = rows + first + shift
    return s_row, u_row, z_row, classes, valid & (place >= 0) & (place < partners)


@triton.jit
def _write(out, g, x, c, inverse, rows, columns, inside, first, stride_n, stride_d, ADD: tl.constexpr):
    g = (g - c[:, None] * x) * inverse[:, None]
    place = out + (rows.to(tl.int64)[:, None] + first) * stride_n + columns.to(tl.int64)[None, :] * stride_d
    if ADD:
        g += tl.load(place, mask=inside, other=0.0).to(g.dtype)
    tl.store(place, g.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "d", "first", "shift", "partners"])
def finish_kernel(
    out,  # any strides; (n of all rows, d)
    unit,  # (padded, depth)
    inverse,  # (n of all rows,)
    product,  # (n, product_depth)
    s,
    u,
    z,  # (n,)
    partner,  # (padded, depth)
    means,  # (ranks, depth)
    rank,  # (n of all rows,)
    n,  # rows of the slice
    d,
    first,
    shift,
    partners,
    stride_n,
    stride_d,
    depth,
    product_depth,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LABELS: tl.constexpr,
    ADD: tl.constexpr,
    STAT: tl.constexpr,
):
    """Rows that fit one tile: BLOCK_D >= d."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    s_row, u_row, z_row, classes, paired = _per_row(s, u, z, rank, rows, n, first, shift, partners, LABELS)
    g, x = _gradient(product, unit, partner, means, rows, columns, inside, paired, first, shift, s_row, u_row, z_row,
                     classes, depth, product_depth, LABELS, STAT)  # fmt: skip
    norm = tl.load(inverse + first + rows, mask=rows < n, other=0.0)
    _write(out, g, x, tl.sum(g * x, 1), norm, rows, columns, inside, first, stride_n, stride_d, ADD)


@triton.jit(do_not_specialize=["n", "d", "first", "shift", "partners"])
def finish_dots_kernel(
    partial,  # (splits, n)
    unit,
    product,
    s,
    u,
    z,
    partner,
    means,
    rank,
    n,
    d,
    first,
    shift,
    partners,
    depth,
    product_depth,
    span,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LABELS: tl.constexpr,
    STAT: tl.constexpr,
):
    """partial[split, row] = g . x over the split's columns."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    s_row, u_row, z_row, classes, paired = _per_row(s, u, z, rank, rows, n, first, shift, partners, LABELS)
    total = tl.zeros((BLOCK_R, BLOCK_D), STAT)
    for start in range(split * span, tl.minimum(split * span + span, d), BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        g, x = _gradient(product, unit, partner, means, rows, columns, inside, paired, first, shift, s_row, u_row,
                         z_row, classes, depth, product_depth, LABELS, STAT)  # fmt: skip
        total += g * x
    tl.store(partial + split.to(tl.int64) * n + rows, tl.sum(total, 1), mask=rows < n)


@triton.jit(do_not_specialize=["n", "d", "first", "shift", "partners", "splits"])
def finish_tiles_kernel(
    out,
    partial,
    unit,
    inverse,
    product,
    s,
    u,
    z,
    partner,
    means,
    rank,
    n,
    d,
    first,
    shift,
    partners,
    stride_n,
    stride_d,
    depth,
    product_depth,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LABELS: tl.constexpr,
    ADD: tl.constexpr,
    STAT: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.zeros((BLOCK_R,), STAT)
    for split in range(splits):
        c += tl.load(partial + tl.cast(split, tl.int64) * n + rows, mask=rows < n, other=0.0)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    s_row, u_row, z_row, classes, paired = _per_row(s, u, z, rank, rows, n, first, shift, partners, LABELS)
    g, x = _gradient(product, unit, partner, means, rows, columns, inside, paired, first, shift, s_row, u_row, z_row,
                     classes, depth, product_depth, LABELS, STAT)  # fmt: skip
    norm = tl.load(inverse + first + rows, mask=rows < n, other=0.0)
    _write(out, g, x, c, norm, rows, columns, inside, first, stride_n, stride_d, ADD)


def finish(step: Finish) -> None:
    """As `pipeline.Kernels.finish`."""
    out, unit, rows, product, s, u, z, partner, shift, means, rank, accumulate = step
    n, d, depth, device = rows.stop - rows.start, unit.d, unit.matrix.shape[1], unit.matrix.device
    operands = unit.matrix, unit.inverse, product, s.contiguous(), u.contiguous(), None if z is None else z.contiguous()
    gathered = partner.matrix, means, rank
    sizes = n, d, rows.start, shift, partner.n
    strides = *out.stride(), depth, product.stride(0)
    flags = {"LABELS": z is not None, "STAT": tl_dtype(product.dtype)}
    transposed = out.stride(0) == 1 and out.stride(1) != 1
    if configs.fits_a_row(d) and not transposed:
        launch = configs.whole_rows(device, d)
        finish_kernel[(triton.cdiv(n, launch.block_m),)](
            out, *operands, *gathered, *sizes, *strides,
            BLOCK_R=launch.block_m, BLOCK_D=launch.block_n, ADD=accumulate, num_warps=launch.warps, **flags,
        )  # fmt: skip
        return
    launch = configs.columns(device) if transposed else configs.rows(device, depth)
    span = configs.span(d, launch.block_n)
    splits = triton.cdiv(d, span)
    partial = torch.empty(splits, n, dtype=product.dtype, device=device)
    blocks = {"BLOCK_R": launch.block_m, "BLOCK_D": launch.block_n, "num_warps": launch.warps}
    finish_dots_kernel[(triton.cdiv(n, launch.block_m), splits)](
        partial, operands[0], *operands[2:], *gathered, *sizes, depth, product.stride(0), span, **blocks, **flags
    )
    finish_tiles_kernel[(triton.cdiv(d, launch.block_n), triton.cdiv(n, launch.block_m))](
        out, partial, *operands, *gathered, *sizes, *strides, splits, ADD=accumulate, **blocks, **flags
    )
