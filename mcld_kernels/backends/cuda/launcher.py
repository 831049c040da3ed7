"""Calls into the compiled module, and the padding and precision of operands that all kernels share."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from ...options import float32_precision
from .. import gemm

if TYPE_CHECKING:
    from mcld_kernels._C import Constants

LOG2E = 1.4426950408889634
_TYPE_NAMES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class Recorder(Protocol):
    """The recorder of a launcher's calls (`plans.CallRecorder`)."""

    plan: Any  # csrc/plan.h, to which a launch appends itself

    def launched(self) -> None:
        """A launch has been appended to the plan."""

    def gemm(self, left: Tensor, right: Tensor, out: Tensor, accumulate: bool) -> None:
        """The library's product, as `gemm.gemm`, recorded."""


class Launcher:
    """Calls a module's launchers on the device and its current stream; with a recorder, they are recorded as well."""

    def __init__(self, module: ModuleType, device: torch.device, recorder: Recorder | None = None):
        self.module, self.device, self._recorder = module, device, recorder
        self.constants: Constants = module.constants

    def __call__(self, name: str, **fields: Any) -> None:
        """Launch ``name`` with the fields of its structure (csrc/launchers.h), tensors by their addresses."""
        for key, value in fields.items():
            if value is None or isinstance(value, Tensor):
                fields[key] = pointer(value)
        device, stream = self.place()
        launcher = getattr(self.module, name)
        if self._recorder is None:
            launcher(**fields, device=device, stream=stream)
        else:
            launcher(**fields, device=device, stream=stream, plan=self._recorder.plan)
            self._recorder.launched()

    def gemm(self, left: Tensor, right: Tensor, out: Tensor, accumulate: bool) -> None:
        """The library's product, as `gemm.gemm`."""
        (gemm.gemm if self._recorder is None else self._recorder.gemm)(left, right, out, accumulate)

    def place(self) -> tuple[int, int]:
        """The number of the device and its current stream; under graph capture, the one that is captured."""
        if self.device.type != "cuda":
            return 0, 0
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        return index, torch._C._cuda_getCurrentRawStream(index)

    def padded_rows(self, n: int) -> int:
        """The rows of an operand with n rows."""
        multiple = self.constants["row_padding"]
        return (n + multiple - 1) // multiple * multiple

    def pitch(self, d: int) -> int:
        """The pitch of an operand with d columns."""
        if d <= self.constants["narrow_pitch"]:
            return self.constants["narrow_pitch"]
        multiple = self.constants["pitch_multiple"]
        return (d + multiple - 1) // multiple * multiple

    def type(self, dtype: torch.dtype) -> int:
        """The enumerator of `Type` for logits or a gradient."""
        return self.constants["types"][_TYPE_NAMES[dtype]]

    def precision(self, operand_dtype: torch.dtype) -> int:
        """The enumerator of `Precision` for operands of a dtype."""
        precisions = self.constants["precisions"]
        if operand_dtype == torch.float32:
            return precisions["tf32x3" if float32_precision() == "highest" else "tf32"]
        return precisions["fp16" if operand_dtype == torch.float16 else "bf16"]

    def fixed_shift(self, operand_dtype: torch.dtype, temperature: float) -> float:
        """The largest exponent, in powers of two, less the lift that fp16 needs."""
        return LOG2E / temperature - (self.constants["fp16_lift"] if operand_dtype == torch.float16 else 0)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized fp32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def pointer(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()
