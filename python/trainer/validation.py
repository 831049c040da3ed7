"""Accuracy over the validation images of all ranks, by torchmetrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer import vision
from trainer.config import Config
from trainer.data import PADDING


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Any,
    config: Config,
    classes: int,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> tuple[float, float, int, list[str], str]:
    """Top-1 and top-5 accuracy, the images left out on this rank, their names, and a fault that must end the run.

    Every rank runs as many batches, so that a sharded model gathers its weights in step.
    """
    vision.import_torchvision()
    from torchmetrics.classification import MulticlassAccuracy  # imports torchvision

    tops = [
        MulticlassAccuracy(classes, top_k=k, average="micro", ignore_index=PADDING, validate_args=False).to(device)
        for k in (1, min(5, classes))
    ]
    training, names, fatal = model.training, [], ""
    memory = torch.channels_last if config.precision.channels_last else torch.preserve_format
    dtype = next(model.parameters()).dtype
    model.eval()
    for batch in batches:
        names += batch.faults
        fatal = fatal or batch.fatal
        images = batch.images.to(device, non_blocking=True).to(dtype=dtype, memory_format=memory)
        with autocast():
            logits = model(images)
        labels = batch.labels.to(device, non_blocking=True)
        for top in tops:
            top.update(logits.float(), labels)
    model.train(training)
    scores = [float(top.compute()) for top in tops]
    return scores[0], scores[1], len(names), names, fatal
