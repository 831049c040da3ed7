"""Plans: the host's side of a call, recorded once for each shape and set of options, and run again without its Python.

`CudaKernels.run` records the second call of a kind while it computes it: every launch (csrc/plan.h), every GEMM of the
library, and every tensor that is made on the way. The tensors that are no result get places in one workspace, two of
them the same place where one is used up before the other is written; the result of a GEMM gets none, since the library
allocates it for less than a view of the workspace takes. A later call of that kind allocates the workspace and the
results and launches. What is launched, with which arguments and in which order stands where it always did, in the
composition of the loss and in this folder.

A call with any other torch operation between the launches has no plan, and runs as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels import LossInputs, LossOutputs
from ...options import float32_precision
from .. import gemm
from .launcher import Launcher

_ALIGNMENT = 256  # of what the allocators give, and more than any kernel needs
_TERMS_BYTES = _ALIGNMENT  # for the terms of a replay
_MADE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ZEROED = ("zeros", "zeros_like", "new_zeros")
_RESULTS = ("loss", "terms", "student_grad", "teacher_grad")
# A contiguous result: its field of `LossOutputs`, shape, strides and dtype. torch.empty takes 1 to 1.5 us more than
# torch.empty_strided to read its arguments, and most where the shape is a torch.Size.
_Result = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]


class NoPlan(Exception):
    """A call that cannot be recorded; the message says why."""


def call_key(compute: Callable[..., Any], inputs: LossInputs) -> tuple[Any, ...] | None:
    """All that a plan depends on; None for a call that has none. Values of tensors are not read on a GPU."""
    key = (
        compute,
        inputs.options,
        _signature(inputs.student),
        _signature(inputs.teacher),
        _signature(inputs.target),
        _signature(inputs.weight),
        _signature(inputs.teacher_target),
        tuple(_signature(tensor) for tensor in _further(inputs)),
        inputs.student_grad,
        inputs.teacher_grad,
        inputs.offset,
        inputs.labels_are_classes,
        float32_precision(),
    )
    try:
        hash(key)
    except TypeError:  # options with a tensor
        return None
    return key


def _signature(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _further(inputs: LossInputs) -> Sequence[Tensor | None]:
    return tuple(getattr(inputs, "extra", {}).values())


def _tensors(inputs: LossInputs) -> list[Tensor]:
    """The inputs, in the order of the bases."""
    first = (inputs.student, inputs.teacher, inputs.target, inputs.weight, inputs.teacher_target)
    return [tensor for tensor in (*first, *_further(inputs)) if tensor is not None]


@dataclass(kw_only=True, slots=True)
class _Block:
    """Memory that was made on the way; ``first`` and ``last`` number the steps that use it."""

    begin: int
    bytes: int
    first: int = -1
    last: int = -1
    offset: int = 0  # in the workspace

    def used(self, step: int) -> None:
        self.first = step if self.first < 0 else self.first
        self.last = step


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """A tensor in the workspace, ``offset`` in elements of its dtype."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, typed: dict[torch.dtype, Tensor]) -> Tensor:
        """The tensor, from the workspace as a tensor of each dtype."""
        return typed[self.dtype].as_strided(self.shape, self.stride, self.offset)


