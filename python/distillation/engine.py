"""Training and evaluation of one model, and checkpoints."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainer.step import Micro, Step

from distillation.models import MODELS
from distillation.objectives import Objective, add

EpochReport = Callable[[int, dict[str, float]], None]


@dataclass
class History:
    """Means over each epoch: ``loss``, its parts by name, and ``accuracy`` where it was measured."""

    epochs: list[dict[str, float]] = field(default_factory=list)

    def series(self, name: str) -> list[float]:
        return [epoch[name] for epoch in self.epochs if name in epoch]


class Diverged(RuntimeError):
    """The loss is no longer finite."""


def fit(
    model: nn.Module,
    batches: DataLoader,
    objective: Objective,
    *,
    epochs: int,
    rate: float,
    device: torch.device,
    teacher: nn.Module | None = None,
    decay: float = 1e-4,
    held_out: DataLoader | None = None,
    report: EpochReport = lambda epoch, means: None,
) -> History:
    """Train ``model`` with AdamW and a one-cycle schedule; the teacher, frozen, sees the same batches.

    ``held_out`` is evaluated after every epoch, for the curves. Raises Diverged where the loss stops being finite.
    """
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(batches))
    history = History()
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
    step = Step(model, objective, optimizer, device=device, teacher=teacher)
    for epoch in range(epochs):
        model.train()
        sums: dict[str, Tensor] = {}
        seen = 0
        for number, (images, target) in enumerate(batches):
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            objective.set_epoch(epoch + number / len(batches))
            outcome = step([Micro(images=images, target=target)])
            schedule.step()
            add(sums, {"loss": outcome.loss, **outcome.parts}, len(target))
            seen += len(target)
        means = {name: float(value) / seen for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise Diverged(f"the loss is {means['loss']} in epoch {epoch + 1}")
        if held_out is not None:
            means["accuracy"] = accuracy(model, held_out, device)
        history.epochs.append(means)
        report(epoch, means)
    return history


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    """The fraction of the images whose largest logit is that of their label."""
    model.to(device).eval()
    predicted, actual = [], []
    for images, target in batches:
        predicted.append(model(images.to(device)).argmax(1).cpu())
        actual.append(target)
    return float(accuracy_score(torch.cat(actual), torch.cat(predicted)))


def save(path: Path, model: nn.Module, name: str, *, classes: int, data: str) -> None:
    """Write a checkpoint: the weights, the model's name and classes, and the data set that it was trained on."""
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    file = io.BytesIO()  # to a full disk torch.save raises RuntimeError, of its own zip writer
    torch.save({"model": name, "classes": classes, "data": data, "state": state}, file)
    path.write_bytes(file.getbuffer())


def load(path: Path, *, classes: int, data: str) -> tuple[nn.Module, str]:
    """A model trained on ``data`` from a checkpoint, and its name. ValueError where it does not fit."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as fault:
        raise ValueError(f"cannot read the checkpoint {path}: {fault.strerror}") from None
    except Exception as fault:  # torch raises several kinds for a file that is no checkpoint
        raise ValueError(f"{path} is not a checkpoint: {type(fault).__name__}") from None
    if not isinstance(saved, dict) or not {"model", "classes", "data", "state"} <= saved.keys():
        raise ValueError(f"{path} is not a checkpoint of this program")
    if saved["model"] not in MODELS or saved["classes"] != classes:
        raise ValueError(f"{path} holds a {saved['model']} for {saved['classes']} classes; {classes} are needed")
    if saved["data"] != data:
        raise ValueError(f"{path} was trained on {saved['data']!r}; the student learns from {data!r}")
    model = MODELS[saved["model"]](classes)
    try:
        model.load_state_dict(saved["state"])
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"{path} does not hold the weights of a {saved['model']}") from None
    return model, saved["model"]
