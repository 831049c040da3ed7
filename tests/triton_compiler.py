"""Compile, without a GPU, every kernel that the "triton" backend launches. A program of its own: an interpreted kernel
does not compile, so it must run without TRITON_INTERPRET.

    python triton_compiler.py [OPTION...] ARCHITECTURE CASE...     (80, 90, 100, gfx942 or gfx950; the names of CASES)

With --few a kernel without a product is compiled once for each type, in its first form alone; with --products none is.
--product-stages: a field of the tuning.

The backend itself runs, on meta tensors; a launch is compiled instead, with the types, constants and alignment that it
has. Prints one JSON object for each distinct kernel.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from mcld_kernels.backends.triton.configs import TritonTuning
from mcld_kernels.backends.triton.kernels import TritonKernels
from mcld_kernels.kernels import LossInputs
from mcld_kernels.losses import mcld
from mcld_kernels.options import mcld_options

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
AMD = ("gfx942", "gfx950")
PRODUCTS = ("flash_kernel", "similarity_kernel", "product_kernel")

# (batch, classes, dtype, options): long and short rows, whole and ragged sizes. Options: of `mcld_loss`, and
# "precision", the float32 matmul precision; "misaligned", logits that begin off a 16-byte boundary; "offset", rows of a
# larger teacher that come before the partners; "student_grad".
EVERYTHING = {"direction": "symmetric", "mask_same_class": True, "present_only": True}
# Needs the online maximum; the instance-wise term has mask keys, the sample-wise one has none.
ONLINE = {"weight": (1.0, 1.0, 0.0), "temperature": 0.01, "mask_same_class": True}
CASES: dict[str, tuple[int, int, torch.dtype, dict[str, Any]]] = {
    "bf16": (4096, 1000, torch.bfloat16, {}),
    "bf16-all": (4096, 1000, torch.bfloat16, EVERYTHING),
    "bf16-online": (4096, 1000, torch.bfloat16, {**ONLINE, "direction": "teacher"}),
    "bf16-ragged": (1031, 379, torch.bfloat16, {"misaligned": True}),
    "bf16-10": (1031, 10, torch.bfloat16, EVERYTHING),
    "bf16-48": (1031, 48, torch.bfloat16, EVERYTHING),
    "bf16-100": (4096, 100, torch.bfloat16, EVERYTHING),
    # Enough anchors for all candidates to stay in one part
    "bf16-100-whole": (16384, 100, torch.bfloat16, {"weight": (1.0, 1.0, 0.0)}),
    "bf16-200": (1031, 200, torch.bfloat16, EVERYTHING),
    "bf16-10-online": (1031, 10, torch.bfloat16, ONLINE),
    "bf16-48-online": (1031, 48, torch.bfloat16, ONLINE),
    "bf16-100-online": (1031, 100, torch.bfloat16, ONLINE),
    "bf16-200-online": (1031, 200, torch.bfloat16, ONLINE),
    "bf16-one": (1, 1, torch.bfloat16, {}),
    "bf16-offset": (1024, 100, torch.bfloat16, {"weight": (1.0, 1.0, 0.0), "offset": 512}),
    "bf16-loss": (4096, 1000, torch.bfloat16, {**EVERYTHING, "student_grad": False}),
    "bf16-100-loss": (4096, 100, torch.bfloat16, {**EVERYTHING, "student_grad": False}),
    "fp16": (4096, 1000, torch.float16, {"direction": "teacher"}),
    # The instance-wise term needs the online maximum, the sample-wise one has a fixed shift.
    "fp16-100": (1031, 100, torch.float16, {"direction": "symmetric", "temperature": (0.05, 0.5, 0.5)}),
    "fp32": (4096, 1000, torch.float32, {}),
    "fp32-all": (1031, 1001, torch.float32, EVERYTHING),
    "fp32-10": (1031, 10, torch.float32, EVERYTHING),
    "fp32-48": (1031, 48, torch.float32, EVERYTHING),
    "fp32-48-online": (1031, 48, torch.float32, ONLINE),
    "tf32": (4096, 1000, torch.float32, {"precision": "high"}),
    "tf32-10": (1031, 10, torch.float32, {"precision": "high", **EVERYTHING}),
    "tf32-48": (1031, 48, torch.float32, {"precision": "high", **EVERYTHING}),
    "tf32-48-online": (1031, 48, torch.float32, {"precision": "high", **ONLINE}),
    "tf32-100": (1031, 100, torch.float32, {"precision": "high", **EVERYTHING}),
    "tf32-100-online": (1031, 100, torch.float32, {"precision": "high", **ONLINE}),
}
# Few forms for AMD: every kernel, every row of the tables that holds for the architecture, and each pitch of 16-bit
# operands with a fixed shift and with the online maximum.
AMD_CASES = {
    "gfx942": (
        *("bf16-all", "bf16-online", "bf16-10", "bf16-48", "bf16-100", "bf16-100-online", "bf16-200"),
        *("bf16-10-online", "bf16-48-online", "bf16-200-online", "fp16", "fp16-100"),
        *("fp32-all", "fp32-10", "fp32-48", "fp32-48-online", "tf32-10", "tf32-48", "tf32-48-online", "tf32-100"),
    ),
    "gfx950": (
        *("bf16-all", "bf16-online", "bf16-10", "bf16-48", "bf16-100", "bf16-100-online", "bf16-200"),
        *("bf16-10-online", "bf16-48-online", "bf16-200-online", "fp16", "fp16-100"),
        *("fp32-10", "fp32-48", "fp32-48-online", "tf32-10", "tf32-48", "tf32-48-online"),
    ),
}


@dataclass(kw_only=True, slots=True)
class Bound:
    """The arguments of a launch, as Triton specializes a kernel for them."""

    values: dict[str, Any]
    signature: dict[str, str]  # type of each, "constexpr" for a constant
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list]  # alignment

    def source(self, kernel: JITFunction) -> ASTSource:
        return ASTSource(kernel, self.signature, self.constants, self.attributes)


def bind(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> Bound:
    """The arguments by name. What ``options`` holds beside them is for the compiler."""
    values = kernel.signature.bind(*args, **{k: v for k, v in options.items() if k in kernel.arg_names}).arguments
    bound = Bound(values=values, signature={}, constants={}, attributes={})
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        constant = parameter.is_constexpr or value is None
        constant |= type(value) is int and value == 1 and not parameter.do_not_specialize
        if constant:
            bound.signature[parameter.name], bound.constants[(i,)] = "constexpr", value
            continue
        bound.signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor):
            address = value.storage_offset() * value.itemsize if value.is_meta else value.data_ptr()
            aligned = address % 16 == 0
        else:
            aligned = type(value) is int and value % 16 == 0 and not parameter.do_not_specialize
        if aligned and not parameter.do_not_specialize_on_alignment:
            bound.attributes[(i,)] = [["tt.divisibility", 16]]
    return bound


class Compiler:
    def __init__(self, architecture: str, few: bool, products: bool = False):
        self.architecture, self.few, self.products = architecture, few, products
        if architecture in AMD:
            self.target = GPUTarget("hip", architecture, 64)
        else:
            self.target = GPUTarget("cuda", int(architecture), 32)
        self.seen: set[str] = set()
        self.case = ""

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Stands in for JITFunction.run."""
        if self.products and kernel.__name__ not in PRODUCTS:
            return
        bound = bind(kernel, args, options)
        options = {k: v for k, v in options.items() if k not in kernel.arg_names}
        signature, constants, attributes = bound.signature, bound.constants, bound.attributes
        key = repr((kernel.__name__, sorted(signature.items()), sorted(constants.items()), sorted(attributes), options))
        dtype = next(kind for kind in signature.values() if kind.startswith("*"))
        if self.few and kernel.__name__ not in PRODUCTS:
            key = repr((kernel.__name__, dtype))
        if key in self.seen:
            return
        self.seen.add(key)
        compiled = triton.compile(bound.source(kernel), target=self.target, options=options)
        report = {
            "triton": triton.__version__,
            "case": self.case,
            "kernel": kernel.__name__,
            "architecture": self.architecture,
            **options,
        }
        report |= {
            name.lower(): getattr(value, "name", None) or str(value)
            for name, value in bound.values.items()
            if name.isupper() and name != "ACC"
        }
        report["dtype"] = dtype
        report["shared"] = compiled.metadata.shared
        report["has_dot"] = "tt.dot" in compiled.asm["ttir"]
        if self.architecture in AMD:
            report["tensor_cores"] = sorted(set(re.findall(r"\bv_mfma_\w+", compiled.asm["amdgcn"])))
            report |= amd_resources(compiled.asm["amdgcn"])
        else:
            # ptxas makes HMMA, HGMMA or UTCHMMA of these alone; a disassembler that showed those took a third of the
            # time.
            report["tensor_cores"] = [name for name in TENSOR_CORES if re.search(rf"\b{name}\b", compiled.asm["ptx"])]
            report |= resources(compiled.asm["cubin"])
        print(json.dumps(report), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory, where spills would go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], text=True)
    return {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def amd_resources(assembly: str) -> dict[str, int]:
    """The same from the metadata of AMDGCN assembly: a lane's registers and scratch memory, and spilled registers."""
    fields = {
        "reg": "vgpr_count",
        "stack": "private_segment_fixed_size",
        "local": "vgpr_spill_count",
        "scalar_spills": "sgpr_spill_count",
    }
    # Without the metadata there is no report: a field that is missing must not read as 0.
    return {
        name: int(re.findall(rf"^\s*(?:- )?\.{field}:\s*(\d+)$", assembly, re.MULTILINE)[0])
        for name, field in fields.items()
    }


def run(case: str, tuning: TritonTuning) -> None:
    batch, classes, dtype, options = CASES[case]
    options = dict(options)
    torch.set_float32_matmul_precision(options.pop("precision", "highest"))
    skipped = 1 if options.pop("misaligned", False) else 0
    offset, student_grad = options.pop("offset", 0), options.pop("student_grad", True)
    storage = torch.empty(2, (batch + offset) * classes + skipped, dtype=dtype, device="meta")
    teacher, student = (part[skipped:].view(-1, classes) for part in storage)
    labels = torch.zeros(batch + offset, dtype=torch.int64, device="meta")
    defaults = {
        "temperature": 0.1, "weight": (1.0, 1.0, 1.0), "direction": "student", "mask_same_class": False,
        "present_only": False, "ignore_index": -100, "eps": 1e-12,
    }  # fmt: skip
    checked, weight = mcld_options(**{**defaults, **options})
    inputs = LossInputs(
        student=student[:batch],
        teacher=teacher,
        target=labels[:batch],
        weight=weight,
        options=checked,
        student_grad=student_grad,
        teacher_grad=False,
        offset=offset,
        teacher_target=labels if offset else None,
    )
    mcld.compute(TritonKernels(tuning), inputs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--product-stages", type=int)
    parser.add_argument("architecture")
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    compiler = Compiler(arguments.architecture, arguments.few, arguments.products)
    name = compiler.architecture if compiler.architecture in AMD else f"sm_{compiler.architecture}"
    # No product is the library's: on a GPU it takes some, and these kernels must be good as well.
    tuning = TritonTuning(
        chunk_bytes=128 << 20, architecture=name, library_product=False, product_stages=arguments.product_stages
    )
    JITFunction.run = lambda kernel, *args, **kwargs: compiler.launch(kernel, *args, **kwargs)
    for case in arguments.cases or CASES:
        compiler.case = case
        run(case, tuning)


if __name__ == "__main__":
    main()
