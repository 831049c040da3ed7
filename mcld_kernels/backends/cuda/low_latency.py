"""The low-latency path of the "cuda" backend: five launches for loss and gradient, where launches take the time.

Teacher anchors, alone or with the student's, take a sixth launch, and have no range in fp16. The steps are in
csrc/portable/low_latency.cuh.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import LossInputs, LossOutputs, has_fixed_shift
from ...options import MCLDOptions, grad_dtype, label_terms
from .launcher import Launcher


def is_supported(inputs: LossInputs, operand_dtype: torch.dtype, limit: int) -> bool:
    """True if the path can compute these inputs: at most ``limit`` rows and classes, one shift for all rows."""
    options: MCLDOptions = inputs.options
    return (
        not inputs.teacher_grad
        and max(inputs.student.shape) <= limit
        and inputs.student.shape == inputs.teacher.shape
        and inputs.student.dtype == inputs.teacher.dtype
        and any(options.active)
        and not (_has_teacher_anchors(options) and operand_dtype == torch.float16)
        and all(
            has_fixed_shift(operand_dtype, temperature)
            for temperature, active in zip(options.temperature, options.active, strict=True)
            if active
        )
    )


def evaluate(inputs: LossInputs, launch: Launcher, operand_dtype: torch.dtype, dependent: bool) -> LossOutputs:
    """Loss, terms and the gradient by the student. dependent: launches may begin while the one before ends."""
    student, teacher, weight = inputs.student, inputs.teacher, inputs.weight
    options: MCLDOptions = inputs.options
    batch, num_classes = student.shape
    workspace = _Workspace(launch, operand_dtype)
    matrices = _matrices(workspace, batch, num_classes, options, inputs.student_grad)
    labelled = inputs.target is not None and any(label_terms(options))
    target = inputs.target.contiguous() if inputs.target is not None and labelled else None
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    gradient_dtype = grad_dtype(student.dtype)
    gradient = None
    if inputs.student_grad:
        gradient = torch.empty(batch, num_classes, dtype=gradient_dtype, device=student.device)
    loss, terms = launch.empty(), launch.empty(3)
    launch(
        "low_latency",
        student=student.data_ptr(), teacher=teacher.data_ptr(), student_strides=student.stride(),
        teacher_strides=teacher.stride(), target=target, ignore_index=options.ignore_index, weight=weight,
        term_weight=options.term_weight, batch=batch, num_classes=num_classes, eps=options.eps,
        present_only=options.present_only and options.active[2], mask_same_class=options.mask_same_class,
        dependent=dependent, matrices=matrices, key=workspace.int64(batch) if labelled else 0,
        num_valid=workspace.float32() if labelled else 0, poison=workspace.float32() if labelled else 0,
        counts=workspace.float32(num_classes) if labelled else 0,
        class_means=workspace.float32(num_classes, launch.pitch(num_classes)) if options.active[1] else 0,
        loss=loss, terms=terms, gradient=gradient, type=launch.type(student.dtype),
        gradient_type=launch.type(gradient_dtype), precision=launch.precision(operand_dtype),
    )  # fmt: skip
    return LossOutputs(loss=loss, terms=terms, student_grad=gradient, teacher_grad=None)


class _Workspace:
    """Makes workspaces and gives their addresses; holds them until the launches are on the stream."""

    def __init__(self, launch: Launcher, operand_dtype: torch.dtype):
        self.launch, self._operand_dtype = launch, operand_dtype
        self._tensors: list[Tensor] = []

    def float32(self, *shape: int) -> int:
        return self._make(shape, torch.float32)

    def int64(self, *shape: int) -> int:
        return self._make(shape, torch.int64)

    def operand(self, *shape: int) -> int:
        return self._make(shape, self._operand_dtype)

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        self._tensors.append(torch.empty(shape, dtype=dtype, device=self.launch.device))
        return self._tensors[-1].data_ptr()


def _has_teacher_anchors(options: MCLDOptions) -> bool:
    return options.direction != "student" and (options.active[0] or options.active[1])


def _matrices(
    workspace: _Workspace, batch: int, num_classes: int, options: MCLDOptions, needs_grad: bool
) -> list[dict[str, Any]]:
    """The similarity matrices of rows (by temperature and mask) and of columns, as the fields of `LowLatencyMatrix`."""
    matrices = []
    groups = _row_terms_by_matrix(options)
    if groups:
        operands = _operands(workspace, batch, num_classes)
        matrices += [_matrix(workspace, operands, group, options, needs_grad) for group in groups]
    if options.active[2]:
        matrices.append(_matrix(workspace, _operands(workspace, num_classes, batch), (2,), options, needs_grad))
    return matrices


def _row_terms_by_matrix(options: MCLDOptions) -> list[tuple[int, ...]]:
    """The row terms, grouped by the similarity matrix that they share."""
    instance, sample, _ = options.active
    if instance and sample and not options.mask_same_class and options.temperature[0] == options.temperature[1]:
        return [(0, 1)]
    return [(term,) for term, active in enumerate((instance, sample)) if active]


def _operands(workspace: _Workspace, n: int, d: int) -> dict[str, int]:
    """The operands of both sides, which matrices of two temperatures share."""
    padded, pitch = workspace.launch.padded_rows(n), workspace.launch.pitch(d)
    return {
        "student": workspace.operand(padded, pitch),
        "teacher": workspace.operand(padded, pitch),
        "student_inv_norm": workspace.float32(n),
        "teacher_inv_norm": workspace.float32(n),
        "n": n,
        "d": d,
        "pitch": pitch,
    }


def _matrix(
    workspace: _Workspace, operands: dict[str, int], group: tuple[int, ...], options: MCLDOptions, needs_grad: bool
) -> dict[str, Any]:
    n, pitch = operands["n"], operands["pitch"]
    padded = workspace.launch.padded_rows(n)
    tiles = padded // workspace.launch.constants["low_latency_tile"]
    columns = group == (2,)
    student_anchors = columns or options.direction != "teacher"
    teacher_anchors = not columns and _has_teacher_anchors(options)
    return {
        **operands,
        "exponentials": workspace.operand(padded, padded) if needs_grad else 0,
        "row_sums": workspace.float32(tiles, padded),
        "column_sums": workspace.float32(tiles, padded) if teacher_anchors else 0,
        "product": workspace.float32(padded, pitch) if needs_grad and student_anchors else 0,
        "weighted_teacher": workspace.operand(padded, pitch) if needs_grad and teacher_anchors else 0,
        "weighted_product": workspace.float32(padded, pitch) if needs_grad and teacher_anchors else 0,
        "product_coef": workspace.float32(n),
        "partner_coef": workspace.float32(n),
        "class_mean_coef": workspace.float32(n),
        "projection": workspace.float32(n),
        "per_anchor": workspace.float32(3, n),
        "inv_temperature": 1 / options.temperature[group[0]],
        "terms": [term in group for term in range(3)],
        "masked": group == (0,) and options.mask_same_class,
        "columns": columns,
        "student_anchors": student_anchors,
    }
