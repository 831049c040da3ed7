"""Launch configurations: block sizes, warps and pipeline stages by architecture, kernel, operand and pitch.

Chosen from compile reports (registers, no spills, shared memory, tensor-core instructions) for sm_80, sm_90 and sm_100
with Triton 3.6.0, 3.7.1 and 3.9.0, and for AMD's gfx942 and gfx950 with 3.7.1; tests/test_triton_compile.py repeats
the reports. The tables hold for every launch, so a cold start times nothing; MCLD_AUTOTUNE=1 times the alternatives of
the kernels with products instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import Tuning
from ...options import float32_precision
from ..gemm import has_gemm

# Unit rows are padded to a multiple of ROWS and, past the pitches of the flash kernel, PITCH columns: every tile of a
# contraction divides them, so no load of an operand needs a mask.
ROWS = 128
PITCH = 128

# The longest padded row that the flash kernel takes, by kind of operand: its tiles and accumulator are that wide.
FLASH_PITCH = {"half": 256, "tf32": 128, "tf32x3": 64, "bf16x3": 64, "ieee": 64, "fp64": 256}

AMD = ("gfx942", "gfx950")  # Instinct MI300 and MI350: 64 and 160 KB of shared memory a block

# input_precision of an fp32 dot at the float32 matmul precisions "highest" and "high". AMD's matrix cores multiply fp32
# as IEEE does, and those of gfx942 alone tf32; three bf16 products keep 16 bits of a mantissa, where tf32 keeps 11.
FLOAT32 = {"gfx942": ("ieee", "tf32"), "gfx950": ("ieee", "bf16x3")}
FLOAT32_NVIDIA = ("tf32x3", "tf32")


class Launch(NamedTuple):
    block_m: int
    block_n: int
    block_k: int = 0
    warps: int = 4
    stages: int = 2


_FALLBACK = {"sm_100": "sm_90", "gfx950": "gfx942"}  # whose rows hold where an architecture has none

# (architecture, kind of operand, pitch): blocks of the flash kernel. "sm_80" serves every architecture without rows of
# its own, so it keeps to the 99 KB of shared memory of sm_86, sm_89 and sm_120.
FLASH = {
    ("sm_80", "half", 32): Launch(128, 64, warps=8, stages=3),
    ("sm_80", "half", 64): Launch(128, 64, warps=8, stages=3),
    ("sm_80", "half", 128): Launch(128, 64, warps=8, stages=3),
    ("sm_80", "half", 256): Launch(64, 32, warps=4, stages=2),
    ("sm_90", "half", 32): Launch(128, 64, warps=8, stages=3),
    ("sm_90", "half", 64): Launch(128, 64, warps=8, stages=3),
    ("sm_90", "half", 128): Launch(128, 128, warps=8, stages=2),
    ("sm_90", "half", 256): Launch(128, 64, warps=8, stages=2),
    ("sm_100", "half", 32): Launch(128, 32, warps=4, stages=3),
    ("sm_100", "half", 128): Launch(128, 64, warps=8, stages=2),
    ("sm_100", "half", 256): Launch(128, 32, warps=8, stages=2),
    ("sm_80", "tf32", 32): Launch(64, 32, warps=4, stages=2),
    ("sm_80", "tf32", 64): Launch(64, 32, warps=4, stages=2),
    ("sm_80", "tf32", 128): Launch(64, 32, warps=4, stages=2),
    ("sm_90", "tf32", 32): Launch(64, 64, warps=4, stages=2),
    ("sm_90", "tf32", 64): Launch(64, 64, warps=4, stages=2),
    ("sm_90", "tf32", 128): Launch(64, 32, warps=8, stages=2),
    ("sm_100", "tf32", 128): Launch(64, 32, warps=4, stages=2),
    ("sm_80", "tf32x3", 32): Launch(64, 32, warps=4, stages=2),
    ("sm_80", "tf32x3", 64): Launch(64, 16, warps=4, stages=2),
    ("sm_90", "tf32x3", 32): Launch(64, 32, warps=4, stages=2),
    ("sm_90", "tf32x3", 64): Launch(64, 32, warps=4, stages=2),
    ("sm_100", "tf32x3", 64): Launch(64, 16, warps=4, stages=2),
    # AMD's compiler gives a lane up to 512 registers; a second stage would halve the waves that hide a load.
    ("gfx942", "half", 32): Launch(128, 64, warps=4, stages=1),
    ("gfx942", "half", 64): Launch(128, 32, warps=4, stages=1),
    ("gfx942", "half", 128): Launch(128, 32, warps=4, stages=1),
    ("gfx942", "half", 256): Launch(64, 32, warps=4, stages=1),
    ("gfx942", "tf32", 32): Launch(64, 64, warps=4, stages=1),
    ("gfx942", "tf32", 64): Launch(64, 32, warps=4, stages=1),
    ("gfx942", "tf32", 128): Launch(64, 32, warps=4, stages=1),
    ("gfx942", "ieee", 32): Launch(64, 64, warps=4, stages=1),
    ("gfx942", "ieee", 64): Launch(64, 32, warps=4, stages=1),
    ("gfx950", "bf16x3", 32): Launch(64, 32, warps=4, stages=1),
    ("gfx950", "bf16x3", 64): Launch(64, 32, warps=4, stages=1),
}

# Rows of their own where an online maximum takes more registers than a fixed shift.
FLASH_ONLINE = {
    ("sm_80", "tf32", 128): Launch(128, 32, warps=8, stages=2),
    ("sm_100", "half", 32): Launch(128, 32, warps=8, stages=3),
    ("sm_100", "tf32", 64): Launch(64, 64, warps=8, stages=2),
}

# (architecture, kind of operand): blocks of either product of the two-product path.
PRODUCT = {
    ("sm_80", "half"): Launch(128, 128, 32, warps=8, stages=4),
    ("sm_90", "half"): Launch(128, 128, 64, warps=8, stages=3),  # two blocks a multiprocessor: 98,304 bytes each
    ("sm_80", "tf32"): Launch(128, 128, 32, warps=8, stages=3),
    ("sm_90", "tf32"): Launch(128, 128, 32, warps=8, stages=3),
    ("sm_80", "tf32x3"): Launch(128, 64, 32, warps=8, stages=3),
    ("sm_90", "tf32x3"): Launch(128, 64, 32, warps=8, stages=3),
    ("gfx942", "half"): Launch(128, 128, 64, warps=4, stages=2),
    ("gfx942", "tf32"): Launch(128, 128, 32, warps=4, stages=2),
    ("gfx942", "ieee"): Launch(128, 128, 32, warps=4, stages=2),
    ("gfx950", "bf16x3"): Launch(128, 128, 32, warps=4, stages=2),
}

# What autotuning times besides the tables' rows; what does not fit a GPU is left out there.
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

# Kernels along vectors of a batch: block_n entries at a time; "class_order" compares each with block_m classes.
VECTORS = {
    "index_labels": Launch(1, 2048, warps=8),
    "class_order": Launch(4, 1024, warps=8),
    "loss_epilogue": Launch(1, 128, warps=4),
    "reduce_terms": Launch(1, 4096, warps=16),
}

# The interpreter's time goes by the operation, not by the element.
INTERPRETER = Launch(128, 128, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonTuning(Tuning):
    """Constants of the Triton kernels. None: as the tables say."""

    architecture: str = "sm_80"  # whose rows of the tables hold
    blocks: Launch | None = None  # of every kernel, in place of the tables
    flash_pitch: int | None = None  # the longest padded row that the flash kernel takes, a power of two
    library_product: bool | None = None  # the library's GEMM computes the second product of the two-product path
    # Stages in which either product of the two-product path loads its operands, without autotuning: to be decided by a
    # clock (bench/NOTES.md). More hide more of a load's latency and leave less shared memory to a second block.
    product_stages: int | None = None
    whole_row: int = 2048  # the longest row that grad_epilogue holds in registers
    min_span: int = 512  # the least part of a longer row, or of a split contraction, that a program sums
    max_splits: int = 64  # the most parts of a longer row
    min_tiles: int = 128  # fewer tiles leave multiprocessors idle (an H200 has 132): the contraction is split
    max_compared: int = 1 << 26  # rows x classes that are compared to order the rows by class; past it a sort is less
    max_flash_splits: int = 16  # the most parts of the candidates in flash
    autotune: bool = False
    flash_alternatives: tuple[Launch, ...] = FLASH_ALTERNATIVES
    product_alternatives: tuple[Launch, ...] = PRODUCT_ALTERNATIVES

    def __post_init__(self) -> None:
        stages = self.product_stages
        if stages is not None and (type(stages) is not int or stages < 1):
            raise ValueError(
                f"product_stages must be a whole number of at least 1, or None for those of the tables; got {stages!r}"
            )


def _power_of_2(value: int) -> int:
    """The least power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()


