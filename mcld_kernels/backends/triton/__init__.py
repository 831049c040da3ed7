"""The "triton" backend: fused kernels for NVIDIA GPUs of compute capability 8.0 and above, for AMD's gfx942 and gfx950,
and for the interpreter.

torch calls AMD's GPUs "cuda" too: what is said of CUDA tensors here holds for them.

This module imports triton only inside the functions that need it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...options import float32_precision
from ..chunks import chunk_bytes
from .configs import AMD, INTERPRETER, TritonTuning, architecture

if TYPE_CHECKING:
    from .kernels import TritonKernels

TUNING = TritonTuning

_FLASH = f"{__name__}.flash"
MIN_VERSION = (3, 6)  # of Triton
MIN_CAPABILITY = (8, 0)


def unavailable_reason() -> str | None:
    """The reason why the kernels cannot run on this machine, whatever the logits; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    version = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if version is None or tuple(map(int, version.groups())) < MIN_VERSION:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, MIN_VERSION))}"
    if interpreted():
        return None
    if _variable_is_set():
        earlier = "the kernels" if _FLASH in sys.modules else "triton"
        return (
            f"TRITON_INTERPRET was set after {earlier} had been imported, when Triton reads it: set it before anything "
            "imports triton, as in `TRITON_INTERPRET=1 python ...`"
        )
    if not torch.cuda.is_available():
        gpu = "CUDA" if torch.version.hip is None else "HIP"
        return f"there is no {gpu} device (TRITON_INTERPRET=1, set before triton is imported, interprets on a CPU)"
    return None


def unsupported_reason(student: Tensor, teacher: Tensor) -> str | None:
    """The reason why the kernels cannot run for these logits; None if they can."""
    reason = unavailable_reason()
    if reason is not None:
        return reason
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    if interpreted():
        medium = dtype == torch.float32 and float32_precision() == "medium"
        if (dtype == torch.bfloat16 or medium) and not _interprets_bf16():
            return "Triton's interpreter computes bf16 products wrongly"
        if dtype == torch.float64 and torch.bfloat16 in (student.dtype, teacher.dtype):
            return "Triton's interpreter rounds fp64 to bf16 wrongly"
        return None
    if student.device.type != "cuda":
        return f"it takes CUDA tensors, and these are on {student.device} (TRITON_INTERPRET=1 lifts that)"
    reason = _device_reason(student.device)
    if reason is not None:
        return reason
    if dtype == torch.float64:
        return "it takes fp64 only in the interpreter"
    return None


def _device_reason(device: torch.device) -> str | None:
    """The reason why the kernels have no configurations for a GPU; None if they have."""
    if torch.version.hip is not None:
        name = architecture(device)
        return None if name in AMD else f"of AMD's GPUs it takes {' and '.join(AMD)}, and {device} is {name}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        least, has = (".".join(map(str, pair)) for pair in (MIN_CAPABILITY, capability))
        return f"it needs compute capability {least} or above, and {device} has {has}"
    return None


def kernel_set(student: Tensor, teacher: Tensor, **tuning_overrides: Any) -> TritonKernels:
    """The kernels for these logits. ``tuning_overrides``: fields of `TritonTuning`."""
    autotune, fields = os.environ.get("MCLD_AUTOTUNE", "0") == "1", tuple(sorted(tuning_overrides.items()))
    return _kernel_set(student.device, chunk_bytes(student.device), autotune, fields)


@lru_cache
def _kernel_set(
    device: torch.device, chunk_bytes: int, autotune: bool, fields: tuple[tuple[str, Any], ...]
) -> TritonKernels:
    from .kernels import TritonKernels

    on_gpu = device.type == "cuda"
    tuning = TritonTuning(
        chunk_bytes=chunk_bytes,
        architecture=architecture(device) if on_gpu else "sm_80",
        blocks=None if on_gpu else INTERPRETER,
        autotune=autotune,
    )
    return TritonKernels(dataclasses.replace(tuning, **dict(fields)) if fields else tuning)


def interpreted() -> bool:
    """True if the kernels run, or would once imported, in Triton's interpreter.

    Each function is interpreted or compiled as the variable was when it was defined: those of Triton's own library at
    the import of triton, and the kernels, which call them.
    """
    library, kernels = sys.modules.get("triton.language.standard"), sys.modules.get(_FLASH)
    defined = [library.sum] if library is not None else []
    if kernels is not None:
        defined.append(kernels.flash_kernel)
    if any(type(function).__name__ != "InterpretedFunction" for function in defined):
        return False
    return kernels is not None or _variable_is_set()


def _variable_is_set() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _interprets_bf16() -> bool:
    """True if a test has taught the interpreter bf16."""
    from triton.runtime.interpreter import InterpreterBuilder

    return getattr(InterpreterBuilder.create_dot, "multiplies_bf16", False)
