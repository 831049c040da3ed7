"""Sources of images: folders of classes, WebDataset shards, CIFAR-100, digits, and noise. `data` makes batches of them.

A source knows its length and the names of its classes, and reads one image by its index. Shards are read by an index
too: their headers are scanned once, so that order, resume and augmentation are the same as everywhere else.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer import vision
from trainer.config import Data
from trainer.faults import ConfigFault, DataFault

# A file that holds no image, or half of one, raises one of these.
READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
SHOWN = 5  # names in a message


class Source:
    """Images by index."""

    classes: tuple[str, ...]  # names, in the order of the labels
    blocks: np.ndarray | None = None  # first index of each shard: files that are best read from end to end
    faults: list[str]  # what was left out when the source was opened

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[Any, int]:
        """Image (PIL's, or a tensor) and label. Raises one of READ_ERRORS."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _decode(stream: io.IOBase | Path, channels: int) -> Image.Image:
    with Image.open(stream) as image:  # type: ignore[arg-type]
        return image.convert("L" if channels == 1 else "RGB")


class Folder(Source):
    """ROOT/CLASS/*.jpg and so on, as torchvision's ImageFolder finds them."""

    def __init__(self, root: Path, channels: int, classes: tuple[str, ...] | None = None):
        vision.import_torchvision()
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        if not root.is_dir():
            raise DataFault(f"there is no folder {root}")
        self.root, self.channels = root, channels
        self.faults = []
        folders = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
        if not folders:
            raise DataFault(f"{root} has no folder of a class: one a class, with its images, is wanted")
        self.classes = folders if classes is None else classes
        if missing := sorted(set(self.classes) - set(folders)):
            raise DataFault(f"{root} has no folder for {len(missing)} of the training classes: {some(missing)}")
        if extra := sorted(set(folders) - set(self.classes)):
            raise DataFault(f"{root} has folders of classes that the training images do not have: {some(extra)}")
        index = {name: label for label, name in enumerate(self.classes)}
        self.samples = make_dataset(str(root), index, extensions=IMG_EXTENSIONS, allow_empty=True)
        counts = np.bincount([label for _, label in self.samples], minlength=len(folders))
        if empty := [name for name, count in zip(self.classes, counts) if count == 0]:
            raise DataFault(
                f"{root} has no image for {len(empty)} of {len(folders)} classes: {some(empty)}; "
                f"read are {', '.join(IMG_EXTENSIONS)}"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return _decode(Path(path), self.channels), label

    def name(self, index: int) -> str:
        return str(Path(self.samples[index][0]).relative_to(self.root))


class Shards(Source):
    """Tar files in WebDataset's format, samples of KEY.jpg (png, webp, ...) and KEY.cls, uncompressed, on disk."""

    IMAGES = ("jpg", "jpeg", "png", "ppm", "webp", "bmp", "tif", "tiff")

    def __init__(self, root: Path, pattern: str, classes: int, channels: int, faulty: str, faulty_limit: float = 1.0):
        from webdataset.shardlists import expand_urls

        self.classes, self.channels = tuple(str(label) for label in range(classes)), channels
        self.paths = [Path(root) / url for url in expand_urls(pattern)]
        with ThreadPoolExecutor(8) as pool:
            scans = list(pool.map(_scan, self.paths))
        self.faults = [fault for _, fault in scans if fault]
        if self.faults and faulty == "fail":
            raise DataFault(f"{len(self.faults)} of {len(scans)} shards are faulty: {some(self.faults)}")
        lost = sum(bool(fault) and not rows for rows, fault in scans)
        if faulty_limit * len(scans) < lost < len(scans):
            raise DataFault(
                f"{lost} of {len(scans)} shards cannot be read, more than data.faulty_limit={faulty_limit:g} of them: "
                f"{some([fault for rows, fault in scans if fault and not rows])}"
            )
        table = [(shard, *row) for shard, (rows, _) in enumerate(scans) for row in rows]
        if not table:
            raise DataFault(
                f"no sample in {len(scans)} shards {root / pattern}: {some(self.faults) or 'all are empty'}"
            )
        self.table = np.array(table, dtype=np.int64)  # (samples, 5): shard, image offset, size, label offset, size
        self.blocks = np.unique(self.table[:, 0], return_index=True)[1]

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> tuple[Image.Image, int]:
        shard, image_at, image_size, label_at, label_size = self.table[index].tolist()
        descriptor = _descriptor(os.getpid(), self.paths[shard])
        label = int(os.pread(descriptor, label_size, label_at))
        if not 0 <= label < len(self.classes):
            raise ValueError(f"label {label} is not in 0..{len(self.classes) - 1}")
        data = os.pread(descriptor, image_size, image_at)
        if len(data) < image_size:
            raise OSError("the shard ends within the image")
        return _decode(io.BytesIO(data), self.channels), label

    def name(self, index: int) -> str:
        first = int(self.blocks[np.searchsorted(self.blocks, index, "right") - 1])
        return f"{self.paths[int(self.table[index, 0])].name}, sample {index - first}"


@functools.lru_cache(maxsize=64)
def _descriptor(process: int, path: Path) -> int:
    """An open shard. Read by position alone; the few descriptors are closed when the process ends."""
    return os.open(path, os.O_RDONLY)


def _last_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(-count, os.SEEK_END)
        return file.read()


def _scan(path: Path) -> tuple[list[tuple[int, int, int, int]], str]:
    """Positions of images and labels in a shard, and what is wrong with it. What stands before a cut is kept."""
    from webdataset.tariterators import base_plus_ext

    rows: list[tuple[int, int, int, int]] = []
    parts: dict[str, tuple[int, int]] = {}
    key, fault, incomplete = None, "", 0

    def finish() -> None:
        nonlocal incomplete
        image = next((parts[kind] for kind in Shards.IMAGES if kind in parts), None)
        if image is not None and "cls" in parts:
            rows.append((*image, *parts["cls"]))
        elif parts:
            incomplete += 1
        parts.clear()

    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                base, extension = base_plus_ext(member.name)
                if not member.isfile() or base is None:
                    continue
                if base != key:
                    finish()
                    key = base
                if member.offset_data + member.size > size:
                    fault = f"{path.name}: cut off at {size} bytes"
                    break
                parts[extension.lower()] = (member.offset_data, member.size)
        if not fault and _last_bytes(path, 512).strip(b"\0"):
            fault = f"{path.name}: cut off at {size} bytes, between two files"
    except (tarfile.TarError, OSError) as error:
        fault = f"{path.name}: {getattr(error, 'strerror', None) or error}"
    finish()
    if incomplete and not fault:
        fault = f"{path.name}: {incomplete} samples without an image or a .cls"
    return rows, fault


class Digits(Source):
    """scikit-learn's handwritten digits, 8 x 8, as grey images."""

    def __init__(self, training: bool):
        from distillation.data import digits

        splits = digits(200, 0.0, 0)
        if training:
            padded, labels = splits.teacher.padded, splits.teacher.labels  # type: ignore[attr-defined]
            pixels = padded[:, :, 1:-1, 1:-1]
        else:
            pixels, labels = splits.validation.tensors  # type: ignore[attr-defined]
        self.images = (pixels[:, 0] * 255).round().to(torch.uint8).numpy()
        self.labels = labels.tolist()
        self.classes = tuple(str(digit) for digit in range(splits.classes))
        self.faults = []

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]

    def name(self, index: int) -> str:
        return f"digit {index}"


class Cifar100(Source):
    """CIFAR-100 as torchvision reads it; it is not downloaded."""

    def __init__(self, root: Path, training: bool):
        vision.import_torchvision()
        from torchvision.datasets import CIFAR100

        try:
            self.data = CIFAR100(str(root), train=training, download=False)
        except RuntimeError as fault:
            raise DataFault(f"no CIFAR-100 (cifar-100-python) in {root}: {fault}") from None
        self.classes = tuple(self.data.classes)
        self.faults = []

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.data[index]

    def name(self, index: int) -> str:
        return f"image {index}"


class Synthetic(Source):
    """Noise with labels in turn. A few images are drawn once, so that reading costs nothing."""

    DISTINCT = 64

    def __init__(self, images: int, classes: int, channels: int, size: int):
        self.length, self.classes = images, tuple(str(label) for label in range(classes))
        self.faults = []
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randn(min(images, self.DISTINCT), channels, size, size, generator=generator)

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.pool[index % len(self.pool)], index % len(self.classes)

    def name(self, index: int) -> str:
        return f"image {index}"


def open_sources(data: Data) -> tuple[Source, Source | None]:
    """The training images, and those of validation if there are any.

    Raises:
        DataFault: a folder, a class or a shard is missing, or a split is empty.
        ConfigFault: the classes are not as many as the configuration says.
    """
    training: Source
    validation: Source | None = None
    root = Path(data.root)
    if data.source == "folder":
        training = Folder(root / data.train, data.channels)
        if data.validation:
            validation = Folder(root / data.validation, data.channels, training.classes)
    elif data.source == "webdataset":
        assert data.classes is not None
        training = Shards(root, data.train, data.classes, data.channels, data.faulty, data.faulty_limit)
        if data.validation:
            validation = Shards(root, data.validation, data.classes, data.channels, data.faulty)
    elif data.source == "cifar100":
        training = Cifar100(root, True)
        validation = Cifar100(root, False) if data.validation else None
    elif data.source == "digits":
        if data.channels != 1:
            raise ConfigFault(f"data.source=digits has data.channels=1; got {data.channels}")
        training, validation = Digits(True), Digits(False) if data.validation else None
    else:
        assert data.classes is not None
        training = Synthetic(data.images, data.classes, data.channels, data.image_size)
        if data.validation_images:
            validation = Synthetic(data.validation_images, data.classes, data.channels, data.image_size)
    if data.classes is not None and data.classes != len(training.classes):
        raise ConfigFault(f"data.classes={data.classes}, and {data.source} has {len(training.classes)} classes")
    return training, validation
