"""The Triton kernels as Triton compiles them: their PTX, run by the interpreter of tests/ptx, against the reference.

Covered beside what Triton's own interpreter covers: the code for a tensor core's layouts and for asynchronous copies,
and what a launch promises the compiler, such as the alignment of addresses. Not covered: sm_100, ptxas, the order of
memory accesses, speed. MCLD_TRITON_PYTHONS is as in test_triton_compile.py.
"""

import collections
import json
import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")

from test_triton_compile import KERNELS, PYTHONS

PROGRAM = Path(__file__).with_name("triton_ptx.py")
# Every kernel, by each path, type and kind of exponent, once on either architecture.
CASES = {
    "80": ("flash-float16-masked", "two-products-bfloat16-cold", "long-float32"),
    "90": ("flash-bfloat16-masked", "flash-float32-cold", "two-products-float16-cold"),
}


@pytest.mark.parametrize("architecture", CASES)
@pytest.mark.parametrize("python", PYTHONS)
def test_compiled_kernels(python, architecture):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [python, PROGRAM, architecture, *CASES[architecture]],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(report["case"], report["wrong"]) for report in reports] == [(case, None) for case in CASES[architecture]]
    launched = sum((collections.Counter(report["launched"]) for report in reports), collections.Counter())
    assert set(launched) == KERNELS
