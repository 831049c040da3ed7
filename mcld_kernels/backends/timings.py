"""The measured table: the fastest CUDA backend on this GPU, by dtype and shape.

`python -m mcld_kernels.calibrate` measures and writes one; each entry has passed a correctness gate. A table is looked
for where MCLD_TABLE says, else in the user's cache folder, else among those of the package (``tables/``). Without a
table the order of the backends is fixed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..options import float32_precision
from ..version import __version__
from . import forms
from .environment import raw_values

SCHEMA = 1
SHIPPED = Path(__file__).parents[1] / "tables"
# What a table compares; "hopper" is backend "cuda" with its Hopper kernels.
CANDIDATES = {"triton": "triton", "cuda": "cuda", "hopper": "cuda"}
_COMMAND = "python -m mcld_kernels.calibrate"
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One shape, all terms, loss and gradient: milliseconds of each candidate that ran and passed the gate.

    ``tuning`` has the fields of a candidate's Tuning with which its time was measured, where they are not the defaults.
    """

    dtype: str
    precision: str  # the float32 matmul precision
    batch: int
    classes: int
    milliseconds: dict[str, float]
    tuning: dict[str, forms.Fields] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    path: Path
    gpu: str
    date: str
    rows: tuple[Row, ...]

    def __hash__(self) -> int:  # of its identity: `_nearest` is asked at every call
        return id(self)


def file_name(gpu: str) -> str:
    """The table's file name for a GPU by its name, as torch gives it."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_path(gpu: str) -> Path:
    """The table's path for this user. Raises RuntimeError where the home folder is not known."""
    if os.environ.get("MCLD_TABLE"):
        return Path(os.environ["MCLD_TABLE"])
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mcld_kernels" / file_name(gpu)


def find(gpu: str) -> tuple[Table | None, str]:
    """The table for a GPU, and a description of it or the reason for its absence.

    Raises ValueError where a file is no table, or the file of MCLD_TABLE cannot be read.
    """
    if os.environ.get("MCLD_TABLE"):
        path = Path(os.environ["MCLD_TABLE"])
        try:
            return _select(path, path.read_bytes(), gpu)
        except FileNotFoundError:
            raise ValueError(f"MCLD_TABLE names {path}, and there is no such file") from None
        except OSError as error:
            raise ValueError(f"MCLD_TABLE names {path}, which cannot be read: {error.strerror}") from None
    paths, reasons = [SHIPPED / file_name(gpu)], []
    try:
        paths.insert(0, user_path(gpu))
    except RuntimeError as error:  # no HOME, and no entry for this uid
        reasons.append(f"no cache folder: {error}")
    for path in paths:
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            reasons.append(f"{path} is ignored: it cannot be read ({error.strerror})")
            continue
        table, description = _select(path, text, gpu)
        if table is not None:
            return table, description
        reasons.append(description)
    return None, "; ".join(reasons) or f"none for this GPU: `{_COMMAND}` measures one"


def _select(path: Path, text: bytes, gpu: str) -> tuple[Table | None, str]:
    """The table in a file if it is for this package and GPU, and its description or the reason."""
    table, reason = parse(path, text)
    if table is None:
        return None, f"{path} is ignored: {reason}"
    if table.gpu != gpu:
        return None, f"{path} is ignored: it was measured on {table.gpu}"
    others = sum(bool(row.tuning) for row in table.rows)
    tuned = f", {others} of them with forms of the kernels other than the defaults" if others else ""
    return table, f"{path}: measured {table.date}, {len(table.rows)} shapes{tuned}"


def parse(path: Path, text: bytes) -> tuple[Table | None, str]:
    """The table in ``text``, or the reason why this version of the package does not use it.

    Raises ValueError where the text is no table.
    """
    try:
        content = json.loads(text)
        if (content["schema"], content["package"]) != (SCHEMA, __version__):
            return None, f"it was measured with mcld_kernels {content['package']}, and this is {__version__}"
        rows = tuple(_row(entry) for entry in content["rows"])
        for row in rows:
            for candidate, fields in row.tuning.items():
                reason = forms.unknown_reason(candidate, fields)
                if reason is not None:
                    return None, f"at batch {row.batch}, {row.classes} classes {reason}"
        return Table(path=path, gpu=str(content["gpu"]), date=str(content["date"]), rows=rows), ""
    # OverflowError: an int of infinity; RecursionError: nesting deeper than the parser's stack.
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path} is no table of measurements ({type(error).__name__}: {str(error)[:200]}): delete it, "
            f"or measure again with `{_COMMAND}`"
        ) from error


