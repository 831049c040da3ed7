"""Single steps for a profiler of kernels: ``ncu --profile-from-start off python bench/step.py --providers cuda``.

Each case runs twice unobserved, then once between cudaProfilerStart and cudaProfilerStop. Without such a profiler it is
a plain run. ``bench.harness.ncu`` reads what ncu prints.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

from bench.harness import cases, programs, providers  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402

# The fewest that reach every kernel: two products, flash, the low-latency path, a long contraction, accurate fp32.
CASES = (
    cases.Case(4096, 1000, "bfloat16", ("instance", "sample")),
    cases.Case(16384, 100, "bfloat16", ("instance", "sample")),
    cases.Case(256, 1000, "bfloat16"),
    cases.Case(1024, 21841, "bfloat16", ("category",)),
    cases.Case(4096, 1000, "float32", ("instance", "sample")),
)
SMALL_CASES = (cases.Case(64, 20),)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(description="Single steps for a profiler.", epilog=programs.EXIT_CODES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--providers", default="cuda", metavar="P,P")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("step: this machine, or this build of torch, has no CUDA device", file=sys.stderr)
        return Exit.NO_DEVICE
    ran = 0
    for case in CASES if device.type == "cuda" else SMALL_CASES:
        tensors = cases.inputs(case, device)
        for provider in providers.choose(options.providers):
            reason = provider.unsupported_reason(case, *tensors[:2])
            if reason is not None:
                print(f"{provider.name}: {case}: not run: {reason}", flush=True)
                continue
            step = provider.make(case, *tensors)
            for _ in range(2):
                step()
            print(f"{provider.name}: {case}", flush=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            ran += 1
    return Exit.OK if ran else Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
