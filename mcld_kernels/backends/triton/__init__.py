"""The "triton" backend: fused kernels for CUDA devices of compute capability 8.0 and above, and for the interpreter.

Nothing here imports triton before a call needs it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re

import torch
from torch import Tensor

from ..arguments import float32_precision
from ..pipeline import Call, Result, evaluate

OLDEST = (3, 6)  # the oldest Triton that the kernels are tested with
LEAST_CAPABILITY = (8, 0)


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, whatever the logits; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    version = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if version is None or tuple(map(int, version.groups())) < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if interpreted():
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return (
            "there is no CUDA device (TRITON_INTERPRET=1, set before the first import, interprets the kernels on a CPU)"
        )
    return None


def reason(student: Tensor, teacher: Tensor) -> str | None:
    """Why the kernels cannot run for these logits; None if they can."""
    why = unavailable()
    if why is not None:
        return why
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    if interpreted():
        medium = dtype == torch.float32 and float32_precision() == "medium"
        if (dtype == torch.bfloat16 or medium) and not _lifts_bf16():
            return "Triton's interpreter computes bf16 products wrongly"
        return None
    if student.device.type != "cuda":
        return f"it takes CUDA tensors, and these are on {student.device} (TRITON_INTERPRET=1 lifts that)"
    capability = torch.cuda.get_device_capability(student.device)
    if capability < LEAST_CAPABILITY:
        least, has = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return f"it needs compute capability {least} or above, and {student.device} has {has}"
    if dtype == torch.float64:
        return "it takes fp64 only in the interpreter"
    return None


def interpreted() -> bool:
    """Whether the kernels run, or would once imported, in Triton's interpreter."""
    import sys

    kernels = sys.modules.get(f"{__name__}.flash")
    if kernels is not None:
        return type(kernels.flash_kernel).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _lifts_bf16() -> bool:
    """Whether a test has taught the interpreter bf16."""
    from triton.runtime.interpreter import InterpreterBuilder

    return getattr(InterpreterBuilder.create_dot, "lifts_bf16", False)


def forward(call: Call) -> Result:
    from .kernels import TritonKernels

    device = call.student.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return evaluate(TritonKernels(), call)
