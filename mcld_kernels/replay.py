"""Replays: a call of a kind that was checked and recorded before, without its checks and most of its Python.

`call_key` names all that the checks and the recorded call depend on but the values of the tensors. The operator keeps,
under the key, what its kernel set gives to run the call again; `replayed_call` in `plain_call` asks for it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .kernels import is_in_memory
from .options import PLAIN_TYPES, float32_precision, is_readable

Key = tuple[Any, ...]
# Of student, teacher and the target that is there: the loss (), and the gradient by the student where there is one.
Replay = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None]]

MOST_REPLAYS = 256
_REPLAYS: dict[Key, Replay] = {}


def call_key(student: Tensor, teacher: Tensor, target: Tensor | None, options: Any, backend: str) -> Key | None:
    """The kind of a call; None where each call must be checked anew, or something observes, transforms or captures it.

    Nothing is checked yet but the options. Labels that can be read are checked in each call.
    """
    # No other backend records calls.
    if torch.compiler.is_compiling() or (backend != "cuda" and backend != "auto"):
        return None
    if type(student) not in PLAIN_TYPES or type(teacher) not in PLAIN_TYPES:
        return None
    if (backend == "auto" and not student.is_cuda) or not (_is_dense(student) and _is_dense(teacher)):
        return None
    # What `is_observed` asks beside that; of its devices, since no call on another one is ever kept, nothing.
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return None
    if forward_ad._current_level >= 0 or _is_captured(student):
        return None
    labels = None
    if target is not None:
        if (
            type(target) is not Tensor
            or target.dtype is not torch.int64
            or not _is_dense(target)
            or is_readable(target)
        ):
            return None
        labels = target.shape, target.stride(), target.device
    if not is_in_memory(student, teacher, target):
        return None
    with_grad = False
    if torch.is_grad_enabled():
        if teacher.requires_grad:
            return None
        with_grad = student.requires_grad
    return (
        student.shape, student.stride(), student.dtype, student.device,
        teacher.shape, teacher.stride(), teacher.dtype, teacher.device,
        labels, with_grad, type(options), options, backend, float32_precision(), backends.settings(student),
    )  # fmt: skip


def _is_captured(tensor: Tensor) -> bool:
    """True in the capture of a CUDA graph, which keeps the launches and whose host cost counts once."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def find(key: Key) -> Replay | None:
    return _REPLAYS.get(key)


def keep(key: Key, replay: Replay) -> None:
    """Keep what runs a call of this kind again, after a call that has passed all checks."""
    if len(_REPLAYS) >= MOST_REPLAYS:
        _REPLAYS.clear()
    _REPLAYS[key] = replay
