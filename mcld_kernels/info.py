"""``python -m mcld_kernels.info [--json]``: the versions, devices, backends and build that a bug report needs."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, installation
from .backends import timings, torch_low_latency
from .backends.chunks import CHUNK_MB, CUDA_WAVE_MB
from .backends.cuda import extension
from .backends.triton import configs
from .console import to_terminal
from .options import float32_precision

SCHEMA = 1
VARIABLES = {
    "MCLD_CHUNK_MB": f"MiB that a chunk of similarities may take (default {CHUNK_MB['cpu']} on CPU, {CHUNK_MB['cuda']} "
    f"on CUDA; backend 'cuda' takes up to {CUDA_WAVE_MB} where that fills whole waves of blocks)",
    "MCLD_AUTOTUNE": "1: tune Triton's launch configurations on first use instead of reading the table",
    "MCLD_HOPPER": "1: let backend 'cuda' use its Hopper kernels, which no GPU has run yet; 0: never; else as measured",
    "MCLD_TABLE": "the table of measurements that backend 'auto' chooses by, instead of the one in the cache folder",
    "TRITON_INTERPRET": "1: run Triton kernels on CPU tensors, slowly, to test them",
}
TRITON_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm")  # the last two beside a torch for AMD's GPUs
GPU_STATE = "no GPU has run the kernels of triton and cuda yet; a CPU tests them, as source and as PTX"
# No such GPU has run them.
AMD_STATE = f"Triton's kernels are compiled for {' and '.join(configs.AMD)}, never run"
AUTO_SHAPE = (1024, 1000)  # the logits for which a device's "auto" is shown
AUTO_DTYPES = (torch.float32, torch.bfloat16)


def describe() -> dict[str, Any]:
    """All of it, as ``--json`` prints it: section -> name -> value, None where there is nothing to say.

    ``backends`` maps each backend to None, or to the reason why this machine cannot run it.
    """
    return {
        "schema": SCHEMA,
        "versions": _versions(),
        "build": _build(),
        "driver": _driver(),
        "devices": _devices(),
        "backends": {name: backends.unavailable_reason(name) for name in backends.NAMES},
        "state": {"GPU kernels": GPU_STATE},
        "measured tables": _tables(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def _versions() -> dict[str, str | None]:
    return {
        "mcld_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "HIP of torch": torch.version.hip,
        "triton": next(filter(None, map(_distribution_version, TRITON_DISTRIBUTIONS)), None),
        "numpy": _distribution_version("numpy"),
        "float32 matmul precision": float32_precision(),
    }


def _distribution_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _build() -> dict[str, Any]:
    origin, editable = installation.source()
    module, _ = extension.load()
    return {
        "source": f"{origin} (editable)" if editable else origin,
        "commit": installation.commit(),
        "compiled module": None if module is None else _module(module.info()),
        "CPU kernels": _cpu_kernels(),
    }


def _cpu_kernels() -> str:
    """The instruction set that the compiled CPU kernels take here, or why there are none."""
    module = torch_low_latency.compiled_module()
    if module is None:
        return f"none: {torch_low_latency.unavailable_reason()}"
    names: list[str] = module.isas()
    return f"{names[-1]} (of {' '.join(names)})"


def _module(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if value is not None} | {"commit": installation.build_commit()}


def _driver() -> dict[str, str | None]:
    """The NVIDIA driver's version, and the newest CUDA that it runs."""
    return {"version": _driver_version(), "CUDA": _driver_cuda()}


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return match[1] if match else None


def _driver_cuda() -> str | None:
    number = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if status == 0 else None


def _devices() -> dict[str, dict[str, Any]]:
    devices: dict[str, dict[str, Any]] = {
        "cpu": {
            "name": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "auto takes": _auto("cpu"),
        }
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = {
            "name": properties.name,
            **_architecture(torch.device("cuda", i), properties),
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "auto takes": _auto(f"cuda:{i}"),
        }
    return devices


def _architecture(device: torch.device, properties: Any) -> dict[str, str]:
    if torch.version.hip is not None:
        return {"architecture": configs.architecture(device), "state": AMD_STATE}
    return {"compute capability": f"{properties.major}.{properties.minor}"}


def _auto(device: str) -> dict[str, str]:
    """The backend that "auto" takes on a device for logits of AUTO_SHAPE, by dtype."""
    taken = {}
    for dtype in AUTO_DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            logits = torch.empty(AUTO_SHAPE, dtype=dtype, device=device)
            backend = backends.choose("auto", logits, logits, teacher_grad=False)
            taken[name] = backend + backends.tuning_text(backend, logits, logits)
        except (RuntimeError, ValueError) as error:  # a device in use by another alone, a table that cannot be read
            taken[name] = f"fails: {error}".splitlines()[0]
    return taken


def _tables() -> dict[str, str]:
    tables = {}
    for gpu in sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}):
        try:
            tables[gpu] = timings.find(gpu)[1]
        except ValueError as error:
            tables[gpu] = str(error)
    return tables


def lines(description: dict[str, Any]) -> list[str]:
    """The description as text: a section a paragraph, a name a line."""
    result = []
    for section, entries in description.items():
        if not isinstance(entries, dict) or not entries:
            continue
        result.append(section)
        width = max(map(len, entries))
        for name, value in entries.items():
            if section == "environment" and value is None:
                value = f"unset ({VARIABLES[name]})"
            elif section == "backends" and value is None:
                value = "available"
            result.append(f"  {name:<{width}}  {_text(value)}")
    return result


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mcld_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    arguments = parser.parse_args()
    description = describe()
    try:
        shown = json.dumps(description, indent=2) if arguments.json else to_terminal("\n".join(lines(description)))
        print(shown, flush=True)
    except BrokenPipeError:  # `| head`: nobody reads the rest, and the interpreter must not flush it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
