"""Teacher logits kept in a file, for images that come again: (crops that repeat, images, classes)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainer import settings
from trainer.config import Config
from trainer.faults import OutputFault
from trainer.sources import Source

_NAMED = 1000  # images whose names stand for those of all
# Settings that change no logit, or whose effect is in the weights.
_FREE = {
    "teacher": ("checkpoint", "pretrained", "compile", "cache", "allow_untrained"),
    "data": ("root", "validation", "validation_images", "workers", "faulty", "faulty_limit"),
    "augment": (),
    "precision": ("compile", "channels_last"),
}


class LogitCache:
    """Logits by (epoch % period, index), float32 (float64 for a float64 run), in a file that the ranks of a node share.

    A row is written before it is marked, and a marked row is never computed again, so a run that was killed reads
    what it wrote. A third file says what the logits are of: those of another teacher or of other images are not read.
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
    def make(cls, folder: Path, config: Config, source: Source, teacher: nn.Module) -> tuple[LogitCache, bool]:
        """Open the cache of a run folder, or make it: a sparse file, filled as images are seen.

        Returns it, and True where one of other logits was in its place.
        """
        period = config.augment.period if config.augment.enabled and config.augment.period else 1
        dtype = "float64" if config.precision.dtype == "float64" else "float32"
        shape = (period, len(source), len(source.classes))
        paths = folder / "teacher-logits.bin", folder / "teacher-logits.marks"
        key_path, key = folder / "teacher-logits.key", fingerprint(config, source, teacher)
        try:
            was_kept = any(path.exists() for path in paths)
            is_same = all(path.exists() for path in (*paths, key_path)) and key_path.read_text(encoding="utf-8") == key
            if not is_same:
                key_path.unlink(missing_ok=True)
                for path, size in zip(paths, (int(np.prod(shape)) * np.dtype(dtype).itemsize, period * len(source))):
                    with path.open("wb") as file:
                        file.truncate(size)
                key_path.write_text(key, encoding="utf-8")
        except OSError as fault:
            raise OutputFault(f"the teacher's logits cannot be kept: {fault}") from None
        return cls(*paths, shape, dtype), was_kept and not is_same

    def get(self, epoch: int, indices: Tensor) -> Tensor | None:
        """The logits of a batch, (b, classes), if all are there."""
        place, rows = epoch % self.period, indices.numpy()
        if (rows < 0).any() or not self.marks[place, rows].all():
            return None
        return torch.from_numpy(np.array(self.logits[place, rows]))

    def put(self, epoch: int, indices: Tensor, logits: Tensor) -> Tensor:
        """Keep the rows that are new, and return all as they are kept.

        A row of index -1 is of an image in another's place, which may be readable the next time: it is not kept.
        """
        place, rows = epoch % self.period, indices.numpy()
        own = rows >= 0
        new = own & ~self.marks[place, rows]
        made = logits.to(getattr(torch, self.dtype)).numpy().copy()
        self.logits[place, rows[new]] = made[new]
        self.marks[place, rows[new]] = True
        made[own] = self.logits[place, rows[own]]
        return torch.from_numpy(made)


def fingerprint(config: Config, source: Source, teacher: nn.Module) -> str:
    """A text that is another one where the logits are: of the teacher's weights, the images and their preparation."""
    tree = settings.tree(config)
    kept = {name: {key: x for key, x in tree[name].items() if key not in free} for name, free in _FREE.items()}
    step = max(1, len(source) // _NAMED)
    names = [source.name(index) for index in range(0, len(source), step)]
    digest = hashlib.sha256(json.dumps([config.seed, kept, source.classes, len(source), names]).encode())
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
