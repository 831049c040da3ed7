"""Checkpoints: everything that a run needs to go on as if it had never stopped, written in one piece or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer import settings
from trainer.faults import ConfigFault, OutputFault
from trainer.models import DAMAGED, KIND, load_whole
from trainer.ranks import Ranks

SCHEMA = 1
BEST = "best.pt"
_NAME = re.compile(r"step-(\d+)\.pt")

# Settings that a checkpoint fixes: its state has no meaning under others.
FIXED = (
    "seed", "batch", "student.name", "student.options", "data.source", "data.classes", "data.image_size",
    "data.channels", "loss.name", "optimizer.name", "precision.dtype", "parallel.kind",
)  # fmt: skip
# Settings that change no result.
FREE = (
    "output", "log.", "checkpoint.", "data.workers", "data.root", "threads", "device", "parallel.timeout",
    "parallel.backend", "validate_every", "student.checkpoint", "student.pretrained",
)  # fmt: skip


def random_state(device: torch.device) -> dict[str, Any]:
    """Every generator that this process draws from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), following],
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))


def model_state(model: nn.Module) -> dict[str, Any]:
    """The whole state_dict, on the CPU. Every rank calls it; with fsdp2 only the first rank gets the tensors."""
    if _is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value.detach().cpu() for name, value in unwrapped(model).state_dict().items()}


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    if _is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        unwrapped(model).load_state_dict(state)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if _is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(model, optimizer, options=options)
    return optimizer.state_dict()


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    if _is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(state)


def _is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def buffers(model: nn.Module | None) -> dict[str, Any]:
    """The buffers of a rank: batch-norm statistics are its own between two averagings."""
    return {} if model is None else {name: value.detach().cpu().clone() for name, value in model.named_buffers()}


def load_buffers(model: nn.Module | None, values: Mapping[str, Any]) -> None:
    if model is not None:
        for name, buffer in model.named_buffers():
            buffer.copy_(values[name])


class Checkpoints:
    """The checkpoints of a run folder."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder / "checkpoints", keep, ranks

    def set_aside_after(self, step: int) -> list[str]:
        """Rename the checkpoints of later steps: the run goes on from before them, and they are not its newest."""

        def rename() -> list[str]:
            later = [path for path in newest_first(self.folder) if int(path.stem.removeprefix("step-")) > step]
            try:
                for path in later:
                    os.replace(path, path.with_name(f"abandoned-{path.name}"))
            except OSError as fault:
                raise OutputFault(f"a checkpoint of a later step cannot be renamed: {fault}") from None
            return [path.name for path in later]

        return self.ranks.from_first(rename)

    def save(self, state: dict[str, Any], step: int, *, best: bool) -> Path:
        """Write on the first rank; raises OutputFault on every rank where that fails."""
        path = self.folder / f"step-{step:08d}.pt"

        def write() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, state)
                if best:
                    _replace_by(self.folder / BEST, path)
                for old in newest_first(self.folder)[self.keep :]:
                    old.unlink(missing_ok=True)
            except (OSError, RuntimeError) as fault:  # torch raises RuntimeError for a full disk
                raise OutputFault(f"the checkpoint {path} cannot be written: {fault}") from None

        self.ranks.from_first(write)
        return path


def write_whole(path: Path, state: Any) -> None:
    """Write beside ``path``, to the disk, and rename: a file of this name is never half a file."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def _replace_by(path: Path, source: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # a file system without links
        shutil.copyfile(source, partial)
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems do not open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, that of the largest step first."""
    numbered = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def find(where: Path) -> Path:
    """The checkpoint that a path names: a file, or a run folder's newest.

    Raises:
        ConfigFault: there is none.
    """
    if where.is_file():
        return where
    for folder in (where / "checkpoints", where):
        if paths := newest_first(folder):
            return paths[0]
    raise ConfigFault(f"--resume: there is no checkpoint in {where}")


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of this trainer.

    Raises:
        ConfigFault: it cannot be read, is cut off, or is another program's; the message names an earlier one.
    """
    try:
        path.open("rb").close()
    except OSError as fault:
        raise ConfigFault(f"the checkpoint {path} cannot be read: {fault.strerror}") from None
    try:
        state = load_whole(path)
    except DAMAGED as fault:
        earlier = [other for other in newest_first(path.parent) if other.name < path.name]
        hint = f"; before it is {earlier[0]}: --resume {earlier[0]}" if earlier else "; there is none before it"
        reason = str(fault).partition("\n")[0]
        raise ConfigFault(f"the checkpoint {path} is cut off or damaged ({reason}){hint}") from None
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise ConfigFault(f"{path} is not a checkpoint of this trainer")
    if state["schema"] != SCHEMA:
        raise ConfigFault(f"{path} has schema {state['schema']}, and this version of the trainer reads {SCHEMA}")
    return state


