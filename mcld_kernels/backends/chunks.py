"""The memory budget of a chunk of exponentials."""

from __future__ import annotations

import os

import torch

CHUNK_MB = {"cpu": 32, "cuda": 256}
_OTHER_MB = 128


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
