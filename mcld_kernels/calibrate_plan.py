"""The grid that `calibrate` measures in one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .backends import forms


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The grid of one process: every candidate at every shape, at one float32 matmul precision."""

    candidates: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    classes: tuple[int, ...]
    precision: str = "highest"
    rounds: int = 20
    device: str = "cuda"
    skip_forms: tuple[str, ...] = ()  # that hung or crashed
    skip_shapes: tuple[tuple[str, int, int], ...] = ()  # dtype, batch, classes: with their forms done

    def shapes(self) -> Iterator[forms.Shape]:
        """The shapes to measure, of one dtype after another."""
        for dtype, classes, batch in itertools.product(self.dtypes, self.classes, self.batches):
            if (dtype, batch, classes) not in self.skip_shapes:
                yield forms.Shape(dtype=dtype, precision=self.precision, batch=batch, classes=classes)
