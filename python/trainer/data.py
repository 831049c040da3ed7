"""Batches in an order that seed and epoch fix, each image augmented by (seed, epoch, index) alone.

A run that is resumed, or runs on another number of ranks or workers, therefore sees the same images.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer import vision
from trainer.config import Augment, Config, Data
from trainer.faults import ConfigFault
from trainer.sources import READ_ERRORS, Source

PADDING = -1  # the index, and the label, of a place that holds no image
TRIES = 100  # readable images are looked for among so many that follow a faulty one
WINDOW = 16  # shards whose images are shuffled among one another
_SHUFFLE, _IMAGE, _MIX, _PROCESS = range(4)  # what a seed is for

Key = tuple[int, int]  # (epoch, index)


@dataclass
class Batch:
    """A micro-batch of one rank."""

    images: Tensor  # (b, channels, height, width)
    labels: Tensor  # (b,), int64; PADDING where there is no image
    indices: Tensor  # (b,), of the images in their source; PADDING where there is none, or another took its place
    faults: list[str]  # images that could not be read
    fatal: str = ""  # the fault that ends the run

    def pin_memory(self) -> Batch:
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


def numpy_generator(*words: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(words))


def seed_all(*words: int) -> None:
    """Seed every generator of this process, the GPU's too."""
    seed = int(numpy_generator(*words, _PROCESS).integers(2**62))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(*words: int) -> Iterator[None]:
    """The generators of random, numpy and torch's CPU seeded by ``words``; restored afterwards."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    low, high = np.random.SeedSequence(words).generate_state(2).tolist()
    random.seed(low << 32 | high)
    np.random.seed(low)
    torch.default_generator.manual_seed(low << 32 | high)  # torch.manual_seed would seed the GPU too
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def transform(augment: Augment, data: Data, training: bool) -> Callable[[Any], Tensor]:
    """From an image to normalized values (channels, height, width), float32."""
    vision.import_torchvision()
    from timm.data import create_transform
    from torchvision import transforms

    mean, std = (list(x) * (data.channels if len(x) == 1 else 1) for x in (augment.mean, augment.std))
    common: dict[str, Any] = {"mean": mean, "std": std}
    if training and augment.enabled:
        if augment.pad:
            steps: list[Any] = [transforms.RandomCrop(data.image_size, padding=augment.pad)]
            if augment.flip:
                steps.append(transforms.RandomHorizontalFlip(augment.flip))
            return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])
        return create_transform(
            (data.channels, data.image_size, data.image_size),
            is_training=True,
            scale=(augment.scale[0], augment.scale[1]),
            ratio=(augment.ratio[0], augment.ratio[1]),
            hflip=augment.flip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment or None,
            re_prob=augment.erasing,
            re_mode="pixel",
            interpolation=augment.interpolation,
            **common,
        )
    return create_transform(
        (data.channels, data.image_size, data.image_size),
        is_training=False,
        crop_pct=augment.crop_fraction,
        interpolation="bilinear" if augment.interpolation == "random" else augment.interpolation,
        **common,
    )


class Samples(Dataset):
    """A source's images by (epoch, index): read, augmented; a faulty one replaced, left out, or fatal."""

    def __init__(self, source: Source, config: Config, training: bool):
        self.source, self.training = source, training
        self.seed, self.period = config.seed, config.augment.period
        self.fail = config.data.faulty == "fail"
        self.transform = None if config.data.source == "synthetic" else transform(config.augment, config.data, training)
        self.shape = (config.data.channels, config.data.image_size, config.data.image_size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int, list[str], str]:
        epoch, index = key
        faults: list[str] = []
        if index == PADDING:
            return torch.zeros(self.shape), PADDING, index, faults, ""
        for place in range(TRIES if self.training and not self.fail else 1):
            other = (index + place) % len(self.source)
            try:
                image, label = self.source.read(other)
                if not self.training:
                    return self._prepared(image), label, index, faults, ""
            except READ_ERRORS as fault:
                text = " ".join(str(fault).split()) or type(fault).__name__
                faults.append(f"{self.source.name(other)}: {text}")
                continue
            own = index if other == index else PADDING
            try:
                return self._augmented(image, epoch, index), label, own, faults, ""
            except Exception as fault:  # of the draw, or of the settings: another image would hide it
                fatal = f"the augmentation of {self.source.name(other)} fails: {type(fault).__name__}: {fault}"
                return torch.zeros(self.shape), PADDING, PADDING, faults, fatal
        if self.fail:
            return torch.zeros(self.shape), PADDING, index, faults, f"an image cannot be read: {faults[0]}"
        if not self.training:
            return torch.zeros(self.shape), PADDING, index, faults, ""
        fatal = f"{len(faults)} images in a row cannot be read, the first: {faults[0]}"
        return torch.zeros(self.shape), PADDING, index, faults, fatal

    def _prepared(self, image: Any) -> Tensor:
        return image if self.transform is None else self.transform(image)

    def _augmented(self, image: Any, epoch: int, index: int) -> Tensor:
        repeated = epoch % self.period if self.period else epoch
        with seeded(self.seed, _IMAGE, repeated, index):
            return self._prepared(image)


