"""The sums between two lines of the log."""

from __future__ import annotations

import time

from torch import Tensor

from trainer.step import Outcome, Step


class Interval:
    """Sums over the steps between two lines, without waiting for the device."""

    def __init__(self, step: Step):
        self.watch = step.watch
        self.watch.read()
        self.steps, self.data, self.start = 0, 0.0, time.perf_counter()
        self.sums: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.text = ""

    def add(self, outcome: Outcome) -> None:
        self.steps += 1
        self.last = outcome.parts
        for name, value in {"loss": outcome.loss, **outcome.parts}.items():
            self.sums[name] = value.double() if name not in self.sums else self.sums[name] + value
        if outcome.norms:
            self.norms = outcome.norms
        if outcome.loss.device.type == "cpu":
            self.text = f"loss {float(outcome.loss):.4g}"

    def read(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Means by name, seconds by part, and the seconds in all."""
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        means |= {f"norm_{name}": float(value) for name, value in self.norms.items()}
        seconds = self.watch.read() | {"data": self.data}
        return means, seconds, max(time.perf_counter() - self.start, 1e-9)
