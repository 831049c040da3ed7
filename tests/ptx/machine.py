"""A block of threads that runs a kernel's PTX: its scheduler, its memory, its copies and barriers.

The blocks of a cluster take turns, each until all of its threads wait.

All threads at the same place run together, and the place that comes first in the text goes first, so that threads that
have gone different ways meet again. As late as a GPU may be: an asynchronous copy fills its target with NaN when it is
issued and delivers when it is waited for, and wgmma reads and writes when its group is waited for.

Addresses of global memory are those of this process. A vector access that is not aligned, an address outside shared
memory, and threads that wait for one another are errors.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import matrix
from .arithmetic import Array, put
from .program import Kernel
from .translate import Step, compile_block

_FIRST = 4096  # the address at which the views of this process's memory begin
_BYTES = (1 << 47) - (1 << 16)
_memory = np.frombuffer((ctypes.c_uint8 * _BYTES).from_address(_FIRST), np.uint8)
_MEMORY = {size: _memory.view(f"u{size}") for size in (1, 2, 4, 8)}
# A kernel of csrc/ asks for dynamic shared memory that is aligned to 128 bytes, and here it gets no more.
_SHARED_BASE = 1024 + 384
_BOX_COLUMNS, _BOX_ROW_BYTES = 64, 128
# In a cluster, addresses of shared memory have the rank of its block above these bits, a block's own addresses as well:
# so the code that nvcc makes for sm_90a has them.
_RANK_SHIFT = 24


class Fault(RuntimeError):
    """Something that a GPU would leave undefined, or stop at."""


@dataclass(slots=True)
class _Barrier:
    """An mbarrier."""

    expected: int
    pending: int
    bytes: int = 0  # that were announced and have not come
    phase: int = 0  # phases that have ended
    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)  # shared address, map, column, row

    def complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.expected


@dataclass(slots=True)
class _Queue:
    """The wgmma of a warpgroup."""

    open: list[Callable[[list], None]] = field(default_factory=list)
    groups: deque[list[Callable[[list], None]]] = field(default_factory=deque)


class Program:
    """A kernel with its compiled blocks."""

    def __init__(self, kernel: Kernel, shared_base: int = _SHARED_BASE):
        self.kernel, self.shared_base = kernel, shared_base
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self._steps: dict[tuple[int, bool], Step] = {}

    def step(self, number: int, all_lanes: bool) -> Step:
        if (number, all_lanes) not in self._steps:
            self._steps[number, all_lanes] = compile_block(self.kernel, number, all_lanes)
        return self._steps[number, all_lanes]

    def run(self, grid: tuple[int, int], threads: int, shared_bytes: int, parameters: bytes) -> None:
        """Run every block of the grid, one after another, those of a cluster together."""
        if len(parameters) != self.kernel.parameter_bytes:
            raise Fault(f"{len(parameters)} bytes of parameters, not {self.kernel.parameter_bytes}")
        size = self.kernel.cluster
        if grid[0] % size:
            raise Fault(f"a grid of {grid[0]} blocks is not whole clusters of {size}")
        for y in range(grid[1]):
            for first in range(0, grid[0], size):
                places = [(x, y) for x in range(first, first + size)]
                with np.errstate(all="ignore"):
                    run_cluster([ThreadBlock(self, at, grid, threads, shared_bytes, parameters) for at in places])


def _in_block(address: Any, rank: Any) -> Any:
    """The same place of shared memory in block ``rank``."""
    return address & ((1 << _RANK_SHIFT) - 1) | rank << _RANK_SHIFT


def run_cluster(blocks: list[ThreadBlock]) -> None:
    """Run blocks that reach each other's shared memory, each in its turn until all of its threads wait."""
    for rank, block in enumerate(blocks):
        block.cluster, block.rank = blocks, rank
        block.shared_base = _in_block(block.shared_base, rank)
    running = {block: block.turns() for block in blocks}
    while running:
        before = sum(block.steps for block in blocks)
        for block, turns in list(running.items()):
            try:
                next(turns)
            except StopIteration:
                block.has_ended = True
                del running[block]
        if running and sum(block.steps for block in blocks) == before:
            raise Fault("deadlock: " + "; ".join(f"threads wait at {block.shown()}" for block in running))
    for block in blocks:
        if any(barrier.boxes for barrier in block.barriers.values()):
            raise Fault("a block ended with loads in flight")


