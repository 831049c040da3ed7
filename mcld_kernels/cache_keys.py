"""Options as keys of a cache: a value that can change would give the options of its first call ever after."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor


def fixed_sequence(value: Any) -> Any:
    """A tuple in place of a list or another sequence of numbers, which can change; the checks look at all else."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, tuple)) else value


def fixed_index(name: str, value: Any) -> Any:
    """An int in place of what stands for one and can change, as a tensor of shape (); the checks look at all else."""
    if isinstance(value, (bool, torch.SymInt)) or not isinstance(value, SupportsIndex):
        return value
    try:
        return operator.index(value)
    except TypeError:
        shown = type(value).__name__
        if isinstance(value, Tensor):
            shown = f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
        raise TypeError(f"{name} must be an int; got {shown}") from None
