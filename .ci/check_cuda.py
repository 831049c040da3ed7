"""Checks a CUDA build without a GPU: no kernel spills or uses a stack; Hopper kernels hold wgmma, not serialized;
kernels that move rows store 16 bytes at once; Hopper flash takes every exponential beside a product, in a loop of known
products and length, and the epilogue of Hopper's product 1 has at most 1,000 instructions for a tile without positive
and edge; no loop over products of a Hopper kernel holds a memory fence. All of this for every Hopper kernel and
architecture that there should be.

    python .ci/check_cuda.py build/cmake-cpython-311-cuda

reads ``build.log`` of that folder (the output of ``ptxas -v``) and the module of an editable install, through cuobjdump
and nvdisasm of Triton's wheel or of the PATH.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import sass

MOST_AFTER_PRODUCT_1 = 1000
ARCHITECTURES = {"sm_80", "sm_90a", "sm_100", "sm_110", "sm_120"}
PRECISIONS = 2  # fp16, bf16: an instance of each Hopper kernel
# Hopper flash by the pitch of its operands: the products of a round of its loop (two tiles of 128 candidates up to a
# pitch of 128, else two of 64), and the most instructions of a round whose tiles have no positive and no edge.
FLASH = {
    64: ({"64x128x16": 8, "64x64x16": 16}, 704),
    104: ({"64x128x16": 14, "64x104x16": 16}, 768),
    128: ({"64x128x16": 32}, 768),
    192: ({"64x64x16": 24, "64x192x16": 8}, 640),
    256: ({"64x64x16": 32, "64x256x16": 8}, 640),
}


def tool(name: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = shutil.which(name, path=f"{folder}{os.pathsep}{os.environ['PATH']}")
    if not path:
        raise SystemExit(f"{name} is neither in Triton's wheel nor on the PATH")
    return path


def ptxas_report(log: str) -> list[tuple[str, str, int]]:
    """(kernel, architecture, bytes of stack and spills) of every entry in a log of ``ptxas -v``.

    ptxas names the entry, then prints its stack frame and spills on a line of their own. Of a kernel compiled
    again, the last report counts.
    """
    report, entry = {}, ("?", "?")
    for line in log.splitlines():
        if compiling := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            entry = compiling[1], compiling[2]
        elif "bytes stack frame" in line:
            report[entry] = sum(map(int, re.findall(r"(\d+) bytes", line)))
    return [(*entry, size) for entry, size in report.items()]


def resource_report(module: Path) -> list[tuple[str, str, int]]:
    """The same from the finished module: stack and local memory of every kernel, whatever log there is."""
    text = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", str(module)], capture_output=True, text=True, check=True
    ).stdout
    report, arch = [], "?"
    name = "?"
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+?):", line):
            name = match[1]
        if match := re.search(r"STACK:(\d+).*?LOCAL:(\d+)", line):
            report.append((name, arch, int(match[1]) + int(match[2])))
    return report


# Kernels by rows that write 16 bytes at once: eight 16-bit elements or four of 32 bits, as the end of their names says.
VECTOR_KERNELS = re.compile(
    r"(normalize_rows|grad_epilogue_rows|anchor_epilogue)_kernelI\w*(Li8|fLi4)E|(rescale|scale_rows|combine_splits|class_means)_kernel"
)


def sm90_code(module: Path) -> dict[str, list[sass.Instruction]]:
    """The machine code of each sm_90a kernel."""
    environ = dict(os.environ, PATH=f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}")
    text = subprocess.run(
        [tool("cuobjdump"), "-sass", "-arch", "sm_90a", str(module)],
        capture_output=True, text=True, check=True, env=environ,
    ).stdout  # fmt: skip
    return sass.kernels(text.splitlines())


def hopper_failures(code: dict[str, list[sass.Instruction]]) -> list[str]:
    """The limits that the Hopper kernels' loops and epilogues miss; prints their counts."""
    failures = []
    found: collections.Counter[int | str] = collections.Counter()
    for name, instructions in code.items():
        if "hopper" in name and any("MEMBAR" in x.text for x in sass.product_loop(instructions)):
            failures.append(f"{name}: a memory fence in the loop over products")
        if pitch := re.search(r"hopper_flash_kernelI\w*?Li(\d+)E", name):
            found[int(pitch[1])] += 1
            products, most = FLASH.get(int(pitch[1]), ({}, 0))
            beside, total = sass.exponentials_beside_products(instructions)
            count, shapes = sass.instructions_of_usual_round(instructions), sass.products(instructions)
            print(f"{beside} of {total} EX2 beside a product, {count} instructions a round, {shapes}: {name}")
            if beside < total or not total:
                failures.append(f"{name}: {total - beside} of {total} EX2 wait for the products")
            if count > most:
                failures.append(f"{name}: {count} instructions a round, {most} at most")
            if shapes != products:
                failures.append(f"{name}: products {shapes}, not {products}")
        elif "hopper_similarity" in name:
            found["cluster" if "cluster" in name else "similarity"] += 1
            count = sass.instructions_after_products(instructions)
            print(f"{count} instructions after the products of a tile: {name}")
            if count > MOST_AFTER_PRODUCT_1:
                failures.append(f"{name}: {count} instructions after the products of a tile")
    wanted: dict[int | str, int] = dict.fromkeys((*FLASH, "similarity", "cluster"), PRECISIONS)
    if found != wanted:
        failures.append(f"Hopper kernels, flash by its pitch and product 1: {dict(found)}, not {wanted}")
    return failures


def main(folder: Path) -> int:
    log = (folder / "build.log").read_text()
    module = next((Path(__file__).resolve().parents[1] / "mcld_kernels").glob("_C*.so"))

    failures = []
    for source, report in (("ptxas", ptxas_report(log)), ("module", resource_report(module))):
        kernels = collections.Counter(arch for _, arch, _ in report)
        print(f"{source}: kernels by architecture {dict(sorted(kernels.items()))}")
        if missing := ARCHITECTURES - kernels.keys():
            failures.append(f"{source}: no code for {', '.join(sorted(missing))}")
        failures += [
            f"{source}: {name} for {arch} has {size} bytes of stack and spills" for name, arch, size in report if size
        ]
    failures += sorted(set(re.findall(r"Potential Performance Loss: .*", log)))
    code = sm90_code(module)
    failures += hopper_failures(code)
    counts = {
        name: {wanted: sum(wanted in x.text for x in instructions) for wanted in ("HGMMA", "STG.E.128")}
        for name, instructions in code.items()
    }
    required = {
        "HGMMA": [name for name in counts if "hopper" in name],
        "STG.E.128": list(filter(VECTOR_KERNELS.search, counts)),
    }
    for instruction, names in required.items():
        print(f"{instruction}: {sum(counts[name][instruction] for name in names)} in {len(names)} sm_90a kernels")
        failures += [f"{name} holds no {instruction}" for name in names if not counts[name][instruction]]
    print(*failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