class ThreadBlock:
    """One block of the grid."""

    def __init__(
        self,
        program: Program,
        place: tuple[int, int],
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        parameters: bytes,
    ):
        self.program, self.threads = program, threads
        self.tid = np.arange(threads, dtype=np.uint32)
        self.laneid = self.tid % np.uint32(32)
        self.ctaid_x, self.ctaid_y = (np.uint32(index) for index in place)
        self.nctaid_x, self.nctaid_y = (np.uint32(size) for size in grid)
        # Parameters lie at an address of their own, aligned as a tensor map asks.
        self._parameters = np.empty(len(parameters) + 128, np.uint8)
        begin = -self._parameters.ctypes.data % 128
        self._parameters = self._parameters[begin : begin + len(parameters)]
        self._parameters[:] = np.frombuffer(parameters, np.uint8)
        self.parameter_address = np.uint64(self._parameters.ctypes.data)
        self.shared_base, self.shared_bytes = program.shared_base, shared_bytes
        size = (shared_bytes + 7) // 8 * 8
        shared = np.full(size, 0xFF, np.uint8)
        self._shared = {bytes_: shared.view(f"u{bytes_}") for bytes_ in (1, 2, 4, 8)}
        empty = {"pred": np.bool_(True), "f32": np.float32(np.nan)}
        dtypes = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
        fills = {
            kind: np.full(threads, value, value.dtype)
            for kind, value in {**empty, **{kind: np.iinfo(t).max - t(0) for kind, t in dtypes.items()}}.items()
        }
        self.registers = [fills[kind] for kind in program.kernel.registers.values()]
        self.barriers: dict[int, _Barrier] = {}
        self._queues: dict[int, _Queue] = {}
        # Copies under way: their size; lanes, group, target, source and bytes to read of each.
        self._copies: list[tuple[int, tuple[Array, ...]]] = []
        self._committed = np.zeros(threads, np.int64)  # groups of each thread
        self.cluster, self.rank, self.has_ended = [self], 0, False
        self.steps = 0  # basic blocks that were run
        self._at: dict[int, Array] = {}
        self._met = np.zeros(threads, np.int64)  # arrivals of each thread at the barrier of the cluster

    # --- the scheduler

    def turns(self) -> Iterator[None]:
        """Run to the end; a turn ends where all threads wait."""
        blocks = self.program.kernel.blocks
        every = np.arange(self.threads)
        at = self._at = {0: every}
        while at:
            for number in sorted(at):
                lanes = self._ready(number, at[number])
                if len(lanes):
                    break
            else:
                yield
                continue
            self.steps += 1
            if len(lanes) == len(at[number]):
                del at[number]
            else:
                at[number] = np.setdiff1d(at[number], lanes)
            is_all = len(lanes) == self.threads
            if blocks[number].instructions:
                target, taken = self.program.step(number, is_all)(self, self.registers, every if is_all else lanes)
            else:
                target, taken = number + 1, None
            parts = [(target, lanes)] if taken is None else [(target, lanes[taken]), (number + 1, lanes[~taken])]
            for place, part in parts:
                if place >= 0 and len(part):
                    at[place] = np.union1d(at[place], part) if place in at else part
        if any(queue.open or queue.groups for queue in self._queues.values()):
            raise Fault("a block ended with wgmma in flight")

    def _ready(self, number: int, lanes: Array) -> Array:
        """The lanes that can run the block now."""
        block = self.program.kernel.blocks[number]
        if not block.instructions:
            return lanes
        first = block.instructions[0]
        if first.opcode == "bar.sync":
            if first.operands != ("0",):
                raise NotImplementedError(str(first))
            return lanes if len(lanes) == self.threads else lanes[:0]
        if first.opcode.startswith("mbarrier.try_wait"):
            address, parity = (
                self.registers[self.program.index[operand.strip("[ ]")]][lanes] for operand in first.operands[1:]
            )
            return lanes[[self._phase_ended(int(a), int(p)) for a, p in zip(address, parity, strict=True)]]
        if first.opcode.startswith("barrier.cluster.wait"):
            behind = min(block._met.min() for block in self.cluster)
            return lanes[self._met[lanes] <= behind]
        together = block.lanes_together
        if together > 1 and len(lanes) < self.threads:
            counts = np.bincount(lanes // together, minlength=self.threads // together)
            lanes = lanes[counts[lanes // together] == together]
        return lanes

    def shown(self) -> str:
        blocks = self.program.kernel.blocks
        return "; ".join(f"{len(lanes)} before {blocks[number].instructions[0]}" for number, lanes in self._at.items())

    def spread(self, value: Any, lanes: Array | None) -> Array:
        """A value of each lane, from one of all."""
        count = self.threads if lanes is None else len(lanes)
        return np.array(np.broadcast_to(value, (count,)))

    # --- memory

    def load_param(self, address: Any, dtype: type, count: int, lanes: Array | None) -> list[Array]:
        size = np.dtype(dtype).itemsize
        bytes_ = np.asarray(address)[..., None] + np.arange(size * count, dtype=np.uint64)
        values = self._parameters[bytes_].view(dtype)
        return [values[..., i].copy() for i in range(count)]

    @staticmethod
    def _indices(address: Array, size: int, count: int) -> Array:
        if (address % np.uint64(size * count)).any():
            raise Fault(f"an access of {size * count} bytes at a misaligned address")
        return address // np.uint64(size)

    def load_global(self, address: Array, dtype: type, count: int, lanes: Array | None) -> list[Array]:
        size = np.dtype(dtype).itemsize
        index = self._indices(address, size, count) - np.uint64(_FIRST // size)
        return [_MEMORY[size][index + np.uint64(i)].view(dtype) for i in range(count)]

    def store_global(self, address: Array, values: tuple[Array, ...], dtype: type, lanes: Array | None) -> None:
        size = np.dtype(dtype).itemsize
        index = self._indices(address, size, len(values)) - np.uint64(_FIRST // size)
        for i, value in enumerate(values):
            _MEMORY[size][index + np.uint64(i)] = np.asarray(value).view(f"u{size}")

    def _shared_indices(self, address: Array, size: int, count: int) -> Array:
        # A descriptor's addresses have no rank.
        offset = _in_block(np.asarray(address).astype(np.int64), self.rank) - self.shared_base
        if offset.size and (offset.min() < 0 or offset.max() + size * count > self.shared_bytes):
            raise Fault("an address outside shared memory")
        return self._indices(offset.astype(np.uint64), size, count)

    def load_shared(self, address: Array, dtype: type, count: int, lanes: Array | None) -> list[Array]:
        size = np.dtype(dtype).itemsize
        index = self._shared_indices(address, size, count)
        return [self._shared[size][index + np.uint64(i)].view(dtype) for i in range(count)]

    def store_shared(self, address: Array, values: tuple[Array, ...], dtype: type, lanes: Array | None) -> None:
        size = np.dtype(dtype).itemsize
        index = self._shared_indices(address, size, len(values))
        for i, value in enumerate(values):
            self._shared[size][index + np.uint64(i)] = np.asarray(value).view(f"u{size}")

    # --- cp.async

    def copy_async(self, shared: Array, source: Array, size: int, read: Array, lanes: Array | None) -> None:
        """cp.async of ``size`` bytes, of which the first ``read`` (0 or all) are read and the others are 0."""
        every = np.arange(self.threads) if lanes is None else lanes
        read = np.broadcast_to(read, every.shape)
        if ((read != 0) & (read != size)).any():
            raise NotImplementedError("a part of a copy")
        self.store_shared(shared, (np.uint32(0xFFFFFFFF),) * (size // 4), np.uint32, lanes)
        self._indices(source[read > 0], size, 1)
        self._copies.append((size, (every, self._committed[every], shared, source, read)))

    def commit_copies(self, lanes: Array | None) -> None:
        self._committed[slice(None) if lanes is None else lanes] += 1

    def wait_copies(self, pending: int, lanes: Array | None) -> None:
        waiting = np.zeros(self.threads, bool)
        waiting[slice(None) if lanes is None else lanes] = True
        rest = []
        for size, copies in self._copies:
            of, group = copies[:2]
            due = waiting[of] & (group < self._committed[of] - pending)
            shared, source, read = (x[due] for x in copies[2:])
            if (filled := read > 0).any():
                values = self.load_global(source[filled], np.uint32, size // 4, None)
                self.store_shared(shared[filled], tuple(values), np.uint32, None)
            if not filled.all():
                self.store_shared(shared[~filled], (np.uint32(0),) * (size // 4), np.uint32, None)
            if not due.all():
                rest.append((size, tuple(x[~due] for x in copies)))
        self._copies = rest

    # --- mbarriers and TMA

    def barrier_init(self, address: Array, arrivals: Array) -> None:
        for a, n in zip(address.tolist(), np.broadcast_to(arrivals, address.shape).tolist(), strict=True):
            self.barriers[a] = _Barrier(expected=n, pending=n)

    def address_in_cluster(self, address: Array, rank: Array) -> Array:
        """mapa: the address of the same place in block ``rank``."""
        if np.max(rank) >= len(self.cluster):
            raise Fault("a block that the cluster does not have")
        return _in_block(address, rank)

    def arrive_at_cluster(self, lanes: Array | None) -> None:
        self._met[slice(None) if lanes is None else lanes] += 1

    def _block_of(self, rank: int) -> ThreadBlock:
        if rank >= len(self.cluster):
            raise Fault("a block that the cluster does not have")
        if self.cluster[rank].has_ended:
            raise Fault("a barrier of a block that has ended")
        return self.cluster[rank]

    def _barrier(self, address: int) -> _Barrier:
        barriers = self._block_of(address >> _RANK_SHIFT).barriers
        if address % 8 or address not in barriers:
            raise Fault("a barrier that is misaligned or was not initialised")
        return barriers[address]

    def barrier_arrive(self, address: Array, bytes_: Array | int) -> None:
        for a, n in zip(address.tolist(), np.broadcast_to(bytes_, address.shape).tolist(), strict=True):
            barrier = self._barrier(a)
            if barrier.pending == 0:
                raise Fault("more arrivals than a barrier expects")
            barrier.pending -= 1
            barrier.bytes += n
            barrier.complete()

    def _phase_ended(self, address: int, parity: int) -> bool:
        barrier = self._barrier(address)
        for box in barrier.boxes:
            barrier.bytes -= self._deliver(*box)
        if barrier.boxes:
            barrier.boxes.clear()
            barrier.complete()
        return barrier.phase & 1 != parity

    def load_box(
        self, shared: Array, map_address: Array, column: Array, row: Array, barrier: Array, blocks: Array | None
    ) -> None:
        """A box of a tensor map, to this block or to those whose bits are set in ``blocks``.

        The map is that of tests/csrc_host/emulation_sm90.h.
        """
        mask = 1 << self.rank if blocks is None else int(np.max(blocks))
        for rank in range(mask.bit_length()):
            if mask >> rank & 1:
                self._block_of(rank)._take_box(shared, map_address, column, row, barrier)

    def _take_box(self, shared: Array, map_address: Array, column: Array, row: Array, barrier: Array) -> None:
        arrays = (np.broadcast_to(x, shared.shape).tolist() for x in (map_address, column, row, barrier))
        for s, m, c, r, b in zip(shared.tolist(), *arrays, strict=True):
            if s % 1024:
                raise Fault("a box that does not begin at a period of the swizzle")
            s, b = _in_block(s, self.rank), _in_block(b, self.rank)
            *_, box_rows = self._map(m)
            every = s + 4 * np.arange(box_rows * _BOX_ROW_BYTES // 4)
            self.store_shared(every, (np.uint32(0xFFFFFFFF),), np.uint32, None)
            self._barrier(b).boxes.append((s, m, c, r))

    def _map(self, address: int) -> tuple[int, int, int, int]:
        """The address of a matrix of 16-bit elements, its rows and pitch, and the rows of a box."""
        first = (address - _FIRST) // 8
        matrix_address, rows, pitch, box_rows = (int(word) for word in _MEMORY[8][first : first + 4])
        return matrix_address, rows, pitch, box_rows & 0xFFFFFFFF

    def _deliver(self, shared: int, map_address: int, column: int, row: int) -> int:
        """Copy a box, zeros outside of the matrix; returns its bytes."""
        first, rows, pitch, box_rows = self._map(map_address)
        r, c = row + np.arange(box_rows)[:, None], column + np.arange(_BOX_COLUMNS)[None, :]
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < pitch)
        source = first + 2 * (np.where(inside, r, 0) * pitch + np.where(inside, c, 0))
        (values,) = self.load_global(source.astype(np.uint64), np.uint16, 1, None)
        target = shared + (r - row) * _BOX_ROW_BYTES + (c - column) * 2
        self.store_shared(matrix.swizzled(target), (np.where(inside, values, np.uint16(0)),), np.uint16, None)
        return int(box_rows) * _BOX_ROW_BYTES

    # --- wgmma

    def _warpgroups(self, lanes: Array | None) -> list[int]:
        every = np.arange(self.threads) if lanes is None else lanes
        return np.unique(every // 128).tolist()

    def _queue(self, warpgroup: int) -> _Queue:
        return self._queues.setdefault(warpgroup, _Queue())

    def issue_product(
        self,
        sums: list[int],
        a: Any,
        b: Array,
        add: Array,
        across: tuple[bool, bool],
        type_name: str,
        lanes: Array | None,
    ) -> None:
        """wgmma of every warpgroup among the lanes; it runs when its group is waited for."""
        for place, warpgroup in enumerate(self._warpgroups(lanes)):
            own = slice(128 * place, 128 * place + 128)
            descriptors = [x[own] for x in ([b] if isinstance(a, tuple) else [a, b])]
            if any((x != x[0]).any() for x in (*descriptors, add[own])):
                raise Fault("threads of a warpgroup issue different wgmma")
            left = tuple(x[own].copy() for x in a) if isinstance(a, tuple) else int(a[own][0])
            right, accumulate = int(b[own][0]), bool(add[own][0])
            of = slice(128 * warpgroup, 128 * warpgroup + 128)

            def product(registers: list, left=left, right=right, accumulate=accumulate, of=of) -> None:
                before = np.stack([registers[i][of].view(np.float32) for i in sums]) if accumulate else None
                after = matrix.wgmma(self, left, right, before, 2 * len(sums), across, type_name)
                for i, values in zip(sums, after, strict=True):
                    registers[i] = put(registers[i], of, values.view(registers[i].dtype))  # type: ignore[arg-type]

            self._queue(warpgroup).open.append(product)

    def commit_products(self, lanes: Array | None) -> None:
        for warpgroup in self._warpgroups(lanes):
            queue = self._queue(warpgroup)
            queue.groups.append(queue.open)
            queue.open = []

    def wait_products(self, pending: int, lanes: Array | None, registers: list) -> None:
        for warpgroup in self._warpgroups(lanes):
            queue = self._queue(warpgroup)
            while len(queue.groups) > pending:
                for product in queue.groups.popleft():
                    product(registers)
