"""The "cuda" backend: the compiled module's kernels (csrc/) behind `pipeline.Kernels`: pointers, sizes, stream, errors.

**No GPU has run these kernels yet.** They compile for sm_80, sm_90a, sm_100a and sm_120 without spills, and every test
run executes the portable ones on the CPU, compiled for the host (tests/csrc_host), against the fp64 reference. The
thresholds below are therefore reasoned, not measured.

float32 logits follow the float32 matmul precision: "highest" is accurate to fp32 (three tf32 products), "high" is tf32,
"medium" takes bf16 operands. fp64 has no kernels here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import blocked, compiled, hopper, latency
from .arguments import Options, float32_precision
from .labels import Labels
from .pipeline import Contrast, Negatives, Result, Unit, evaluate

LEAST_CAPABILITY = (8, 0)
LOG2E = 1.4426950408889634
ROWS = 128  # rows of an operand are padded to a multiple
# Tiles of 128 x 128 pay once they fill a large GPU (132 to 170 multiprocessors); of 64 x 64 there are four times more.
ENOUGH_TILES = 128
# Rows of at most so many bytes: an accumulator of the whole row fits the registers, and the tiles shared memory.
FLASH_BYTES = 512
FLASH_ROWS = 64  # anchors of a block
FLASH_BLOCKS = 264  # blocks wanted, by splitting the candidates: two for each multiprocessor of a large GPU
MOST_SPLITS = 16
# A fixed shift is right while exp(-2 / temperature) keeps to normal numbers: in powers of two, with a margin for bf16
# and fp32; for fp16 between 2^-14 and 2^15, into which FP16_LIFT moves the exponentials.
FIXED_RANGE = {torch.float32: 100.0, torch.bfloat16: 100.0, torch.float16: 29.0}
FP16_LIFT = 15.0
FP16_GAIN = 1024.0  # what the largest weighted probability, or factor of an anchor, becomes in fp16

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_BF16, _FP16, _TF32, _TF32X3 = range(4)

# The kernels compiled for the host; tests set it, and CPU tensors are then taken.
emulated: ModuleType | None = None


def unavailable() -> str | None:
    """Why the backend cannot run on this machine, whatever the logits; None if it can."""
    if emulated is not None:
        return None
    without = compiled.without_cuda()
    if without is not None:
        return without
    module, _ = compiled.load()
    if module is not None and not module.info()["portable"]:
        return "the compiled module holds no portable kernels: install the package again"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def reason(student: Tensor, teacher: Tensor) -> str | None:
    """Why the backend cannot run with these logits; None if it can."""
    why = unavailable()
    if why is not None:
        return why
    if torch.float64 in (student.dtype, teacher.dtype):
        return "it has no fp64 kernels: use backend 'torch' or 'reference', or float32 logits"
    if emulated is not None:
        return None if student.device.type == "cpu" else "the kernels are compiled for the host: it takes CPU tensors"
    if student.device.type != "cuda":
        return f"it takes CUDA tensors, and these are on {student.device}"
    capability = torch.cuda.get_device_capability(student.device)
    if capability < LEAST_CAPABILITY:
        return (
            f"it needs compute capability {_dotted(LEAST_CAPABILITY)} or above, "
            f"and {student.device} has {_dotted(capability)}"
        )
    module, _ = compiled.load()
    assert module is not None
    architectures = module.info()["architectures"]
    if not any(runs_on(architecture, capability) for architecture in architectures):
        return (
            f"the compiled module is for {', '.join(architectures)}, and {student.device} has compute capability "
            f"{_dotted(capability)}: install the package again with MCLD_CUDA_ARCHS={_dotted(capability)}"
        )
    return None


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architecture``, as CMake writes it ("80-real", "90a", "120"), runs on a compute capability."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:
        return False
    major, minor, special, kind = int(match[1]), int(match[2]), match[3], match[4]
    if special == "a":
        return capability == (major, minor)
    binary = kind != "-virtual" and capability[0] == major and capability[1] >= minor
    # What is not "-real" also holds PTX, which the driver compiles for any later device.
    return binary or (kind != "-real" and not special and capability >= (major, minor))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def padded_rows(n: int) -> int:
    return (n + ROWS - 1) // ROWS * ROWS


def pitch_of(d: int) -> int:
    """Columns of an operand: whole slices of shared memory, and whole tiles of 128 where one of 64 is not enough."""
    return 64 if d <= 64 else (d + 127) // 128 * 128


def _tile(rows: int, columns: int) -> int:
    return 128 if columns % 128 == 0 and rows // 128 * (columns // 128) >= ENOUGH_TILES else 64


def _pointer(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class CudaKernels:
    """`pipeline.Kernels` by a module of launchers: `mcld_kernels._C`, or the same kernels compiled for the host."""

    def __init__(self, module: ModuleType, device: torch.device):
        self._module = module
        self._where: dict[str, int] = {"device": 0, "stream": 0}
        if device.type == "cuda":
            # The stream that is current now: also the one that a graph is being captured on.
            stream = torch.cuda.current_stream(device)
            self._where = {"device": stream.device_index, "stream": stream.cuda_stream}

    def call(self, name: str, **fields: Any) -> None:
        getattr(self._module, name)(**fields, **self._where)

    def _on_hopper(self, unit: Unit) -> bool:
        return hopper.refused(self._module, unit.matrix.device, unit.matrix.dtype) is None

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float32 and float32_precision() == "medium":
            return torch.bfloat16
        return dtype

    def can_reverse(self, dtype: torch.dtype, temperature: float) -> bool:
        # Sums by column need one shift for all rows, which in fp16 leaves the weighted anchors no range.
        return dtype != torch.float16 and has_fixed_shift(dtype, temperature)

    def normalise(self, x: Tensor, dtype: torch.dtype, eps: float) -> Unit:
        n, d = x.shape
        matrix = torch.empty(padded_rows(n), pitch_of(d), dtype=dtype, device=x.device)
        inverse = _floats(x, n)
        columns = x.stride(0) < x.stride(1) and n > 1
        splits = max(1, min(64, d // 256)) if columns else 0
        work = _floats(x, splits, n) if columns else None
        self.call(
            "normalise_columns" if columns else "normalise_rows",
            x=x.data_ptr(), row_stride=x.stride(0), column_stride=x.stride(1), out=_pointer(matrix),
            inverse=_pointer(inverse), work=_pointer(work), n=n, d=d, padded_rows=matrix.shape[0],
            pitch=matrix.shape[1], splits=splits, eps=eps, type=TYPES[x.dtype], precision=precision_of(dtype),
        )  # fmt: skip
        return Unit(matrix, inverse, n, d)

    def class_means(self, unit: Unit, labels: Labels, counts: Tensor) -> Tensor:
        pitch = unit.matrix.shape[1]
        # In fp32, not in the operand dtype: no tensor-core product reads them, and rounding would show.
        means = _floats(unit.matrix, counts.shape[0], pitch)
        self.call(
            "class_means",
            unit=_pointer(unit.matrix), order=_pointer(labels.order), starts=_pointer(labels.starts),
            counts=_pointer(counts), out=_pointer(means), ranks=counts.shape[0], pitch=pitch,
            precision=precision_of(unit.matrix.dtype),
        )  # fmt: skip
        return means

    def positives(
        self, a: Unit, k: Unit, offset: int, means: Tensor | None, rank: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        positive = _floats(a.matrix, a.n)
        by_label = positive if means is None else _floats(a.matrix, a.n)
        rank = None if means is None or rank is None else rank.contiguous()
        self.call(
            "positives",
            a=_pointer(a.matrix), k=_pointer(k.matrix), means=_pointer(means), rank=_pointer(rank),
            positive=_pointer(positive), by_label=_pointer(by_label), n=a.n, m=k.n, offset=offset,
            pitch=a.matrix.shape[1], precision=precision_of(a.matrix.dtype),
        )  # fmt: skip
        return positive, by_label

    def contrast(
        self,
        a: Unit,
        k: Unit,
        *,
        temperature: float,
        offset: int,
        same: tuple[Tensor, Tensor] | None,
        positive: Tensor,
        weight: Tensor | None,
        sink: Callable[[Negatives], None] | None,
        candidate: bool,
        reverse: bool,
    ) -> Contrast:
        same = None if same is None else (same[0].contiguous(), same[1].contiguous())
        if not reverse and k.matrix.shape[1] * k.matrix.itemsize <= FLASH_BYTES:
            log_off, scale, row_maxima = self._flash(a, k, temperature, offset, same, sink)
            if not candidate:
                return Contrast(log_off)
            assert weight is not None
            share = weight * torch.sigmoid(log_off - positive / temperature)
            return Contrast(log_off, self._flash_candidates(a, k, temperature, offset, same, share, scale, row_maxima))
        return self._two_products(a, k, temperature, offset, same, positive, weight, sink, candidate, reverse)

    def _two_products(
        self,
        a: Unit,
        k: Unit,
        temperature: float,
        offset: int,
        same: tuple[Tensor, Tensor] | None,
        positive: Tensor,
        weight: Tensor | None,
        sink: Callable[[Negatives], None] | None,
        candidate: bool,
        reverse: bool,
    ) -> Contrast:
        dtype, pitch = a.matrix.dtype, a.matrix.shape[1]
        precision = precision_of(dtype)
        columns = padded_rows(k.n)  # of E
        fixed = has_fixed_shift(dtype, temperature) and not (candidate and dtype == torch.float16)
        scale_of, shift = LOG2E / temperature, _shift(dtype, temperature)
        rows_of_chunk = blocked.chunk_bytes(a.matrix.device) // (columns * a.matrix.itemsize)
        rows_of_chunk = max(ROWS, min(rows_of_chunk // ROWS * ROWS, padded_rows(a.n)))
        keeps = sink is not None or candidate
        e = a.matrix.new_empty(rows_of_chunk, columns) if keeps else None
        log_off = _floats(a.matrix, a.n)
        by_candidate = _floats(a.matrix, columns, pitch) if candidate else None
        reversed_product = _floats(a.matrix, columns, pitch) if reverse and candidate else None
        reverse_off, reverse_log, reverse_scale = (_floats(a.matrix, k.n) if reverse else None for _ in range(3))
        on_hopper = fixed and not reverse and same is None and self._on_hopper(a)
        for start in range(0, a.n, rows_of_chunk):
            rows = slice(start, min(start + rows_of_chunk, a.n))
            count, padded = rows.stop - start, padded_rows(rows.stop - start)
            tile = _tile(padded, columns)
            anchors = a.matrix[start : start + padded]
            sm90 = on_hopper and hopper.takes_similarity(count, columns)
            kernel: dict[str, Any] = {"name": "hopper_similarity"} if sm90 else {"name": "similarity", "tile": tile}
            tiles = -(-columns // hopper.SIMILARITY_COLUMNS) if sm90 else columns // tile
            sums = _floats(e if e is not None else anchors, tiles, padded)
            maxima = None if fixed else torch.empty_like(sums)
            row_maxima = None if fixed else _floats(sums, count)
            column_sums = _floats(sums, padded // tile, columns) if reverse else None
            scale = _floats(sums, count)
            self.call(
                **kernel,
                a=_pointer(anchors), k=_pointer(k.matrix), e=_pointer(e), row_sums=_pointer(sums),
                row_maxima=_pointer(maxima), column_sums=_pointer(column_sums),
                same_a=_pointer(None if same is None else same[0][rows]),
                same_k=_pointer(None if same is None else same[1]), rows=count, m=k.n, pitch=pitch,
                pitch_e=columns, padded_rows=padded,
                diagonal=start + offset, scale=scale_of, shift=shift, precision=precision,
            )  # fmt: skip
            self._statistics(sums, maxima, row_maxima, log_off[rows], scale, shift)
            if reverse_off is not None:
                assert column_sums is not None and reverse_log is not None and reverse_scale is not None
                self._statistics(column_sums, None, None, reverse_log, reverse_scale, shift, reverse_off, start > 0)
            if e is None:
                continue
            if maxima is not None:
                self.call(
                    "rescale",
                    e=_pointer(e), maxima=_pointer(maxima), row_maxima=_pointer(row_maxima), rows=count,
                    padded_rows=padded, pitch_e=columns, tile=tile, precision=precision,
                )  # fmt: skip
            if sink is not None:
                product = _floats(sums, padded, pitch)
                self._product(e, k.matrix, product, padded, columns, transposed=False, add=False)
                sink(Negatives(rows, log_off[rows], product[:count], scale))
            if by_candidate is not None:
                assert weight is not None
                share = weight[rows] * torch.sigmoid(log_off[rows] - positive[rows] / temperature)
                weighted, alpha = self._weighted(anchors, share * scale)
                self._product(e, weighted, by_candidate, columns, padded, transposed=True, add=start > 0, alpha=alpha)
            if reversed_product is not None:
                self._product(e, anchors, reversed_product, columns, padded, transposed=True, add=start > 0)
        if by_candidate is not None:
            by_candidate = by_candidate[: k.n]
        if reverse_log is None or reverse_scale is None:
            return Contrast(log_off, by_candidate)
        product = reverse_log[:0] if reversed_product is None else reversed_product[: k.n]
        return Contrast(log_off, by_candidate, Negatives(slice(0, k.n), reverse_log, product, reverse_scale))

    def _weighted(self, a: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        """factor_i A_i in the operand dtype and, for fp16, what the products of it are to be multiplied by."""
        alpha = None
        if a.dtype == torch.float16:
            # Factors of 1 / (n m) are below fp16's range: there they are relative to the chunk's largest.
            alpha = factor.amax().clamp(min=1e-30) / FP16_GAIN
            factor = factor / alpha
        weighted = torch.empty_like(a)
        self.call(
            "scale_rows",
            a=_pointer(a), out=_pointer(weighted), factor=_pointer(factor), rows=factor.shape[0],
            padded_rows=a.shape[0], pitch=a.shape[1], precision=precision_of(a.dtype),
        )  # fmt: skip
        return weighted, alpha

    def _product(
        self,
        e: Tensor,
        k: Tensor,
        out: Tensor,
        rows: int,
        contraction: int,
        *,
        transposed: bool,
        add: bool,
        alpha: Tensor | None = None,
    ) -> None:
        self.call(
            "product",
            e=_pointer(e), k=_pointer(k), out=_pointer(out), alpha=_pointer(alpha), rows=rows, contraction=contraction,
            pitch_e=e.shape[1], pitch=k.shape[1], transposed=transposed, add=add, precision=precision_of(e.dtype),
            tile=_tile(rows, k.shape[1]),
        )  # fmt: skip

    def _statistics(
        self,
        sums: Tensor,
        maxima: Tensor | None,
        row_maxima: Tensor | None,
        log_off: Tensor,
        scale: Tensor,
        shift: float,
        total: Tensor | None = None,
        add: bool = False,
    ) -> None:
        self.call(
            "statistics",
            sums=_pointer(sums), maxima=_pointer(maxima), row_maxima=_pointer(row_maxima), total=_pointer(total),
            log_off=_pointer(log_off), scale=_pointer(scale), rows=log_off.shape[0], pitch=sums.shape[1],
            tiles=sums.shape[0], add=add, shift=shift,
        )  # fmt: skip

    def _flash(
        self,
        a: Unit,
        k: Unit,
        temperature: float,
        offset: int,
        same: tuple[Tensor, Tensor] | None,
        sink: Callable[[Negatives], None] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One pass over the candidates: log_off, scale, maxima (n,) of the anchors and, into the sink, the products."""
        fixed, shift = has_fixed_shift(a.matrix.dtype, temperature), _shift(a.matrix.dtype, temperature)
        parts, sums, maxima = self._flash_pass(a, k, temperature, offset, same, sink is not None, online=not fixed)
        log_off, scale = _floats(sums, a.n), _floats(sums, a.n)
        row_maxima = None if fixed else _floats(sums, a.n)
        self._statistics(sums, maxima, row_maxima, log_off, scale, shift)
        if sink is not None:
            assert parts is not None
            sink(Negatives(slice(0, a.n), log_off, self._combine(parts, a.n, maxima, row_maxima), scale))
        return log_off, scale, row_maxima

    def _flash_candidates(
        self,
        a: Unit,
        k: Unit,
        temperature: float,
        offset: int,
        same: tuple[Tensor, Tensor] | None,
        share: Tensor,
        scale: Tensor,
        row_maxima: Tensor | None,
    ) -> Tensor:
        """sum_i share_i p_ij A_i for every candidate, p_ij = scale_i exp(a_ij): a second pass, the sides changed."""
        gain = None
        if a.matrix.dtype == torch.float16:
            # share p, which fp16 is to hold, is at most the largest share; the product is divided again in fp32.
            gain = FP16_GAIN / share.amax().clamp(min=1e-30)
            share = share * gain
        factor = share * scale
        same = None if same is None else (same[1], same[0])
        parts, _, _ = self._flash_pass(k, a, temperature, -offset, same, True, factor=factor, column_shift=row_maxima)
        assert parts is not None
        product = self._combine(parts, k.n)
        return product if gain is None else product.div_(gain)

    def _flash_pass(
        self,
        a: Unit,
        k: Unit,
        temperature: float,
        offset: int,
        same: tuple[Tensor, Tensor] | None,
        wanted: bool,
        *,
        online: bool = False,
        factor: Tensor | None = None,
        column_shift: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Partial products (splits, n, d) if ``wanted``, sums (splits, n); maxima if ``online``; n and d padded."""
        pitch, padded = a.matrix.shape[1], padded_rows(a.n)
        blocks = (a.n + FLASH_ROWS - 1) // FLASH_ROWS
        splits = max(1, min(MOST_SPLITS, FLASH_BLOCKS // blocks, (k.n + FLASH_ROWS - 1) // FLASH_ROWS))
        kernel = "flash"
        plain = wanted and not online and factor is None and column_shift is None and same is None
        if plain and self._on_hopper(a) and hopper.flash_splits(a.n, k.n, pitch):
            kernel, splits = "hopper_flash", hopper.flash_splits(a.n, k.n, pitch)
        parts = _floats(a.matrix, splits, padded, pitch) if wanted else None
        sums = _floats(a.matrix, splits, padded)
        maxima = torch.empty_like(sums) if online else None
        self.call(
            kernel,
            a=_pointer(a.matrix), k=_pointer(k.matrix), out=_pointer(parts), sums=_pointer(sums),
            maxima=_pointer(maxima), column_factor=_pointer(factor), column_shift=_pointer(column_shift),
            same_a=_pointer(None if same is None else same[0]), same_k=_pointer(None if same is None else same[1]),
            n=a.n, m=k.n, pitch=pitch, padded_rows=padded, diagonal=offset, splits=splits, scale=LOG2E / temperature,
            shift=_shift(a.matrix.dtype, temperature), precision=precision_of(a.matrix.dtype),
        )  # fmt: skip
        return parts, sums, maxima

    def _combine(
        self, parts: Tensor, rows: int, maxima: Tensor | None = None, row_maxima: Tensor | None = None
    ) -> Tensor:
        splits, padded, pitch = parts.shape
        if splits == 1:
            return parts[0, :rows]
        product = _floats(parts, rows, pitch)
        self.call(
            "combine",
            parts=_pointer(parts), maxima=_pointer(maxima), row_maxima=_pointer(row_maxima), out=_pointer(product),
            rows=rows, padded_rows=padded, pitch=pitch, splits=splits,
        )  # fmt: skip
        return product

    def finish(
        self,
        out: Tensor,
        unit: Unit,
        rows: slice,
        product: Tensor,
        s: Tensor,
        u: Tensor,
        z: Tensor | None,
        partner: Unit,
        shift: int,
        means: Tensor | None,
        rank: Tensor | None,
        accumulate: bool,
    ) -> None:
        assert product.stride(1) == 1
        gradient = out[rows]
        count = gradient.shape[0]
        transposed = gradient.stride(0) < gradient.stride(1) and count > 1
        dots = _floats(product, count) if transposed else None
        s, u = s.contiguous(), u.contiguous()
        z = None if z is None else z.contiguous()
        rank = None if rank is None or z is None else rank[rows].contiguous()
        self.call(
            "finish",
            out=gradient.data_ptr(), row_stride=gradient.stride(0), column_stride=gradient.stride(1),
            unit=_pointer(unit.matrix[rows]), partner=_pointer(partner.matrix),
            means=_pointer(means if z is not None else None), inverse=_pointer(unit.inverse[rows]),
            product=product.data_ptr(), s=_pointer(s), u=_pointer(u), z=_pointer(z), rank=_pointer(rank),
            dots=_pointer(dots), rows=count, d=unit.d, pitch=unit.matrix.shape[1],
            product_pitch=product.stride(0), shift=rows.start + shift, partner_rows=partner.n, add=accumulate,
            type=TYPES[gradient.dtype], precision=precision_of(unit.matrix.dtype),
        )  # fmt: skip


def precision_of(dtype: torch.dtype) -> int:
    if dtype == torch.float32:
        return _TF32X3 if float32_precision() == "highest" else _TF32
    return _FP16 if dtype == torch.float16 else _BF16


def has_fixed_shift(dtype: torch.dtype, temperature: float) -> bool:
    """Whether one shift does for all rows: cosines are bounded, so exponentials span at most exp(2 / temperature)."""
    return 2 * LOG2E / temperature <= FIXED_RANGE[dtype]


def _shift(dtype: torch.dtype, temperature: float) -> float:
    return LOG2E / temperature - (FP16_LIFT if dtype == torch.float16 else 0.0)


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    chosen: Options,
    *,
    student_grad: bool,
    teacher_grad: bool,
) -> Result:
    """Loss, terms and gradients of a non-empty batch: student, teacher (B, C), target (B,), weight (3,)."""
    module = emulated or compiled.load()[0]
    assert module is not None, "reason() says why"
    kernels = CudaKernels(module, student.device)
    operand = kernels.operand_dtype(torch.promote_types(student.dtype, teacher.dtype))
    if not teacher_grad and latency.takes(student, teacher, chosen, operand):
        return latency.evaluate(kernels, student, teacher, target, weight, chosen, student_grad=student_grad)
    return evaluate(
        kernels, student, teacher, target, weight, chosen, student_grad=student_grad, teacher_grad=teacher_grad
    )
