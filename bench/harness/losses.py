"""The losses that are measured: one entry of `LOSSES` for each, with its flop count, its options and its eager truth.

A new loss is one entry. `Case` finds it by name, and every provider and the gate go through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mcld_kernels
from bench.harness import mcld_chunks, plain
from mcld_kernels import reference

if TYPE_CHECKING:
    from bench.harness.cases import Case

Result = tuple[Tensor, "Tensor | None"]  # the loss () and the student's gradient (B, C); None in forward mode


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss. ``function`` and ``reference``: (student, teacher, target, **options) -> (); the first takes backend.

    ``eager`` computes loss and gradient in eager arithmetic of a dtype; the default is the reference on logits of that
    dtype, an own one reaches batch sizes at which the reference does not fit into memory.
    """

    title: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    options: Callable[[Case], dict[str, Any]]
    flop: Callable[[Case], int]
    eager_bytes: Callable[[Case], int]  # an estimate from above of what an eager step takes beside its inputs
    magnitude: Callable[[Case, Tensor], tuple[float, float]]  # of the parts that cancel in a zero loss, gradient
    terms: tuple[str, ...]
    temperature: float
    is_gemm_bound: bool = True  # otherwise the copy speed is its ceiling
    is_rectangular: bool = False  # the teacher may have more rows than the batch
    eager: Callable[[Case, Tensor, Tensor, Tensor, torch.dtype], Result] | None = None


def autograd(function: Callable[..., Tensor], case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Result:
    """Loss and gradient of a differentiable function by autograd."""
    leaf = student.detach().requires_grad_(case.backward)
    loss = function(leaf, teacher, target)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0] if case.backward else None


def eager(case: Case, student: Tensor, teacher: Tensor, target: Tensor, dtype: torch.dtype) -> Result:
    """The case's loss and gradient in eager arithmetic of ``dtype``, at any batch size."""
    loss = LOSSES[case.loss]
    if loss.eager is not None:
        return loss.eager(case, student, teacher, target, dtype)
    options = loss.options(case)
    function = lambda s, t, y: loss.reference(s, t, y, **options)  # noqa: E731
    return autograd(function, case, student.to(dtype), teacher.to(dtype), target)


def _mcld_flop(case: Case) -> int:
    """2 n m d for the similarities, 2 n m d for the gradient. Instance and sample terms share one matrix."""
    products = 2 if case.backward else 1
    rows = 2 * products * case.batch**2 * case.classes if case.row_terms else 0
    return rows + (2 * products * case.classes**2 * case.batch if case.category else 0)


# (B, B) matrices that the eager reference holds at its peak, by (instance, sample), and (C, C) ones; counted from
# measured peaks at B = 2048 (torch 2.13, CPU), which tests/test_bench_cases.py repeats at a smaller size.
_ROW_MATRICES = {
    (True, False): (2.5, 5.0),
    (False, True): (4.5, 5.0),
    (True, True): (4.5, 6.0),
    (False, False): (0.0, 0.0),
}
_CATEGORY_MATRICES = (2.0, 5.0)


def _mcld_eager_bytes(case: Case) -> int:
    rows = _ROW_MATRICES["instance" in case.terms, "sample" in case.terms]
    return case.matrix_bytes(rows[case.backward], _CATEGORY_MATRICES[case.backward])


def _mcld_soft_eager_bytes(case: Case) -> int:
    """The products of labels, their mask and the matrix of weights come to those of hard labels."""
    return _mcld_eager_bytes(case) + case.matrix_bytes(3, 0)


def _mcld_magnitude(case: Case, student: Tensor) -> tuple[float, float]:
    """Cosines over the temperature, and their gradient by logits whose rows or columns have a norm."""
    loss = gradient = 0.0
    for dim, is_active in ((1, case.row_terms), (0, case.category)):
        if is_active:
            norm = torch.linalg.vector_norm(student.double(), dim=dim)
            inv_norm = torch.where(norm == 0, 0.0, 1 / norm)
            loss += 1 / case.temperature
            gradient += torch.linalg.vector_norm(inv_norm).item() / (case.temperature * len(norm))
    return loss, gradient


def _unit_row_gradient(student: Tensor) -> float:
    """The norm of 1 / (norm of a row), over the rows: a gradient by unit rows of size 1, by the logits."""
    norm = torch.linalg.vector_norm(student.double(), dim=1)
    return torch.linalg.vector_norm(torch.where(norm == 0, 0.0, 1 / norm)).item() / len(norm)