class CallRecorder(TorchDispatchMode):
    """Records a call: `Launcher` hands it launches and GEMMs, and torch what else is dispatched."""

    def __init__(self, module: Any):
        super().__init__()
        self.plan = module.Plan()
        self.blocks: list[_Block] = []
        # ("launch", number), ("zero", tensor) or ("gemm", left, right, out, accumulate)
        self.steps: list[tuple[Any, ...]] = []
        self.other: str | None = None  # an operation that no plan has
        self._held: list[Tensor] = []  # so that an address is not given twice
        self._inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in _MADE or name in _ZEROED:
            self._held.append(result)
            self.blocks.append(_Block(begin=result.data_ptr(), bytes=result.untyped_storage().nbytes()))
            if name in _ZEROED:
                self.steps.append(("zero", result))
        elif not (self._inside or function.is_view or self.other):
            self.other = str(function)
        return result

    def launched(self) -> None:
        """A launch has been appended to the plan."""
        self.steps.append(("launch", len(self.plan) - 1))

    def gemm(self, left: Tensor, right: Tensor, out: Tensor, accumulate: bool) -> None:
        self._inside = True
        try:
            gemm.gemm(left, right, out, accumulate)
        finally:
            self._inside = False
        self._held += [left, right, out]
        self.steps.append(("gemm", left, right, out, accumulate))

    def finish(self, inputs: LossInputs, outputs: LossOutputs) -> CallPlan:
        """The plan of the call. Raises NoPlan."""
        if self.other is not None:
            raise NoPlan(f"it takes {self.other}")
        ranges = [(*_extent(tensor), base, 0) for base, tensor in enumerate(_tensors(inputs))]
        ordered = sorted(ranges)
        if any(a[0] + a[1] > b[0] for a, b in zip(ordered, ordered[1:])):
            raise NoPlan("its inputs share memory")
        blocks = {block.begin: block for block in self.blocks if block.bytes}
        workspace_base = len(ranges)
        results: list[_Result] = []
        for name in _RESULTS:
            tensor = getattr(outputs, name)
            if tensor is None:
                continue
            block = blocks.pop(tensor.data_ptr(), None)
            if block is None or block.bytes != tensor.nbytes or not tensor.is_contiguous():
                raise NoPlan(f"{name} is a part of another tensor")
            results.append((name, tuple(tensor.shape), tensor.stride(), tensor.dtype))
            ranges.append((block.begin, block.bytes, workspace_base + len(results), 0))
        kept = list(blocks.values())
        self._mark(kept)
        products = self._products(kept)
        ranges += [(block.begin, block.bytes, workspace_base + len(results) + 1, 0) for block in products]
        kept = [block for block in kept if block not in products]
        size = _place(kept)
        ranges += [(block.begin, block.bytes, workspace_base, block.offset) for block in kept]
        try:
            self.plan.place(ranges)
        except ValueError as fault:
            raise NoPlan(str(fault)) from None
        steps = self._merged(kept)
        dtypes = tuple({part.dtype for step in steps for part in step if isinstance(part, _View)})
        return CallPlan(
            plan=self.plan, steps=steps, bytes=size, dtypes=dtypes, results=results, has_gemm=bool(products)
        )

    def _products(self, blocks: list[_Block]) -> list[_Block]:
        """The results of the GEMMs: each written first and whole by its GEMM, and read by launches before the next one.

        Raises NoPlan for any other.
        """
        begins = {block.begin: block for block in blocks}
        products: list[_Block] = []
        for number, step in enumerate(self.steps):
            if step[0] != "gemm":
                continue
            _, _, _, out, accumulate = step
            block = begins.get(out.data_ptr())
            if block is None or accumulate or not out.is_contiguous() or out.nbytes != block.bytes:
                raise NoPlan("a GEMM adds to its result, or writes a part of another tensor")
            if block.first < number or (products and products[-1].last >= number):
                raise NoPlan("a GEMM's result is used before it, or from the next GEMM on")
            products.append(block)
        return products

    def _mark(self, blocks: list[_Block]) -> None:
        """Note the steps that use each block."""
        for number, step in enumerate(self.steps):
            if step[0] == "launch":
                addresses = self.plan.pointers(step[1])
            else:
                addresses = [part.data_ptr() for part in step[1:] if isinstance(part, Tensor)]
            for address in addresses:
                for block in blocks:
                    if 0 <= address - block.begin < block.bytes:
                        block.used(number)

    def _merged(self, blocks: list[_Block]) -> list[tuple[Any, ...]]:
        """The steps of the plan: launches in a row as one, and tensors as places in the workspace."""

        def view(tensor: Tensor) -> _View:
            for block in blocks:
                at = tensor.data_ptr() - block.begin
                if 0 <= at < block.bytes:
                    offset = (block.offset + at) // tensor.itemsize
                    return _View(offset=offset, shape=tensor.shape, stride=tensor.stride(), dtype=tensor.dtype)
            raise NoPlan("a torch operation takes an input or writes a result")

        merged: list[tuple[Any, ...]] = []
        for step in self.steps:
            if step[0] == "gemm":
                merged.append(("gemm", view(step[1]), view(step[2]), step[3].dtype))
            elif step[0] == "zero":
                merged.append(("zero", view(step[1])))
            elif merged and merged[-1][0] == "launch":
                merged[-1] = ("launch", merged[-1][1], step[1] + 1)
            else:
                merged.append(("launch", step[1], step[1] + 1))
        return merged


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes from the first element of a tensor to its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), (last + 1) * tensor.itemsize


