"""Which kernel, tile and split for which shape: the portable kernels' thresholds, reasoned, not yet measured."""

from __future__ import annotations

import torch

LATENCY_LARGEST = 1024  # rows and classes up to which five launches do everything
# Rows of operands of at most so many bytes: an accumulator of the whole row fits the registers, tiles shared memory.
FLASH_BYTES = 512
FLASH_ROWS = 64  # anchors of a block, and candidates of most tiles

# Blocks wanted where candidates, or the contraction, can be split: two for each multiprocessor of a large GPU (132).
BLOCKS = 264
MOST_SPLITS = 16
# Tiles of 128 x 128 pay once they fill a large GPU; of 64 x 64 there are four times more.
ENOUGH_TILES = 128
LEAST_SPAN = 512  # of a split contraction: less does not pay for writing and adding its sums
MOST_PARTS = {128: 8, 64: 32}  # of it, by the tile


def flash_splits(anchors: int, candidates: int) -> int:
    """Into how many parts flash splits the candidates."""
    blocks = -(-anchors // FLASH_ROWS)
    return max(1, min(MOST_SPLITS, BLOCKS // blocks, -(-candidates // FLASH_ROWS)))


def tile(rows: int, columns: int) -> int:
    """Rows and columns of a product's tile: 128 or 64. rows and columns are padded."""
    return 128 if columns % 128 == 0 and rows // 128 * (columns // 128) >= ENOUGH_TILES else 64


def similarity_tile(rows: int, columns: int, depth: int) -> tuple[int, int]:
    """Tile of product 1, and into how many parts its contraction ``depth`` is split, by the shape alone.

    Few anchors and candidates with a long contraction are the category-wise term of a large batch: 64 tiles of 128, or
    one. Large tiles read less; but one block adds all parts of a tile, so that there may be few of a large one.
    """
    for size, most in MOST_PARTS.items():
        tiles = rows // size * (columns // size)
        parts = max(1, min(most, BLOCKS // tiles, depth // LEAST_SPAN))
        if tiles * parts >= ENOUGH_TILES:
            return size, parts
    return size, parts


def by_library(dtype: torch.dtype, precision: str, device: torch.device) -> bool:
    """Whether torch.mm is the choice for product 2: on a GPU, unless fp32 must be as accurate as IEEE's.

    Vendor kernels use wgmma and its heirs, the portable ones mma.sync; for accurate fp32 they use no tensor cores.
    """
    return device.type == "cuda" and (dtype != torch.float32 or precision != "highest")
