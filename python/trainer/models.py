"""Students and teachers by name: timm's, and a few small ones; weights from files; a teacher ready to be asked."""

from __future__ import annotations

import difflib
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from trainer.config import Config, Model, Teacher
from trainer.faults import ConfigFault

KIND = "mcld_kernels trainer"  # marks a checkpoint of this trainer
# What reading a damaged file raises.
DAMAGED = (
    OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, BadZipFile, zlib.error,
)  # fmt: skip


class _Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut (He et al., arXiv 1512.03385, basic block)."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A residual network for 32 x 32 images: a 3 x 3 stem, three stages of (depth - 2) / 6 blocks, global pooling.

    ``widths`` are the channels of the stem and of the stages: (16, 16, 32, 64) in He et al. (section 4.2), and
    (32, 64, 128, 256) for the networks "x4" of the distillation literature (Tian et al., arXiv 1910.10699).
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], classes: int, channels: int = 3):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        inside = widths[0]
        for number, outside in enumerate(widths[1:]):
            stage = [_Block(inside, outside, 2 if number else 1)]
            stage += [_Block(outside, outside, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            inside = outside
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(inside, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def tiny_cnn(classes: int, channels: int, width: int = 8, dropout: float = 0.0) -> nn.Module:
    """Two convolutions with group normalization and global pooling, for images of any size: for trials."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1),
        nn.GroupNorm(2, width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width, classes),
    )


def tiny_bn(classes: int, channels: int, width: int = 8, dropout: float = 0.0) -> nn.Module:
    """One convolution with batch normalization and global pooling: for trials."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(width, classes),
    )


def _digits(name: str) -> Callable[..., nn.Module]:
    def make(classes: int, channels: int) -> nn.Module:
        from distillation.models import MODELS

        if channels != 1:
            raise ConfigFault(f"digits-{name} takes images of one channel; got data.channels={channels}")
        return MODELS[name](classes)

    return make


def _cifar(depth: int, widths: tuple[int, int, int, int]) -> Callable[..., nn.Module]:
    return lambda classes, channels: CifarResNet(depth, widths, classes, channels)


BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "resnet8x4": _cifar(8, (32, 64, 128, 256)),
    "resnet32x4": _cifar(32, (32, 64, 128, 256)),
    "resnet20": _cifar(20, (16, 16, 32, 64)),
    "resnet56": _cifar(56, (16, 16, 32, 64)),
    "digits-cnn": _digits("cnn"),
    "digits-small-cnn": _digits("small-cnn"),
    "digits-mlp": _digits("mlp"),
    "tiny-cnn": tiny_cnn,
    "tiny-bn": tiny_bn,
}


def create(model: Model, key: str, *, classes: int | None, channels: int) -> nn.Module:
    """The model of a section, without the weights of its file. ``classes`` None: as many as pretrained weights have.

    Raises:
        ConfigFault: the name is unknown, or the constructor refuses an option.
    """
    if model.name in BUILT_IN:
        if model.pretrained:
            raise ConfigFault(f"{key}.pretrained: {model.name} is built in and has no weights; name a checkpoint")
        assert classes is not None
        try:
            return BUILT_IN[model.name](classes, channels, **model.options)
        except TypeError as fault:
            raise ConfigFault(f"{key}.options: {fault}") from None
    from trainer.vision import timm

    if not timm.is_model(model.name):
        close = difflib.get_close_matches(model.name, [*BUILT_IN, *timm.list_models()], n=3)
        hint = f"; close to it are {', '.join(close)}" if close else ""
        raise ConfigFault(
            f"{key}.name={model.name} is neither a model of timm {timm.__version__} nor one of "
            f"{', '.join(BUILT_IN)}{hint}"
        )
    arguments: dict[str, Any] = {"in_chans": channels, **model.options}
    if classes is not None:
        arguments["num_classes"] = classes
    try:
        return timm.create_model(model.name, pretrained=model.pretrained, **arguments)
    except (TypeError, ValueError, AssertionError) as fault:
        raise ConfigFault(f"{key}: timm cannot make {model.name} with {arguments}: {fault}") from None
    except Exception as fault:
        if not model.pretrained:
            raise
        raise ConfigFault(
            f"{key}.pretrained: the weights of {model.name} are not in timm's cache and cannot be fetched "
            f"({type(fault).__name__}: {str(fault).partition(chr(10))[0]}); name a file as {key}.checkpoint"
        ) from None


def read_weights(path: Path, key: str) -> dict[str, Any]:
    """A file of weights: {"state": state_dict, "classes": names or None, "model": name or None}.

    Raises:
        ConfigFault: it cannot be read, is cut off, or holds no weights.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return {"state": load_file(path), "classes": None, "model": None}
        except Exception as fault:
            raise ConfigFault(f"{key}.checkpoint: {path} cannot be read: {fault}") from None
    try:
        path.open("rb").close()
    except OSError as fault:
        raise ConfigFault(f"{key}.checkpoint: {path} cannot be read: {fault.strerror}") from None
    try:
        saved = load_whole(path)
    except DAMAGED as fault:
        reason = str(fault).partition("\n")[0]
        raise ConfigFault(f"{key}.checkpoint: {path} is cut off, or holds more than weights: {reason}") from None
    if isinstance(saved, dict) and saved.get("kind") == KIND:
        better = saved["ema"] is not None and saved["average_is_better"]  # at the last validation before it
        state = saved["ema"] if better else saved["model"]
        return {"state": state, "classes": saved["classes"], "model": saved["model_name"]}
    if isinstance(saved, dict) and {"model", "classes", "data", "state"} <= saved.keys():  # of the digits experiment
        return {"state": saved["state"], "classes": None, "model": f"digits-{saved['model']}"}
    for name in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(saved, dict) and isinstance(saved.get(name), dict):
            saved = saved[name]
            break
    if not isinstance(saved, dict) or not saved or not all(isinstance(x, Tensor) for x in saved.values()):
        raise ConfigFault(
            f"{key}.checkpoint: {path} holds no weights: a state_dict, or a dictionary with one, is wanted"
        )
    return {"state": saved, "classes": None, "model": None}


def load_whole(path: Path) -> Any:
    """torch.load, which reads a part that its checksum contradicts without a word: here it raises, of `DAMAGED`."""
    if is_zipfile(path):  # else of torch before 1.6, which has no checksum; or damaged, which torch.load finds
        with ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {name} is another one")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(network: nn.Module, model: Model, key: str, classes: tuple[str, ...]) -> None:
    """Load the file of a section into its model.

    Raises:
        ConfigFault: the file is of another model, or its classes are not those of the data.
    """
    path = Path(model.checkpoint)
    read = read_weights(path, key)
    if read["model"] is not None and read["model"] != model.name:
        raise ConfigFault(f"{key}.checkpoint: {path} holds a {read['model']}; {key}.name={model.name}")
    names = read["classes"]
    if names is not None and tuple(names) != classes:
        raise ConfigFault(f"{key}.checkpoint: {_class_difference(tuple(names), classes)}")
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in read["state"].items()}
    own = network.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or extra:
        from trainer.sources import some

        parts = [f"without {some(missing)}"] * bool(missing) + [f"with {some(extra)}"] * bool(extra)
        raise ConfigFault(f"{key}.checkpoint: {path} is not of a {model.name}: {', '.join(parts)}")
    if shapes:
        name = min(shapes, key=lambda name: own[name].numel())
        theirs, expected = tuple(state[name].shape), tuple(own[name].shape)
        hint = ""
        if theirs[1:] == expected[1:] and expected[:1] == (len(classes),):
            hint = f": it knows {theirs[0]} classes, and the data has {len(classes)}"
        raise ConfigFault(f"{key}.checkpoint: {path}: {name} has shape {theirs}, {expected} is needed{hint}")
    network.load_state_dict(state)


def _class_difference(teacher: tuple[str, ...], data: tuple[str, ...]) -> str:
    if len(teacher) != len(data):
        return f"its {len(teacher)} classes are not the {len(data)} of the data"
    place = next(i for i, (a, b) in enumerate(zip(teacher, data)) if a != b)
    return (
        f"its class {place} is {teacher[place]!r}, that of the data {data[place]!r}: logits would be of other classes"
    )


def student(config: Config, classes: tuple[str, ...], device: torch.device) -> nn.Module:
    """The student on the device, in its dtype and memory format."""
    made = create(config.student, "student", classes=len(classes), channels=config.data.channels)
    if config.student.checkpoint:
        load_weights(made, config.student, "student", classes)
    return _placed(made, device, getattr(torch, config.precision.dtype), config)


def teacher(config: Config, classes: tuple[str, ...], device: torch.device) -> nn.Module:
    """The teacher on the device: frozen, in evaluation mode, compiled where asked.

    Raises:
        ConfigFault: it has no weights, or knows other classes than the data has.
    """
    section: Teacher = config.teacher
    if not (section.checkpoint or section.pretrained or section.allow_untrained):
        raise ConfigFault(
            "the teacher has no weights: set teacher.checkpoint=FILE or teacher.pretrained=true "
            "(teacher.allow_untrained=true to measure speed)"
        )
    own = section.pretrained and not section.checkpoint  # its weights decide how many classes it has
    made = create(section, "teacher", classes=None if own else len(classes), channels=config.data.channels)
    if section.checkpoint:
        load_weights(made, section, "teacher", classes)
    known = getattr(made, "num_classes", len(classes))
    if known != len(classes):
        raise ConfigFault(f"the teacher {section.name} knows {known} classes, and the data has {len(classes)}")
    dtype = getattr(torch, config.precision.dtype if section.dtype == "as_student" else section.dtype)
    made = _placed(made, device, dtype, config).eval().requires_grad_(False)
    if section.compile:
        made.compile()  # in place: the names of its weights stay
    return made


def _placed(model: nn.Module, device: torch.device, dtype: torch.dtype, config: Config) -> nn.Module:
    memory = torch.channels_last if config.precision.channels_last else torch.preserve_format
    return model.to(device=device, dtype=dtype, memory_format=memory)  # type: ignore[call-overload]


@torch.no_grad()
def check_output(model: nn.Module, key: str, config: Config, classes: int, device: torch.device) -> None:
    """Ask a model once: a wrong image size or number of classes is found before the first epoch."""
    training = model.training
    model.eval()
    parameter = next(model.parameters())
    size = config.data.image_size
    images = torch.zeros(2, config.data.channels, size, size, device=device, dtype=parameter.dtype)
    try:
        shape = tuple(model(images).shape)
    except (RuntimeError, AssertionError, ValueError) as fault:
        raise ConfigFault(
            f"{key} cannot take images {tuple(images.shape)}: {str(fault).partition(chr(10))[0]}"
        ) from None
    finally:
        model.train(training)
    if shape != (2, classes):
        raise ConfigFault(f"{key} gives {shape} for images {tuple(images.shape)}; (2, {classes}) is needed")
