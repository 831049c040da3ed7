"""A small grid of the backends' kernels under compute-sanitizer: ``compute-sanitizer python bench/sanitize.py``.

Shapes past tile edges, a width that is no multiple of 16 bytes, every direction and mask, both ways to shift the
exponent, repeated runs compared bit by bit; the cheapest that reach another kernel first. A form of the kernels that is
off by default is a provider of its own, with one shape: in a process of its own, one that hangs costs itself alone.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 must be set: PyTorch's allocator would put a stray access inside a live block.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

BEGUN = time.monotonic()  # before PyTorch's start, which takes long under a sanitizer

import torch  # noqa: E402

import mcld_kernels  # noqa: E402
from bench.harness import forms  # noqa: E402
from bench.harness.commands import BEGINS, DIFFER, ENDS  # noqa: E402
from mcld_kernels import backends  # noqa: E402
from mcld_kernels.backends import forms as calibrated  # noqa: E402
from mcld_kernels.calibrate import EXIT_CODES, Exit  # noqa: E402

SHAPES = ((70, 100), (129, 37), (65, 300))
DTYPES = (torch.bfloat16, torch.float32)
OPTIONS = (
    {},
    {"direction": "symmetric", "mask_same_class": True, "present_only": True},
    {"temperature": 0.02},
    {"direction": "teacher"},
)
# The low-latency path takes some shapes and not all, the Hopper kernels take shapes as small as these, and product 2 is
# the package's own kernel, not the library's.
SMALL = {
    "low_latency_limit": 100,
    "library_product": False,
    "min_hopper_similarity_tiles": 1,
    "min_hopper_flash_tiles": 1,
}
PROVIDERS = ("torch", "triton", "cuda", "hopper")
FORMS = forms.SANITIZED
KEPT_S = 35.0  # of the time, for the last combination
LAST_S = 5.0  # of the time, for a sanitizer to print what it has found after a combination that hangs


class Combination(NamedTuple):
    provider: str
    batch: int
    classes: int
    dtype: torch.dtype
    options: dict[str, Any]  # of the loss
    fields: dict[str, Any]  # of the backend's Tuning, beside SMALL

    def __str__(self) -> str:
        fields = f", {self.fields}" if self.fields else ""
        return f"{self.provider}, {self.batch} x {self.classes}, {self.dtype}, {self.options}{fields}"


def combinations(providers: Sequence[str]) -> Iterator[Combination]:
    """The grid and, behind it, the forms."""
    for options, dtype, (batch, classes) in itertools.product(OPTIONS, DTYPES, SHAPES):
        for provider in providers:
            if provider in PROVIDERS:
                yield Combination(provider, batch, classes, dtype, options, {})
    for form in providers:
        if form in FORMS:
            provider, fields = calibrated.parse(form)
            yield Combination(provider, *FORMS[form], torch.bfloat16, {}, fields)


def main(arguments: Sequence[str] | None = None, begun: float | None = None) -> int:
    """Run the grid; returns one of the exit codes of ``--help``. ``begun``: by time.monotonic(), else it is now."""
    begun = time.monotonic() if begun is None else begun
    parser = argparse.ArgumentParser(description="Run the backends on a small grid.", epilog=EXIT_CODES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--providers", nargs="+", choices=(*PROVIDERS, *FORMS), metavar="P", default=list(PROVIDERS),
        help=f"of {', '.join(PROVIDERS)} (default: these) and {', '.join(FORMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=float(os.environ.get("MCLD_PHASE_S", 600)),
        help=f"in all; the grid's last combination begins {KEPT_S:.0f} s before (default: MCLD_PHASE_S, else 600)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("sanitize: this machine, or this build of torch, has no CUDA device", file=sys.stderr)
        return Exit.NO_DEVICE
    # A thread without the GIL, which a hung launch may hold, names the line and ends the process by itself, so that the
    # sanitizer lives on to print its findings.
    faulthandler.dump_traceback_later(max(1.0, begun + options.seconds - LAST_S - time.monotonic()), exit=True, file=2)
    try:
        return run(combinations(options.providers), device, begun + options.seconds - KEPT_S)
    finally:
        faulthandler.cancel_dump_traceback_later()


def run(chosen: Iterable[Combination], device: torch.device, deadline: float) -> int:
    """Run combinations, the first at any time and the others while it is before the deadline, and print the counts."""
    torch.manual_seed(0)
    ran = differing = left = 0
    for combination in chosen:
        provider, batch, classes, dtype, loss_options, fields = combination
        student = torch.randn(batch, classes, device=device, dtype=dtype)
        teacher = torch.randn(batch, classes, device=device, dtype=dtype)
        target = torch.randint(min(classes, 10), (batch,), device=device)
        name = "cuda" if provider == "hopper" else provider
        if backends.unsupported_reason(name, student, teacher, False) is not None:
            continue
        if ran and time.monotonic() > deadline:
            left += 1
            continue
        print(f"{BEGINS}{combination}", flush=True)
        results = []
        for _ in range(2):
            leaf = student.clone().requires_grad_()
            with backends.tuned(hopper=provider == "hopper", **SMALL, **fields):
                loss = mcld_kernels.mcld_loss(leaf, teacher, target, backend=name, **loss_options)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        repeatable = all(torch.equal(a, b) for a, b in zip(*results))
        ran += 1
        differing += not repeatable
        print(f"{ENDS}{combination}", flush=True)
        if not repeatable:
            print(DIFFER, flush=True)
    print(f"{ran} combinations ran, {differing} were not repeatable, {left} were left for want of time", flush=True)
    return Exit.FAILED if differing or not ran else Exit.OK


if __name__ == "__main__":
    sys.exit(main(begun=BEGUN))
