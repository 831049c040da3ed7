"""What the Hopper kernels of backend "cuda" (csrc/hopper: TMA and wgmma) can take, in place of the portable ones.

**No GPU has run them.** They compile for sm_90a without spills and with wgmma, and every test run executes them in host
emulation. So they are taken where a measured table (`mcld_kernels.measured`) has found them right and the fastest, or
on request, by the environment variable MCLD_HOPPER=1.
"""

from __future__ import annotations

from types import ModuleType

import torch

CAPABILITY = (9, 0)  # wgmma exists nowhere else
DTYPES = (torch.float16, torch.bfloat16)

# Tiles of E: 128 anchors by 256 candidates, as csrc/hopper/hopper.h has it.
SIMILARITY_ROWS, SIMILARITY_COLUMNS = 128, 256
# Candidates of a flash tile, by the pitch of the operands: what the registers beside the accumulator allow.
FLASH_ROWS = 128
FLASH_COLUMNS = {64: 128, 128: 128, 192: 64, 256: 64}

# The least work at which a kernel is taken, in tiles: below it most multiprocessors have none, and the portable
# kernels' smaller tiles do better. Reasoned for the 132 multiprocessors of an H100 or H200, not measured.
BLOCKS = 132  # flash blocks wanted: their shared memory leaves room for one a multiprocessor
LEAST_TILES = {"similarity": 132, "flash": 132}


def refused(module: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take operands of ``dtype`` on ``device``, of whatever shape; None if they can."""
    if not hasattr(module, "hopper_similarity"):
        return "the module is compiled without them: put 90a into MCLD_CUDA_ARCHS and install again"
    if dtype not in DTYPES:
        return f"they take 16-bit operands, not {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != CAPABILITY:
        return "they need compute capability 9.0"
    return None


def takes_similarity(anchors: int, candidates: int) -> bool:
    """Whether product 1 of this shape has work enough for the Hopper kernel."""
    tiles = _tiles(anchors, SIMILARITY_ROWS) * _tiles(candidates, SIMILARITY_COLUMNS)
    return tiles >= LEAST_TILES["similarity"]


def flash_splits(anchors: int, candidates: int, pitch: int) -> int:
    """Into how many parts flash splits the candidates, so that one wave of blocks does all; 0: it is not taken."""
    if pitch not in FLASH_COLUMNS:
        return 0
    rows, columns = _tiles(anchors, FLASH_ROWS), _tiles(candidates, FLASH_COLUMNS[pitch])
    if rows * columns < LEAST_TILES["flash"]:
        return 0
    return max(1, min(BLOCKS // rows, columns))


def _tiles(size: int, tile: int) -> int:
    return (size + tile - 1) // tile
