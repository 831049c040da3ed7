"""A small grid of the backends' kernels under compute-sanitizer: ``compute-sanitizer python bench/sanitize.py``.

Shapes past tile edges, a width that is no multiple of 16 bytes, every direction and mask, both ways to shift the
exponent, repeated runs compared bit by bit; the cheapest that reach another kernel first, and forms of kernels that are
off by default once.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 must be set: PyTorch's allocator would put a stray access inside a live block.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

import mcld_kernels  # noqa: E402
from mcld_kernels import backends  # noqa: E402
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
# provider -> the shape that reaches the kernels, and what turns the form on.
FORMS: dict[str, tuple[tuple[tuple[int, int], dict[str, Any]], ...]] = {
    "cuda": (((70, 100), {"dependent_launches": True}),),
    "hopper": (
        ((70, 100), {"dependent_launches": True}),
        ((65, 300), {"hopper_skew": 2}),
        ((65, 300), {"hopper_cluster": 2}),
    ),
}
PROVIDERS = ("torch", "triton", "cuda", "hopper")


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
    """The grid and, once in it, the forms of a provider."""
    for options, dtype, (batch, classes) in itertools.product(OPTIONS, DTYPES, SHAPES):
        for provider in providers:
            yield Combination(provider, batch, classes, dtype, options, {})
            for shape, fields in FORMS.get(provider, ()):
                if shape == (batch, classes) and dtype == torch.bfloat16 and not options:
                    yield Combination(provider, batch, classes, dtype, options, fields)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(description="Run the backends on a small grid.", epilog=EXIT_CODES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, metavar="P", default=list(PROVIDERS),
        help=f"of {', '.join(PROVIDERS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=600, help="after which no combination is begun")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("sanitize: this machine, or this build of torch, has no CUDA device", file=sys.stderr)
        return Exit.NO_DEVICE
    torch.manual_seed(0)
    deadline = time.monotonic() + options.seconds
    ran = differing = left = 0
    for combination in combinations(options.providers):
        provider, batch, classes, dtype, loss_options, fields = combination
        student = torch.randn(batch, classes, device=device, dtype=dtype)
        teacher = torch.randn(batch, classes, device=device, dtype=dtype)
        target = torch.randint(min(classes, 10), (batch,), device=device)
        name = "cuda" if provider == "hopper" else provider
        if backends.unsupported_reason(name, student, teacher, False) is not None:
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        print(combination, flush=True)
        results = []
        for _ in range(2):
            leaf = student.clone().requires_grad_()
            with backends.tuned(hopper=provider == "hopper", **SMALL, **fields):
                loss = mcld_kernels.mcld_loss(leaf, teacher, target, backend=name, **loss_options)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        repeatable = all(torch.equal(a, b) for a, b in zip(*results))
        ran += 1
        differing += not repeatable
        if not repeatable:
            print("  two runs differ")
    print(f"{ran} combinations ran, {differing} were not repeatable, {left} were left for want of time")
    return Exit.FAILED if differing or not ran else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
