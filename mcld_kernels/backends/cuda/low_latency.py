"""The low-latency path of the "cuda" backend: five launches for loss and gradient, where launches take the time.

It holds for at most 1024 rows and classes and temperatures at which one shift does for all rows. Teacher anchors, alone
or with the student's, take a sixth launch, and have no range in fp16; everything else goes through `pipeline`.
csrc/portable/small.cuh has the steps. No GPU has run it yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import Options
from ..pipeline import Call, Result, gradient_dtype
from . import common, configs
from .common import Launcher


def takes(call: Call, operand: torch.dtype) -> bool:
    """Whether the path can do what is asked."""
    chosen = call.chosen
    fixed = all(
        common.has_fixed_shift(operand, temperature)
        for temperature, active in zip(chosen.temperature, chosen.active, strict=True)
        if active
    )
    return (
        not call.teacher_grad
        and max(call.student.shape) <= configs.LATENCY_LARGEST
        and call.student.shape == call.teacher.shape
        and call.student.dtype == call.teacher.dtype
        and any(chosen.active)
        and not (_by_teacher(chosen) and operand == torch.float16)
        and fixed
    )


def _by_teacher(chosen: Options) -> bool:
    """Whether teacher rows are anchors."""
    return chosen.direction != "student" and (chosen.active[0] or chosen.active[1])


def evaluate(launch: Launcher, call: Call, operand: torch.dtype) -> Result:
    """As `pipeline.evaluate`. operand: the dtype of the products' operands."""
    student, teacher, target, weight, chosen, student_grad = call[:6]
    batch, classes = student.shape
    make = _Maker(student, operand)
    labelled = target is not None and any(chosen.label_terms)
    matrices = [_matrix(make, batch, classes)] if chosen.active[0] or chosen.active[1] else []
    groups = _groups(chosen)
    problems = [_problem(make, matrices[0], group, chosen, student_grad) for group in groups]
    if chosen.active[2]:
        matrices.append(_matrix(make, classes, batch))
        problems.append(_problem(make, matrices[-1], (2,), chosen, student_grad))
    result_dtype = gradient_dtype(student.dtype)
    gradient = torch.empty(batch, classes, dtype=result_dtype, device=student.device) if student_grad else None
    loss, terms = make.floats(), make.floats(3)
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    target = target.contiguous() if target is not None and labelled else None
    launch(
        "small",
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        student_strides=student.stride(),
        teacher_strides=teacher.stride(),
        target=0 if target is None else target.data_ptr(),
        ignore_index=chosen.ignore_index,
        weights=0 if weight is None else weight.data_ptr(),
        scale=chosen.scale,
        batch=batch,
        classes=classes,
        eps=chosen.eps,
        present_only=chosen.present_only and chosen.active[2],
        any_mask=chosen.mask_same_class,
        problems=problems,
        same=make.pointer(torch.empty(batch, dtype=torch.int64, device=student.device)) if labelled else 0,
        facts=make.pointer(make.floats(2)) if labelled else 0,
        counts=make.pointer(make.floats(classes)) if labelled else 0,
        means=make.workspace(classes, common.pitch_of(classes)) if chosen.active[1] else 0,
        loss=loss.data_ptr(),
        terms=terms.data_ptr(),
        gradient=0 if gradient is None else gradient.data_ptr(),
        type=common.TYPES[student.dtype],
        gradient_type=common.TYPES[result_dtype],
        precision=common.precision_of(operand),
    )
    return Result(loss, terms, gradient, None)


class _Maker:
    """Makes workspaces, and holds them until the launches are on the stream."""

    def __init__(self, like: Tensor, operand: torch.dtype):
        self._device, self._operand = like.device, operand
        self._held: list[Tensor] = []

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def pointer(self, tensor: Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()

    def workspace(self, *shape: int) -> int:
        return self.pointer(self.floats(*shape))

    def operand(self, *shape: int) -> int:
        return self.pointer(torch.empty(shape, dtype=self._operand, device=self._device))


def _matrix(make: _Maker, n: int, d: int) -> dict[str, Any]:
    """The operands of one side pair, which problems of two temperatures share."""
    padded, pitch = common.padded_rows(n), common.pitch_of(d)
    return {
        "a": make.operand(padded, pitch),
        "k": make.operand(padded, pitch),
        "inverse_a": make.workspace(n),
        "inverse_k": make.workspace(n),
        "n": n,
        "d": d,
        "pitch": pitch,
    }


def _groups(chosen: Options) -> list[tuple[int, ...]]:
    """The row terms by the similarity matrix that they share."""
    instance, sample, _ = chosen.active
    if instance and sample and not chosen.mask_same_class and chosen.temperature[0] == chosen.temperature[1]:
        return [(0, 1)]
    return [(term,) for term, active in enumerate((instance, sample)) if active]


def _problem(
    make: _Maker, matrix: dict[str, Any], group: tuple[int, ...], chosen: Options, wanted: bool
) -> dict[str, Any]:
    n, padded = matrix["n"], common.padded_rows(matrix["n"])
    columns = group == (2,)
    by_student, by_teacher = columns or chosen.direction != "teacher", not columns and _by_teacher(chosen)
    return {
        **matrix,
        "e": make.operand(padded, padded) if wanted else 0,
        "row_sums": make.workspace(padded // 64, padded),
        "column_sums": make.workspace(padded // 64, padded) if by_teacher else 0,
        "product": make.workspace(padded, matrix["pitch"]) if wanted and by_student else 0,
        "weighted": make.operand(padded, matrix["pitch"]) if wanted and by_teacher else 0,
        "back": make.workspace(padded, matrix["pitch"]) if wanted and by_teacher else 0,
        **{name: make.workspace(n) for name in ("s", "u", "z", "dots")},
        "values": make.workspace(3, n),
        "inverse_temperature": 1 / chosen.temperature[group[0]],
        "terms": [term in group for term in range(3)],
        "masked": group == (0,) and chosen.mask_same_class,
        "columns": columns,
        "by_student": by_student,
    }
