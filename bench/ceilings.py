"""The machine's ceilings as JSON on stdout: ``python bench/ceilings.py``. GEMM for each precision, device copy."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

from bench.harness import machine, measure, programs  # noqa: E402

# name -> dtype and float32 matmul precision of the product
_GEMMS = {
    "gemm_bf16": ("bfloat16", "highest"),
    "gemm_fp16": ("float16", "highest"),
    "gemm_tf32": ("float32", "high"),
    "gemm_fp32": ("float32", "highest"),
}


def measure_all(device: torch.device) -> dict[str, float]:
    """flop/s of each product and bytes/s of the copy (reads and writes counted)."""
    ceilings: dict[str, float] = {}
    for name, (dtype, precision) in _GEMMS.items():
        if device.type == "cpu" and name in ("gemm_fp16", "gemm_tf32"):
            continue  # no CPU has tf32, and fp16 products run at a thousandth of the speed on most
        torch.set_float32_matmul_precision(precision)
        values = measure.ceilings(device, [dtype])
        ceilings[f"{name}_flop_per_s"] = values[f"gemm_{dtype}_flop_per_s"]
        ceilings["copy_bytes_per_s"] = max(ceilings.get("copy_bytes_per_s", 0.0), values["copy_bytes_per_s"])
    return ceilings


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the JSON; returns one of the exit codes of ``--help``."""
    programs.Parser(
        description="Measure this machine's speed of GEMM and of copying; JSON on stdout.", epilog=programs.EXIT_CODES
    ).parse_args(arguments)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = measure_all(where)
    print(json.dumps({"machine": machine.describe(where), "ceilings": values}))
    return programs.Exit.OK


if __name__ == "__main__":
    sys.exit(main())
