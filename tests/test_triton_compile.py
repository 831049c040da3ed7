"""Every Triton kernel, as the backend would launch it, compiled for three architectures without a GPU.

The program `triton_compiler.py` does the compiling; here its reports are held to what a fast kernel needs: no spills,
shared memory that the architecture has, and tensor cores where there is a product.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")

from mcld_kernels.triton import configs

COMPILER = Path(__file__).with_name("triton_compiler.py")
# Shared memory of a block, in bytes. Generation 8 of the tables also serves GPUs with 99 KB (sm_86, sm_89, sm_120).
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
KERNELS = {
    "describe_kernel",
    "scan_kernel",
    "normalise_rows_kernel",
    "column_squares_kernel",
    "normalise_columns_kernel",
    "class_means_kernel",
    "positives_kernel",
    "factors_kernel",
    "totals_kernel",
    "flash_kernel",
    "exponentials_kernel",
    "row_sums_kernel",
    "scale_kernel",
    "matmul_kernel",
    "finish_kernel",
    "finish_dots_kernel",
    "finish_tiles_kernel",
}


def compile_all(architecture, cache):
    """Reports of the kernels of every case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(COMPILER.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(COMPILER), str(architecture)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def table_rows(architecture):
    """Launches of the flash kernel's table that hold for an architecture, by kind of operand and depth."""
    rows = {}
    for generation in {80: (8,), 90: (9,), 100: (9, 10)}[architecture]:  # the row of a later one counts
        rows |= {key[1:]: launch for key, launch in configs.FLASH.items() if key[0] == generation}
    return rows


# One test an architecture: a worker of its own can take each.
@pytest.mark.parametrize("architecture", sorted(SHARED), ids="sm_{}".format)
def test_compiled_kernels(architecture, tmp_path):
    reports = compile_all(architecture, tmp_path)
    products = [r for r in reports if r["has_dot"]]
    flash = [r for r in reports if r["kernel"] == "flash_kernel"]

    # Nothing is left out: every kernel, every row of the table, every way of the flash kernel.
    assert {r["kernel"] for r in reports} == KERNELS
    launches = {(int(r["d"]), int(r["block_m"]), int(r["block_n"]), r["num_warps"], r["num_stages"]) for r in flash}
    for (_, depth), launch in table_rows(architecture).items():
        assert (depth, launch.block_m, launch.block_n, launch.warps, launch.stages) in launches
    for operand in (("*bf16", "ieee"), ("*fp32", "tf32"), ("*fp32", "tf32x3")):
        for exponent in ("fixed", "online", "known"):
            assert any((r["dtype"], r["precision"], r["exponent"]) == (*operand, exponent) for r in flash)

    found = {
        "spills": [r for r in reports if r["stack"] or r["local"] or r["spills"]],
        "needs more shared memory than there is": [r for r in reports if r["shared"] > SHARED[architecture]],
        "has a product without tensor cores": [
            r for r in products if TENSOR_CORES[architecture] not in r["tensor_cores"]
        ],
    }
    wrong = [f"{what}: {described(r)}" for what, kernels in found.items() for r in kernels]
    assert not wrong, "\n".join(wrong)


def described(report):
    return ", ".join(f"{name} {value}" for name, value in report.items() if value not in ("", [], "False"))
