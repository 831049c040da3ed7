"""What a call asks for: the options shared by every backend, and every check of an argument, in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

TERMS = ("instance", "sample", "category")
DIRECTIONS = ("student", "teacher", "symmetric")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MCLDTerms(NamedTuple):
    """The loss and its three parts, each of shape () and of the loss's dtype.

    ``loss`` carries the gradient; ``instance``, ``sample`` and ``category`` are unweighted and detached, for logging.
    A term that is not computed (weight 0) reads 0.
    """

    loss: Tensor
    instance: Tensor
    sample: Tensor
    category: Tensor


class Options(NamedTuple):
    """A call's options after the checks: plain values, the same for every backend."""

    temperature: tuple[float, float, float]
    scale: tuple[float, float, float]  # weights known to Python; 0 removes the term and its cost
    direction: str
    mask_same_class: bool
    present_only: bool
    ignore_index: int
    eps: float

    @property
    def active(self) -> tuple[bool, bool, bool]:
        return self.scale[0] != 0, self.scale[1] != 0, self.scale[2] != 0

    @property
    def label_terms(self) -> tuple[bool, bool, bool]:
        """Which terms are computed and read the labels."""
        instance, sample, category = self.active
        return instance and self.mask_same_class, sample, category and self.present_only


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, sums and the loss: fp64 for fp64 logits, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float32_precision() -> str:
    """torch's float32 matmul precision: "highest", "high" or "medium"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # Settings of one backend, newer than this one, have been used, and may differ from it.
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def options(
    *,
    temperature: float | Sequence[float],
    weight: Sequence[float] | Tensor,
    direction: str,
    mask_same_class: bool,
    present_only: bool,
    ignore_index: int,
    eps: float,
    process_group: Any = None,
) -> tuple[Options, Tensor | None]:
    """Check everything that does not depend on the logits. Returns the options and the weight tensor, if one came."""
    if process_group is not None:
        raise NotImplementedError(
            "process_group: the loss over a global batch is not implemented yet; pass process_group=None"
        )
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(map(repr, DIRECTIONS))}; got {direction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int; got {type(ignore_index).__name__}")
    if not is_number(eps) or not math.isfinite(eps) or eps < 0:
        raise ValueError(f"eps must be a finite number >= 0; got {eps!r}")
    scale, tensor = _weight(weight)
    chosen = Options(
        _temperature(temperature),
        scale,
        direction,
        _flag("mask_same_class", mask_same_class),
        _flag("present_only", present_only),
        ignore_index,
        float(eps),
    )
    return chosen, tensor


def check(student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None, chosen: Options) -> None:
    """Check the tensors of a call against its options. Reads no value of a tensor that is not on the CPU."""
    for name, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a tensor of logits (batch, classes); got {type(logits).__name__}")
        if logits.dtype not in DTYPES:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name} must be of a floating dtype ({wanted}); got {logits.dtype}")
        if logits.ndim != 2:
            raise ValueError(f"{name} must have shape (batch, classes); got {tuple(logits.shape)}")
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must have the same shape (batch, classes); "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device; got {student.device} and {teacher.device}")
    if student.shape[1] == 0:
        raise ValueError(f"student and teacher need at least one class; got shape {tuple(student.shape)}")
    if weight is not None and weight.device != student.device:
        raise ValueError(f"weight must be on the logits' device {student.device}; got {weight.device}")
    if target is None:
        _missing(chosen)
    else:
        _target(target, student, chosen)


def is_number(value: Any) -> bool:
    """Whether ``value`` is one real number (of Python or numpy), not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _temperature(value: Any) -> tuple[float, float, float]:
    values = (value,) * 3 if is_number(value) else tuple(value) if isinstance(value, Sequence) else None
    if values is None or len(values) != 3 or not all(map(is_number, values)):
        raise TypeError(f"temperature must be one number or three (instance, sample, category); got {value!r}")
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"temperature must be positive and finite; got {value!r}")
    return float(values[0]), float(values[1]), float(values[2])


def _weight(value: Any) -> tuple[tuple[float, float, float], Tensor | None]:
    if isinstance(value, Tensor):
        if value.shape != (3,):
            raise ValueError(f"weight as a tensor must have shape (3,); got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"weight as a tensor must be of a floating dtype; got {value.dtype}")
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            _weights_in_range(value.tolist())
        return (1.0, 1.0, 1.0), value
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 3:
        wanted = "three numbers (instance, sample, category) or a tensor of three"
        raise TypeError(f"weight must be {wanted}; got {value!r}")
    if not all(map(is_number, value)):
        raise TypeError(f"weight must be three numbers (instance, sample, category); got {value!r}")
    _weights_in_range(value)
    return (float(value[0]), float(value[1]), float(value[2])), None


def _weights_in_range(values: Sequence[float]) -> None:
    if not all(math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(f"weight must be finite and >= 0; got {tuple(values)!r}")


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {value!r}")
    return value


def _missing(chosen: Options) -> None:
    reasons = (
        "mask_same_class of the instance-wise term",
        "the sample-wise term (weight[1] other than 0)",
        "present_only of the category-wise term",
    )
    needed = [reason for reason, used in zip(reasons, chosen.label_terms, strict=True) if used]
    if needed:
        raise ValueError(
            f"target is None, but labels (batch,) are needed by {' and '.join(needed)}: pass target, "
            "or turn that off (a term: weight 0)"
        )


def _target(target: Tensor, student: Tensor, chosen: Options) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of labels (batch,), int64; got {type(target).__name__}")
    batch, classes = student.shape
    if target.ndim == 2 and target.is_floating_point():
        raise ValueError(
            "target must hold hard labels of shape (batch,), int64; "
            f"got soft labels {tuple(target.shape)}, {target.dtype}. "
            "With mixed or smoothed targets either pass target=None with weight[1] = 0 (no sample-wise term), "
            "mask_same_class=False and present_only=False, or pass hard labels, such as target.argmax(dim=1)"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must be of dtype int64; got {target.dtype}")
    if target.shape != (batch,):
        raise ValueError(f"target must have shape (batch,) = ({batch},); got {tuple(target.shape)}")
    if target.device != student.device:
        raise ValueError(f"target must be on the logits' device {student.device}; got {target.device}")
    # Reading labels on a GPU would synchronise it; there a bad label makes the terms that use it NaN instead.
    readable = target.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and any(chosen.label_terms):
        bad = target[((target < 0) | (target >= classes)) & (target != chosen.ignore_index)]
        if bad.numel():
            raise ValueError(
                f"target holds {int(bad[0])}; labels must be in [0, {classes}) "
                f"or equal ignore_index={chosen.ignore_index}"
            )