def collate(samples: list[tuple[Tensor, int, int, list[str], str]]) -> Batch:
    images, labels, indices, faults, fatal = zip(*samples)
    return Batch(
        images=torch.stack(images),
        labels=torch.tensor(labels),
        indices=torch.tensor(indices),
        faults=[fault for some in faults for fault in some],
        fatal=next((text for text in fatal if text), ""),
    )


class TrainingOrder(Sampler[list[Key]]):
    """The micro-batches of a rank, step by step: a fixed slice of each global batch.

    Global batch s of an epoch is the s-th run of ``batch`` images in the epoch's order; its micro-batch m is divided
    among the ranks in turn. What is left at an epoch's end makes no batch.
    """

    def __init__(self, source: Source, *, batch: int, accumulate: int, rank: int, size: int, seed: int):
        if batch % (size * accumulate):
            raise ConfigFault(
                f"batch={batch} cannot be divided into {size} ranks x {accumulate} micro-batches: "
                f"take a multiple of {size * accumulate}"
            )
        if len(source) < batch:
            raise ConfigFault(f"batch={batch} is more than the {len(source)} training images")
        self.source, self.batch, self.accumulate, self.seed = source, batch, accumulate, seed
        self.rank, self.size, self.micro = rank, size, batch // (size * accumulate)
        self.steps = len(source) // batch
        self.epoch = self.first = 0  # where iteration begins

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self.order(self.epoch)
        for step in range(self.first, self.steps):
            for part in range(self.accumulate):
                at = step * self.batch + (part * self.size + self.rank) * self.micro
                yield [(epoch, index) for index in order[at : at + self.micro].tolist()]

    def order(self, epoch: int) -> np.ndarray:
        """The indices of an epoch; shards in random order, and their images shuffled within a window of shards."""
        generator = numpy_generator(self.seed, _SHUFFLE, epoch)
        if self.source.blocks is None:
            return generator.permutation(len(self.source))
        ends = np.append(self.source.blocks[1:], len(self.source))
        shards = [np.arange(first, end) for first, end in zip(self.source.blocks, ends)]
        turn = generator.permutation(len(shards))
        windows = [np.concatenate([shards[i] for i in turn[at : at + WINDOW]]) for at in range(0, len(turn), WINDOW)]
        return np.concatenate([generator.permutation(window) for window in windows])


class ValidationOrder(Sampler[list[Key]]):
    """Every image once, over the ranks; each rank has as many batches, the last ones padded."""

    def __init__(self, source: Source, *, batch: int, rank: int, size: int):
        indices = np.arange(rank, len(source), size)
        places = -(-len(source) // size)
        indices = np.append(indices, np.full(places - len(indices), PADDING))
        self.batches = [indices[at : at + batch].tolist() for at in range(0, places, batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        for indices in self.batches:
            yield [(0, index) for index in indices]


def loader(samples: Samples, order: Sampler[list[Key]], data: Data, device: torch.device) -> DataLoader:
    """Batches from worker processes. Nothing is drawn from torch's global generator."""
    return DataLoader(
        samples,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=data.workers,
        persistent_workers=data.workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=_begin_worker,
    )


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):  # sent to the whole group: the run itself ends its workers
        signal.signal(number, signal.SIG_IGN)


class Mix:
    """mixup and cutmix by timm, drawn by (seed, epoch, step, micro-batch, rank): labels become soft ones."""

    def __init__(self, config: Config, classes: int, micro: int):
        vision.import_torchvision()
        from timm.data import Mixup

        if micro % 2:
            raise ConfigFault(f"mixup and cutmix mix pairs: the micro-batch of a rank must be even; got {micro}")
        augment, self.seed = config.augment, config.seed
        self.mixup = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            prob=augment.mix_probability,
            switch_prob=augment.mix_switch,
            label_smoothing=0.0,  # the cross-entropy smooths
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, *place: int) -> tuple[Tensor, Tensor]:
        """Mixed images, and soft labels (b, classes)."""
        with seeded(self.seed, _MIX, *place):
            return self.mixup(images, labels)
