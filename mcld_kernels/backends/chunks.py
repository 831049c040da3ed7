"""The memory budget of a chunk of exponentials."""

from __future__ import annotations

import os

import torch

CHUNK_MB = {"cpu": 32, "cuda": 256}
_OTHER_MB = 128
# On CUDA a chunk that fills whole waves of the multiprocessors may take so many instead: 33 tiles of 128 rows of
# 65,536 candidates in 16 bits take 528.
CUDA_WAVE_MB = 544


def wave_bytes(device: torch.device) -> int:
    """Bytes that a chunk may take where that saves waves; 0: no more than `chunk_bytes`, as MCLD_CHUNK_MB asks."""
    return CUDA_WAVE_MB << 20 if device.type == "cuda" and "MCLD_CHUNK_MB" not in os.environ else 0


def chunk_bytes(device: torch.device) -> int:
    """Bytes that a chunk of exponentials may take: MCLD_CHUNK_MB, or the default of the device.

    Raises ValueError where MCLD_CHUNK_MB is not a positive whole number.
    """
    text = os.environ.get("MCLD_CHUNK_MB")
    if text is None:
        return CHUNK_MB.get(device.type, _OTHER_MB) << 20
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"MCLD_CHUNK_MB must be a positive whole number of MiB; got {text!r}")
    return int(text) << 20
