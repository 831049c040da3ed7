"""The communication and memory of a step over ranks, by formula: the tables of distributed.md. Run it to print them.

tests/test_distributed.py compares `collectives` with what ranks really run, in order and in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

GPUS = (8, 64, 512)
ROWS = 256  # of each GPU
CLASSES = {"ImageNet-1k": 1000, "ImageNet-21k": 21841}
CHUNK = 256 << 20  # bytes of a chunk on a GPU


def collectives(
    ranks: int,
    rows: int,
    classes: int,
    *,
    weight: Sequence[float] = (1.0, 1.0, 1.0),
    temperature: Sequence[float] = (0.1, 0.1, 0.1),
    direction: str = "student",
    mask_same_class: bool = False,
    present_only: bool = False,
    gather: str = "all",
    teacher_grad: bool = False,
    with_grad: bool = True,
    soft: bool = False,
    operand: int = 2,
    acc: int = 4,
    chunk: int = CHUNK,
) -> list[tuple[str, int]]:
    """The collectives of a call, in order, and the bytes that each rank receives at least.

    rows: of each rank; operand, acc: bytes of an operand and of an accumulator; the operand's rows are not padded.
    """
    batch = ranks * rows

    def all_reduce(numbers: int) -> tuple[str, int]:
        return "all-reduce", 2 * numbers * acc * (ranks - 1) // ranks

    found = [("exchange", (ranks - 1) * 32)]
    if weight[1] or (weight[0] and mask_same_class) or (weight[2] and present_only):
        found.append(("all-gather", (ranks - 1) * rows * 8))  # labels
    if weight[2]:
        found += [all_reduce(2 * classes)] * (2 if with_grad else 1)  # norms
        step = max(1, chunk // (classes * acc))
        found += [all_reduce(min(step, classes - k) * classes) for k in range(0, classes, step)]  # cosines
    pairs = [(term,) for term in (0, 1) if weight[term]]
    if len(pairs) == 2 and not mask_same_class and temperature[0] == temperature[1]:
        pairs = [(0, 1)]
    block = ("shift", rows * classes * operand)
    if pairs and gather == "all":
        found.append(("all-gather", (ranks - 1) * rows * classes * operand))  # the teacher's rows
    for terms in pairs:
        if soft and 1 in terms:
            tables = (direction != "teacher") * (1 + teacher_grad) + (direction != "student") * (1 + with_grad)
            found += [all_reduce(classes), *[all_reduce(classes**2)] * tables]
        if gather == "ring":
            found += [block] * (ranks - 1)
        if direction != "student":
            if 2 / temperature[terms[0]] > 80:
                found.append(all_reduce(batch))  # maxima
            found.append(all_reduce((3 if 1 in terms else 2) * batch))
        if gather == "ring" and teacher_grad:
            found += [block, ("shift", rows * classes * acc)] * (ranks - 1) + [("shift", rows * classes * acc)]
        elif gather == "ring" and direction != "student" and with_grad:
            found += [block] * (ranks - 1)
        elif gather == "all" and teacher_grad:
            found.append(("reduce-scatter", (ranks - 1) * rows * classes * acc))
    return found


def family_collectives(
    loss: str,
    ranks: int,
    rows: int,
    classes: int,
    *,
    weight: Sequence[float] = (1.0, 1.0, 1.0),
    views: int = 2,
    student_grad: bool = True,
    teacher_grad: bool = False,
    operand: int = 2,
    acc: int = 4,
    chunk: int = CHUNK,
) -> list[tuple[str, int]]:
    """`collectives` of "ckd" with the student's negatives, "clkd" and "mlkd"; weight: of their terms."""
    sides, first, last = student_grad + teacher_grad, bool(weight[0]), bool(weight[2])

    def all_gather(bytes_of_a_row: int) -> tuple[str, int]:
        return "all-gather", (ranks - 1) * rows * bytes_of_a_row

    def all_reduce(numbers: int) -> tuple[str, int]:
        return "all-reduce", 2 * numbers * acc * (ranks - 1) // ranks

    found = [("exchange", (ranks - 1) * 32)]
    if loss == "ckd":
        found.append(all_gather(classes * operand))
        return found + [all_gather(acc)] * student_grad
    if loss == "mlkd":
        if last:
            found.append(all_gather(8))  # labels
        if first or last:
            found.append(all_gather((2 if first or views == 2 else 1) * classes * operand))
            if student_grad or (teacher_grad and (first or views == 2)):
                found.append(all_gather((4 * first + views * last) * acc))
        return found
    category = bool(weight[1])
    if category or last:
        found.append(all_reduce((2 * category + 3 * last) * classes))  # norms; means of S - T, S and T
    if category and sides:
        found.append(all_reduce(sides * classes))
    if last and 3 * ranks * rows < classes:
        found += [all_gather(2 * classes * acc), all_reduce(1)]
    elif last and 2 * classes**2 * acc <= chunk:
        found.append(all_reduce(classes**2))
    elif last:
        step = max(1, chunk // (2 * classes * acc))
        found += [all_reduce(min(step, classes - k) * classes) for k in range(0, classes, step)]
    return found


def received(*args: int, **options: object) -> int:
    """Bytes that each rank receives in a call."""
    return sum(size for _, size in collectives(*args, **options))  # type: ignore[arg-type]


def held(ranks: int, rows: int, classes: int, gather: str, operand: int = 2, acc: int = 4) -> int:
    """Bytes that the row terms hold beside a call of one process of the same rows, chunks left out.

    gather="all": the teacher's rows of all ranks, of which one process holds its own. "ring": a second block, and the
    running sums of the local anchors.
    """
    return (ranks - 1) * rows * classes * operand if gather == "all" else rows * classes * (operand + acc)


def megabytes(size: int) -> str:
    """Megabytes (10^6 bytes) with three digits."""
    value = size / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.{max(0, 2 - int(math.log10(max(value, 0.01))))}f}"


def table() -> list[list[str]]:
    """The rows of the table: megabytes that each rank receives a step, and holds."""
    rows_only, columns_only = (1.0, 1.0, 0.0), (0.0, 0.0, 1.0)
    lines = []
    for name, classes in CLASSES.items():
        for ranks in GPUS:
            shape = ranks, ROWS, classes
            lines.append(
                [
                    f"{name}, {ranks} GPUs, B = {ranks * ROWS:,}",
                    megabytes(received(*shape, weight=rows_only)),
                    megabytes(received(*shape, weight=rows_only, direction="symmetric")),
                    megabytes(received(*shape, weight=rows_only, direction="symmetric", gather="ring")),
                    megabytes(received(*shape, weight=columns_only)),
                    megabytes(held(*shape, "all")),
                    megabytes(held(*shape, "ring")),
                ]
            )
    return lines


if __name__ == "__main__":
    for line in table():
        print("| " + " | ".join(line) + " |")
