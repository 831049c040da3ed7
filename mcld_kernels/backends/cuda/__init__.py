"""The "cuda" backend: the compiled module's kernels (csrc/) as a `KernelSet`.

The kernels compile for sm_80, sm_90a, sm_100 and sm_120 without spills, and every test run executes them on the CPU,
compiled for the host (tests/csrc_host), against the fp64 reference.

float32 logits follow the float32 matmul precision: "highest" is accurate to fp32 (three tf32 products), "high" is tf32,
"medium" takes bf16 operands. fp64 has no kernels here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import installation
from .. import timings
from ..chunks import chunk_bytes, wave_bytes
from . import extension
from .kernels import CudaKernels
from .launcher import Launcher
from .tuning import MULTIPROCESSORS, CudaTuning

TUNING = CudaTuning
MIN_CAPABILITY = (8, 0)
# Device and dtypes -> the module that takes them: each call asks, and the answer takes a dozen calls into the driver.
_CAN_RUN: dict[tuple[torch.device, torch.dtype, torch.dtype], ModuleType] = {}


def unavailable_reason() -> str | None:
    """The reason why the backend cannot run on this machine, whatever the logits; None if it can."""
    module, reason = extension.load()
    if module is None:
        return reason
    if _is_host_build(module):
        return None
    if torch.version.hip is not None:
        return f"its kernels are CUDA's, and this torch is for AMD's GPUs (HIP {torch.version.hip})"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    toolkit, driver = _toolkit(module), module.driver_version()
    # A driver runs the code of every toolkit of its own major version (CUDA's minor version compatibility).
    if driver is not None and driver[0] < toolkit[0]:
        return (
            f"the compiled module was built with CUDA {_dotted(toolkit)}, and the driver runs CUDA {_dotted(driver)} "
            f"at most: update the driver, or compile with a toolkit of CUDA {driver[0]} on the PATH, "
            f"`{installation.cuda_command()}`"
        )
    return None


def unsupported_reason(student: Tensor, teacher: Tensor) -> str | None:
    """The reason why the backend cannot run with these logits; None if it can."""
    kind = student.device, student.dtype, teacher.dtype
    module = extension.load()[0]
    if module is not None and _CAN_RUN.get(kind) is module:
        return None
    reason = _find_reason(student, teacher)
    if reason is None and module is not None:
        _CAN_RUN[kind] = module
    return reason


def _find_reason(student: Tensor, teacher: Tensor) -> str | None:
    reason = unavailable_reason()
    if reason is not None:
        return reason
    if torch.float64 in (student.dtype, teacher.dtype):
        return "it has no fp64 kernels: use backend 'torch' or 'reference', or float32 logits"
    module = _module()
    if _is_host_build(module):
        return None if student.device.type == "cpu" else "the kernels are compiled for the host: it takes CPU tensors"
    if student.device.type != "cuda":
        return f"it takes CUDA tensors, and these are on {student.device}"
    return _device_reason(module, student.device)


def kernel_set(student: Tensor, teacher: Tensor, **overrides: Any) -> CudaKernels:
    """The kernel set for these logits; ``overrides`` are fields of `CudaTuning`."""
    device, fields = student.device, tuple(sorted(overrides.items()))
    # A budget given by hand holds.
    budgets = chunk_bytes(device), 0 if "chunk_bytes" in overrides else wave_bytes(device)
    return _kernel_set(_module(), device, budgets, timings.takes_hopper(student, teacher), fields)


@functools.lru_cache(maxsize=64)
def _kernel_set(
    module: ModuleType,
    device: torch.device,
    budgets: tuple[int, int],
    hopper: bool,
    fields: tuple[tuple[str, Any], ...],
) -> CudaKernels:
    """One kernel set for all calls: it keeps their plans."""
    tuning = CudaTuning(
        chunk_bytes=budgets[0],
        wave_bytes=budgets[1],
        multiprocessors=_multiprocessors(device),
        hopper=hopper,
        low_latency_limit=module.constants["low_latency_limit"],
        flash_row_bytes=module.constants["flash_row_bytes"],
    )
    if fields:
        tuning = dataclasses.replace(tuning, **dict(fields))
    return CudaKernels(Launcher(module, device), tuning)


def runs_on(architecture: str, capability: tuple[int, int], *, jit: bool = True) -> bool:
    """True if code for ``architecture``, as CMake writes it ("80-real", "90a", "120"), runs on a compute capability.

    jit: the driver can compile PTX of the toolkit.
    """
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:
        return False
    major, minor, special, kind = int(match[1]), int(match[2]), match[3], match[4]
    if special == "a":
        return capability == (major, minor)
    binary = kind != "-virtual" and capability[0] == major and capability[1] >= minor
    # All but "-real" also hold PTX, which the driver compiles for any later device.
    return binary or (jit and kind != "-real" and not special and capability >= (major, minor))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _device_reason(module: ModuleType, device: torch.device) -> str | None:
    """The reason why the module's code does not run on a CUDA device; None if it does."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"it needs compute capability {_dotted(MIN_CAPABILITY)} or above, and {device} has {_dotted(capability)}"
    architectures, toolkit, driver = module.info()["architectures"], _toolkit(module), module.driver_version()
    jit = driver is None or driver >= toolkit
    if any(runs_on(architecture, capability, jit=jit) for architecture in architectures):
        return None
    held = f"the compiled module is for {', '.join(architectures)}, and {device} has compute capability"
    remedy = f"`{installation.cuda_command()}` compiles for it"
    if any(runs_on(architecture, capability) for architecture in architectures):
        return (
            f"{held} {_dotted(capability)}, for which the driver must compile PTX of CUDA {_dotted(toolkit)}; it runs "
            f"CUDA {_dotted(driver)} at most: update the driver, or {remedy}"
        )
    return f"{held} {_dotted(capability)}: {remedy}"


def _module() -> ModuleType:
    module, reason = extension.load()
    assert module is not None, reason
    return module


def _is_host_build(module: ModuleType) -> bool:
    return module.info()["architectures"] == ["host"]


def _toolkit(module: ModuleType) -> tuple[int, int]:
    """The CUDA version, (major, minor), that the module was compiled with."""
    major, minor = module.info()["cuda"].split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