def _ckd(negatives: str, title: str) -> Loss:
    return Loss(
        title=title,
        function=mcld_kernels.ckd_loss,
        reference=reference.ckd_loss,
        options=lambda case: {"temperature": case.temperature, "negatives": negatives},
        # 2 n n d for the similarities and 2 n n d for the gradient; similarities of rows with one another are half.
        flop=lambda case: (
            {"teacher": (2, 4), "student": (1, 3)}[negatives][case.backward] * case.batch**2 * case.classes
        ),
        eager_bytes=lambda case: case.matrix_bytes(0, 0) + _ckd_matrices(case, negatives),
        magnitude=lambda case, student: (
            10 / case.temperature,
            20 / case.temperature * _unit_row_gradient(student),
        ),
        terms=("contrast",),
        temperature=1.0,
    )


def _ckd_matrices(case: Case, negatives: str) -> int:
    """The (B, B) matrices that eager holds at its peak."""
    matrices = {"teacher": (2.0, 4.0), "student": (3.0, 5.0)}[negatives][case.backward]
    return int((8 if case.dtype == "float64" else 4) * matrices * case.batch**2)


def _mlkd_eager_bytes(case: Case) -> int:
    """(B, B) matrices at eager's peak, of which four make one of the 2 B rows."""
    matrices = 30 if case.backward else 25
    return case.matrix_bytes(0, 0) + (8 if case.dtype == "float64" else 4) * matrices * case.batch**2


def _clkd_flop(case: Case) -> int:
    """The products of the correlation, by (C, C) or (B, B) matrices."""
    by_classes = (4 if case.backward else 2) * case.batch * case.classes**2
    by_rows = (10 if case.backward else 6) * case.batch**2 * case.classes
    return min(by_classes, by_rows)


def _clkd_magnitude(case: Case, student: Tensor) -> tuple[float, float]:
    """The squares of both sides, whose difference is small when the student is close to its teacher."""
    student = student.double()
    centred = student - student.mean(0)
    gram, factor = centred.T @ centred, 0.4 / (max(case.classes - 1, 1) ** 2 * case.classes**2)
    loss = 2 * (0.5 / case.classes + 1 / case.batch) + factor * gram.square().sum().item()
    columns = torch.linalg.vector_norm(student, dim=0)
    of_columns = torch.linalg.vector_norm(torch.where(columns == 0, 0.0, 1 / columns)).item() / case.classes
    gradient = 2 * (0.5 / case.classes * _unit_row_gradient(student) + of_columns / case.batch)
    return loss, gradient + 4 * factor * torch.linalg.matrix_norm(centred @ gram).item()


def _queue_options(case: Case) -> dict[str, Any]:
    """The batch's keys are of one class, so that the mask drops all but the own one: negatives are the others alone."""
    theirs = torch.zeros(case.columns, dtype=torch.int64)
    theirs[case.batch :] = 1
    return {"temperature": case.temperature, "mask_same_class": True, "candidate_target": theirs}


