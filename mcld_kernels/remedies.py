"""The end of an error about a tensor: what to pass instead, as ": pass ...", or "" where nothing can be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def of_no_tensor(name: str, value: Any) -> str:
    """An argument that is no tensor: a model's output, an array, a list."""
    if isinstance(value, Mapping):
        return f': pass {name}["logits"]' if "logits" in value else ""
    if isinstance(getattr(value, "logits", None), Tensor):
        return f": pass {name}.logits"
    if isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
        return ": pass one tensor of them"
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        return f": pass torch.as_tensor({name})"
    return ""


def of_dtype(name: str, x: Tensor) -> str:
    """Logits or embeddings of no floating dtype."""
    if name == "teacher" and x.ndim == 1:
        return ": labels come third, loss(student, teacher, target)"
    return "" if x.is_complex() else f": pass {name}.float()"


def of_rank(name: str, x: Tensor) -> str:
    """Logits or embeddings of another number of dimensions than two."""
    if x.ndim == 1:
        return f": pass {name}[None] for a single row"
    if x.ndim == 3:
        return f": pass {name}.flatten(0, 1) to take each position as a row"
    return ""


def of_shapes(student: Tensor, teacher: Tensor) -> str:
    """Logits (batch, classes) of two shapes."""
    if student.shape == teacher.shape[::-1]:
        return ": one of them is transposed, pass teacher.T"
    if student.shape[0] == teacher.shape[0]:
        return ": pass the columns of the classes that both have, in one order"
    return ": pass the rows of the same samples"


def of_label_dtype(name: str, target: Tensor) -> str:
    """Labels that are neither int64 nor soft."""
    return _of_one_hot(name) if target.ndim == 2 and target.shape[1] > 1 else f": pass {name}.long()"


def of_label_shape(name: str, target: Tensor, n: int) -> str:
    """Labels int64 that are not (n,)."""
    if target.shape == (n, 1):
        return f": pass {name}.squeeze(1)"
    return _of_one_hot(name) if target.ndim == 2 and target.shape[0] == n else ""


def _of_one_hot(name: str) -> str:
    return f": of one-hot rows pass {name}.long().argmax(dim=1)"
