"""What the kernel families share: operands, their padding and precision, and the call into the compiled module."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..arguments import float32_precision

LOG2E = 1.4426950408889634
ROWS = 128  # rows of an operand are padded to a multiple
# A fixed shift is right while exp(-2 / temperature) keeps to normal numbers: in powers of two, with a margin for bf16
# and fp32; for fp16 between 2^-14 and 2^15, into which FP16_LIFT moves the exponentials.
FIXED_RANGE = {torch.float32: 100.0, torch.bfloat16: 100.0, torch.float16: 29.0}
FP16_LIFT = 15.0
FP16_GAIN = 1024.0  # what the largest weighted probability, or factor of an anchor, becomes in fp16

# The enumerations of csrc/portable/launchers.h.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_BF16, _FP16, _TF32, _TF32X3 = range(4)


class Launcher:
    """Calls a module's launchers on the device and stream that are current when it is made."""

    def __init__(self, module: ModuleType, device: torch.device):
        self.module, self.device = module, device
        self._where = {"device": 0, "stream": 0}
        if device.type == "cuda":
            # The stream that is current now: also the one that a graph is being captured on.
            stream = torch.cuda.current_stream(device)
            self._where = {"device": stream.device_index, "stream": stream.cuda_stream}

    def __call__(self, name: str, **fields: Any) -> None:
        """Launch kernel family ``name`` with the fields of its parameter structure, tensors by their addresses."""
        for key, value in fields.items():
            if value is None or isinstance(value, Tensor):
                fields[key] = pointer(value)
        getattr(self.module, name)(**fields, **self._where)


def pointer(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def padded_rows(n: int) -> int:
    return (n + ROWS - 1) // ROWS * ROWS


def pitch_of(d: int) -> int:
    """Columns of an operand: whole slices of shared memory, and whole tiles of 128 where one of 64 is not enough."""
    return 64 if d <= 64 else (d + 127) // 128 * 128


def precision_of(dtype: torch.dtype) -> int:
    if dtype == torch.float32:
        return _TF32X3 if float32_precision() == "highest" else _TF32
    return _FP16 if dtype == torch.float16 else _BF16


def has_fixed_shift(dtype: torch.dtype, temperature: float) -> bool:
    """Whether one shift does for all rows: cosines are bounded, so exponentials span at most exp(2 / temperature)."""
    return 2 * LOG2E / temperature <= FIXED_RANGE[dtype]


def fixed_shift(dtype: torch.dtype, temperature: float) -> float:
    """The largest exponent, in powers of two, less the lift that fp16 needs."""
    return LOG2E / temperature - (FP16_LIFT if dtype == torch.float16 else 0.0)
