"""The way of one call through the package: calls, moves between files, and the depth at which arithmetic begins.

``python tests/test_trace.py`` prints it.
"""

import sys
from pathlib import Path

import torch
from cases import labels, logits

import mcld_kernels
from mcld_kernels import backends

PACKAGE = str(Path(mcld_kernels.__file__).parent)
# The first of these that a call makes is on the logits.
_ARITHMETIC = {"stack", "square", "mul", "mul_", "mm", "addmm", "exp", "exp_", "low_latency", "normalize"}


class Trace:
    """Python calls of the package's own functions during ``run``."""

    def __init__(self, run):
        self.calls, self.moves, self.depth, self.arithmetic = 0, 0, 0, None
        self._stack = []
        sys.setprofile(self._profile)
        try:
            run()
        finally:
            sys.setprofile(None)

    def _profile(self, frame, event, argument):
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) or frame.f_code.co_name.startswith("<"):
            return
        if event == "call":
            self.calls += 1
            self.moves += bool(self._stack) and self._stack[-1] != file
            self._stack.append(file)
            self.depth = max(self.depth, len(self._stack))
        elif event == "return" and self._stack:
            self._stack.pop()
        elif event == "c_call" and self.arithmetic is None and argument.__name__ in _ARITHMETIC:
            self.arithmetic = len(self._stack), argument.__name__


def trace(low_latency, batch=64, classes=10):
    student, teacher = logits("random", batch, classes, torch.float32)
    student.requires_grad_()
    target = labels(batch, classes)

    def run():
        mcld_kernels.mcld_loss(student, teacher, target)

    with backends.tuned(low_latency=low_latency):
        run()  # what is computed once is there
        return Trace(run)


def test_arithmetic_begins_near_the_surface():
    for low_latency in (True, False):
        found = trace(low_latency)
        assert found.arithmetic is not None and found.arithmetic[0] <= 6, found.arithmetic
        assert found.depth <= 10


def test_a_call_stays_short():
    """Package calls and moves between files of all three terms with their gradient."""
    small, large = trace(True), trace(False)
    assert small.calls <= 50 and large.calls <= 100
    assert small.moves <= 20 and large.moves <= 53


if __name__ == "__main__":
    for low_latency in (True, False):
        found = trace(low_latency)
        print(
            f"{'low-latency' if low_latency else 'chunks'}: {found.calls} package calls, {found.moves} moves between "
            f"files, depth {found.depth}, arithmetic from depth {found.arithmetic[0]} ({found.arithmetic[1]})"
        )
