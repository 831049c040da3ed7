"""Networks by name: images (B, 1, 8, 8) to logits (B, classes)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def small_cnn(classes: int, width: int = 8) -> nn.Module:
    """Two convolutions, 2 thousand parameters: the student."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 4, classes),
    )


def mlp(classes: int, width: int = 32) -> nn.Module:
    """One hidden layer, 2 thousand parameters: another student."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))


def cnn(classes: int, width: int = 32) -> nn.Module:
    """Three convolutions and two linear layers, 190 thousand parameters: the teacher."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, classes),
    )


MODELS: dict[str, Callable[[int], nn.Module]] = {"cnn": cnn, "small-cnn": small_cnn, "mlp": mlp}


def parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())
