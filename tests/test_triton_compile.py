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

COMPILER = Path(__file__).with_name("triton_compiler.py")
# Shared memory of a block, in bytes. Generation 8 of the tables also serves GPUs with 99 KB (sm_86, sm_89, sm_120).
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
KERNELS = {
    "normalise_rows_kernel",
    "column_squares_kernel",
    "normalise_columns_kernel",
    "class_means_kernel",
    "positives_kernel",
    "flash_kernel",
    "exponentials_kernel",
    "row_sums_kernel",
    "scale_kernel",
    "matmul_kernel",
    "finish_kernel",
    "finish_dots_kernel",
    "finish_tiles_kernel",
}


@pytest.fixture(scope="module", params=sorted(SHARED), ids="sm_{}".format)
def compiled(request, tmp_path_factory):
    """(architecture, reports of its kernels)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(COMPILER.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(COMPILER), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def described(report):
    return ", ".join(f"{name} {value}" for name, value in report.items() if value not in ("", [], "False"))


def test_every_kernel_is_compiled(compiled):
    assert {report["kernel"] for report in compiled[1]} == KERNELS
    variants = {(r["dtype"], r["precision"], r["exponent"]) for r in compiled[1] if r["kernel"] == "flash_kernel"}
    for operand in (("*bf16", "ieee"), ("*fp32", "tf32"), ("*fp32", "tf32x3")):
        assert {(*operand, exponent) for exponent in ("fixed", "online", "known")} <= variants


def test_every_launch_of_the_tables_is_compiled(compiled):
    from mcld_kernels.triton import configs

    generations = {80: (8,), 90: (9,), 100: (9, 10)}[compiled[0]]
    rows = {}
    for generation in generations:  # the row of a later one counts
        rows |= {key[1:]: launch for key, launch in configs.FLASH.items() if key[0] == generation}
    used = {
        (int(r["d"]), int(r["block_m"]), int(r["block_n"]), r["num_warps"], r["num_stages"])
        for r in compiled[1]
        if r["kernel"] == "flash_kernel"
    }
    for (_, depth), launch in rows.items():
        assert (depth, launch.block_m, launch.block_n, launch.warps, launch.stages) in used


def test_nothing_spills(compiled):
    spilled = [described(r) for r in compiled[1] if r["stack"] or r["local"] or r["spills"]]
    assert not spilled, "\n".join(spilled)


def test_shared_memory_fits(compiled):
    too_large = [described(r) for r in compiled[1] if r["shared"] > SHARED[compiled[0]]]
    assert not too_large, "\n".join(too_large)


def test_products_use_tensor_cores(compiled):
    without = [described(r) for r in compiled[1] if r["has_dot"] and TENSOR_CORES[compiled[0]] not in r["tensor_cores"]]
    assert not without, "\n".join(without)
    assert sum(r["has_dot"] for r in compiled[1]) > 30
