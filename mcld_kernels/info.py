"""``python -m mcld_kernels.info``: versions, devices, backends and the compiled module, for a bug report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, backends
from .backends import timings as measured
from .backends.cuda import extension as compiled
from .options import float32_precision

VARIABLES = {
    "MCLD_CHUNK_MB": "MiB that a chunk of exponentials may take (default 32 on CPU, 256 on CUDA)",
    "MCLD_AUTOTUNE": "1: tune Triton's launch configurations on first use instead of reading the table",
    "MCLD_HOPPER": "1: let backend 'cuda' use its Hopper kernels, which no GPU has run yet; 0: never; else as measured",
    "MCLD_TABLE": "the table of measurements that backend 'auto' chooses by, instead of the one in the cache folder",
    "TRITON_INTERPRET": "1: run Triton kernels on CPU tensors, slowly, to test them",
}


def describe() -> dict[str, dict[str, str]]:
    """Everything that is printed: section -> name -> text."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "measured tables": _tables(),
        "compiled module": _compiled(),
        "environment": {name: os.environ.get(name, f"unset ({text})") for name, text in VARIABLES.items()},
    }


def _versions() -> dict[str, str]:
    found = {"mcld_kernels": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["cuda of torch"] = torch.version.cuda or "none"
    found["float32 matmul precision"] = float32_precision()
    return found


def _devices() -> dict[str, str]:
    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (
            f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 2**30:.0f} GiB"
        )
    return found


def _backends() -> dict[str, str]:
    return {name: backends.unavailable(name) or "available" for name in backends.NAMES}


def _tables() -> dict[str, str]:
    found = {}
    for gpu in sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}):
        try:
            found[gpu] = measured.find(gpu)[1]
        except ValueError as fault:
            found[gpu] = str(fault)
    return found or {"auto": "there is no GPU to choose for"}


def _compiled() -> dict[str, str]:
    module, reason = compiled.load()
    if module is None:
        return {"mcld_kernels._C": f"not built: {reason}"}
    return {name: str(value) for name, value in module.info().items()}


def main() -> None:
    for section, entries in describe().items():
        print(section)
        width = max(map(len, entries), default=0)
        for name, text in entries.items():
            print(f"  {name:<{width}}  {text}")


if __name__ == "__main__":
    main()
