"""CKD on a CPU where two similarity matrices fit one chunk: whole matrices, in closed form.

As `torch_low_latency` for MCLD: the number of dispatched operations is the cost. Both forms of the loss are the
instance-wise term of MCLD, with teacher anchors or with student rows on both sides: with the compiled module fp32
logits take csrc/cpu/low_latency.cpp. Without it the operations here are fewer than MCLD's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..family_options import CKDOptions, ckd_as_mcld
from ..kernels import LossInputs, LossOutputs, has_fixed_shift
from . import torch_teacher_anchors
from .torch_low_latency import LARGEST_SIZE, LowLatencyTuning, compiled_module, mcld


def ckd(inputs: LossInputs, tuning: LowLatencyTuning) -> Callable[[LossInputs], LossOutputs] | None:
    """The function for a frozen teacher; None where this path does not apply."""
    n, dtype = inputs.student.shape[0], inputs.student.dtype
    is_small = n <= LARGEST_SIZE and 2 * n * n * dtype.itemsize <= tuning.chunk_bytes
    if (
        inputs.student.device.type != "cpu"
        or dtype != inputs.teacher.dtype
        or dtype not in (torch.float32, torch.float64)
        or inputs.teacher_grad
        or not has_fixed_shift(dtype, inputs.options.temperature)
        or not (is_small or dtype == torch.float32)
    ):
        return None
    if tuning.compiled and dtype == torch.float32 and compiled_module() is not None:
        weight = None if inputs.weight is None else inputs.weight.expand(3)
        as_mcld = dataclasses.replace(inputs, target=None, weight=weight, options=ckd_as_mcld(inputs.options))
        path = mcld if is_small else torch_teacher_anchors.mcld
        if (function := path(as_mcld, tuning)) is not None:
            return lambda _: _with_one_term(function(as_mcld))
    return _ckd if is_small else None


def _with_one_term(outputs: LossOutputs) -> LossOutputs:
    return dataclasses.replace(outputs, terms=outputs.terms[:1])


def _ckd(inputs: LossInputs) -> LossOutputs:
    """Loss, term and gradient. The gradient by the unit rows is one product, W K, with the partners' coefficients
    written into the diagonal of W where the partner is a candidate."""
    options: CKDOptions = inputs.options
    n, tau = inputs.student.shape[0], options.temperature
    logits = torch.stack((inputs.student, inputs.teacher))  # (2, n, C)
    norm = torch.linalg.vector_norm(logits, dim=2, keepdim=True)
    norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
    inv_norm = torch.threshold_(norm, options.eps, torch.inf).reciprocal_()
    logits.mul_(inv_norm)
    student, teacher = logits.unbind()
    by_teacher = options.negatives == "teacher"
    e = torch.addmm(norm[0], teacher if by_teacher else student, student.T, beta=0, alpha=1 / tau)  # (anchors, n)
    diagonal = e.diagonal()
    positive = diagonal.exp() if by_teacher else (student * teacher).sum(1).div_(tau).exp_()
    e.exp_()
    diagonal.zero_()
    neg_sum = e.sum(1)
    term = (neg_sum / positive).log1p_().mean()
    weight = options.term_weight if inputs.weight is None else inputs.weight.item() * options.term_weight
    gradient = None
    if inputs.student_grad:
        inv_total = positive.add_(neg_sum).reciprocal_()
        share = neg_sum.mul_(inv_total)  # 1 - the probability of the positive
        scale = weight / (n * tau)
        if by_teacher:
            e.mul_(inv_total.unsqueeze(1))
            torch.neg(share, out=diagonal)
            gradient = torch.addmm(norm[0], e.T, teacher, beta=0, alpha=scale)
        else:
            e.mul_(inv_total.unsqueeze(1) + inv_total)
            gradient = torch.addmm(teacher * share.unsqueeze(1), e, student, beta=-scale, alpha=scale)
        # Unit rows in the accumulator dtype have x . x = 1 up to rounding.
        gradient.addcmul_(student, (gradient * student).sum(1, keepdim=True), value=-1)
        gradient.mul_(inv_norm[0])
    return LossOutputs(loss=term * weight, terms=term.reshape(1), student_grad=gradient, teacher_grad=None)
