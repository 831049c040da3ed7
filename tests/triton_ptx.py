"""Run the "triton" backend on CPU tensors with the PTX that Triton compiles, in the interpreter of tests/ptx. A program
of its own: an interpreted kernel does not compile, so it must run without TRITON_INTERPRET.

    python triton_ptx.py ARCHITECTURE CASE...     (80 or 90; the names of CASES, all without any)

A launch is compiled with the types, constants and alignment that it has. Prints a JSON object for each case:
the launches of each kernel, and what is wrong with loss and gradient at the error bar, if anything.
"""

from __future__ import annotations

import collections
import json
import os
import struct
import sys
import tempfile
from typing import Any

# Nobody else may find what is compiled here, which ends with PTX.
_CACHE = tempfile.TemporaryDirectory()
os.environ["TRITON_CACHE_DIR"] = _CACHE.name

import cases  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from ptx import machine, program  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton_compiler import Bound, bind  # noqa: E402

from mcld_kernels import backends  # noqa: E402
from mcld_kernels.backends import triton as triton_backend  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MASKED = {"direction": "symmetric", "mask_same_class": True, "present_only": True}
COLD = {"temperature": 0.015, "direction": "teacher"}
TWO_PRODUCTS = {"flash_pitch": 0}
# (batch, classes, dtype, options of `mcld_loss`, fields of the tuning)
CASES: dict[str, tuple[int, int, torch.dtype, dict[str, Any], dict[str, Any]]] = {
    f"{path}-{cases.short(dtype)}-{name}": (batch, classes, dtype, options, tuning)
    for path, tuning in (("flash", {}), ("two-products", TWO_PRODUCTS))
    for dtype in (BF16, FP16, FP32)
    for name, batch, classes, options in (
        ("plain", 70, 48, {}),
        ("masked", 67, 37, MASKED),
        ("cold", 130, 20, COLD),
    )
}
CASES["long-float32"] = 40, 1000, FP32, {"weight": (1.0, 1.0, 0.0)}, {}
CASES["long-bfloat16"] = 40, 1000, BF16, {"weight": (1.0, 1.0, 0.0)}, {}
# Where a GPU of compute capability 8.0 or later has a block's dynamic shared memory if there is no other: Triton's
# swizzles rely on it.
SHARED_BASE = 1024
_PACKED = {"i32": "<i", "u32": "<I", "i64": "<q", "fp32": "<f", "i1": "<?"}


def pack(kernel: program.Kernel, bound: Bound) -> bytes:
    """The parameters as a launch on a GPU gives them; Triton's own, after those of the source, are null."""
    parameters = bytearray(kernel.parameter_bytes)
    offsets = iter(kernel.parameters.values())
    for name, kind in bound.signature.items():
        if kind == "constexpr":
            continue
        value = bound.values[name]
        if kind.startswith("*"):
            kind, value = "i64", value.data_ptr()
        struct.pack_into(_PACKED[kind], parameters, next(offsets), value)
    return bytes(parameters)


class Runner:
    """Runs launches, and counts those of each kernel."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.programs: dict[str, tuple[machine.Program, Any]] = {}  # with what Triton says of each
        self.launched: collections.Counter[str] = collections.Counter()

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Stands in for JITFunction.run."""
        bound = bind(kernel, args, options)
        compiler_options = {k: v for k, v in options.items() if k not in kernel.arg_names}
        key = repr((kernel.__name__, bound.signature, bound.constants, bound.attributes, compiler_options))
        if key not in self.programs:
            target = GPUTarget("cuda", self.architecture, 32)
            compiled = triton.compile(bound.source(kernel), target=target, options=compiler_options)
            code = program.kernels(compiled.asm["ptx"])[kernel.__name__]
            self.programs[key] = machine.Program(code, shared_base=SHARED_BASE), compiled.metadata
        runner, metadata = self.programs[key]
        self.launched[kernel.__name__] += 1
        x, y, z = (*(grid(bound.values) if callable(grid) else grid), 1, 1)[:3]
        assert z == 1
        runner.run((x, y), 32 * metadata.num_warps, metadata.shared, pack(runner.kernel, bound))


def main() -> None:
    architecture, *names = sys.argv[1:]
    runner = Runner(int(architecture))
    CUDABackend.make_cubin = lambda *_: b""
    JITFunction.run = lambda kernel, *args, **kwargs: runner.launch(kernel, *args, **kwargs)
    triton_backend.unavailable_reason = lambda: None
    triton_backend.unsupported_reason = lambda student, teacher: None
    for name in names or CASES:
        batch, classes, dtype, options, tuning = CASES[name]
        runner.launched.clear()
        wrong = None
        with backends.tuned(blocks=None, architecture=f"sm_{architecture}", library_product=False, **tuning):
            try:
                cases.check("triton", "cpu", "random", batch, classes, dtype, draws=1, ignored=0.2, **options)
            except (AssertionError, NotImplementedError, machine.Fault) as error:
                wrong = f"{type(error).__name__}: {error}"
        print(json.dumps({"case": name, "launched": dict(runner.launched), "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
