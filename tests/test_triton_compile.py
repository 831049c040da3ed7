"""Every Triton kernel, as the backend launches it, compiled for three architectures of NVIDIA and two of AMD without a
GPU.

The program `triton_compiler.py` does the compiling. Its reports must show no spills, shared memory that the
architecture has, and tensor cores where there is a product. MCLD_TRITON_PYTHONS may list Python interpreters (separated
as in PATH) that import other versions of Triton: their reports must show the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")

from triton_compiler import AMD, AMD_CASES, PRODUCTS

from mcld_kernels.backends.triton import configs

PYTHONS = [sys.executable, *filter(None, os.environ.get("MCLD_TRITON_PYTHONS", "").split(os.pathsep))]
COMPILER = Path(__file__).with_name("triton_compiler.py")
# Shared memory of a block, in bytes. Generation 8 of the tables also serves GPUs with 99 KB (sm_86, sm_89, sm_120).
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
# A multiprocessor of compute capability 9.0, of whose shared memory each block reserves a kilobyte beside its own.
SHARED_OF_ALL_BLOCKS, RESERVED = 228 << 10, 1 << 10
REGISTERS = 1 << 16
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", "gfx942": "v_mfma_", "gfx950": "v_mfma_"}
# Whose rows of the tables are compiled for an architecture: of two rows for one launch the later one counts.
ROWS = {
    80: ("sm_80",),
    90: ("sm_90",),
    100: ("sm_90", "sm_100"),
    "gfx942": ("gfx942",),
    "gfx950": ("gfx942", "gfx950"),
}
# AMD's compiler keeps spilled scalar registers in the 64 lanes of vector registers: two of those are no loss. Where it
# runs out of lanes, they go to the scratch memory, of which there must be none.
MOST_SCALAR_SPILLS = 128
# All forms of the kernels without a product are compiled for this one: they take so few of the 255 registers that
# another architecture's allocation does not decide whether they spill, and have no configuration of their own there.
ALL_FORMS, FEW_REGISTERS = 80, 128
KERNELS = {
    "index_labels_kernel",
    "class_order_kernel",
    "l2_normalize_rows_kernel",
    "column_squares_kernel",
    "l2_normalize_columns_kernel",
    "class_means_kernel",
    "positive_cosines_kernel",
    "loss_epilogue_kernel",
    "reduce_terms_kernel",
    "flash_kernel",
    "similarity_kernel",
    "row_sums_kernel",
    "scale_rows_kernel",
    "product_kernel",
    "grad_epilogue_kernel",
    "grad_dots_kernel",
    "grad_tiles_kernel",
}


def compile_all(python, architecture, cache):
    """Reports of the kernels of every case; those without a product in all forms for one architecture alone."""
    few = [] if architecture == ALL_FORMS else ["--few"]
    return compiled(python, cache, *few, str(architecture), *AMD_CASES.get(architecture, ()))


def compiled(python, cache, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(COMPILER.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([python, str(COMPILER), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def operands(architecture):
    """Dtype and precision of the operands of dots."""
    highest, high = configs.FLOAT32.get(architecture, configs.FLOAT32_NVIDIA)
    return ("*bf16", "ieee"), ("*fp32", high), ("*fp32", highest)


def table_rows(table, architecture):
    """Launches of a table of the flash kernel that hold for an architecture, by kind of operand and pitch."""
    kinds = {"half"} | {precision for dtype, precision in operands(architecture) if dtype == "*fp32"}
    rows = {}
    for name in ROWS[architecture]:
        rows |= {key[1:]: launch for key, launch in table.items() if key[0] == name and key[1] in kinds}
    return rows


def launched(reports):
    """(pitch, launch) of reports of the flash kernel."""
    return {
        (
            int(r["d"]),
            configs.Launch(int(r["block_m"]), int(r["block_n"]), warps=r["num_warps"], stages=r["num_stages"]),
        )
        for r in reports
    }


# One test an architecture: a worker of its own can take each.
@pytest.mark.parametrize("architecture", SHARED, ids=lambda name: name if name in AMD else f"sm_{name}")
@pytest.mark.parametrize("python", PYTHONS)
def test_compiled_kernels(python, architecture, tmp_path):
    reports = compile_all(python, architecture, tmp_path)
    products = [r for r in reports if r["has_dot"]]
    flash = [r for r in reports if r["kernel"] == "flash_kernel"]

    # Nothing is left out: every kernel, every row of the tables, every exponent of the flash kernel.
    assert {r["kernel"] for r in reports} == KERNELS
    assert {(pitch, row) for (_, pitch), row in table_rows(configs.FLASH, architecture).items()} <= launched(flash)
    online = [r for r in flash if r["exponent"] == "online"]
    rows = table_rows(configs.FLASH_ONLINE, architecture)
    assert {(pitch, row) for (_, pitch), row in rows.items()} <= launched(online)
    fixed = [r for r in flash if r["exponent"] == "fixed"]
    half = {(pitch, row) for (kind, pitch), row in table_rows(configs.FLASH, architecture).items() if kind == "half"}
    assert half <= launched([r for r in fixed if r["dtype"] == "*bf16"])
    assert {pitch for pitch, _ in half} <= {int(r["d"]) for r in online if r["dtype"] == "*bf16"}
    for operand in (*operands(architecture), ("*fp16", "ieee")):
        for exponent in ("fixed", "online", "known"):
            assert any((r["dtype"], r["precision"], r["exponent"]) == (*operand, exponent) for r in flash)

    faults = {
        "spills": [r for r in reports if r["stack"] or r["local"]],
        "spills many scalar registers": [r for r in reports if r.get("scalar_spills", 0) > MOST_SCALAR_SPILLS],
        "takes many registers, so compile all its forms for every architecture": [
            r for r in reports if r["kernel"] not in PRODUCTS and r["reg"] > FEW_REGISTERS
        ],
        "needs more shared memory than there is": [r for r in reports if r["shared"] > SHARED[architecture]],
        "has a product without tensor cores": [
            r for r in products if not any(name.startswith(TENSOR_CORES[architecture]) for name in r["tensor_cores"])
        ],
    }
    wrong = [f"{fault}: {described(r)}" for fault, kernels in faults.items() for r in kernels]
    assert not wrong, "\n".join(wrong)


def of_rows(reports):
    """The products of the row terms by default: 16 bits, a fixed shift, no sums of columns, added to nothing."""
    special = ("online", "columns", "accumulate")
    return [
        r
        for r in reports
        if r["kernel"] in ("product_kernel", "similarity_kernel")
        and r["dtype"] in ("*bf16", "*fp16")
        and all(r.get(option, "False") == "False" for option in special)
    ]


def blocks_of_a_multiprocessor(report):
    """Blocks that fit at once by shared memory and by registers, which a warp takes 256 at a time."""
    of_a_warp = -(-32 * report["reg"] // 256) * 256
    return (
        SHARED_OF_ALL_BLOCKS // (report["shared"] + RESERVED),
        REGISTERS // (report["num_warps"] * of_a_warp),
    )


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("stages, blocks", [(None, 2), (4, 1)], ids=["default", "4 stages"])
def test_blocks_of_the_products_on_a_multiprocessor_of_sm_90(python, stages, blocks, tmp_path):
    """Two of the default's 3 stages; 4 stages fit, and leave room for one: a clock decides."""
    options = [] if stages is None else ["--product-stages", str(stages)]
    products = of_rows(compiled(python, tmp_path, "--products", *options, "90", "bf16"))
    # One that reads what a split-k product has summed loads no operand.
    loading = [r for r in products if r.get("split_k") != "True"]
    assert {r["kernel"] for r in loading} == {"product_kernel", "similarity_kernel"}
    for report in products:
        assert report["num_stages"] == (stages or 3)
        assert report["shared"] <= SHARED[90], described(report)
        by_shared, by_registers = blocks_of_a_multiprocessor(report)
        assert by_registers >= 2, described(report)
        if report in loading:
            assert by_shared == blocks, described(report)


def described(report):
    return ", ".join(f"{name} {value}" for name, value in report.items() if value not in ("", [], "False"))