@lru_cache
def architecture(device: torch.device) -> str:
    """The architecture of a GPU, as the tables name it; of AMD's any that torch names, as "gfx90a"."""
    if torch.version.hip is not None:
        # With its features after it, as in "gfx942:sramecc+:xnack-".
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


class Configs:
    """The launch configurations of one kernel set: the tables' rows for its architecture, unless its tuning differs."""

    def __init__(self, tuning: TritonTuning):
        self.tuning = tuning

    def precision(self, operand_dtype: torch.dtype) -> str:
        """input_precision of a dot; for fp32 operands it follows torch's float32 matmul precision."""
        if operand_dtype == torch.float32:
            highest, high = FLOAT32.get(self.tuning.architecture, FLOAT32_NVIDIA)
            return highest if float32_precision() == "highest" else high
        return "ieee"

    def flash_pitch(self, operand_dtype: torch.dtype) -> int:
        """The longest padded row that the flash kernel takes."""
        pitch = self.tuning.flash_pitch
        return FLASH_PITCH[self._kind(operand_dtype)] if pitch is None else pitch

    def pitch(self, d: int, operand_dtype: torch.dtype) -> int:
        """Columns of padded unit rows: a power of two for the flash kernel, which takes a row as one tile."""
        power = max(32, _power_of_2(d))
        return power if power <= self.flash_pitch(operand_dtype) else -(-d // PITCH) * PITCH

    def flash(self, operand_dtype: torch.dtype, pitch: int, exponent: str) -> Launch:
        if self.tuning.blocks is not None:
            return self.tuning.blocks
        kind = self._kind(operand_dtype)
        launch = self._row(FLASH, kind, pitch)
        if exponent == "online":
            return FLASH_ONLINE.get((self.tuning.architecture, kind, pitch), launch)
        if exponent == "known":
            # Two more numbers a column: with 128 columns some versions of the compiler spill.
            return launch._replace(block_n=min(launch.block_n, 64))
        return launch

    def product(self, operand_dtype: torch.dtype) -> Launch:
        """Blocks of either product of the two-product path."""
        launch, stages = self.tuning.blocks or self._row(PRODUCT, self._kind(operand_dtype)), self.tuning.product_stages
        return launch if stages is None else launch._replace(stages=stages)

    def library_product(self, operand: Tensor, acc_dtype: torch.dtype) -> bool:
        """True if the library's GEMM computes the second product: on a GPU, unless fp32 must be as accurate as IEEE."""
        choice = self.tuning.library_product
        if choice is None:
            choice = operand.is_cuda and self.precision(operand.dtype) != "tf32x3"
        return choice and has_gemm(operand.dtype, acc_dtype)

    def rows(self, pitch: int) -> Launch:
        """Kernels that pass along contiguous rows."""
        return self.tuning.blocks or (Launch(8, 128, warps=4) if pitch <= 256 else Launch(4, 512, warps=4))

    def columns(self) -> Launch:
        """Kernels that read or write through a transposed view: neighbours in memory are rows."""
        return self.tuning.blocks or Launch(64, 32, warps=4)

    def class_means(self, pitch: int) -> Launch:
        blocks = self.tuning.blocks
        return Launch(16, 128, warps=4) if blocks is None else Launch(blocks.block_m, _power_of_2(pitch))

    def row_sums(self) -> Launch:
        """block_m rows by block_n tiles."""
        return self.tuning.blocks or Launch(32, 32, warps=4)

    def vectors(self, kernel: str) -> Launch:
        return self.tuning.blocks or VECTORS[kernel]

    def compares(self, n: int, num_classes: int) -> bool:
        """True if rows are ordered by class by comparing them with every class, False if they are sorted."""
        return n * num_classes <= self.tuning.max_compared

    def fits_whole_row(self, d: int) -> bool:
        return d <= self.tuning.whole_row

    def whole_rows(self, d: int) -> Launch:
        """Blocks that hold whole rows: block_n >= d."""
        columns, blocks = max(32, _power_of_2(d)), self.tuning.blocks
        if blocks is not None:
            return Launch(blocks.block_m, columns)
        return Launch(max(1, 1024 // columns), columns, warps=4 if columns <= 1024 else 8)

    def span(self, d: int, block: int) -> int:
        """Columns that a program sums, a multiple of ``block``. By the shape alone, so that a run repeats bitwise."""
        least = max(self.tuning.min_span, -(-d // self.tuning.max_splits))
        return -(-least // block) * block

    def splits(self, tiles: int, contraction: int) -> int:
        """Parts into which a contraction is split: 1 unless its tiles leave most of a GPU idle."""
        few = self.tuning.min_tiles
        return 1 if tiles >= few else max(1, min(2 * few // tiles, contraction // (2 * self.tuning.min_span)))

    def flash_splits(self, row_tiles: int, column_tiles: int) -> int:
        """Parts of the candidates in flash, 2 tiles each at least: 1 unless row tiles leave most of a GPU idle."""
        few = self.tuning.min_tiles
        return 1 if row_tiles >= few else max(1, min(few // row_tiles, column_tiles // 2, self.tuning.max_flash_splits))

    def chunk_rows(self, rows: int, row_bytes: int) -> int:
        """Rows of a chunk of exponentials within the budget: a multiple of ROWS, at least one and at most ``rows``."""
        return min(rows, max(1, self.tuning.chunk_bytes // (row_bytes * ROWS)) * ROWS)

    def _kind(self, operand_dtype: torch.dtype) -> str:
        if operand_dtype == torch.float64:
            return "fp64"
        return self.precision(operand_dtype) if operand_dtype == torch.float32 else "half"

    def _row(self, table: dict[Any, Launch], *key: Any) -> Launch:
        own, fallback = ((name, *key) for name in (self.tuning.architecture, _FALLBACK.get(self.tuning.architecture)))
        return table[own if own in table else fallback]
