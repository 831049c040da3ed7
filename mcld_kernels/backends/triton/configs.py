"""Launch configurations: block sizes, warps and pipeline stages by architecture, kernel, operand and depth.

The figures were chosen from compile reports (registers, no spills, shared memory, tensor-core instructions) for
sm_80, sm_90 and sm_100 with Triton 3.6.0 and 3.7.1. None of them has been measured on a GPU yet. The tables hold for
every launch, so a cold start tunes nothing; MCLD_AUTOTUNE=1 times the alternatives of the two large kernels instead
(never in the interpreter).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

# Deepest row, after padding, that the flash kernel takes, by kind of operand: its tiles and accumulator are that wide.
FLASH_DEPTH = {"half": 256, "tf32": 128, "tf32x3": 64, "fp64": 256}

# The longest row that `finish` holds in registers, and the least part of a longer one that a program sums.
_WHOLE_ROW = 2048
_LEAST_SPAN = 512
_MOST_SPLITS = 64

# Fewer tiles than this leave multiprocessors idle; an H200 has 132.
_FEW_TILES = 128


class Launch(NamedTuple):
    block_m: int
    block_n: int
    block_k: int = 0
    warps: int = 4
    stages: int = 2


@lru_cache
def architecture(device: torch.device) -> int:
    """Major compute capability: 8 (Ampere, Ada), 9 (Hopper), 10 and above (Blackwell); 0 for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


# (generation, kind of operand, depth): tiles of the flash kernel. Generation 9 is Hopper, 10 is data-centre Blackwell
# where it differs from 9, and 8 is all others, within the 99 KB of shared memory of the smaller ones. Kinds: "half",
# "tf32", "tf32x3".
FLASH = {
    (8, "half", 32): Launch(128, 64, warps=8, stages=3),
    (8, "half", 64): Launch(128, 64, warps=8, stages=3),
    (8, "half", 128): Launch(128, 64, warps=8, stages=3),
    (8, "half", 256): Launch(64, 32, warps=4, stages=2),
    (9, "half", 32): Launch(128, 64, warps=8, stages=3),
    (9, "half", 64): Launch(128, 64, warps=8, stages=3),
    (9, "half", 128): Launch(128, 128, warps=8, stages=2),
    (9, "half", 256): Launch(128, 64, warps=8, stages=2),
    (10, "half", 32): Launch(128, 32, warps=4, stages=3),
    (10, "half", 128): Launch(128, 64, warps=8, stages=2),
    (10, "half", 256): Launch(128, 32, warps=8, stages=2),
    (8, "tf32", 32): Launch(64, 64, warps=4, stages=2),
    (8, "tf32", 64): Launch(64, 32, warps=4, stages=2),
    (8, "tf32", 128): Launch(64, 32, warps=4, stages=2),
    (9, "tf32", 32): Launch(64, 64, warps=4, stages=2),
    (9, "tf32", 64): Launch(64, 64, warps=4, stages=2),
    (9, "tf32", 128): Launch(64, 32, warps=8, stages=2),
    (10, "tf32", 128): Launch(64, 32, warps=4, stages=2),
    (8, "tf32x3", 32): Launch(64, 32, warps=4, stages=2),
    (8, "tf32x3", 64): Launch(64, 16, warps=4, stages=2),
    (9, "tf32x3", 32): Launch(64, 32, warps=4, stages=2),
    (9, "tf32x3", 64): Launch(64, 32, warps=4, stages=2),
    (10, "tf32x3", 64): Launch(64, 16, warps=4, stages=2),
}

# (generation, kind of operand): tiles of the first and the second product of long rows.
PRODUCT = {
    (8, "half"): Launch(128, 128, 32, warps=8, stages=4),
    (9, "half"): Launch(128, 128, 64, warps=8, stages=4),
    (8, "tf32"): Launch(128, 128, 32, warps=8, stages=3),
    (9, "tf32"): Launch(128, 128, 32, warps=8, stages=3),
    (8, "tf32x3"): Launch(128, 64, 32, warps=8, stages=3),
    (9, "tf32x3"): Launch(128, 64, 32, warps=8, stages=3),
}

# What MCLD_AUTOTUNE=1 times besides the tables' rows; what does not fit a GPU is left out there.
FLASH_ALTERNATIVES = (
    Launch(128, 128, warps=8, stages=3),
    Launch(128, 64, warps=8, stages=3),
    Launch(128, 64, warps=4, stages=3),
    Launch(64, 64, warps=4, stages=3),
    Launch(64, 32, warps=4, stages=3),
)
PRODUCT_ALTERNATIVES = (
    Launch(128, 128, 64, warps=8, stages=3),
    Launch(128, 128, 64, warps=4, stages=4),
    Launch(128, 128, 32, warps=4, stages=4),
    Launch(128, 64, 64, warps=4, stages=4),
    Launch(64, 128, 64, warps=4, stages=4),
)

