"""Every setting of a training run: a tree of frozen dataclasses, one a section of the YAML file.

`settings` reads, checks and writes them; docs/training.md shows the table that `settings.reference` makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Value = str | int | float | bool | None | list[Any]  # what a free option of a model, an optimizer or a loss may be
Options = dict[str, Value]


def option(default: Any, doc: str, *, least: float | None = None, most: float | None = None, above: Any = None) -> Any:
    """A field with its documentation and bounds: least <= value <= most, value > above."""
    metadata = {"doc": doc, "least": least, "most": most, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images come from."""

    source: Literal["synthetic", "digits", "folder", "webdataset", "cifar100"] = option(
        "synthetic",
        "folder: ROOT/TRAIN/CLASS/*.jpg; webdataset: tar files of image and .cls; cifar100: the Python version, "
        "unpacked in ROOT; digits: scikit-learn's; synthetic: noise that costs no reading, for measuring speed",
    )
    root: str = option("", "folder of the data set")
    train: str = option(
        "train", "below root: the training folder, or for webdataset a pattern such as `train-{0000..1023}.tar`"
    )
    validation: str = option("val", "the same of the validation images; empty: no validation")
    classes: int | None = option(
        None, "number of classes; needed for webdataset and synthetic, checked for the others", least=2
    )
    image_size: int = option(224, "height and width that a model sees, pixels", least=1)
    channels: int = option(3, "1 or 3", least=1)
    workers: int = option(4, "processes that read and augment, of each rank; 0: the rank's own", least=0)
    faulty: Literal["skip", "fail"] = option(
        "skip",
        "an image or shard that cannot be read. skip: it is counted and named, the next readable image takes its place "
        "in training, and validation leaves it out; fail: the run ends with its name",
    )
    faulty_limit: float = option(
        0.01,
        "with skip: the run ends where more than this fraction of the training images, or of their shards, is faulty",
        least=0,
        most=1,
    )
    images: int = option(1_281_167, "training images of the synthetic source", least=1)
    validation_images: int = option(0, "validation images of the synthetic source", least=0)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The augmentation of a training image, by timm. All of it is a function of (seed, epoch, index of the image)."""

    enabled: bool = option(True, "false: training images are prepared as those of validation")
    scale: list[float] = option([0.08, 1.0], "of a random resized crop: smallest and largest part of the area")
    ratio: list[float] = option([0.75, 1.3333333333333333], "of a random resized crop: aspect ratios")
    pad: int = option(
        0, "more than 0: instead of a resized crop, pad by this many pixels and crop at random, as on CIFAR", least=0
    )
    flip: float = option(0.5, "probability of a horizontal flip", least=0, most=1)
    color_jitter: float = option(0.0, "strength of colour jitter; 0: none", least=0)
    auto_augment: str = option("", "of timm, such as rand-m9-mstd0.5-inc1; empty: none")
    erasing: float = option(0.0, "probability of random erasing", least=0, most=1)
    interpolation: Literal["bilinear", "bicubic", "random"] = option("bilinear", "of resizing")
    crop_fraction: float = option(0.875, "part of a validation image that its centre crop keeps", above=0, most=1)
    mean: list[float] = option([0.485, 0.456, 0.406], "of the channels, subtracted; one number or one a channel")
    std: list[float] = option([0.229, 0.224, 0.225], "of the channels, divided by")
    mixup: float = option(0.0, "alpha of mixup; 0: none", least=0)
    cutmix: float = option(0.0, "alpha of cutmix; 0: none", least=0)
    mix_probability: float = option(1.0, "of a batch that is mixed", least=0, most=1)
    mix_switch: float = option(0.5, "probability of cutmix where both are on", least=0, most=1)
    smoothing: float = option(0.0, "label smoothing", least=0, most=0.999)
    period: int = option(
        0,
        "epochs after which the same crops come again, so that a teacher's logits can be cached; 0: never",
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The student."""

    name: str = option("", "a name of timm, or one of trainer.models.BUILT_IN")
    pretrained: bool = option(False, "weights from timm's cache or its hub")
    checkpoint: str = option("", "file of weights to begin from: a state_dict, or a checkpoint of this trainer")
    options: Options = option({}, "arguments of the model's constructor, such as drop_path_rate")


