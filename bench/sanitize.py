"""A small grid of every backend under compute-sanitizer: ``compute-sanitizer python bench/sanitize.py``.

Shapes past tile edges, a width that is no multiple of 16 bytes, every direction and mask, repeated runs compared
bit by bit. PYTORCH_NO_CUDA_MEMORY_CACHING=1 must be set: PyTorch's allocator would put a stray access inside a live
block.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

import mcld_kernels  # noqa: E402
from mcld_kernels import backends  # noqa: E402
from mcld_kernels.calibrate import EXIT_CODES, Exit  # noqa: E402

SHAPES = ((70, 100), (129, 37), (65, 300))
DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = (
    {},
    {"direction": "symmetric"},
    {"mask_same_class": True, "present_only": True},
)


def main() -> int:
    """Run the grid; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(description="Run every backend on a small grid.", epilog=EXIT_CODES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("sanitize: this machine, or this build of torch, has no CUDA device", file=sys.stderr)
        return Exit.NO_DEVICE
    torch.manual_seed(0)
    # The low-latency path takes some shapes and not all, and the Hopper kernels take shapes as small as these.
    small = {"low_latency_limit": 100, "min_hopper_similarity_tiles": 1, "min_hopper_flash_tiles": 1}
    ran = differing = 0
    for (batch, classes), dtype, options in itertools.product(SHAPES, DTYPES, OPTIONS):
        student = torch.randn(batch, classes, device=device, dtype=dtype)
        teacher = torch.randn(batch, classes, device=device, dtype=dtype)
        target = torch.randint(min(classes, 10), (batch,), device=device)
        names = [name for name, state in backends.explain(student, teacher).items() if state == "can run"]
        runs = [(name, False) for name in names if name != "reference"] + [("cuda", True)] * ("cuda" in names)
        for name, hopper in runs:
            results = []
            for _ in range(2):
                leaf = student.clone().requires_grad_()
                with backends.tuned(hopper=hopper, **small):
                    loss = mcld_kernels.mcld_loss(leaf, teacher, target, backend=name, **options)
                results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
            repeatable = all(torch.equal(a, b) for a, b in zip(*results))
            ran += 1
            differing += not repeatable
            if not repeatable:
                print(f"two runs differ: {name}, hopper={hopper}, {batch} x {classes}, {dtype}, {options}")
    print(f"{ran} combinations ran, {differing} were not repeatable")
    return Exit.FAILED if differing or not ran else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