# Kernels along vectors of a batch: block_n entries at a time, of which "scan" compares each with block_m ranks.
VECTORS = {
    "describe": Launch(1, 2048, warps=8),
    "scan": Launch(4, 1024, warps=8),
    "factors": Launch(1, 128, warps=4),
    "totals": Launch(1, 4096, warps=16),
}

# The scan compares every row with every rank; past so many pairs a sort is less work.
_MOST_COMPARED = 1 << 26

# CPU tensors: the interpreter's time goes by the operation, not by the element.
INTERPRETED = Launch(128, 128, 128)


def _kind(dtype: torch.dtype, precision: str) -> str:
    if dtype == torch.float64:
        return "fp64"
    return precision if dtype == torch.float32 else "half"


def _of(table: dict[Any, Launch], device: torch.device, *key: Any) -> Launch:
    """The table's row for the device's generation."""
    major = architecture(device)
    if major == 0:
        return INTERPRETED
    generation = major if major in (9, 10, 11) else 8
    return table[(10, *key) if generation > 9 and (10, *key) in table else (min(generation, 9), *key)]


def flash_depth(dtype: torch.dtype, precision: str) -> int:
    return FLASH_DEPTH[_kind(dtype, precision)]


def flash(device: torch.device, dtype: torch.dtype, precision: str, depth: int, exponent: str) -> Launch:
    launch = _of(FLASH, device, _kind(dtype, precision), depth)
    if exponent == "known" and launch != INTERPRETED:
        # Two more numbers a column: with 128 columns some versions of the compiler spill.
        return launch._replace(block_n=min(launch.block_n, 64))
    return launch


def product(device: torch.device, dtype: torch.dtype, precision: str) -> Launch:
    """Tiles of either product of long rows."""
    return _of(PRODUCT, device, _kind(dtype, precision))


def library_product(dtype: torch.dtype, precision: str, device: torch.device) -> bool:
    """Whether torch.mm is the choice for the second product: on a GPU, unless fp32 must be as accurate as IEEE's."""
    return device.type == "cuda" and precision != "tf32x3"


def rows(device: torch.device, depth: int) -> Launch:
    """Kernels that pass along rows that are contiguous."""
    if architecture(device) == 0:
        return INTERPRETED
    return Launch(8, 128, warps=4) if depth <= 256 else Launch(4, 512, warps=4)


def columns(device: torch.device) -> Launch:
    """Kernels that read or write through a transposed view: neighbours in memory are rows."""
    return INTERPRETED if architecture(device) == 0 else Launch(64, 32, warps=4)


def classes(device: torch.device, depth: int) -> Launch:
    if architecture(device) == 0:
        return Launch(INTERPRETED.block_m, triton.next_power_of_2(depth))
    return Launch(16, 128, warps=4)


def sums(device: torch.device) -> Launch:
    """block_m rows by block_n tiles."""
    return INTERPRETED if architecture(device) == 0 else Launch(32, 32, warps=4)


def vectors(device: torch.device, kernel: str) -> Launch:
    return INTERPRETED if architecture(device) == 0 else VECTORS[kernel]


def scans(n: int, ranks: int) -> bool:
    """Whether rows are put in the order of their ranks by a scan and not by a sort."""
    return n * ranks <= _MOST_COMPARED


def fits_a_row(d: int) -> bool:
    return d <= _WHOLE_ROW


def whole_rows(device: torch.device, d: int) -> Launch:
    """Rows of a tile that holds them whole: block_n >= d."""
    block = max(32, triton.next_power_of_2(d))
    if architecture(device) == 0:
        return Launch(INTERPRETED.block_m, block)
    return Launch(max(1, 1024 // block), block, warps=4 if block <= 1024 else 8)


def span(d: int, block: int) -> int:
    """Columns that a program sums, a multiple of ``block``. By the shape alone, so that a run repeats bitwise."""
    least = max(_LEAST_SPAN, -(-d // _MOST_SPLITS))
    return -(-least // block) * block


def splits(tiles: int, depth: int) -> int:
    """Parts into which the depth of the first product is split: 1 unless its tiles leave most of a GPU idle."""
    return 1 if tiles >= _FEW_TILES else max(1, min(2 * _FEW_TILES // tiles, depth // (2 * _LEAST_SPAN)))


def chunk_rows(rows: int, row_bytes: int, budget: int, multiple: int) -> int:
    """Rows of exponentials within ``budget`` bytes: a multiple of ``multiple``, at least one and at most ``rows``."""
    return min(rows, max(1, budget // (row_bytes * multiple)) * multiple)
