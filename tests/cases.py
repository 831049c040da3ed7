"""Logits, labels, and the error bar that every backend is held to.

The truth is the reference on the same logits in fp64. The bar is twice the error of the reference at the logits' own
dtype (what eager PyTorch gives), plus the floor of `Bar`. Errors of several draws are combined as a root mean square:
the error of one scalar can be 0 by luck, and twice nothing is no bar.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mcld_kernels
from mcld_kernels.options import MCLDOptions, mcld_options

KINDS = ("random", "converged", "collinear", "large", "zeros")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WEIGHT = (1.0, 0.7, 0.4)  # all different, so that swapped weights show
# What the CUDA kernels are tried with, on the host and on a GPU.
KERNEL_OPTIONS = {
    "student": {},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "masked": {"mask_same_class": True, "present_only": True},
    "masked-teacher": {"mask_same_class": True, "direction": "teacher"},
    "masked-symmetric": {"mask_same_class": True, "direction": "symmetric"},
    # Below 0.025 the online maximum takes over (fp16: below 0.1).
    "cold": {"temperature": (0.02, 0.015, 0.02)},
    "cold-symmetric": {"temperature": 0.02, "direction": "symmetric", "mask_same_class": True},
}


def options_of(**options) -> tuple[MCLDOptions, Tensor | None]:
    """The options of a call and the weights given as a tensor, with the defaults of `mcld_loss` for the others."""
    defaults = {"temperature": 0.1, "weight": (1.0, 1.0, 1.0), "direction": "student", "mask_same_class": False}
    defaults |= {"present_only": False, "ignore_index": -100, "eps": 1e-12}
    return mcld_options(**defaults | options)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def logits(kind: str, batch: int, classes: int, dtype=torch.float64, seed=0, device="cpu") -> tuple[Tensor, Tensor]:
    """Student and teacher logits (batch, classes) of a kind."""
    generator = torch.Generator().manual_seed(1000 * seed + 31 * batch + classes)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher = 3 * normal(batch, classes)
    if kind == "random":  # rows of very different norms, so that a wrong norm shows
        student = normal(batch, classes) * (0.3 + 3 * torch.rand(batch, 1, generator=generator, dtype=torch.float64))
    elif kind == "converged":  # the student has all but reached the teacher
        student = teacher + 1e-2 * normal(batch, classes)
    elif kind == "collinear":  # all rows point one way or the opposite: cosines of 1 and -1
        direction = normal(1, classes)
        student, teacher = (direction * (normal(batch, 1) + 1e-3 * normal(batch, classes)) for _ in range(2))
    elif kind == "alike":  # the teacher's rows all but agree, the student's do not: as features early in training
        student = normal(batch, classes)
        teacher = normal(1, classes) + 0.1 * teacher
    elif kind == "large":
        student, teacher = 1e4 * normal(batch, classes).clamp(-6, 6), 1e4 * teacher.clamp(-6, 6)
    elif kind == "zeros":  # rows and columns without direction, in the student, the teacher and both
        student = normal(batch, classes)
        student[::3], student[:, ::4] = 0, 0
        teacher[::2], teacher[:, ::5] = 0, 0
    else:
        raise ValueError(kind)
    return student.to(dtype).to(device), teacher.to(dtype).to(device)


def labels(batch: int, classes: int, seed=0, ignored=0.0, device="cpu") -> Tensor:
    """Labels (batch,) of which about a part ``ignored`` is -100. At most 7 classes occur, so that classes repeat."""
    generator = torch.Generator().manual_seed(77 + seed)
    present = torch.randperm(classes, generator=generator)[:7]
    target = present[torch.randint(len(present), (batch,), generator=generator)]
    target[torch.rand(batch, generator=generator) < ignored] = -100
    return target.to(device)


def alternating(alternatives, first, second):
    """Points (alternative, first, second) for every pair of the last two, the alternatives in turn.

    So each alternative meets every value of both others, and half of their pairs. Two of the three choose a kernel or
    its instance, and what the third changes inside it does not depend on both: the points left out run no code of their
    own. Arguments map the names in a test's id to values.
    """
    names = list(alternatives)
    return [
        pytest.param(alternatives[names[(i + j) % len(names)]], a, b, id=f"{names[(i + j) % len(names)]}-{x}-{y}")
        for i, (x, a) in enumerate(first.items())
        for j, (y, b) in enumerate(second.items())
    ]


def by_name(values, name=str):
    return dict(zip(map(name, values), values, strict=True))


class Outcome(NamedTuple):
    loss: Tensor
    terms: Tensor  # (3,)
    student: Tensor  # gradient
    teacher: Tensor | None


def run(backend: str, student: Tensor, teacher: Tensor, target=None, *, upstream=1.0, teacher_grad=False, **options):
    """Loss, terms and gradients, the loss multiplied by ``upstream`` on its way back."""
    student = student.detach().requires_grad_()
    teacher = teacher.detach().requires_grad_(teacher_grad)
    result = mcld_kernels.mcld_terms(student, teacher, target, backend=backend, **options)
    result.loss.backward(torch.as_tensor(upstream, dtype=result.loss.dtype, device=result.loss.device))
    terms = torch.stack([result.instance, result.sample, result.category])
    return Outcome(result.loss.detach(), terms, student.grad, teacher.grad)


def truth(student: Tensor, teacher: Tensor, target=None, **options) -> Outcome:
    """The reference in fp64, on the logits' own device: the CPU's fp64 would take most of a GPU test's time."""
    weight = options.get("weight")
    if isinstance(weight, Tensor):
        options["weight"] = weight.detach().double()
    return run("reference", student.detach().double(), teacher.detach().double(), target, **options)