def check_settings(saved: Mapping[str, Any], config: Any, path: Path) -> list[str]:
    """Lines about what has changed since a checkpoint.

    Raises:
        ConfigFault: a setting has changed that its state depends on.
    """
    lines = []
    for key, before, after in settings.differences(saved, settings.tree(config)):
        if key in FIXED or any(key.startswith(f"{fixed}.") for fixed in FIXED):
            raise ConfigFault(
                f"the checkpoint {path} is of a run with {key}={before}, and {key}={after} now: "
                "begin a new run, or set it back"
            )
        if not key.startswith(FREE):
            lines.append(f"{key} was {before} and is {after} now: the run goes on otherwise than it would have")
    return lines


def check_ranks(begun: Sequence[tuple[Mapping[str, Any], int | None]]) -> None:
    """``begun``: each rank's settings, and the step that it goes on from.

    Raises:
        ConfigFault: a rank trains otherwise than the first one, or goes on from another step.
    """
    settings_of_first, first = begun[0]
    for rank, (own, step) in enumerate(begun):
        changed = [key for key, *_ in settings.differences(settings_of_first, own) if not key.startswith(FREE)]
        if step != first:
            here, there = ("at the beginning" if x is None else f"after step {x}" for x in (step, first))
            text = f"begins {here}, and rank 0 {there}"
        elif changed:
            text = f"has other settings than rank 0: {', '.join(changed)}"
        else:
            continue
        raise ConfigFault(f"rank {rank} {text}: all ranks must see the same file of settings and the same run folder")


def check_classes(state: Mapping[str, Any], classes: tuple[str, ...], path: Path) -> None:
    if tuple(state["classes"]) != classes:
        raise ConfigFault(
            f"the checkpoint {path} is of other classes: it has {len(state['classes'])}, the data {len(classes)}"
            + ("" if len(state["classes"]) != len(classes) else ", by other names")
        )


def check_images(state: Mapping[str, Any], images: int, path: Path) -> None:
    """Within an epoch the order is that of as many images: others would come twice, or not at all."""
    before = state.get("images", images)  # older checkpoints do not say
    if before != images and state["step_in_epoch"]:
        raise ConfigFault(
            f"the checkpoint {path} is within an epoch of {before} training images, and there are {images} now: "
            "restore the data, or go on from a checkpoint at an epoch's end"
        )


def image_lines(state: Mapping[str, Any], images: int) -> list[str]:
    """The change that more or fewer images bring at an epoch's end."""
    before = state.get("images", images)
    if before == images:
        return []
    return [f"there were {before} training images, and there are {images} now: an epoch and the schedule change"]


def world_size_lines(state: Mapping[str, Any], size: int, *, by_rank: bool, mixes: bool) -> list[str]:
    """The changes that another number of ranks brings."""
    before = len(state["ranks"])
    if before == size:
        return []
    parts = ["every step sees the same images", "sums are rounded in another order", "dropout draws other numbers"]
    parts.append("batch-norm statistics go on from those of rank 0")
    if mixes:
        parts.append("mixup and cutmix pair other images")
    if by_rank:
        parts.append(f"loss.over=rank contrasts 1/{size} of the batch, where it was 1/{before}")
    return [f"the checkpoint is of {before} rank{'s' * (before > 1)}, and this is {size}: {'; '.join(parts)}"]
