"""The limits of the Hopper kernels (csrc/hopper: TMA and wgmma), which stand in for portable ones.

They are taken where this GPU's timings (`backends.timings`) have found them right and the fastest, or on request, by
the environment variable MCLD_HOPPER=1.
"""

from __future__ import annotations

from types import ModuleType

import torch

CAPABILITY = (9, 0)  # wgmma exists nowhere else
DTYPES = (torch.float16, torch.bfloat16)


def unsupported_reason(module: ModuleType, device: torch.device, operand_dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot take operands of a dtype on ``device``, of any shape; None if they can."""
    if not hasattr(module, "hopper_similarity"):
        return "the module is compiled without them: put 90a into MCLD_CUDA_ARCHS and install again"
    if operand_dtype not in DTYPES:
        return f"they take 16-bit operands, not {operand_dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != CAPABILITY:
        return "they need compute capability 9.0"
    return None
