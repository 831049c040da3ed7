"""The "cuda" backend: the compiled module's kernels (csrc/) behind `pipeline.Kernels`.

**No GPU has run these kernels yet.** They compile for sm_80, sm_90a, sm_100a and sm_120 without spills, and every test
run executes the portable ones on the CPU, compiled for the host (tests/csrc_host), against the fp64 reference.

float32 logits follow the float32 matmul precision: "highest" is accurate to fp32 (three tf32 products), "high" is tf32,
"medium" takes bf16 operands. fp64 has no kernels here.
"""

from __future__ import annotations

import re
from types import ModuleType

import torch
from torch import Tensor

from .. import compiled, measured
from ..pipeline import Call, Result, evaluate
from . import latency
from .common import Launcher
from .kernels import CudaKernels

LEAST_CAPABILITY = (8, 0)

# The kernels compiled for the host; tests set it, and CPU tensors are then taken.
emulated: ModuleType | None = None


def unavailable() -> str | None:
    """Why the backend cannot run on this machine, whatever the logits; None if it can."""
    if emulated is not None:
        return None
    without = compiled.without_cuda()
    if without is not None:
        return without
    module, _ = compiled.load()
    if module is not None and not module.info()["portable"]:
        return "the compiled module holds no portable kernels: install the package again"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def reason(student: Tensor, teacher: Tensor) -> str | None:
    """Why the backend cannot run with these logits; None if it can."""
    why = unavailable()
    if why is not None:
        return why
    if torch.float64 in (student.dtype, teacher.dtype):
        return "it has no fp64 kernels: use backend 'torch' or 'reference', or float32 logits"
    if emulated is not None:
        return None if student.device.type == "cpu" else "the kernels are compiled for the host: it takes CPU tensors"
    if student.device.type != "cuda":
        return f"it takes CUDA tensors, and these are on {student.device}"
    capability = torch.cuda.get_device_capability(student.device)
    if capability < LEAST_CAPABILITY:
        return (
            f"it needs compute capability {_dotted(LEAST_CAPABILITY)} or above, "
            f"and {student.device} has {_dotted(capability)}"
        )
    module, _ = compiled.load()
    assert module is not None
    architectures = module.info()["architectures"]
    if not any(runs_on(architecture, capability) for architecture in architectures):
        return (
            f"the compiled module is for {', '.join(architectures)}, and {student.device} has compute capability "
            f"{_dotted(capability)}: install the package again with MCLD_CUDA_ARCHS={_dotted(capability)}"
        )
    return None


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architecture``, as CMake writes it ("80-real", "90a", "120"), runs on a compute capability."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:
        return False
    major, minor, special, kind = int(match[1]), int(match[2]), match[3], match[4]
    if special == "a":
        return capability == (major, minor)
    binary = kind != "-virtual" and capability[0] == major and capability[1] >= minor
    # What is not "-real" also holds PTX, which the driver compiles for any later device.
    return binary or (kind != "-real" and not special and capability >= (major, minor))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def forward(call: Call) -> Result:
    module = emulated or compiled.load()[0]
    assert module is not None, "reason() says why"
    launch = Launcher(module, call.student.device)
    kernels = CudaKernels(launch, hopper=measured.takes_hopper(call.student, call.teacher))
    operand = kernels.operand_dtype(call.dtype)
    return latency.evaluate(launch, call, operand) if latency.takes(call, operand) else evaluate(kernels, call)
