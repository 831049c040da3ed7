"""The matrix instructions: where the PTX ISA puts the elements of each operand, and how tensor cores round.

Products and sums of one instruction are exact here (fp64), and the accumulator is truncated once an instruction, as
tests/csrc_host/emulation.h does and cites.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import Array, toward_zero

_LANE = np.arange(32)[:, None]
_GROUP, _OF_GROUP = _LANE // 4, _LANE % 4


def _as_floats(bits: Array, type_name: str) -> Array:
    """Elements of 16 bits (uint16), or tf32 (uint32), as fp64."""
    if type_name == "tf32":
        # The low 13 bits are not read.
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if type_name == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _accumulators(columns: int) -> tuple[Array, Array]:
    """Row and column of d[i] in each lane: m16n8 and, in a warp's 16 rows, m64nN."""
    i = np.arange(columns // 2)
    return _GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * _OF_GROUP + i % 2


def _left(type_name: str) -> tuple[Array, Array]:
    """Row and k of each element of A in a lane: m16k16 of 16 bits, or m16k8 of tf32."""
    if type_name == "tf32":
        i = np.arange(4)
        return _GROUP + 8 * (i % 2), _OF_GROUP + 4 * (i // 2)
    i = np.arange(8)
    return _GROUP + 8 * (i // 2 % 2), 2 * _OF_GROUP + i % 2 + 8 * (i // 4)


def _right(type_name: str) -> tuple[Array, Array]:
    """k and column of each element of B in a lane: k16n8 of 16 bits, or k8n8 of tf32."""
    if type_name == "tf32":
        return _OF_GROUP + 4 * np.arange(2), np.broadcast_to(_GROUP, (32, 2))
    i = np.arange(4)
    return 2 * _OF_GROUP + i % 2 + 8 * (i // 2), np.broadcast_to(_GROUP, (32, 4))


def _elements(registers: tuple[Array, ...], type_name: str) -> Array:
    """(warps, 32, elements of a lane) of registers of 32 bits, the low half first."""
    words = np.stack(registers, -1)
    if type_name != "tf32":
        words = words.view(np.uint16)
    return _as_floats(words, type_name).reshape(-1, 32, words.shape[-1])


def _scatter(elements: Array, places: tuple[Array, Array], shape: tuple[int, int]) -> Array:
    """(warps, *shape) from the elements of the lanes."""
    whole = np.empty((len(elements), *shape))
    whole[:, places[0], places[1]] = elements
    return whole


_MMA = {
    name: (_left(name), _right(name), _accumulators(8), 8 if name == "tf32" else 16) for name in ("bf16", "f16", "tf32")
}
_SHAPES = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}


def mma(shape: str, type_name: str, a: tuple[Array, ...], b: tuple[Array, ...], c: tuple[Array, ...]) -> Array:
    """mma.sync: d[i] of each lane, (4, lanes)."""
    assert _SHAPES[type_name] == shape
    left, right, sums, depth = _MMA[type_name]
    product = _scatter(_elements(a, type_name), left, (16, depth)) @ _scatter(
        _elements(b, type_name), right, (depth, 8)
    )
    total = product[:, sums[0], sums[1]].reshape(-1, 4) + np.stack(c, -1)
    return np.ascontiguousarray(toward_zero(total).T)


def ldmatrix(block: Any, address: Array, count: int, transposed: bool) -> Array:
    """ldmatrix: lane l gives the address of row l % 8 of matrix l / 8; (count, lanes) registers."""
    of_rows = address.reshape(-1, 32)[:, : 8 * count]
    rows = np.stack(block.load_shared(of_rows, np.uint32, 4, None), -1)  # (warps, 8 count, 4) of 32 bits
    matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)  # warp, matrix, row, column
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    pairs = matrices[:, :, _GROUP, 2 * _OF_GROUP + np.arange(2)]  # warp, matrix, lane, pair
    registers = np.ascontiguousarray(pairs).view(np.uint32)[..., 0]
    return np.ascontiguousarray(registers.swapaxes(0, 1)).reshape(count, -1)


def stmatrix(block: Any, address: Array, registers: tuple[Array, ...], transposed: bool) -> None:
    """stmatrix: the converse of `ldmatrix`."""
    count = len(registers)
    pairs = np.stack(registers, 0).reshape(count, -1, 32, 1).view(np.uint16)  # matrix, warp, lane, pair
    matrices = np.empty((pairs.shape[1], count, 8, 8), np.uint16)
    matrices[:, :, _GROUP, 2 * _OF_GROUP + np.arange(2)] = pairs.swapaxes(0, 1)
    if transposed:
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
    words = matrices.view(np.uint32).reshape(-1, 8 * count, 4)
    of_rows = address.reshape(-1, 32)[:, : 8 * count]
    block.store_shared(of_rows, tuple(words[..., i] for i in range(4)), np.uint32, None)


def swizzled(address: Array, row_bytes: int = 128) -> Array:
    """The swizzle of rows of 128, 64 or 32 bytes: 3, 2 or 1 bits from bit 4 on are changed by as many from bit 7 on."""
    return address ^ ((address >> 7 & row_bytes // 16 - 1) << 4)


_SWIZZLED_ROWS = {1: 128, 2: 64, 3: 32}  # bytes, by the field of a descriptor


def _fields(descriptor: int) -> tuple[int, int, int, int]:
    """Bytes of a swizzled row; start address, leading and stride offset in bytes, of "Matrix Descriptor Format"."""
    if descriptor >> 62 not in _SWIZZLED_ROWS:
        raise NotImplementedError("a descriptor without a swizzle")
    if descriptor >> 49 & 7:
        raise NotImplementedError("a descriptor with a base offset")
    return _SWIZZLED_ROWS[descriptor >> 62], *((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))  # type: ignore[return-value]


def _operand(block: Any, descriptor: int, rows: int, across: bool, type_name: str) -> Array:
    """(rows, depth) of an operand in shared memory: its contraction runs along the swizzled rows, or across them."""
    row_bytes, start, leading, stride = _fields(descriptor)
    size, depth = (4, 8) if type_name == "tf32" else (2, 16)
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if across:
        columns = row_bytes // size
        address = start + row // columns * leading + row % columns * size + k // 8 * stride + k % 8 * row_bytes
    else:
        address = start + row // 8 * stride + row % 8 * row_bytes + k * size
    word = np.uint32 if size == 4 else np.uint16
    return _as_floats(block.load_shared(swizzled(address, row_bytes), word, 1, None)[0], type_name)


def wgmma(
    block: Any,
    a: tuple[Array, ...] | int,
    b: int,
    d: Array | None,
    columns: int,
    across: tuple[bool, bool],
    type_name: str,
) -> Array:
    """wgmma.mma_async of one warpgroup: (columns / 2, 128) sums; d: those before, or None for zeros.

    a: registers, or a descriptor, as b is. across: whether the contraction of each runs across its rows.
    """
    depth = 8 if type_name == "tf32" else 16
    if isinstance(a, tuple):
        left = _scatter(_elements(a, type_name), _left(type_name), (16, depth)).reshape(64, depth)
    else:
        left = _operand(block, a, 64, across[0], type_name)
    product = (left @ _operand(block, b, columns, across[1], type_name).T).reshape(4, 16, columns)
    row, column = _accumulators(columns)
    total = product[:, row, column].reshape(128, -1).T
    return toward_zero(total if d is None else total + d)