def _row(entry: dict[str, Any]) -> Row:
    milliseconds = {str(name): float(value) for name, value in entry["milliseconds"].items()}
    row = Row(
        dtype=str(entry["dtype"]),
        precision=str(entry["precision"]),
        batch=int(entry["batch"]),
        classes=int(entry["classes"]),
        milliseconds=milliseconds,
        tuning={str(name): dict(fields) for name, fields in entry.get("tuning", {}).items()},
    )
    positive = all(0 < value < math.inf for value in milliseconds.values())  # False for NaN
    shape = all(0 < value < 2**63 for value in (row.batch, row.classes))
    if (
        not milliseconds
        or not positive
        or not shape
        or set(milliseconds) - set(CANDIDATES)
        or set(row.tuning) - set(milliseconds)
    ):
        raise ValueError(f"an impossible row: {entry}")
    return row


def nearest(table: Table, dtype: torch.dtype, batch: int, classes: int) -> Row | None:
    """The row of this dtype whose shape is the nearest, by factors of two; None if the dtype is not in the table."""
    name = str(dtype).removeprefix("torch.")
    groups = [[row for row in table.rows if row.dtype == name]]
    if name == "float32":
        groups = [[row for row in groups[0] if row.precision == float32_precision()]]
    if name in _HALF:
        groups.append([row for row in table.rows if row.dtype in _HALF])
    rows = next(filter(None, groups), [])

    def distance(row: Row) -> float:
        return math.log2(row.batch / max(batch, 1)) ** 2 + math.log2(row.classes / max(classes, 1)) ** 2

    return min(rows, key=distance, default=None)


@lru_cache
def _in_use(gpu: str, setting: tuple[Hashable, ...]) -> Table | None:
    """Read once in a process: a choice that changed halfway would change the last bits of a result."""
    return find(gpu)[0]


@lru_cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def in_use(x: Tensor) -> Table | None:
    """The table for the device of a tensor. Raises ValueError as `find`."""
    return _in_use(_name(x.device), raw_values("MCLD_TABLE")) if x.is_cuda else None


def _nearest_row(student: Tensor, teacher: Tensor) -> Row | None:
    table = in_use(student)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return None if table is None else _nearest(table, dtype, float32_precision(), *student.shape)


@lru_cache(maxsize=1024)
def _nearest(table: Table, dtype: torch.dtype, precision: str, batch: int, classes: int) -> Row | None:
    """`nearest`, which reads the precision itself."""
    return nearest(table, dtype, batch, classes)


def order(student: Tensor, teacher: Tensor) -> tuple[str, ...] | None:
    """The CUDA backends for logits (batch, classes), the fastest first; None where nothing was measured."""
    row = _nearest_row(student, teacher)
    if row is None:
        return None
    fastest = sorted(row.milliseconds, key=row.milliseconds.__getitem__)
    return tuple(dict.fromkeys(CANDIDATES[name] for name in fastest))


def takes_hopper(student: Tensor, teacher: Tensor) -> bool:
    """True if backend "cuda" takes its Hopper kernels: as MCLD_HOPPER says (1 or 0), else by the table."""
    setting = os.environ.get("MCLD_HOPPER")
    if setting in ("0", "1"):
        return setting == "1"
    row = _nearest_row(student, teacher)
    if row is None or "hopper" not in row.milliseconds:
        return False
    return row.milliseconds["hopper"] < row.milliseconds.get("cuda", math.inf)


def tuning(backend: str, student: Tensor, teacher: Tensor) -> forms.Fields:
    """The fields of a backend's Tuning that were the fastest for these logits, where they are not the defaults."""
    row = _nearest_row(student, teacher)
    if row is None or not row.tuning:
        return {}
    candidate = "hopper" if backend == "cuda" and takes_hopper(student, teacher) else backend
    fields = row.tuning.get(candidate, {})
    if "MCLD_CHUNK_MB" in os.environ:  # a budget given by hand holds
        return {name: value for name, value in fields.items() if name not in forms.BUDGETS}
    return fields
