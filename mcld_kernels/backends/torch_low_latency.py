"""MCLD on a CPU where a similarity matrix fits one chunk: whole matrices, in closed form.

Here the number of dispatched operations is the cost, not their memory. The formulas are those of `infonce`, written
for the negatives; one GEMM gives the gradient by the unit rows, because the coefficients of the partners are written
into the matrix of exponentials:

    W_ij = e_ij / (neg_sum_i + e_ii) (j != i),   W_ii = -neg_sum_i / (neg_sum_i + e_ii),   g = weight / (n t) W K

and, for label positives with weight c', g_i gains c' (K_i - mean of the candidates with i's label). Where the teacher's
rows are the anchors, of the instance-wise term alone, they are the columns of the same matrix, as in the category-wise
term.

With the compiled module fp32 logits take csrc/cpu/low_latency.cpp: a small call whole, a larger one with torch's GEMMs
between its steps. Without it, and for fp64, the same steps are torch operations.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import installation
from ..kernels import LossInputs, LossOutputs, Tuning, has_fixed_shift, is_in_memory
from ..options import PLAIN_TYPES, MCLDOptions
from .chunks import CHUNK_MB

# Where one shift serves all rows, similarities stay between -40 and 40: exp needs none at all, and ratios of sums of so
# many exponentials stay inside fp32: exp(80) x 4096 = 2e38.
LARGEST_SIZE = 4096
# Rows and columns up to which csrc/cpu/low_latency.cpp, with matrices, is as fast as csrc/cpu/contrast.cpp; measured.
_LARGEST_MATRIX = 1536
# Multiply-adds of the similarities of columns up to which it is as fast: alone, above so many rows and up to them, and
# beside row terms; measured.
_LARGEST_COLUMNS = {"above": 1 << 25, "alone": 1 << 27, "beside": 1 << 30}
# Multiply-adds of the similarities up to which the compiled module's own GEMMs are as fast as PyTorch's.
_LARGEST_GEMM = {"baseline": 1 << 20, "avx2": 1 << 27, "avx512": 1 << 31}
_SERIAL_ROWS = 64  # over columns vector_norm adds row after row; `sum` adds in parts, with less rounding error
# Of the compiled module.
_FUNCTIONS = "clkd", "contrast", "grad_epilogue", "low_latency", "mlkd", "normalize", "softmax_kl", "teacher_anchors"
_ANCHORS = {"student": 0, "teacher": 1, "self": 2}  # of csrc/cpu/low_latency.h


@dataclass(frozen=True, slots=True, kw_only=True)
class LowLatencyTuning(Tuning):
    low_latency: bool = True  # take this path where it applies
    compiled: bool = True  # use the compiled module where it is built
    compiled_contrast: bool = True  # take the compiled module's contrast where it serves the rows
    compiled_gemm: int | None = None  # the most multiply-adds whose GEMMs the module takes; None: _LARGEST_GEMM
    isa: str | None = None  # the compiled module's instruction set; None: the fastest


def mcld(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for a frozen teacher; None where this path does not apply."""
    if not _applies(inputs, tuning.chunk_bytes):
        return None
    if tuning.compiled and (module := compiled_module()) is not None and has_plain_fp32_memory(inputs):
        n, num_classes = inputs.student.shape
        is_large = max(n, num_classes) > _LARGEST_MATRIX or n * num_classes**2 > _LARGEST_COLUMNS["alone"]
        if is_large and tuning.compiled_contrast and _is_for_contrast(inputs.options, n, num_classes):
            return None
        return partial(_mcld_compiled, module=module, tuning=tuning)
    return None if inputs.options.direction == "self" else _mcld_torch


def has_plain_fp32_memory(inputs: LossInputs) -> bool:
    """True where an address and strides say all about the logits."""
    student, teacher = inputs.student, inputs.teacher
    plain = student.dtype == torch.float32 and type(student) in PLAIN_TYPES
    return plain and teacher.dtype == torch.float32 and type(teacher) in PLAIN_TYPES


def module_for_whole_calls(inputs: LossInputs, tuning: LowLatencyTuning) -> Any:
    """The compiled module, where it may take a call on fp32 logits of a frozen teacher whole; else None."""
    if not tuning.compiled or inputs.student.device.type != "cpu" or inputs.teacher_grad:
        return None
    return compiled_module() if has_plain_fp32_memory(inputs) else None


class WholeCall(NamedTuple):
    """The arguments that every function of a whole call in csrc/cpu takes first, behind its steps, and its results."""

    arguments: tuple[int, ...]
    work: Tensor  # (size,)
    outputs: LossOutputs


