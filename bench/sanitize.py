"""A small grid of every CUDA backend, for compute-sanitizer to watch: ``compute-sanitizer python bench/sanitize.py``.

Shapes past tile edges, a width that is no multiple of 16 bytes, every direction and mask, repeated runs compared
bit by bit. PYTORCH_NO_CUDA_MEMORY_CACHING=1 must be set: PyTorch's allocator would put a stray access inside a live
block.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

import mcld_kernels  # noqa: E402
from mcld_kernels import backends  # noqa: E402
from mcld_kernels.cuda import configs, hopper  # noqa: E402

SHAPES = ((70, 100), (129, 37), (65, 300))
DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = (
    {},
    {"direction": "symmetric"},
    {"mask_same_class": True, "present_only": True},
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every backend on a small grid.")
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    # So that the five launches do not take all, and the Hopper kernels take what is as small as this.
    configs.LATENCY_LARGEST = 100
    hopper.LEAST_TILES = {"similarity": 1, "flash": 1}
    ran = wrong = 0
    for (batch, classes), dtype, options in itertools.product(SHAPES, DTYPES, OPTIONS):
        student = torch.randn(batch, classes, device=device, dtype=dtype)
        teacher = torch.randn(batch, classes, device=device, dtype=dtype)
        target = torch.randint(min(classes, 10), (batch,), device=device)
        can = [name for name, said in backends.explain(student, teacher).items() if said == "can run"]
        for name, wanted in [(name, "0") for name in can if name != "reference"] + [("cuda", "1")] * ("cuda" in can):
            os.environ["MCLD_HOPPER"] = wanted
            results = []
            for _ in range(2):
                leaf = student.clone().requires_grad_()
                loss = mcld_kernels.mcld_loss(leaf, teacher, target, backend=name, **options)
                results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
            same = all(torch.equal(a, b) for a, b in zip(*results))
            ran += 1
            wrong += not same
            if not same:
                print(f"two runs differ: {name}, MCLD_HOPPER={wanted}, {batch} x {classes}, {dtype}, {options}")
    print(f"{ran} combinations ran, {wrong} were not repeatable")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
