"""Forms of a kernel that only a clock can decide between, each reachable by name: ``bench/run.py --forms``.

A form is a provider ``backend:field=value+field=value``: a backend with other fields of its Tuning. It is compared with
the backend as it is, at the cases at which the choice matters.
"""

from __future__ import annotations

from bench.harness.cases import TERMS, Case

ROWS = ("instance", "sample")
MIB = 1 << 20

# case -> the forms that are compared there
FORMS: dict[Case, tuple[str, ...]] = {
    Case(4096, 1000, "bfloat16", ROWS): (
        "triton",
        "cuda",
        "hopper",
        *(f"hopper:hopper_skew={slices}" for slices in (1, 2, 3)),
        "hopper:hopper_cluster=2",
        "hopper:library_product=False",
        "hopper:one_epilogue=False",
        "triton:library_product=False",
        "triton:library_product=True",
        "triton:product_stages=3",
        "triton:product_stages=4",
        "triton:library_product=False+product_stages=4",
    ),
    Case(16384, 1000, "bfloat16", ROWS): (
        "hopper",
        "hopper:hopper_skew=1",
        "hopper:hopper_skew=2",
        "hopper:hopper_cluster=2",
        "hopper:hopper_cluster=2+hopper_skew=2",
        *(f"hopper:chunk_bytes={size * MIB}" for size in (32, 64, 128, 512)),
        f"triton:chunk_bytes={64 * MIB}",
        "triton",
    ),
    Case(65536, 1000, "bfloat16", ROWS): (
        "hopper",
        "hopper:wave_bytes=0",
        "hopper:hopper_skew=2",
        "hopper:hopper_cluster=2",
    ),
    Case(16384, 100, "bfloat16", ROWS): ("triton", "cuda", "hopper", "hopper:flash_row_bytes=0"),
    Case(4096, 100, "bfloat16", ROWS): ("triton", "triton:max_flash_splits=1", "hopper"),
    Case(256, 1000, "bfloat16", TERMS): ("cuda", "cuda:dependent_launches=True", "cuda:low_latency_limit=0"),
    Case(1024, 1000, "bfloat16", TERMS): ("cuda", "cuda:low_latency_limit=0", "hopper:low_latency_limit=0"),
    Case(256, 21841, "bfloat16", ("category",)): (
        "cuda",
        "hopper",
        "hopper:min_hopper_flash_tiles=1",
        "cuda:max_flash_splits=1",
        "hopper:max_flash_splits=1",
    ),
    Case(4096, 1000, "float32", ROWS): ("cuda", "cuda:library_product=True"),
}

SMALL_FORMS: dict[Case, tuple[str, ...]] = {
    Case(64, 20): ("torch", f"torch:chunk_bytes={64 * 20 * 4}", "torch:low_latency=False")
}

# Off by default, each with logits (batch, classes) that reach its kernels: what a sanitizer looks at beside the grid.
SANITIZED: dict[str, tuple[int, int]] = {
    "cuda:dependent_launches=True": (70, 100),
    "hopper:dependent_launches=True": (70, 100),
    "hopper:hopper_skew=2": (65, 300),
    "hopper:hopper_cluster=2": (65, 300),
}
