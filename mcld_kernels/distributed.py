"""Every collective of the losses over ranks: the exchange that begins a call, gathers, sums and the ring.

A rank is a process of a `torch.distributed` process group. Rank r holds ``sizes[r]`` rows of the global batch, in the
order of the ranks. Every rank runs the same collectives in the same order, whatever its rows and labels are; they all
go through `_run`, which counts them for `count_collectives` and explains their failures.

A call begins with an *exchange*, an all-gather of four integers a rank: status, rows, and a digest of everything
that must be the same on all ranks. A rank that has refused its arguments takes part in it too (`report`), so that all
ranks raise together, and only then are texts exchanged that say who differs in what.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .options import check_flag, is_readable

Gather = Literal["all", "ring"]
GATHERS: tuple[Gather, ...] = ("all", "ring")

_AGREED, _REFUSED = 1, 2  # the status of a rank in an exchange
_INTEGERS = 4  # of an exchange: status, rows and two halves of the digest
_TEXT_BYTES = 4096  # of a text that is exchanged after a failure
_ROLL_CALL_S = 5.0  # how long a failed collective waits for word of the other ranks
_COUNTED: ContextVar[list[Collective] | None] = ContextVar("mcld_kernels_collectives", default=None)


class RanksOptions(NamedTuple):
    """How a call runs over ranks: plain values, so that they can be arguments of an operator."""

    group: str  # the name of the process group
    gather: Gather
    even: bool


class Collective(NamedTuple):
    """One collective: what it was, and the bytes that each rank receives at least."""

    kind: str
    num_bytes: int


@contextlib.contextmanager
def count_collectives() -> Iterator[list[Collective]]:
    """List the collectives that this process runs inside, in order; received bytes as in docs/distributed.md."""
    counted: list[Collective] = []
    token = _COUNTED.set(counted)
    try:
        yield counted
    finally:
        _COUNTED.reset(token)


def ranks_options(process_group: Any, gather: Any, even: Any) -> RanksOptions | None:
    """Check how a call is to run over ranks. None for ``process_group=None``, one process."""
    if process_group is None and gather == "all" and even is False:
        return None  # the usual call, and the cheapest
    if gather not in GATHERS:
        raise ValueError(f"gather must be one of {', '.join(map(repr, GATHERS))}; got {gather!r}")
    if even is not False:
        check_flag("even", even)
    if process_group is None:
        return None
    if isinstance(process_group, str):
        return RanksOptions(process_group, gather, even)
    remedy = "pass a torch.distributed.ProcessGroup, its name, or None"
    if type(process_group).__name__ == "DeviceMesh":
        remedy = "pass the group of one of its dimensions, as in mesh.get_group('dp')"
    if not dist.is_available():
        raise ValueError("process_group: this torch was built without torch.distributed; pass None")
    if not isinstance(process_group, dist.ProcessGroup):
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group: this process is not a member of it; only members may compute the loss")
        raise TypeError(f"process_group of type {type(process_group).__name__}: {remedy}")
    return RanksOptions(process_group.group_name, gather, even)


def resolve(name: str) -> dist.ProcessGroup:
    """The process group of this name. Raises ValueError where this process has none."""
    from torch._C._distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"process_group: this process has no group named {name!r}. Make the group before the first call; a module "
            "that was copied or unpickled in another process keeps the name alone: assign module.process_group"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of one call, after its exchange."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]  # rows of each rank
    gather: Gather
    poison: Tensor | None = None  # () 1, or NaN if ranks disagree; None where that has been checked on the host

    @property
    def count(self) -> int:
        """The number of ranks."""
        return len(self.sizes)

    @property
    def total(self) -> int:
        """Rows of the global batch."""
        return sum(self.sizes)

    @property
    def is_even(self) -> bool:
        """True if all ranks hold the same number of rows."""
        return len(set(self.sizes)) == 1

    def rows(self, rank: int) -> slice:
        """The rows of the global batch that a rank holds."""
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    @property
    def own(self) -> slice:
        """The rows of the global batch that this rank holds."""
        return self.rows(self.rank)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows x (own rows, ...) of all ranks: (total, ...), into ``out`` if it is given; both contiguous.

        One all-gather. Unequal numbers of rows travel padded to the largest, through two transient copies.
        """
        if out is None:
            out = x.new_empty(self.total, *x.shape[1:])
        if self.is_even:
            self._all_gather(out, x)
            return out
        largest = max(self.sizes)
        padded = x.new_zeros(largest, *x.shape[1:])
        padded[: x.shape[0]] = x
        everything = x.new_empty(self.count * largest, *x.shape[1:])
        self._all_gather(everything, padded)
        for rank, size in enumerate(self.sizes):
            out[self.rows(rank)] = everything[rank * largest : rank * largest + size]
        return out

    def _all_gather(self, out: Tensor, x: Tensor) -> None:
        num_bytes = out.nbytes - x.nbytes
        # As bytes: not every version of every backend knows every dtype.
        _run("all-gather", num_bytes, self.group, _all_gather_single, _as_bytes(out), _as_bytes(x), group=self.group)

    def all_reduce(self, x: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
        """Reduce a contiguous x of one shape on all ranks, in place; returns it."""
        kind = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
        num_bytes = 2 * x.nbytes * (self.count - 1) // self.count
        _run("all-reduce", num_bytes, self.group, dist.all_reduce, x, op=kind, group=self.group)
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum over ranks of x (total, ...), this rank's rows of it: (own rows, ...)."""
        largest = max(self.sizes)
        if not self.is_even:
            padded = x.new_zeros(self.count * largest, *x.shape[1:])
            for rank, size in enumerate(self.sizes):
                padded[rank * largest : rank * largest + size] = x[self.rows(rank)]
            x = padded
        out = x.new_empty(largest, *x.shape[1:])
        num_bytes = out.nbytes * (self.count - 1)
        _run("reduce-scatter", num_bytes, self.group, _reduce_scatter_single, out, x.contiguous(), group=self.group)
        return out[: self.sizes[self.rank]]

    def ring(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The blocks of all ranks, one shape, as (rank, block), own block first.

        The next block arrives while the caller works on this one. Two blocks are held, of which ``block`` is one: it
        is overwritten.
        """
        spare = None
        for step in range(self.count):
            is_last = step == self.count - 1
            incoming = None
            if not is_last:
                spare = torch.empty_like(block) if spare is None else spare
                incoming = self.shift(block, spare)
            yield (self.rank - step) % self.count, block
            if incoming is not None:
                incoming.wait()
                block, spare = incoming.received, block

    def ring_sum(self, parts: Iterable[Tensor]) -> Tensor:
        """Sums over ranks that end at their owners: ``parts`` are this rank's, in the order of `ring`, one shape."""
        total, incoming = None, None
        for part in parts:
            total = part
            if incoming is not None:
                incoming.wait()
                total = part.add_(incoming.received)
            incoming = self.shift(total, torch.empty_like(total))
        assert incoming is not None
        incoming.wait()
        return incoming.received

    def shift(self, x: Tensor, received: Tensor) -> Shift:
        """Begin to send x to the next rank, and to receive from the one before."""
        peers = ((self.rank + 1) % self.count, (self.rank - 1) % self.count)
        after, before = (dist.get_global_rank(self.group, peer) for peer in peers)
        operations = [
            dist.P2POp(dist.isend, _as_bytes(x), after, self.group),
            dist.P2POp(dist.irecv, _as_bytes(received), before, self.group),
        ]
        works = _run("shift", x.nbytes, self.group, dist.batch_isend_irecv, operations)
        return Shift(group=self.group, works=works, sent=x, received=received)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A transfer under way."""

    group: dist.ProcessGroup
    works: list[Any]
    sent: Tensor  # kept until it has been sent
    received: Tensor

    def wait(self) -> None:
        """Wait until both tensors may be used: the host on a CPU, the current stream on a GPU."""
        with _explained("shift", self.group):
            for work in self.works:
                work.wait()


def _all_gather_single(*args: Any, **kw: Any) -> Any:
    # The new name of torch 2.13.
    return getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(*args, **kw)


def _reduce_scatter_single(*args: Any, **kw: Any) -> Any:
    return getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(*args, **kw)


def _as_bytes(x: Tensor) -> Tensor:
    assert x.is_contiguous()
    # The stride of a single number may be any, which a view as another dtype refuses.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def _run(
    kind: str, num_bytes: int, group: dist.ProcessGroup, collective: Callable[..., Any], /, *args: Any, **kw: Any
) -> Any:
    """Run a collective: all of them pass here."""
    counted = _COUNTED.get()
    if counted is not None:
        counted.append(Collective(kind, num_bytes))
    with _explained(kind, group):
        return collective(*args, **kw)


@contextlib.contextmanager
def _explained(kind: str, group: dist.ProcessGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        rank, count = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(
            f"mcld_kernels: {kind} over process group {group.group_name!r} failed on rank {rank} of {count}; "
            f"{_absent_ranks(group)}. The backend says: {error}"
        ) from error


def _absent_ranks(group: dist.ProcessGroup) -> str:
    """Call the roll after a failure: every survivor leaves a mark in the store. Best effort, in bounded time."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    try:
        store = dist.distributed_c10d._get_default_store()
        mark = f"mcld_kernels/failed/{group.group_name}/"
        store.set(mark + str(rank), "1")
        absent = set(range(count)) - {rank}
        end = time.monotonic() + _ROLL_CALL_S
        while absent and time.monotonic() < end:
            absent -= {other for other in absent if store.check([mark + str(other)])}
            if absent:
                time.sleep(0.05)
    except Exception as error:
        return f"the ranks' store does not answer either ({type(error).__name__}): its host, mostly rank 0, has ended"
    if not absent:
        return "all ranks report the failure, none is known to have ended"
    names = ", ".join(map(str, sorted(absent)))
    return f"no word within {_ROLL_CALL_S:g} s from rank{'s' * (len(absent) > 1)} {names}: ended, or in other code"


def gather_with_grad(x: Tensor, ranks: Ranks) -> Tensor:
    """`Ranks.all_gather`, differentiable any number of times: its gradient is the sum over ranks at the owner."""
    return _Gather.apply(x, ranks)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_gather(x.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _ReduceScatter.apply(gradient, ctx.ranks), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.reduce_scatter(x.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _Gather.apply(gradient, ctx.ranks), None


def same_on_all_ranks(
    student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None, options: Any, operands: str
) -> dict[str, Any]:
    """The values in which the ranks of a call must agree. options: a NamedTuple; operands: the kernels' own."""
    shown = None if weight is None else weight.tolist() if is_readable(weight) else str(weight.dtype)
    return {
        "classes": student.shape[1],
        "student dtype": str(student.dtype),
        "teacher dtype": str(teacher.dtype),
        "labels": "None" if target is None else "soft" if target.is_floating_point() else "hard",
        "weight tensor": shown,
        **options._asdict(),
        "operands": operands,
    }


def join(options: RanksOptions, rows: int, common: Mapping[str, Any], device: torch.device) -> Ranks:
    """Begin a call: learn the rows of every rank, and raise ValueError on all ranks if they disagree in ``common``.

    even=True on a GPU: nothing is read on the host. Every rank is taken to hold ``rows`` rows, and where ranks disagree
    `Ranks.poison` is NaN.
    """
    group = resolve(options.group)
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    if count == 1:
        return Ranks(group=group, rank=0, sizes=(rows,), gather=options.gather)
    known = {"even": options.even, "gather": options.gather, **common}
    text = json.dumps(known | {"rows": rows} if options.even else known, default=str)
    integers = (_AGREED, rows, *_digest(text))
    where = _exchange_device(group, options.even, device)
    if not _is_read(options.even, where):
        mine = _integers_on(where, integers)
        everything = mine.new_empty(count * _INTEGERS)
        _exchange(group, everything, mine)
        agree = (everything.view(count, _INTEGERS) == mine).all()
        poison = torch.where(agree, 1.0, torch.nan)
        return Ranks(group=group, rank=rank, sizes=(rows,) * count, gather=options.gather, poison=poison)
    if where.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot capture the exchange of the ranks' numbers of rows: pass even=True, which says that "
            "all ranks hold the same number"
        )
    mine = torch.tensor(integers, dtype=torch.int64, device=where)
    everything = mine.new_empty(count * _INTEGERS)
    _exchange(group, everything, mine)
    table = everything.view(count, _INTEGERS).tolist()
    if any(row[0] != _AGREED or row[2:] != table[rank][2:] for row in table):
        texts = _exchange_texts(group, text, where)
        _raise_disagreement([row[0] == _REFUSED for row in table], texts)
    return Ranks(group=group, rank=rank, sizes=tuple(row[1] for row in table), gather=options.gather)


def report(options: RanksOptions | None, error: Exception) -> None:
    """Take part in the exchange of a call whose arguments this rank has refused, so that all ranks raise.

    The caller raises ``error`` afterwards. Does nothing for one process, and while a program is traced.
    """
    if options is None or torch.compiler.is_compiling() or not dist.is_initialized():
        return
    group = resolve(options.group)
    count = dist.get_world_size(group)
    if count == 1:
        return
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    where = _exchange_device(group, options.even, torch.device("cuda", index))
    mine = torch.tensor((_REFUSED, 0, 0, 0), dtype=torch.int64, device=where)
    everything = mine.new_empty(count * _INTEGERS)
    _exchange(group, everything, mine)
    if _is_read(options.even, where):
        _exchange_texts(group, f"{type(error).__name__}: {error}", where)


def _exchange(group: dist.ProcessGroup, everything: Tensor, mine: Tensor) -> None:
    num_bytes = everything.nbytes - mine.nbytes
    _run("exchange", num_bytes, group, _all_gather_single, everything, mine, group=group)


def _exchange_device(group: dist.ProcessGroup, even: bool, device: torch.device) -> torch.device:
    """The CPU where the group has a backend for it, which spares a synchronization; else the logits' device."""
    cpu = torch.device("cpu")
    if device.type == "cpu":
        return cpu
    is_gloo_alone = dist.get_backend(group) == "gloo"
    return cpu if is_gloo_alone or (not even and cpu in group._device_types) else device


def _is_read(even: bool, device: torch.device) -> bool:
    """True where an exchange on the device is read on the host."""
    return device.type == "cpu" or not even


def _exchange_texts(group: dist.ProcessGroup, text: str, device: torch.device) -> list[str]:
    """The text of every rank."""
    count = dist.get_world_size(group)
    encoded = text.encode()[:_TEXT_BYTES]
    mine = torch.tensor(list(encoded.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8, device=device)
    everything = mine.new_empty(count * _TEXT_BYTES)
    _run("texts", everything.nbytes - mine.nbytes, group, _all_gather_single, everything, mine, group=group)
    texts = bytes(everything.tolist())
    return [texts[i * _TEXT_BYTES : (i + 1) * _TEXT_BYTES].rstrip(b"\0").decode(errors="replace") for i in range(count)]


def _raise_disagreement(refused: list[bool], texts: list[str]) -> None:
    if any(refused):
        rank = refused.index(True)
        raise ValueError(f"process_group: rank {rank} refused its arguments: {texts[rank]}")
    known = [json.loads(text) for text in texts]
    differences = []
    for name in known[0]:
        values = [values_of.get(name) for values_of in known]
        if any(value != values[0] for value in values):
            others = (f"rank {rank} has {value!r}" for rank, value in enumerate(values) if value != values[0])
            differences.append(f"{name}: rank 0 has {values[0]!r}, {', '.join(others)}")
    raise ValueError(f"process_group: the ranks must be called alike, and differ in {'; '.join(differences)}")


@functools.lru_cache(maxsize=256)
def _digest(text: str) -> tuple[int, int]:
    """128 bits as two int64."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:16], "little", signed=True)


@functools.lru_cache(maxsize=256)
def _integers_on(device: torch.device, integers: tuple[int, ...]) -> Tensor:
    """A tensor of these integers, kept: a copy to the device cannot be captured in a CUDA graph."""
    return torch.tensor(integers, dtype=torch.int64, device=device)
