"""The correctness gate: a result that is wrong gets no speed.

A provider passes where its loss and gradient differ from the fp64 truth by at most twice the difference of eager
PyTorch at the same dtype and float32 matmul precision. If eager's error is not finite, only the floor applies.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.harness.cases import DTYPES, Case
from bench.harness.losses import LOSSES, Result, eager
from mcld_kernels.calibrate import FACTOR, GRADIENT_FLOOR, LOSS_FLOOR, floor_dtype
from mcld_kernels.options import float32_precision


@dataclass(frozen=True)
class Error:
    """Relative errors: |loss - loss'| / |loss'| and ||grad - grad'|| / ||grad'|| (Frobenius) against the truth."""

    loss: float
    gradient: float | None = None


@dataclass(frozen=True)
class Verdict:
    passed: bool
    error: Error
    allowed: Error

    @property
    def ratio(self) -> float:
        """The larger of both errors as a fraction of what is allowed."""
        ratios = [self.error.loss / self.allowed.loss]
        if self.error.gradient is not None and self.allowed.gradient is not None:
            ratios.append(self.error.gradient / self.allowed.gradient)
        return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)

    def record(self) -> dict[str, object]:
        error, allowed = asdict(self.error), asdict(self.allowed)
        return {"passed": self.passed, "ratio": self.ratio, "error": error, "allowed": allowed}


@dataclass(frozen=True)
class Truth:
    """The exact result, and what its errors are relative to.

    That is its own size, except where it is zero to rounding (a batch of one has a loss and a gradient of zero): then
    it is the size of the parts that cancel in it, since no relative error of a zero exists.
    """

    loss: Tensor
    gradient: Tensor | None
    loss_size: float
    gradient_size: float


def truth(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Truth:
    """Loss and gradient in fp64 of the logits as given (a half logit is exact in fp64)."""
    loss, gradient = eager(case, student, teacher, target, torch.float64)
    loss_parts, gradient_parts = LOSSES[case.loss].magnitude(case, student)

    def size(value: Tensor | None, of_parts: float) -> float:
        own = 0.0 if value is None else torch.linalg.vector_norm(value).item()
        zero = (1e-14 if case.dtype == "float64" else 1e-6) * of_parts
        return (of_parts if own <= zero else own) or 1.0

    return Truth(loss, gradient, size(loss, loss_parts), size(gradient, gradient_parts))


def error(result: Result, exact: Truth) -> Error:
    """The errors of a result; infinity where it is not finite."""

    def relative(value: Tensor, expected: Tensor, size: float) -> float:
        ratio = torch.linalg.vector_norm(value.to(torch.float64) - expected).item() / size
        return math.inf if math.isnan(ratio) else ratio

    loss, gradient = result
    loss_error = relative(loss.detach(), exact.loss, exact.loss_size)
    if exact.gradient is None:
        return Error(loss_error)
    if gradient is None:
        raise ValueError("the case asks for a gradient and the provider returned none")
    if gradient.shape != exact.gradient.shape:
        raise ValueError(f"the gradient has shape {tuple(gradient.shape)}, the logits {tuple(exact.gradient.shape)}")
    return Error(loss_error, relative(gradient, exact.gradient, exact.gradient_size))


def eager_error(case: Case, student: Tensor, teacher: Tensor, target: Tensor, exact: Truth) -> Error:
    """Eager's error at the case's dtype, at any batch size."""
    return error(eager(case, student, teacher, target, case.torch_dtype), exact)


def allowed_error(case: Case, student: Tensor, teacher: Tensor, target: Tensor, exact: Truth, of_eager: Error) -> Error:
    """Twice eager's error, or the floor where that is lower still.

    A float32 matmul precision below "highest" allows operands of fewer bits, whether eager uses them or not: the error
    of eager on logits of that dtype counts as well.
    """
    operands = floor_dtype(case.dtype, float32_precision())
    errors = [of_eager]
    if operands != case.dtype:
        rounded = [x.to(DTYPES[operands]) for x in (student, teacher)]
        errors.append(error(eager(case, *rounded, target, DTYPES[operands]), exact))

    return bar(errors, operands)


def bar(errors: list[Error], operands: str) -> Error:
    """The bar from eager's errors: twice the largest that is finite, or the floor of the operands' dtype."""

    def most(values: list[float], floor: float) -> float:
        return max([FACTOR * value for value in values if math.isfinite(value)] + [floor])

    gradients = [entry.gradient for entry in errors if entry.gradient is not None]
    return Error(
        most([entry.loss for entry in errors], LOSS_FLOOR[operands]),
        most(gradients, GRADIENT_FLOOR[operands]) if gradients else None,
    )


def judge(measured: Error, allowed: Error) -> Verdict:
    """A verdict: passed if both errors are within what is allowed."""
    passed = measured.loss <= allowed.loss
    if allowed.gradient is not None:
        passed = passed and measured.gradient is not None and measured.gradient <= allowed.gradient
    return Verdict(passed, measured, allowed)
