"""The ranks of a run: their process group, and what they must agree on before a step."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import Config
from trainer.faults import ConfigFault, DeviceFault

T = TypeVar("T")


class Ranks:
    """This process among those that torchrun started; alone without torchrun.

    Control messages go through a gloo group of their own, so that they wait neither for the GPU nor for DDP's buckets.
    """

    def __init__(self, config: Config):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and local >= torch.cuda.device_count():
            raise DeviceFault(
                f"rank {self.rank} needs CUDA device {local}, and this machine, or this build of torch, "
                f"has {torch.cuda.device_count()}"
            )
        self.device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        backend = config.parallel.backend
        if backend == "auto":
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if backend == "nccl" and kind == "cpu":
            raise ConfigFault("parallel.backend=nccl needs GPUs: take gloo, or auto")
        self.control: dist.ProcessGroup | None = None
        self._began = False
        limit = datetime.timedelta(seconds=config.parallel.timeout)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group(backend, timeout=limit)
            self._began = True
        elif config.parallel.kind == "fsdp2" and not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            self._began = True
        if self.size > 1:
            self.control = dist.new_group(backend="gloo", timeout=limit)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, code: int) -> int:
        """The largest code of any rank. Every rank calls it at the same places."""
        if self.control is None:
            return code
        value = torch.tensor([code])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on each rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """The value of ``make`` on the first rank, on every rank; or the exception that it raises there."""
        if self.control is None:
            return make()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except Exception as fault:
                answer[1] = fault
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def all(self, make: Callable[[], T]) -> T:
        """The value of ``make`` on this rank, once it has succeeded on all: a fault of one is raised by each."""
        result, fault = None, None
        try:
            result = make()
        except Exception as caught:
            fault = caught
        faults = [(rank, each) for rank, each in enumerate(self.gather(fault)) if each is not None]
        if faults:
            rank, first = faults[0]
            raise fault if fault is not None else first if self.size == 1 else _of_rank(first, rank)
        return result  # type: ignore[return-value]

    def mean(self, tensors: list[Tensor]) -> None:
        """Average floating-point tensors over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.size

    def all_rows(self, rows: Tensor, parts: int = 1) -> Tensor:
        """The rows of all ranks, which have as many each, of ``parts`` micro-batches: in the order of one process."""
        if self.size == 1:
            return rows
        each = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(each, rows.contiguous())
        return torch.stack(each).unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 2)

    def sum_floats(self, values: list[float]) -> list[float]:
        if self.control is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def average_buffers(self, *models: nn.Module) -> None:
        """Average the batch-norm statistics, which each rank gathers from its own images, over the ranks."""
        if self.size > 1:
            self.mean([x for model in models for x in model.buffers() if x.is_floating_point()])

    def is_lost(self, fault: RuntimeError) -> bool:
        """Is this what a collective raises where another rank has ended, or never came?"""
        return self.size > 1 and (isinstance(fault, dist.DistError) or "gloo" in str(fault).lower())

    def close(self) -> None:
        if self._began and dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # a rank that is gone
                dist.destroy_process_group()


def _of_rank(fault: Exception, rank: int) -> Exception:
    fault.args = (f"rank {rank}: {fault}",)
    return fault


def wrapped(student: nn.Module, config: Config, ranks: Ranks) -> nn.Module:
    """The student as the ranks train it. The gradient is the mean over the ranks."""
    if config.parallel.sync_batchnorm and ranks.size > 1:
        if ranks.device.type != "cuda":
            raise ConfigFault("parallel.sync_batchnorm works on GPUs only, as torch's SyncBatchNorm does")
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if config.parallel.kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in _blocks(student):
            fully_shard(block)
        fully_shard(student)
        return student
    if ranks.size > 1:
        ddp = nn.parallel.DistributedDataParallel
        # Each rank keeps its own buffers, and they are averaged before they are used.
        old, new = "broadcast_buffers", "forward_sync_buffers"
        buffers = (
            new if new in inspect.signature(ddp).parameters else old
        )  # the old name is deprecated since torch 2.13
        devices = [ranks.device.index] if ranks.device.type == "cuda" else None
        return ddp(student, device_ids=devices, gradient_as_bucket_view=True, **{buffers: False})
    return student


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The children that are sharded on their own: blocks of a few million parameters gather in turn."""
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and any(True for _ in child.parameters()):
            for inner in child.children():
                if any(True for _ in inner.parameters()):
                    yield inner


@contextlib.contextmanager
def no_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of a micro-batch stay on their rank, unless it is the last one of a step."""
    if last:
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
    else:
        yield
