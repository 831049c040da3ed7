"""The flash path, for short rows: similarities, exponentials and their product with the candidates in one kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..pipeline import Contrast, Negatives, Problem, Unit
from . import configs, hopper
from .common import FP16_GAIN, LOG2E, Launcher, fixed_shift, floats, has_fixed_shift, padded_rows, precision_of
from .products import statistics


class _Pass(NamedTuple):
    """Rows q against columns k: the anchors against the candidates, or the other way round."""

    q: Unit
    k: Unit
    temperature: float
    offset: int  # what is dropped of row i is column i + offset
    same: tuple[Tensor, Tensor] | None


def contrast(launch: Launcher, problem: Problem, on_hopper: bool) -> Contrast:
    """As `pipeline.Kernels.contrast`, without the reverse."""
    a, temperature = problem.a, problem.temperature
    dtype = a.matrix.dtype
    fixed = has_fixed_shift(dtype, temperature)
    forward = _Pass(a, problem.k, temperature, problem.offset, problem.same)
    parts, sums, maxima = _run(launch, forward, problem.sink is not None, online=not fixed, on_hopper=on_hopper)
    log_off, scale = floats(sums, a.n), floats(sums, a.n)
    row_maxima = None if fixed else floats(sums, a.n)
    statistics(launch, sums, maxima, row_maxima, log_off, scale, fixed_shift(dtype, temperature))
    if problem.sink is not None:
        assert parts is not None
        problem.sink(Negatives(slice(0, a.n), log_off, _combine(launch, parts, a.n, maxima, row_maxima), scale))
    if not problem.candidate:
        return Contrast(log_off, scale)
    share = problem.factors(slice(0, a.n), log_off, scale).u * temperature
    return Contrast(log_off, scale, _candidates(launch, problem, share, scale, row_maxima))


def _candidates(launch: Launcher, problem: Problem, share: Tensor, scale: Tensor, row_maxima: Tensor | None) -> Tensor:
    """sum_i share_i p_ij A_i for every candidate, p_ij = scale_i exp(a_ij): a second pass, the sides changed."""
    a, k = problem.a, problem.k
    gain = None
    if a.matrix.dtype == torch.float16:
        # share p, which fp16 is to hold, is at most the largest share; the product is divided again in fp32.
        gain = FP16_GAIN / share.amax().clamp(min=1e-30)
        share = share * gain
    back = _Pass(k, a, problem.temperature, -problem.offset, problem.turned())
    parts, _, _ = _run(launch, back, True, factor=share * scale, column_shift=row_maxima)
    assert parts is not None
    product = _combine(launch, parts, k.n)
    return product if gain is None else product.div_(gain)


def _run(
    launch: Launcher,
    what: _Pass,
    wanted: bool,
    *,
    online: bool = False,
    factor: Tensor | None = None,
    column_shift: Tensor | None = None,
    on_hopper: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Partial products (splits, n, d) if ``wanted``, sums (splits, n); maxima if ``online``; n and d padded.

    factor, column_shift: (m,) what a column's exponentials are multiplied with, and their own shift.
    """
    q, k, temperature, offset, same = what
    dtype, pitch, padded = q.matrix.dtype, q.matrix.shape[1], padded_rows(q.n)
    kernel, splits = "flash", configs.flash_splits(q.n, k.n)
    plain = wanted and not online and factor is None and column_shift is None and same is None
    if on_hopper and plain and hopper.refused(launch.module, launch.device, dtype) is None:
        taken = hopper.flash_splits(q.n, k.n, pitch)
        kernel, splits = ("hopper_flash", taken) if taken else (kernel, splits)
    parts = floats(q.matrix, splits, padded, pitch) if wanted else None
    sums = floats(q.matrix, splits, padded)
    maxima = torch.empty_like(sums) if online else None
    launch(
        kernel,
        a=q.matrix, k=k.matrix, out=parts, sums=sums, maxima=maxima, column_factor=factor, column_shift=column_shift,
        same_a=None if same is None else same[0], same_k=None if same is None else same[1], n=q.n, m=k.n, pitch=pitch,
        padded_rows=padded, diagonal=offset, splits=splits, scale=LOG2E / temperature,
        shift=fixed_shift(dtype, temperature), precision=precision_of(dtype),
    )  # fmt: skip
    return parts, sums, maxima


def _combine(
    launch: Launcher, parts: Tensor, rows: int, maxima: Tensor | None = None, row_maxima: Tensor | None = None
) -> Tensor:
    """The splits' products, added in order: (rows, pitch)."""
    splits, padded, pitch = parts.shape
    if splits == 1:
        return parts[0, :rows]
    product = floats(parts, rows, pitch)
    launch(
        "combine",
        parts=parts, maxima=maxima, row_maxima=row_maxima, out=product, rows=rows, padded_rows=padded, pitch=pitch,
        splits=splits,
    )  # fmt: skip
    return product
