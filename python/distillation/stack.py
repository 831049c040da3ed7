"""Many small students trained at once, each exactly as it would be alone: their weights stand in one tensor a layer.

A student of scikit-learn's digits takes some microseconds a step, and the calls around it take a hundred times as
long. Stacked, 30 students share these calls: the network runs under `torch.func.vmap`, AdamW works element by element,
and each student has its own images, order, weights and loss. Nothing is shared but the schedule of the learning rate.

The teacher is frozen and in evaluation mode, and the digits move by a pixel at most, so that its logits for the nine
places of every image are computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from distillation.data import Shifted, digits

# A loss beside the cross-entropy: (student, teacher, target) to a scalar.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SHIFTS = [(top, left) for top in range(3) for left in range(3)]


@dataclass(frozen=True)
class Pool:
    """A student's training images at each of the nine places, with labels, some of them wrong, and teacher logits."""

    images: Tensor  # (9, n, 1, 8, 8)
    labels: Tensor  # (n,)
    teacher: Tensor  # (9, n, classes)


@torch.no_grad()
def pool(teacher: nn.Module, images: int, noise: float, seed: int) -> Pool:
    """The images that ``seed`` draws from the teacher's training images, and their wrong labels."""
    data = digits(images, noise, 0, draw=seed).student
    assert isinstance(data, Shifted)
    moved = torch.stack(
        [data.padded[:, :, top : top + data.height, left : left + data.width] for top, left in SHIFTS]
    )  # (9, n, 1, 8, 8)
    teacher.eval()
    logits = torch.stack([teacher(images) for images in moved])
    return Pool(images=moved, labels=data.labels, teacher=logits)


def draw(pool: Pool, batch: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places and indices of each step's images, (steps, batch) each: epochs in random order, the remainder dropped."""
    count = len(pool.labels)
    if batch > count:
        raise ValueError(f"a batch of {batch} needs as many training images; there are {count}")
    generator = torch.Generator().manual_seed(seed)
    whole = count // batch
    epochs = [torch.randperm(count, generator=generator)[: whole * batch] for _ in range(-(-steps // whole))]
    places = torch.randint(len(SHIFTS), (steps, batch), generator=generator)
    return places, torch.cat(epochs).view(-1, batch)[:steps]


@dataclass(frozen=True)
class Student:
    """One student of a stack."""

    pool: Pool
    seed: int  # initial weights, order and places of the images
    loss: Loss | None  # None: cross-entropy alone


def train(
    make_model: Callable[[], nn.Module],
    students: Sequence[Student],
    *,
    batch: int,
    steps: int,
    rate: float,
    decay: float,
) -> Callable[[Tensor], Tensor]:
    """Train the students with AdamW and a one-cycle schedule on cross-entropy and their losses.

    Returns a function from images (N, 1, 8, 8) to the students' logits (students, N, classes). A student that diverges
    has logits of NaN, and the others go on.
    """
    models = []
    for student in students:
        torch.manual_seed(student.seed)
        models.append(make_model())
    parameters, _ = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    run = vmap(lambda values, images: functional_call(skeleton, values, (images,)))
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    draws = [draw(student.pool, batch, steps, student.seed) for student in students]
    pools = [student.pool for student in students]
    for step in range(steps):
        chosen = [(places[step], rows[step]) for places, rows in draws]
        images = torch.stack([p.images[at] for p, at in zip(pools, chosen)])
        target = torch.stack([p.labels[at[1]] for p, at in zip(pools, chosen)])
        logits = run(parameters, images)  # (students, batch, classes)
        cross = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / batch
        losses = [
            student.loss(own, student.pool.teacher[at], labels)
            for student, own, at, labels in zip(students, logits.unbind(), chosen, target)
            if student.loss is not None
        ]
        optimizer.zero_grad(set_to_none=True)
        torch.stack([cross, *losses]).sum().backward()  # each student's gradient is its own: no weight is shared
        optimizer.step()
        schedule.step()
    values = {name: value.detach() for name, value in parameters.items()}
    same = vmap(lambda own, images: functional_call(skeleton, own, (images,)), in_dims=(0, None))
    return lambda images: same(values, images)


@torch.no_grad()
def accuracies(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> list[float]:
    """The fraction of right answers of each student; 0 for one that has diverged."""
    logits = predict(images)
    right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
    return right.double().mean(1).tolist()