class Error(NamedTuple):
    """Squared error, and what it is relative to, of one quantity of one draw."""

    square: float
    size: float  # magnitude of the truth
    natural: float  # magnitude of the parts whose difference the truth is


def coldest(options: dict) -> float:
    temperature = options.get("temperature", 0.1)
    return min(temperature) if isinstance(temperature, tuple) else temperature


def errors(got: Outcome, want: Outcome, student: Tensor, teacher: Tensor, options: dict) -> dict[str, Error]:
    # The loss is made of similarities of size 1 / temperature; its gradient by a row is that over the row's norm and
    # the batch.
    similarity = 1 / coldest(options)

    def gradient(x: Tensor) -> float:
        norms = [x.double().norm(dim=dim) for dim in (0, 1)]
        spread = sum(float((1 / n[n > 0]).square().sum().sqrt()) / len(n) for n in norms)
        return abs(options.get("upstream", 1.0)) * similarity * spread

    pairs = {
        "loss": (got.loss, want.loss, similarity),
        "terms": (got.terms, want.terms, similarity),
        "student gradient": (got.student, want.student, gradient(student)),
        "teacher gradient": (got.teacher, want.teacher, gradient(teacher)),
    }
    found = {}
    for name, (a, b, natural) in pairs.items():
        if b is not None:
            assert a is not None, f"no {name}"
            assert a.shape == b.shape
            found[name] = Error(float((a.double() - b).square().sum()), float(b.norm()), natural)
    return found


class Bar(NamedTuple):
    """The floor under twice eager's error: it matters only where eager is exact by luck.

    ulps: of the truth, at the logits' dtype: half a unit for what is rounded to it, operands or gradient.
    natural: units of the accumulator dtype, of the parts whose difference the truth is. Where the loss or its gradient
    vanishes (one row, one class, collinear rows) what remains is the rounding of cosines near 1.
    """

    ulps: float
    natural: float


BAR = Bar(0.5, 1.0)
# There the truth is as rounded as the result, and the exponential multiplies the rounding of a cosine by
# 1 / temperature (200 at the lowest here). A wrong formula is off by a thousand million times this bar.
BAR64 = Bar(1000.0, 100.0)


def check(
    backend,
    device,
    kind,
    batch,
    classes,
    dtype,
    *,
    draws=3,
    ignored=0.0,
    teacher_grad=False,
    teacher_dtype=None,
    **options,
):
    """Hold ``backend`` to the error bar over several draws of logits, labels and upstream gradients.

    teacher_dtype: that of the teacher's logits, where it is not ``dtype``.
    """
    teacher_dtype = teacher_dtype or dtype
    # A gradient is rounded to the dtype of its logits, all else to that of the operands.
    rounded = {"student gradient": dtype, "teacher gradient": teacher_dtype}
    operand_dtype = torch.promote_types(dtype, teacher_dtype)
    bar = BAR64 if dtype == torch.float64 else BAR
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    totals: dict[str, list[float]] = {}
    options.setdefault("weight", WEIGHT)
    for seed in range(draws):
        student, teacher = logits(kind, batch, classes, dtype, seed, device)
        if teacher_dtype != dtype:
            _, teacher = logits(kind, batch, classes, teacher_dtype, seed, device)
        target = labels(batch, classes, seed, ignored, device)
        upstream = float(torch.randn((), generator=torch.Generator().manual_seed(seed)))
        # As a GradScaler would: eager's gradient by the cosines, upstream / (batch temperature), must stay inside fp16.
        if dtype == torch.float16:
            upstream *= 256 * min(batch, classes) * coldest(options)
        both = {"upstream": upstream, "teacher_grad": teacher_grad, **options}
        want = truth(student, teacher, target, **both)
        got = run(backend, student, teacher, target, **both)
        assert (got.loss.dtype, got.student.dtype) == (stat, dtype)
        ours = errors(got, want, student, teacher, both)
        eager = errors(run("reference", student, teacher, target, **both), want, student, teacher, both)
        for name, error in ours.items():
            ulp = torch.finfo(rounded.get(name, operand_dtype)).eps
            floor = bar.ulps * ulp * error.size + bar.natural * torch.finfo(stat).eps * error.natural
            total = totals.setdefault(name, [0.0, 0.0, 0.0])
            for i, square in enumerate((error.square, eager[name].square, floor**2)):
                total[i] += square
    for name, (ours, eager, floor) in totals.items():
        # Written so that NaN fails.
        assert ours**0.5 <= 2 * eager**0.5 + floor**0.5, (
            f"{name}: error {ours**0.5:.3g}, eager's {eager**0.5:.3g}, floor {floor**0.5:.3g}"
        )
