"""Data sets by name: many clean labels for the teacher, few and noisy ones for the student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset


@dataclass(frozen=True)
class Splits:
    """Four sets of images (N, channels, height, width) with labels (N,).

    They are disjoint, except that the student's training images are some of the teacher's.
    """

    teacher: Dataset
    student: Dataset
    validation: Dataset  # for choosing options
    test: Dataset  # for reporting
    classes: int
    flipped: int  # wrong labels among the student's

    def held_out(self, name: str) -> Dataset:
        return {"validation": self.validation, "test": self.test}[name]


class Shifted(Dataset):
    """Images moved by up to one pixel in each direction, at random."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.padded, self.labels = F.pad(images, (1, 1, 1, 1)), labels
        self.height, self.width = images.shape[-2:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 3, (2,)).tolist()
        image = self.padded[index, :, top : top + self.height, left : left + self.width]
        return image, self.labels[index]


def digits(images: int, noise: float, seed: int, draw: int | None = None) -> Splits:
    """scikit-learn's 1797 handwritten digits, 8 x 8: half trains the teacher, a fifth validates, the rest tests.

    ``images`` of the teacher's are the student's, and a fraction ``noise`` of their labels is replaced by a wrong one.
    ``seed`` draws the splits, ``draw`` (default: ``seed`` too) the student's images and its noise.
    """
    bundle = load_digits()
    pixels = torch.tensor(bundle.images, dtype=torch.float32)[:, None] / 16.0  # (1797, 1, 8, 8)
    labels = torch.tensor(bundle.target)
    classes = len(bundle.target_names)
    everything = np.arange(len(labels))
    train, rest = train_test_split(everything, train_size=0.5, stratify=labels, random_state=seed)
    validation, test = train_test_split(rest, train_size=0.4, stratify=labels[rest], random_state=seed)
    if not classes <= images <= len(train) - classes:
        raise ValueError(f"the student's images must be {classes} to {len(train) - classes} here; got {images}")
    if not 0 <= noise < 1:
        raise ValueError(f"the fraction of wrong labels must be in [0, 1); got {noise}")
    draw = seed if draw is None else draw
    few, _ = train_test_split(train, train_size=images, stratify=labels[train], random_state=draw)
    noisy, flipped = _flip(labels[few], classes, noise, draw)
    return Splits(
        Shifted(pixels[train], labels[train]),
        Shifted(pixels[few], noisy),
        TensorDataset(pixels[validation], labels[validation]),
        TensorDataset(pixels[test], labels[test]),
        classes,
        flipped,
    )


def _flip(labels: Tensor, classes: int, fraction: float, seed: int) -> tuple[Tensor, int]:
    """Replace a fraction of the labels by one of the other classes each."""
    generator = torch.Generator().manual_seed(seed)
    count = round(fraction * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    step = torch.randint(1, classes, (count,), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (noisy[chosen] + step) % classes
    return noisy, count


DATASETS: dict[str, Callable[[int, float, int], Splits]] = {"digits": digits}


def loader(data: Dataset, batch: int, train: bool, seed: int = 0, workers: int = 0) -> DataLoader:
    """Batches in a random order that ``seed`` fixes, or in the order of the data."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch, shuffle=train, generator=generator if train else None, num_workers=workers)