def _place(blocks: list[_Block]) -> int:
    """Give each block the lowest place that no block in use at the same time has; returns the bytes of all."""
    placed: list[_Block] = []
    for block in sorted(blocks, key=lambda block: -block.bytes):
        if block.first < 0:
            continue  # nothing uses it
        together = [other for other in placed if other.first <= block.last and block.first <= other.last]
        block.offset = 0
        for other in sorted(together, key=lambda other: other.offset):
            if block.offset + block.bytes <= other.offset:
                break
            end = other.offset + other.bytes
            block.offset = max(block.offset, (end + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT)
        placed.append(block)
    size = max((block.offset + block.bytes for block in placed), default=0)
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPlan:
    """A recorded call."""

    plan: Any  # csrc/plan.h
    steps: list[tuple[Any, ...]]  # ("launch", first, last), ("zero", view) or ("gemm", left, right, its dtype)
    bytes: int  # of the workspace
    dtypes: tuple[torch.dtype, ...]  # of views of the workspace
    results: list[_Result]
    has_gemm: bool  # among the steps: the last base is then its result

    def run(self, launch: Launcher, inputs: LossInputs) -> LossOutputs:
        """The call for other inputs of the same key."""
        device = inputs.student.device
        workspace = self._workspace(self.bytes, device)
        fields = {
            name: torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for name, shape, stride, dtype in self.results
        }
        bases = [tensor.data_ptr() for tensor in _tensors(inputs)]
        bases.append(workspace.data_ptr())
        bases += [result.data_ptr() for result in fields.values()]
        self._run(launch, workspace, bases)
        return LossOutputs(
            loss=fields["loss"],
            terms=fields["terms"],
            student_grad=fields.get("student_grad"),
            teacher_grad=fields.get("teacher_grad"),
        )

    def can_replay(self, inputs: LossInputs) -> bool:
        """True where `replay` takes all that is there, and gives all that is read."""
        further = inputs.weight, inputs.teacher_target, *_further(inputs)
        results = {name: math.prod(shape) * dtype.itemsize for name, shape, _, dtype in self.results}
        has_others = any(tensor is not None for tensor in further)
        return not has_others and "teacher_grad" not in results and results["terms"] <= _TERMS_BYTES

    def replay(self, launch: Launcher, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """As `run`: loss and gradient of student, teacher and the target that is there.

        The terms, which nobody reads, are written behind the workspace.
        """
        device = launch.device
        workspace = self._workspace(self.bytes + _TERMS_BYTES, device)
        begin = workspace.data_ptr()
        bases = [tensor.data_ptr() for tensor in tensors]
        bases.append(begin)
        fields = {}
        for name, shape, stride, dtype in self.results:
            if name == "terms":
                bases.append(begin + self.bytes)
            else:
                fields[name] = result = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                bases.append(result.data_ptr())
        self._run(launch, workspace, bases)
        return fields["loss"], fields.get("student_grad")

    def _workspace(self, size: int, device: torch.device) -> Tensor:
        """So many bytes, a multiple of `_ALIGNMENT`, in a dtype in which they are viewed, where there is one."""
        dtype = self.dtypes[0] if self.dtypes else torch.uint8
        return torch.empty_strided((size // dtype.itemsize,), (1,), dtype=dtype, device=device)

    def _run(self, launch: Launcher, workspace: Tensor, bases: list[int]) -> None:
        """Launch on the workspace, with the addresses of inputs, workspace and results."""
        index, stream = launch.place()
        if self.has_gemm:
            bases.append(0)  # until the result is there
        typed = {dtype: workspace if workspace.dtype is dtype else workspace.view(dtype) for dtype in self.dtypes}
        product: Tensor | None = None
        for kind, *step in self.steps:
            if kind == "launch":
                self.plan.run(bases, index, stream, step[0], step[1])
            elif kind == "gemm":
                left, right, dtype = step
                product = None  # that of the chunk before, whose memory may be given again
                product = gemm.product(left.of(typed), right.of(typed), dtype)
                assert product.is_contiguous()
                bases[-1] = product.data_ptr()
            else:
                step[0].of(typed).zero_()
