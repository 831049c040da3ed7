"""Teacher logits kept in a file, for images that come again: (crops that repeat, images, classes)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import Config
from trainer.faults import OutputFault


class LogitCache:
    """Logits by (epoch % period, index), float32 (float64 for a float64 run), in a file that the ranks of a node share.

    A row is written before it is marked, and a marked row is never computed again, so a run that was killed reads
    what it wrote.
    """

    def __init__(self, logits: Path, marks: Path, shape: tuple[int, int, int], dtype: str):
        self.period = shape[0]
        self.paths, self.shape, self.dtype = (logits, marks), shape, dtype
        self._open()

    def _open(self) -> None:
        self.logits = np.memmap(self.paths[0], dtype=self.dtype, mode="r+", shape=self.shape)
        self.marks = np.memmap(self.paths[1], dtype=np.bool_, mode="r+", shape=self.shape[:2])

    def __getstate__(self) -> dict:
        return {"period": self.period, "paths": self.paths, "shape": self.shape, "dtype": self.dtype}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    @classmethod
    def make(cls, folder: Path, config: Config, images: int, classes: int) -> LogitCache:
        """Open the cache of a run folder, or make it: a sparse file, filled as images are seen."""
        period = config.augment.period if config.augment.enabled and config.augment.period else 1
        dtype = "float64" if config.precision.dtype == "float64" else "float32"
        shape = (period, images, classes)
        paths = folder / "teacher-logits.bin", folder / "teacher-logits.marks"
        try:
            for path, size in zip(paths, (int(np.prod(shape)) * np.dtype(dtype).itemsize, period * images)):
                if not path.exists():
                    with path.open("wb") as file:
                        file.truncate(size)
        except OSError as fault:
            raise OutputFault(f"the teacher's logits cannot be kept: {fault}") from None
        return cls(*paths, shape, dtype)

    def get(self, epoch: int, indices: Tensor) -> Tensor | None:
        """The logits of a batch, (b, classes), if all are there."""
        place, rows = epoch % self.period, indices.numpy()
        if not self.marks[place, rows].all():
            return None
        return torch.from_numpy(np.array(self.logits[place, rows]))

    def put(self, epoch: int, indices: Tensor, logits: Tensor) -> Tensor:
        """Keep the rows that are new, and return all as they are kept."""
        place, rows = epoch % self.period, indices.numpy()
        new = ~self.marks[place, rows]
        self.logits[place, rows[new]] = logits.to(getattr(torch, self.dtype)).numpy()[new]
        self.marks[place, rows[new]] = True
        return torch.from_numpy(np.array(self.logits[place, rows]))
