"""A contrast with frozen candidates on a CPU, fp32, by the compiled module: loss and gradient in one pass.

csrc/cpu/contrast.h: a thread takes a slice of anchors through all candidates, block after block, and keeps the
exponentials of one block in its cache, where the chunks of `torch` write and read each exponential several times. It
needs a fixed shift, and rows whose numbers follow each other, or without labels rows that lie by columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..info_nce_options import InfoNCEOptions, needs_labels
from ..kernels import AnchorPassArgs, ContrastArgs, LossInputs, LossOutputs, MeanOf
from ..options import PLAIN_TYPES, check_positive
from .torch_low_latency import LowLatencyTuning, has_plain_fp32_memory, has_slices, isa_index, loaded_module

# exp of it is a number of fp32, and the compiled exponential reaches so far.
_LARGEST_EXPONENT = 87.0
PART = 1 << 35  # multiply-adds of a thread's similarities, about a second: then Python hears signals
_NO_KEY = -(2**63)  # no row has it


@lru_cache(maxsize=256)
def _has_range(temperature: float, candidates: int) -> bool:
    """True where fp32 has a sum of so many exponentials, over any one of them: no shift is needed."""
    return 2 / temperature + math.log(candidates) <= _LARGEST_EXPONENT


def anchor_pass(
    args: ContrastArgs, out: Tensor | None, mean_of: MeanOf | None, tuning: LowLatencyTuning
) -> Callable[[AnchorPassArgs], None] | None:
    """As `KernelSet.anchor_pass`; None where the module does not serve these rows."""
    if not (tuning.compiled and tuning.compiled_contrast):
        return None
    anchors, candidates = args.anchors, args.candidates
    for x in (out, anchors.rows, candidates.rows, anchors.inv_norm):
        if x is None:
            continue
        if x.dtype != torch.float32 or not x.is_cpu or type(x) not in PLAIN_TYPES:
            return None
    matrices = [x for x in (out, anchors.rows, candidates.rows) if x is not None]
    by_columns = not all(x.stride(1) == 1 or x.shape[1] == 1 for x in matrices)
    if by_columns:
        if args.mask is not None or mean_of is not None or not has_slices(anchors.n, torch.get_num_threads()):
            return None
        if not all(x.stride(0) == 1 or x.shape[0] == 1 for x in matrices):
            return None
    if args.offset < 0 or args.offset + anchors.n > candidates.n:
        return None
    if not args.is_bounded or not _has_range(args.temperature, candidates.n):
        return None
    module = loaded_module()
    return None if module is None else partial(_anchor_pass, args, module, isa_index(tuning.isa), by_columns)


def _anchor_pass(args: ContrastArgs, module: Any, isa: int, by_columns: bool, whole: AnchorPassArgs) -> None:
    anchors, candidates, out = args.anchors, args.candidates, whole.out
    keys, of_means = (0, 0, 0, 0), (0, 0, 0)
    if args.mask is not None:
        own, theirs = args.mask
        keys = own.data_ptr(), own.stride(0), theirs.data_ptr(), theirs.stride(0)
    if whole.class_means is not None and whole.class_index is not None:
        means, index = whole.class_means.contiguous(), whole.class_index.contiguous()
        of_means = means.data_ptr(), means.stride(0), index.data_ptr()
    counted = [None if weight.counted is None else weight.counted.contiguous() for weight in whole.weights]
    terms = []
    for weight, counts, values in zip(whole.weights, counted, whole.per_anchor, strict=True):
        scale = weight.constant if weight.factor is None else weight.constant * float(weight.factor)
        of_gradient = scale * weight.term_weight * (1.0 if weight.weight is None else float(weight.weight))
        by_label = weight.positives == "label"
        terms.append((values.data_ptr(), 0 if counts is None else counts.data_ptr(), scale, of_gradient, by_label))
    threads, shape = torch.get_num_threads(), (anchors.n, candidates.n, anchors.d)
    work = anchors.rows.new_empty(module.contrast_size(*shape, by_columns, threads))
    module.contrast(
        isa, threads, anchors.rows.data_ptr(), *anchors.rows.stride(), candidates.rows.data_ptr(),
        *candidates.rows.stride(), anchors.inv_norm.data_ptr(), *keys, _NO_KEY, *of_means, *shape, args.offset,
        work.data_ptr(), 0, *((0, 0, 0) if out is None else (out.data_ptr(), *out.stride())), whole.accumulate, 0,
        args.temperature, 0.0, by_columns, PART, *terms,
    )  # fmt: skip


def info_nce(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function of an `info_nce` with diagonal positives on a CPU: frozen candidates, good hard labels.

    None where the module does not serve it.
    """
    options: InfoNCEOptions = inputs.options
    if (
        not (tuning.compiled and tuning.compiled_contrast)
        or not has_plain_fp32_memory(inputs)
        or not options.normalize
        or options.positives != "diagonal"
        or inputs.extra["anchor_weight"] is not None
        or (module := loaded_module()) is None
    ):
        return None
    temperature = options.temperature
    if inputs.weight is not None:
        temperature = check_positive("temperature", float(inputs.weight))
    if not _has_range(temperature, inputs.teacher.shape[0]):
        return None
    return partial(_info_nce, temperature=temperature, module=module, isa=isa_index(tuning.isa))


def _info_nce(inputs: LossInputs, temperature: float, module: Any, isa: int) -> LossOutputs:
    options: InfoNCEOptions = inputs.options
    anchors, candidates, (n, d) = inputs.student, inputs.teacher, inputs.student.shape
    keys = (0, 0, 0, 0)
    if needs_labels(options):
        target, theirs = inputs.target, inputs.extra["candidate_target"]
        assert target is not None
        theirs = target if theirs is None else theirs
        keys = target.data_ptr(), target.stride(0), theirs.data_ptr(), theirs.stride(0)
    by_anchor = options.reduction == "none"
    # new_empty: torch's default device may be another one.
    values, loss = anchors.new_empty(n), None if by_anchor else anchors.new_empty(())
    gradient = anchors.new_empty((n, d)) if inputs.student_grad else None
    by_temperature = anchors.new_empty(n) if options.temperature_grad else None
    scale = 1 / n if options.reduction == "mean" else 1.0
    threads, shape = torch.get_num_threads(), (n, candidates.shape[0], d)
    work = anchors.new_empty(module.contrast_size(*shape, False, threads))
    module.contrast(
        isa, threads, anchors.data_ptr(), *anchors.stride(), candidates.data_ptr(), *candidates.stride(), 0, *keys,
        options.ignore_index, 0, 0, 0, *shape, options.offset, work.data_ptr(), 0 if loss is None else loss.data_ptr(),
        0 if gradient is None else gradient.data_ptr(), d, 1, False,
        0 if by_temperature is None else by_temperature.data_ptr(), temperature, options.eps, False, PART,
        (values.data_ptr(), 0, scale, scale, False),
    )  # fmt: skip
    result = values if loss is None else loss
    if by_temperature is None:
        by_temperature = torch.zeros_like(result)
    elif not by_anchor:
        by_temperature = by_temperature.sum()
    return LossOutputs(loss=result, terms=by_temperature, student_grad=gradient, teacher_grad=None)