def whole_call(inputs: LossInputs, isa: int, size: int, labels: tuple[int, ...] = ()) -> WholeCall:
    """A workspace of ``size`` floats, the results, and the arguments that name them; labels: address and stride."""
    student, teacher = inputs.student, inputs.teacher
    n, num_classes = student.shape
    # new_empty: torch's default device may be another one.
    work, loss, terms = student.new_empty(size), student.new_empty(()), student.new_empty(3)
    gradient = student.new_empty((n, num_classes)) if inputs.student_grad else None
    arguments = (
        isa, torch.get_num_threads(), student.data_ptr(), *student.stride(), teacher.data_ptr(), *teacher.stride(),
        *labels, n, num_classes, work.data_ptr(), 0 if gradient is None else gradient.data_ptr(), loss.data_ptr(),
        terms.data_ptr(),
    )  # fmt: skip
    return WholeCall(arguments, work, LossOutputs(loss=loss, terms=terms, student_grad=gradient, teacher_grad=None))


def labels_of(target: Tensor | None) -> tuple[int, int]:
    """The address and stride of labels for the compiled module, zeros where there are none."""
    return (0, 0) if target is None else (target.data_ptr(), target.stride(0))


def _applies(inputs: LossInputs, chunk_bytes: int) -> bool:
    student, teacher = inputs.student, inputs.teacher
    return (
        student.device.type == "cpu"
        and student.dtype == teacher.dtype
        and student.shape == teacher.shape
        and not inputs.teacher_grad
        and _options_apply(inputs.options, *student.shape, student.dtype, chunk_bytes, inputs.labels_are_classes)
    )


def _is_for_contrast(options: MCLDOptions, n: int, num_classes: int) -> bool:
    """True where csrc/cpu/contrast.h is faster, which keeps no matrix."""
    instance, sample, category = options.active
    if instance or sample:
        if options.direction != "student" or n > _LARGEST_MATRIX:
            return options.direction == "student"
        limit = _LARGEST_COLUMNS["beside"]
    else:
        limit = _LARGEST_COLUMNS["above" if n > _LARGEST_MATRIX else "alone"]
    is_large = num_classes > _LARGEST_MATRIX or n * num_classes**2 > limit
    return category and is_large and has_slices(num_classes, torch.get_num_threads())