def _of_queue(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(s: Tensor, t: Tensor, y: Tensor, candidate_target: Tensor, **options: Any) -> Tensor:
        return function(
            s, t, anchor_target=torch.zeros_like(y), candidate_target=candidate_target.to(y.device), **options
        )

    return loss


def _info_nce(title: str, **changed: Any) -> Loss:
    fields: dict[str, Any] = {
        "title": title,
        "function": lambda s, t, y, **options: mcld_kernels.info_nce(s, t, **options),
        "reference": lambda s, t, y, **options: reference.info_nce(s, t, **options),
        "options": lambda case: {"temperature": case.temperature},
        "flop": lambda case: (4 if case.backward else 2) * case.batch * case.columns * case.classes,
        # Similarities, their softmax and its gradient, unit rows and their gradients.
        "eager_bytes": lambda case: int(
            (8 if case.dtype == "float64" else 4)
            * ((5 if case.backward else 3) * case.batch * case.columns + 4 * (case.batch + case.columns) * case.classes)
        ),
        "magnitude": lambda case, student: (
            1 / case.temperature,
            _unit_row_gradient(student) / case.temperature,
        ),
        "terms": ("contrast",),
        "temperature": 0.1,
        "is_rectangular": True,
    }
    return Loss(**(fields | changed))


def _contrast_with_own(title: str, views: int) -> Loss:
    """MLKD's supervised term alone: the rows of all views with one another, not with themselves."""
    return Loss(
        title=title,
        function=lambda s, t, y, **options: mcld_kernels.mlkd_loss(s, t, _labels(y, views), **options),
        reference=lambda s, t, y, **options: reference.mlkd_loss(s, t, _labels(y, views), **options),
        options=lambda case: {"supervised_temperature": case.temperature, "views": views, "weight": (0, 0, 1)},
        # Similarities are half of a matrix of all rows; the gradient by the first view's is a product with all.
        flop=lambda case: (views**2 + (2 * views if case.backward else 0)) * case.batch**2 * case.classes,
        eager_bytes=lambda case: int(
            (8 if case.dtype == "float64" else 4)
            * ((7 if case.backward else 6) * (views * case.batch) ** 2 + 6 * views * case.batch * case.classes)
        ),
        magnitude=lambda case, student: (1 / case.temperature, 4 / case.temperature * _unit_row_gradient(student)),
        terms=("supervised",),
        temperature=0.1,
    )


def _labels(target: Tensor, views: int) -> Tensor:
    """Of two views of one image each (SimCLR) the image's number; of one view the classes (SupCon)."""
    return target if views == 1 else torch.arange(len(target), device=target.device)


LOSSES = {
    "mcld": Loss(
        title="MCLD",
        function=mcld_kernels.mcld_loss,
        reference=reference.mcld_loss,
        options=lambda case: {"weight": case.weight, "temperature": case.temperature},
        flop=_mcld_flop,
        eager_bytes=_mcld_eager_bytes,
        magnitude=_mcld_magnitude,
        terms=("instance", "sample", "category"),
        temperature=0.1,
        eager=mcld_chunks.loss_and_gradient,
    ),
    "mcld-soft": Loss(
        title="MCLD, soft labels of mixup",
        # Making the labels is part of the step: mixup makes them anew for each batch.
        function=lambda s, t, y, **options: mcld_kernels.mcld_loss(s, t, plain.mixed(y, s.shape[1]), **options),
        reference=lambda s, t, y, **options: reference.mcld_loss(s, t, plain.mixed(y, s.shape[1]), **options),
        options=lambda case: {"temperature": case.temperature},
        flop=_mcld_flop,
        eager_bytes=_mcld_soft_eager_bytes,
        magnitude=_mcld_magnitude,
        terms=("instance", "sample", "category"),
        temperature=0.1,
    ),
    "kd": Loss(
        title="KD (KL divergence)",
        function=lambda s, t, y, **options: mcld_kernels.kd_loss(s, t, **options),
        reference=lambda s, t, y, **options: reference.kd_loss(s, t, **options),
        options=lambda case: {"temperature": case.temperature},
        # Each side: scale, maximum, exp, sum, log, subtract; the divergence: subtract, multiply, add; the gradient: 3.
        flop=lambda case: (18 if case.backward else 15) * case.batch * case.classes,
        eager_bytes=lambda case: case.matrix_bytes(0, 0) * 3,
        magnitude=lambda case, student: (
            case.temperature * torch.linalg.vector_norm(student.double()).item() / case.batch**0.5,
            case.temperature / case.batch**0.5,
        ),
        terms=("divergence",),
        temperature=4.0,
        is_gemm_bound=False,
    ),
    "info_nce": _info_nce("InfoNCE"),
    "moco": _info_nce(
        "InfoNCE of pairs against a queue",
        function=_of_queue(mcld_kernels.info_nce),
        reference=_of_queue(reference.info_nce),
        options=_queue_options,
    ),
    "ckd": _ckd("teacher", "CKD, as released"),
    "ckd-student": _ckd("student", "CKD, negatives among the students"),
    "clkd": Loss(
        title="CLKD",
        function=mcld_kernels.clkd_loss,
        reference=reference.clkd_loss,
        options=lambda case: {},
        flop=_clkd_flop,
        eager_bytes=lambda case: int(
            (8 if case.dtype == "float64" else 4)
            * ((8 if case.backward else 3.5) * case.batch + 2 * case.classes)
            * case.classes
        ),
        magnitude=_clkd_magnitude,
        terms=("instance", "category", "correlation"),
        temperature=1.0,
    ),
    "mlkd": Loss(
        title="MLKD",
        function=mcld_kernels.mlkd_loss,
        reference=reference.mlkd_loss,
        options=lambda case: {"supervised_temperature": case.temperature},
        # Similarities: student and teacher rows with one another are half of a matrix each, the cross ones a whole.
        # The gradient: a product with the student's rows, one with the teacher's.
        flop=lambda case: (8 if case.backward else 4) * case.batch**2 * case.classes,
        eager_bytes=_mlkd_eager_bytes,
        magnitude=lambda case, student: (
            100 / 0.5 + 40 + 1 / case.temperature,
            (200 / 0.5 + 40 + 4 / case.temperature) * _unit_row_gradient(student),
        ),
        terms=("correlation", "alignment", "supervised"),
        temperature=0.07,
    ),
    "simclr": _contrast_with_own("SimCLR's NT-Xent, the second view frozen", views=2),
    "supcon": _contrast_with_own("SupCon of one view", views=1),
}
