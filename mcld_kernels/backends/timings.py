"""The measured table: which of the CUDA backends was the fastest on this GPU, by dtype and shape.

`bench/calibrate.py` measures and writes one, each figure past the correctness gate. It is looked for where MCLD_TABLE
says, else in the user's cache folder, else among those that the package ships (``tables/``: none yet, no GPU has been
measured). Without a table nothing is known, and the choice falls back to a fixed order.
"""

from __future__ import annotations

import json
import math
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import float32_precision
from ..version import __version__

SCHEMA = 1
SHIPPED = Path(__file__).parents[1] / "tables"
# What a table compares; "hopper" is backend "cuda" with its Hopper kernels.
CANDIDATES = {"triton": "triton", "cuda": "cuda", "hopper": "cuda"}
_HALF = ("bfloat16", "float16")


class Row(NamedTuple):
    """One shape, all terms, loss and gradient: milliseconds of each candidate that ran and was right."""

    dtype: str
    precision: str  # the float32 matmul precision
    batch: int
    classes: int
    milliseconds: dict[str, float]


class Table(NamedTuple):
    path: Path
    gpu: str
    date: str
    rows: tuple[Row, ...]


def file_name(gpu: str) -> str:
    """The table's file name for a GPU by its name, as torch gives it."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_path(gpu: str) -> Path:
    """Where `bench/calibrate.py` writes the table of this machine's GPU."""
    if os.environ.get("MCLD_TABLE"):
        return Path(os.environ["MCLD_TABLE"])
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mcld_kernels" / file_name(gpu)


def find(gpu: str) -> tuple[Table | None, str]:
    """The table for a GPU, and what to say of it or why there is none. Raises ValueError where a file is no table."""
    asked = bool(os.environ.get("MCLD_TABLE"))
    ignored = []
    for path in (user_path(gpu), *([] if asked else [SHIPPED / file_name(gpu)])):
        if not path.is_file():
            if asked:
                raise ValueError(f"MCLD_TABLE names {path}, and there is no such file")
            continue
        table, why = _read(path)
        if table is not None and table.gpu == gpu:
            return table, f"{path}: measured {table.date}, {len(table.rows)} shapes"
        ignored.append(f"{path} is ignored: {why or f'it was measured on {table and table.gpu}'}")
    return None, "; ".join(ignored) or "none for this GPU: `python bench/calibrate.py` measures one"


def _read(path: Path) -> tuple[Table | None, str]:
    """The table in a file, or why this version of the package does not use it."""
    try:
        found = json.loads(path.read_text())
        if (found["schema"], found["package"]) != (SCHEMA, __version__):
            return None, f"it was measured with mcld_kernels {found['package']}, and this is {__version__}"
        rows = []
        for entry in found["rows"]:
            milliseconds = {str(name): float(value) for name, value in entry["milliseconds"].items()}
            row = Row(
                str(entry["dtype"]), str(entry["precision"]), int(entry["batch"]), int(entry["classes"]), milliseconds
            )
            unknown = set(milliseconds) - set(CANDIDATES)
            if not milliseconds or unknown or min(row.batch, row.classes, *milliseconds.values()) <= 0:
                raise ValueError(f"a row that cannot be: {entry}")
            rows.append(row)
        return Table(path, str(found["gpu"]), str(found["date"]), tuple(rows)), ""
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as fault:
        raise ValueError(
            f"{path} is no table of measurements ({type(fault).__name__}: {fault}): delete it, "
            "or measure again with `python bench/calibrate.py`"
        ) from fault


def nearest(table: Table, dtype: torch.dtype, batch: int, classes: int) -> Row | None:
    """The row of this kind of logits whose shape is the nearest, by factors of two; None if the kind is not in it."""
    name = str(dtype).removeprefix("torch.")
    kinds = [[row for row in table.rows if row.dtype == name]]
    if name == "float32":
        kinds = [[row for row in kinds[0] if row.precision == float32_precision()]]
    if name in _HALF:
        kinds.append([row for row in table.rows if row.dtype in _HALF])
    rows = next(filter(None, kinds), [])

    def distance(row: Row) -> float:
        return math.log2(row.batch / max(batch, 1)) ** 2 + math.log2(row.classes / max(classes, 1)) ** 2

    return min(rows, key=distance, default=None)


@lru_cache
def _in_use(gpu: str, asked: str | None) -> Table | None:
    """Read once in a process: a choice that changed halfway would change the last bits of a result."""
    return find(gpu)[0]


def _row(student: Tensor, teacher: Tensor) -> Row | None:
    if not student.is_cuda:
        return None
    table = _in_use(torch.cuda.get_device_name(student.device), os.environ.get("MCLD_TABLE"))
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return None if table is None else nearest(table, dtype, *student.shape)


def order(student: Tensor, teacher: Tensor) -> tuple[str, ...] | None:
    """The CUDA backends for logits (batch, classes), the fastest first; None where nothing was measured."""
    row = _row(student, teacher)
    if row is None:
        return None
    fastest = sorted(row.milliseconds, key=row.milliseconds.__getitem__)
    return tuple(dict.fromkeys(CANDIDATES[name] for name in fastest))


def takes_hopper(student: Tensor, teacher: Tensor) -> bool:
    """Whether backend "cuda" is to take its Hopper kernels: as MCLD_HOPPER says (1 or 0), else as was measured."""
    asked = os.environ.get("MCLD_HOPPER")
    if asked in ("0", "1"):
        return asked == "1"
    row = _row(student, teacher)
    if row is None or "hopper" not in row.milliseconds:
        return False
    return row.milliseconds["hopper"] < row.milliseconds.get("cuda", math.inf)