@lru_cache(maxsize=256)
def has_slices(columns: int, threads: int) -> bool:
    """True where a contrast of columns has a slice of 16 of them for at least half of the threads."""
    return 2 * -(-columns // 16) >= threads


@lru_cache(maxsize=256)
def _options_apply(
    options: MCLDOptions, n: int, num_classes: int, dtype: torch.dtype, chunk_bytes: int, labels_are_classes: bool
) -> bool:
    instance, sample, category = options.active
    rows = instance or sample
    size = max(n if rows else 0, num_classes if category else 0)
    return (
        dtype in (torch.float32, torch.float64)
        and any(options.active)
        and (options.direction == "student" or not rows or (options.direction in _ANCHORS and not sample))
        and not (instance and options.mask_same_class)
        and not (category and options.present_only)
        and not (instance and sample and options.temperature[0] != options.temperature[1])
        and (not sample or labels_are_classes)
        and size <= LARGEST_SIZE
        and size * size * dtype.itemsize <= chunk_bytes
        and all(
            has_fixed_shift(dtype, temperature)
            for temperature, active in zip(options.temperature, options.active, strict=True)
            if active
        )
    )


def compiled_module() -> Any:
    """The compiled module mcld_kernels._cpu; None without one."""
    return _import()[0]


def unavailable_reason() -> str | None:
    """The reason for which there is no compiled module, and the command that builds it; None where there is one."""
    return _import()[1]


def _import_module() -> tuple[Any, str | None]:
    missing: list[str] = []
    try:
        module = importlib.import_module("mcld_kernels._cpu")
        missing = [name for name in _FUNCTIONS if not hasattr(module, name)]
        if not missing:
            return module, None
        reason = f"the module was built from other sources, without {', '.join(missing)}"
    except ModuleNotFoundError:
        reason = installation.without_cpu_kernels() or "this installation has none"
    except ImportError as error:
        reason = f"the module does not load ({error})"
    reason = f"{reason.rstrip('.')}. To compile them: `{installation.cpu_command()}`"
    if missing:  # an editable checkout that has moved on: its calls would only be slower
        warnings.warn(f"mcld_kernels has no compiled CPU kernels: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason


_import = cache(_import_module)
loaded_module = cache(compiled_module)  # without a call of Python's, for the steps of each contrast


class _Layout(NamedTuple):
    """The workspace of a call, sizes and offsets in floats."""

    size: int
    pitch: int
    row_pitch: int
    student_rows: int
    teacher_rows: int
    student_columns: int
    teacher_columns: int
    similarity: int
    row_product: int
    column_product: int


@lru_cache(maxsize=256)
def _layout(n: int, num_classes: int, sample: bool, category: bool) -> _Layout:
    module = compiled_module()
    return _Layout(**module.layout(n, num_classes, sample, category))


def _takes_gemms(active: tuple[bool, bool, bool], n: int, num_classes: int, tuning: LowLatencyTuning) -> bool:
    """True where the compiled module takes the GEMMs of a call as well."""
    instance, sample, category = active
    products = n * num_classes * (n * (instance or sample) + num_classes * category)
    most = tuning.compiled_gemm
    if most is None:
        most = _LARGEST_GEMM[compiled_module().isas()[isa_index(tuning.isa)]]
    return products <= most


@cache
def isa_index(name: str | None) -> int:
    """The compiled module's index of an instruction set; None: the fastest that this machine runs."""
    names: list[str] = compiled_module().isas()
    return len(names) - 1 if name is None else names.index(name)


def _mcld_compiled(inputs: LossInputs, module: Any, tuning: LowLatencyTuning) -> LossOutputs:
    options = inputs.options
    n, num_classes = inputs.student.shape
    active = options.active
    _, sample, category = active
    layout = _layout(n, num_classes, sample, category)
    call = whole_call(inputs, isa_index(tuning.isa), layout.size, labels_of(inputs.target if sample else None))
    arguments = (*call.arguments, *_constants(options, weights_of(inputs)))
    if _takes_gemms(active, n, num_classes, tuning):
        module.low_latency(module.ALL_STEPS, *arguments)
    else:
        _steps(module, arguments, call.work, layout, inputs)
    return call.outputs


class _Plan(NamedTuple):
    """The arguments of the compiled module that depend on options and shape alone, for a plain call."""

    run: Any
    all_steps: int
    isa: int
    size: int
    constants: tuple[Any, ...]


@lru_cache(maxsize=256)
def _plan(options: MCLDOptions, n: int, num_classes: int) -> _Plan | None:
    """None where the compiled module does not take the call whole, with the default tuning, or reads labels."""
    module = compiled_module()
    tuning = LowLatencyTuning(chunk_bytes=CHUNK_MB["cpu"] << 20)
    instance, sample, category = options.active
    if (
        module is None
        or sample
        or not _takes_gemms(options.active, n, num_classes, tuning)
        or _is_for_contrast(options, n, num_classes)
        or not _options_apply(options, n, num_classes, torch.float32, tuning.chunk_bytes, False)
    ):
        return None
    return _Plan(
        run=module.low_latency,
        all_steps=module.ALL_STEPS,
        isa=isa_index(tuning.isa),
        size=_layout(n, num_classes, sample, category).size,
        constants=_constants(options, options.term_weight),
    )


def plain_call(
    student: Tensor, teacher: Tensor, options: MCLDOptions, with_grad: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Loss and gradient of a call with the default tuning, without terms; None where this path does not apply.

    The logits (n, C), n C > 0, are plain fp32 tensors of the CPU.
    """
    shape = student.shape
    plan = _plan(options, *shape)
    if plan is None or not is_in_memory(student, teacher):
        return None
    run, all_steps, isa, size, constants = plan
    work, loss = student.new_empty(size), student.new_empty(())
    gradient = student.new_empty(shape) if with_grad else None
    run(
        all_steps, isa, torch.get_num_threads(), student.data_ptr(), *student.stride(), teacher.data_ptr(),
        *teacher.stride(), 0, 0, *shape, work.data_ptr(), 0 if gradient is None else gradient.data_ptr(),
        loss.data_ptr(), 0, *constants,
    )  # fmt: skip
    return loss, gradient


def _constants(options: MCLDOptions, weight: tuple[float, ...]) -> tuple[Any, ...]:
    """The last arguments of the compiled module."""
    active = options.active
    temperature = options.temperature[0 if active[0] else 1], options.temperature[2]
    return (*temperature, *weight, *active, _ANCHORS.get(options.direction, 0), options.eps)


def _steps(module: Any, arguments: tuple[Any, ...], work: Tensor, layout: _Layout, inputs: LossInputs) -> None:
    """The steps of a call with GEMMs by torch."""
    n, num_classes = inputs.student.shape
    instance, sample, category = inputs.options.active
    module.low_latency(module.NORMALIZE, *arguments)
    pitch, row_pitch = layout.pitch, layout.row_pitch
    if instance or sample:
        student = work.as_strided((n, num_classes), (pitch, 1), layout.student_rows)
        teacher = work.as_strided((n, num_classes), (pitch, 1), layout.teacher_rows)
        candidates = student if inputs.options.direction == "self" else teacher
        similarity = work.as_strided((n, n), (row_pitch, 1), layout.similarity)
        torch.mm(student, candidates.T, out=similarity)
        module.low_latency(module.ROW_SUMS, *arguments)
        if inputs.student_grad:
            torch.mm(similarity, candidates, out=work.as_strided((n, num_classes), (pitch, 1), layout.row_product))
            module.low_latency(module.ROW_GRADIENT, *arguments)
    if category:
        student = work.as_strided((n, num_classes), (pitch, 1), layout.student_columns)
        teacher = work.as_strided((n, num_classes), (pitch, 1), layout.teacher_columns)
        similarity = work.as_strided((num_classes, num_classes), (pitch, 1), layout.similarity)
        torch.mm(teacher.T, student, out=similarity)
        module.low_latency(module.COLUMN_SUMS, *arguments)
        if inputs.student_grad:
            torch.mm(teacher, similarity, out=work.as_strided((n, num_classes), (pitch, 1), layout.column_product))
    module.low_latency(module.FINISH, *arguments)


def _mcld_torch(inputs: LossInputs) -> LossOutputs:
    options: MCLDOptions = inputs.options
    instance, sample, category = options.active
    weight = weights_of(inputs)
    logits = torch.stack((inputs.student, inputs.teacher))  # (2, n, C)
    row_loss = category_loss = label_gap = grad = None
    if instance or sample:
        unit, inv_norm = _l2_normalize(logits, torch.linalg.vector_norm(logits, dim=2, keepdim=True), options.eps)
        target = inputs.target if sample else None
        temperature = options.temperature[0 if instance else 1]
        coefficients = (weight[0] if instance else 0.0, weight[1] if sample else 0.0)
        if options.direction == "teacher":
            row_loss, grad = _teacher_rows(unit, inv_norm, temperature, weight[0], inputs.student_grad)
        else:
            row_loss, label_gap, grad = _rows(unit, inv_norm, target, temperature, coefficients, inputs.student_grad)
    if category:
        if logits.shape[1] <= _SERIAL_ROWS:
            norm = torch.linalg.vector_norm(logits, dim=1, keepdim=True)
        else:
            norm = logits.square().sum(1, keepdim=True).sqrt_()
        unit, inv_norm = _l2_normalize(logits, norm, options.eps)
        category_loss, grad = _columns(unit, inv_norm, options.temperature[2], weight[2], grad, inputs.student_grad)
    sample_loss = None if row_loss is None or label_gap is None else row_loss + label_gap
    parts = (row_loss if instance else None, sample_loss, category_loss)
    terms = torch.stack([logits.new_zeros(()) if part is None else part for part in parts])
    loss = terms.sum() if weight == (1.0, 1.0, 1.0) else torch.dot(terms, terms.new_tensor(weight))
    return LossOutputs(loss=loss, terms=terms, student_grad=grad, teacher_grad=None)


def weights_of(inputs: LossInputs) -> tuple[float, ...]:
    """The factors of the terms in the loss, which are on the CPU."""
    term_weight: tuple[float, float, float] = inputs.options.term_weight
    if inputs.weight is None:
        return term_weight
    return tuple(w * factor for w, factor in zip(inputs.weight.tolist(), term_weight, strict=True))


def _l2_normalize(logits: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Unit vectors of both sides (2, n, C) and the student's 1 / norm, broadcastable; ``norm`` is overwritten."""
    norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
    inv_norm = torch.threshold_(norm, eps, torch.inf).reciprocal_()
    return logits * inv_norm, inv_norm[0]


def _rows(
    unit: Tensor,
    inv_norm: Tensor,
    target: Tensor | None,
    temperature: float,
    weight: tuple[float, float],
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The instance-wise term, what the sample-wise term has above it, and the gradient (n, C) by the student.

    target: (n,) for the sample-wise term. weight: of the two terms.
    """
    student, teacher = unit.unbind()
    n = student.shape[0]
    e = torch.addmm(inv_norm, student, teacher.T, beta=0, alpha=1 / temperature)  # (n, n)
    diagonal = e.diagonal()
    label_gap = label_pull = class_means = None
    if target is not None:
        if _by_classes(*student.shape):
            class_means = _class_means(teacher, target)  # (n, C)
            label_gap = (diagonal.sum() - (student * class_means).sum() / temperature).div_(n)
        else:
            same = (target.unsqueeze(1) == target).to(e.dtype)
            # The pull of label positives less that of the partner: row i averages the rows of its label, minus row i.
            label_pull = same.div_(same.sum(1, keepdim=True))  # (n, n)
            label_pull.diagonal().sub_(1)
            label_gap = (e * label_pull).sum().div_(-n)
    positive = diagonal.exp()
    e.exp_()
    diagonal.zero_()
    neg_sum = e.sum(1)
    loss = (neg_sum / positive).log1p_().mean()
    coefficient = weight[0] + weight[1]
    if not with_grad:
        return loss, label_gap, None
    label_part = weight[1] / coefficient if coefficient > 0 else 0.0
    total = positive.add_(neg_sum)
    e.div_(total.unsqueeze(1))
    diagonal.addcdiv_(neg_sum, total, value=-1)
    if label_pull is not None:
        e.sub_(label_pull, alpha=label_part)
    if class_means is not None:
        diagonal.add_(label_part)
    coefficient /= n * temperature
    gradient = torch.addmm(inv_norm, e, teacher, beta=0, alpha=coefficient)
    if class_means is not None:
        gradient.sub_(class_means, alpha=label_part * coefficient)
    # Unit rows in the accumulator dtype have x . x = 1 up to rounding.
    gradient.addcmul_(student, (gradient * student).sum(1, keepdim=True), value=-1)
    return loss, label_gap, gradient.mul_(inv_norm)


def _teacher_rows(
    unit: Tensor, inv_norm: Tensor, temperature: float, weight: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The instance-wise term of teacher anchors and its gradient (n, C) by the student."""
    student, teacher = unit.unbind()
    n = student.shape[0]
    e = torch.addmm(inv_norm, student, teacher.T, beta=0, alpha=1 / temperature)  # (n, n), anchors are columns
    loss = _column_anchors(e, with_grad)
    if not with_grad:
        return loss, None
    gradient = torch.addmm(inv_norm, e, teacher, beta=0, alpha=weight / (n * temperature))
    gradient.addcmul_(student, (gradient * student).sum(1, keepdim=True), value=-1)
    return loss, gradient.mul_(inv_norm)


def _column_anchors(e: Tensor, with_grad: bool) -> Tensor:
    """The mean loss of the anchors, columns of the similarities ``e``, which become W of the module's text."""
    diagonal = e.diagonal()
    positive = diagonal.exp()
    e.exp_()
    diagonal.zero_()
    neg_sum = e.sum(0)
    loss = (neg_sum / positive).log1p_().mean()
    if with_grad:
        total = positive.add_(neg_sum)
        e.div_(total)
        diagonal.addcdiv_(neg_sum, total, value=-1)
    return loss


def _by_classes(n: int, num_classes: int) -> bool:
    """True where two GEMMs with one-hot labels, n x C x C, cost less than some passes over an n x n matrix."""
    return n > 256 and num_classes * num_classes <= 16 * n


def _class_means(rows: Tensor, target: Tensor) -> Tensor:
    """The mean of the rows with each row's label: (n, C)."""
    one_hot = (target.unsqueeze(1) == torch.arange(rows.shape[1], device=rows.device)).to(rows.dtype)
    sums = torch.mm(one_hot.T, rows)
    return sums.div_(one_hot.sum(0).clamp_(min=1).unsqueeze(1))[target]


def _columns(
    unit: Tensor, inv_norm: Tensor, temperature: float, weight: float, row_grad: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The category-wise term; its gradient (n, C) by the student is added to ``row_grad``, in place."""
    student, teacher = unit.unbind()
    num_classes = student.shape[1]
    # Anchors are columns here: their factors broadcast along rows.
    e = torch.addmm(inv_norm, teacher.T, student, beta=0, alpha=1 / temperature)  # (C, C)
    loss = _column_anchors(e, with_grad)
    if not with_grad:
        return loss, None
    gradient = torch.addmm(inv_norm, teacher, e, beta=0, alpha=weight / (num_classes * temperature))
    gradient.addcmul_(student, (gradient * student).sum(0), value=-1)
    return loss, gradient.mul_(inv_norm) if row_grad is None else row_grad.addcmul_(gradient, inv_norm)
