"""The choice of kernel, tile and split by shape. The thresholds are reasoned, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from ...kernels import Tuning
from ...options import float32_precision

if TYPE_CHECKING:
    from mcld_kernels._C import Constants


MULTIPROCESSORS = 132  # of a large GPU (H100, H200)
_GEMM_TILE = 128, 256  # the usual tile of a library's GEMM of 16-bit operands, as of product 1 on Hopper
_BLOCK_TILES = 2  # what a block of flash takes to begin and to end, in tiles of candidates
_CHUNK_DEPTH = 512  # the launches of a chunk, in elements of a tile's contraction
_WAVE_GAIN = 0.97  # of the cost at the usual budget: what is left at best


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaTuning(Tuning):
    """Constants of the choice. A multiprocessor holds two blocks of the portable kernels."""

    wave_bytes: int = 0  # what a chunk may take where that saves waves; 0: chunk_bytes
    multiprocessors: int = MULTIPROCESSORS

    hopper: bool  # take the Hopper kernels where they can run
    plans: bool = True  # record calls and run them again (`plans`)
    library_product: bool | None = None  # take the library's GEMM for product 2; None: `takes_library_product`
    low_latency_limit: int  # rows and classes up to which the low-latency path is taken; the kernels' own at most
    # Launches of the low-latency path begin while the one before ends: to be decided by a clock (bench/NOTES.md).
    dependent_launches: bool = False
    flash_row_bytes: int  # rows of operands up to which flash is taken; the kernels' own at most

    one_epilogue: bool = True  # all that follows product 2 in one launch, where it can be
    blocks: int = 264  # the number aimed at where candidates, or a contraction, can be split
    max_flash_splits: int = 16
    min_large_tiles: int = 128  # large tiles are taken where there are as many
    min_split_depth: int = 512  # of a split contraction: less does not pay for writing and adding its sums
    max_large_tile_splits: int = 8
    max_small_tile_splits: int = 32

    hopper_blocks: int = 132  # of flash, whose shared memory leaves room for one block a multiprocessor
    # Slices that the second warpgroup of product 1 begins behind the first: to be decided by a clock (bench/NOTES.md).
    hopper_skew: int = 0
    # Blocks of product 1 that load their candidates together, 1 or 2: to be decided by a clock, as above.
    hopper_cluster: int = 1
    # Below as many tiles most multiprocessors are idle, and the portable kernels' smaller tiles do better.
    min_hopper_similarity_tiles: int = 132
    min_hopper_flash_tiles: int = 132

    def __post_init__(self) -> None:
        if type(self.hopper_skew) is not int or self.hopper_skew < 0:
            raise ValueError(f"hopper_skew must be a whole number of at least 0; got {self.hopper_skew!r}")
        if type(self.hopper_cluster) is not int or self.hopper_cluster not in (1, 2):
            raise ValueError(f"hopper_cluster must be 1 or 2; got {self.hopper_cluster!r}")


def flash_splits(tuning: CudaTuning, constants: Constants, anchors: int, candidates: int) -> int:
    """The parts into which portable flash splits the candidates."""
    rows = constants["flash_rows"]
    row_tiles, column_tiles = _ceil_div(anchors, rows), _ceil_div(candidates, rows)
    return _splits(row_tiles, column_tiles, rows, tuning.blocks, tuning.max_flash_splits)


def product_tile(tuning: CudaTuning, constants: Constants, rows: int, columns: int) -> int:
    """The tile of product 2 for padded sizes."""
    large = constants["large_tile"]
    enough = columns % large == 0 and rows // large * (columns // large) >= tuning.min_large_tiles
    return large if enough else constants["small_tile"]


def similarity_tile(tuning: CudaTuning, constants: Constants, rows: int, columns: int, depth: int) -> tuple[int, int]:
    """The tile of product 1 for padded sizes, and the parts into which its contraction ``depth`` is split.

    Few anchors and candidates with a long contraction are the category-wise term of a large batch: 64 tiles of 128, or
    one. Large tiles read less; but one block adds all parts of a tile, so a large one has few parts.
    """
    sizes = (
        (constants["large_tile"], tuning.max_large_tile_splits),
        (constants["small_tile"], tuning.max_small_tile_splits),
    )
    for tile, max_splits in sizes:
        tiles = rows // tile * (columns // tile)
        splits = max(1, min(max_splits, tuning.blocks // tiles, depth // tuning.min_split_depth))
        if tiles * splits >= tuning.min_large_tiles:
            return tile, splits
    return tile, splits


@lru_cache(maxsize=256)
def chunk_rows(tuning: CudaTuning, rows: int, columns: int, pitch: int, itemsize: int, multiple: int) -> int:
    """The rows of a chunk of E (rows, columns), a multiple of ``multiple``, by the waves of blocks of all chunks.

    A wave is one tile for each multiprocessor: product 1 has tiles of E with a contraction of ``pitch``, product 2
    tiles of (rows, pitch) with a contraction of ``columns``. At 65,536 candidates and a pitch of 1024 a chunk of 2048
    rows fills half a wave of product 2, and one of 33 x 128 rows a whole one.
    """
    step_rows, step_columns = _GEMM_TILE
    total, row_bytes = _ceil_div(rows, multiple), columns * itemsize

    def waves(tiles: int, of_columns: int) -> int:
        row_tiles = _ceil_div(tiles * multiple, step_rows)
        return _ceil_div(row_tiles * _ceil_div(of_columns, step_columns), tuning.multiprocessors)

    def depth(tiles: int) -> int:
        return waves(tiles, columns) * pitch + waves(tiles, pitch) * columns + _CHUNK_DEPTH if tiles else 0

    def cost(tiles: int) -> int:
        return total // tiles * depth(tiles) + depth(total % tiles)

    def within(budget: int) -> int:
        most = max(1, min(total, budget // (row_bytes * multiple)))
        return min(range(1, most + 1), key=lambda tiles: (cost(tiles), tiles))

    usual, larger = within(tuning.chunk_bytes), within(max(tuning.chunk_bytes, tuning.wave_bytes))
    return multiple * (larger if cost(larger) < _WAVE_GAIN * cost(usual) else usual)


def takes_library_product(tuning: CudaTuning, operand_dtype: torch.dtype, device: torch.device) -> bool:
    """True if product 2 is the library's GEMM: on a GPU, unless fp32 must be as accurate as IEEE's.

    Vendor kernels use wgmma and its successors, the portable ones mma.sync; for accurate fp32 they use no tensor cores.
    """
    if tuning.library_product is not None:
        return tuning.library_product
    return device.type == "cuda" and (operand_dtype != torch.float32 or float32_precision() != "highest")


def takes_hopper_similarity(tuning: CudaTuning, constants: Constants, anchors: int, candidates: int) -> bool:
    """True if product 1 of this shape has enough tiles for the Hopper kernel."""
    rows = _ceil_div(anchors, constants["hopper_similarity_rows"])
    columns = _ceil_div(candidates, constants["hopper_similarity_columns"])
    return rows * columns >= tuning.min_hopper_similarity_tiles


def hopper_flash_splits(tuning: CudaTuning, constants: Constants, anchors: int, candidates: int, pitch: int) -> int:
    """The parts into which Hopper flash splits the candidates; 0: it is not taken."""
    tile = constants["hopper_flash_columns"].get(pitch)
    if tile is None:
        return 0
    rows, columns = _ceil_div(anchors, constants["hopper_flash_rows"]), _ceil_div(candidates, tile)
    if rows * columns < tuning.min_hopper_flash_tiles:
        return 0
    return _splits(rows, columns, tile, tuning.hopper_blocks, tuning.max_flash_splits)


@lru_cache(maxsize=256)
def _splits(row_tiles: int, column_tiles: int, tile_columns: int, blocks: int, most: int) -> int:
    """The parts of the candidates with the least time, in tiles that a block computes one after another.

    ``blocks`` run at once. 21,841 anchors are 171 tiles of 128: 132 blocks take two rounds, and a third of the
    candidates each in four rounds takes less. A split's products are written and read again in fp32, 8 bytes a number
    at some 2,450 bytes a clock (H200), where a tile takes a clock for 2,048 products.
    """

    def time(splits: int) -> float:
        rounds = _ceil_div(row_tiles * splits, blocks)
        combine = 3.5 * splits * row_tiles / tile_columns if splits > 1 else 0.0
        return rounds * (_ceil_div(column_tiles, splits) + _BLOCK_TILES) + combine

    return min(range(1, min(most, column_tiles) + 1), key=lambda splits: (time(splits), splits))


def _ceil_div(size: int, tile: int) -> int:
    return (size + tile - 1) // tile
