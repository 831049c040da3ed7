"""Prints the table of docs/hyperparameters.md: ``python docs/gradient_sizes.py``.

The size of a gradient is its L2 norm over the student's logits, for B = 256 rows, C = 100 classes and weight 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mcld_kernels import kd_loss, mcld_loss

BATCH, CLASSES = 256, 100
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)
TERMS = {"instance": (1, 0, 0), "sample": (0, 1, 0), "category": (0, 0, 1)}


def logits(share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels: a teacher that favours the label, a student with a share of the teacher's logits."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (BATCH,), generator=generator)
    teacher = torch.randn(BATCH, CLASSES, generator=generator)
    teacher[torch.arange(BATCH), target] += 4
    return share * teacher + torch.randn(BATCH, CLASSES, generator=generator), teacher, target


def size(student: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
    student = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student), student)
    return float(gradient.norm())


def rows() -> list[list[str]]:
    """The table's cells: each term far from the teacher (share 0) and half way to it (share 0.5)."""
    table = []
    for temperature in TEMPERATURES:
        cells = [f"{temperature:g}"]
        for share in (0.0, 0.5):
            student, teacher, target = logits(share)
            for weight in TERMS.values():
                value = size(student, lambda s: mcld_loss(s, teacher, target, temperature=temperature, weight=weight))  # noqa: B023
                cells.append(f"{value:.3f}")
        table.append(cells)
    return table


def main() -> None:
    print("| temperature | instance | sample | category | instance, half way | sample, half way | category, half way |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for cells in rows():
        print(f"| {' | '.join(cells)} |")
    for share, where in ((0.0, "far from the teacher"), (0.5, "half way")):
        student, teacher, target = logits(share)
        cross = size(student, lambda s: F.cross_entropy(s, target))  # noqa: B023
        soft = size(student, lambda s: kd_loss(s, teacher, temperature=4.0))  # noqa: B023
        print(f"{where}: cross-entropy {cross:.3f}, soft targets at temperature 4 {soft:.3f}")


if __name__ == "__main__":
    main()