@dataclass(frozen=True, kw_only=True)
class Teacher(Model):
    """The teacher: frozen, in evaluation mode, without gradient."""

    dtype: Literal["as_student", "float32", "bfloat16", "float16"] = option(
        "as_student", "as_student: its weights in the student's dtype, under the same autocast; else its weights in it"
    )
    compile: bool = option(False, "torch.compile")
    cache: bool = option(
        False,
        "keep its logits in a file of the run folder and compute them once; needs augment.period >= 1 (or no "
        "augmentation) and no mixup or cutmix",
    )
    allow_untrained: bool = option(False, "a teacher with random weights, for measuring speed")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """cross_entropy x cross-entropy + weight x the distillation loss."""

    name: str = option("mcld", "ce (cross-entropy alone), kd, dkd, mcld, or another loss that mcld_kernels exports")
    weight: float = option(1.0, "of the distillation loss", least=0)
    cross_entropy: float = option(1.0, "weight of the cross-entropy with the labels", least=0)
    warmup_epochs: float = option(0.0, "epochs over which `weight` comes in linearly; see also mcld's warmup", least=0)
    options: Options = option({}, "arguments of the loss's constructor, such as temperature; also --loss-option")
    over: Literal["global", "rank"] = option(
        "global",
        "a loss that contrasts rows: over the batch of all ranks, or each rank its own rows, which is another loss",
    )
    queue: int = option(
        0, "teacher rows of earlier steps, over all ranks, that a contrast with `candidates` (mcld) also sees", least=0
    )
    gradient_norms: int = option(
        0, "log the norm of each term's gradient by the logits every this many steps; 0: never", least=0
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """By timm's create_optimizer_v2."""

    name: str = option("sgd", "of timm: sgd (Nesterov), momentum, adamw, lamb, lars, ...")
    rate: float = option(0.1, "learning rate at `base_batch` images", above=0)
    scaling: Literal["none", "linear", "sqrt"] = option(
        "none", "the rate is multiplied by batch / base_batch (linear), by its square root, or not"
    )
    base_batch: int = option(256, "batch that `rate` is meant for", least=1)
    weight_decay: float = option(1e-4, "weight decay", least=0)
    decay_norm_and_bias: bool = option(True, "weight decay of biases and normalization weights too")
    momentum: float = option(0.9, "momentum of those that have one", least=0, most=1)
    options: Options = option({}, "further arguments of the optimizer, such as betas")
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping", least=0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Of the learning rate, by timm's create_scheduler_v2, moved every step."""

    name: Literal["cosine", "step", "multistep", "poly", "constant"] = option("cosine", "of timm")
    warmup_epochs: float = option(0.0, "linear warm-up from warmup_rate", least=0)
    warmup_rate: float = option(0.0, "rate at the first step of the warm-up", least=0)
    min_rate: float = option(0.0, "last rate of cosine and poly", least=0)
    decay_epochs: float = option(30.0, "step: epochs between decays", above=0)
    milestones: list[int] = option([30, 60, 90], "multistep: epochs of the decays")
    decay_rate: float = option(0.1, "factor of a decay; poly: the power", above=0)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats."""

    dtype: Literal["float32", "float64"] = option("float32", "of the student's weights")
    amp: Literal["none", "bfloat16", "float16"] = option("none", "autocast; float16 with a GradScaler")
    matmul: Literal["highest", "high", "medium"] = option("highest", "torch.set_float32_matmul_precision")
    channels_last: bool = option(False, "memory format of images and of both models")
    compile: bool = option(False, "torch.compile of the student")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Over the ranks that torchrun starts."""

    kind: Literal["ddp", "fsdp2"] = option("ddp", "DistributedDataParallel, or fully_shard")
    backend: Literal["auto", "nccl", "gloo"] = option("auto", "auto: nccl on GPUs, gloo on CPUs")
    sync_batchnorm: bool = option(False, "batch statistics over all ranks; on GPUs only")
    timeout: float = option(600.0, "seconds after which a collective that a rank never joins ends the run", above=0)


@dataclass(frozen=True, kw_only=True)
class Average:
    """An exponential moving average of the student, by timm's ModelEmaV3; validated beside it."""

    decay: float = option(0.0, "0: none", least=0, most=1)
    warmup: bool = option(False, "the decay comes in over the first steps")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """checkpoints/step-*.pt in the run folder."""

    every_epochs: int = option(1, "0: not by epochs; a model better than any before is saved all the same", least=0)
    every_steps: int = option(0, "0: not by steps", least=0)
    keep: int = option(2, "newest checkpoints that stay; best.pt stays beside them", least=1)


@dataclass(frozen=True, kw_only=True)
class Log:
    """log.txt, steps.csv, epochs.csv, results.json, curves.png and TensorBoard files in the run folder."""

    every: int = option(50, "steps between lines", least=1)
    tensorboard: bool = option(True, "write events for TensorBoard")
    profile: int = option(
        0, "steps that torch.profiler records, after 5 others if the epoch has them; 0: none. Also --profile", least=0
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    seed: int = option(0, "of the weights, the order of the images and their augmentation", least=0, most=2**31 - 1)
    epochs: int = option(100, "passes over the training images", least=1)
    steps: int | None = option(None, "the run ends after this many steps of the optimizer, if before `epochs`", least=1)
    batch: int = option(256, "images of a step over all ranks and micro-batches", least=1)
    accumulate: int = option(1, "micro-batches of a step; a contrast is over all of them", least=1)
    validate_every: int = option(1, "epochs between validations; the last epoch is always validated", least=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where there is one")
    threads: int | None = option(None, "of a rank on a CPU; default: torch's own choice", least=1)
    output: str = option("", "run folder; default: runs/NAME-DATE")
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    teacher: Teacher = field(default_factory=Teacher)
    student: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = field(default_factory=Precision)
    parallel: Parallel = field(default_factory=Parallel)
    ema: Average = field(default_factory=Average)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
