"""The machine of a measurement: hardware, versions, commit, and the steps that reach its ceilings.

No host name and no path is recorded: results are published.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from mcld_kernels.options import float32_precision
from mcld_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "numpy", "info-nce-pytorch", "pytorch-metric-learning", "lightly", "inf-cl")


def describe(device: torch.device) -> dict[str, object]:
    """The machine in a few plain values."""
    values: dict[str, object] = {
        "device": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_1min": load(),
        "float32_matmul_precision": float32_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks_power": _run(
                "nvidia-smi", "--query-gpu=clocks.max.sm,clocks.sm,power.limit", "--format=csv,noheader"
            ),
        }
    return values


def load() -> float | None:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def name(machine: dict[str, Any]) -> str:
    """The values of ``describe`` in a few words."""
    if "gpu" in machine:
        return str(machine["gpu"])
    return f"{machine['cpu']}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def caption(header: dict[str, Any]) -> str:
    """One line for a plot or a table: machine, load, versions, commit and date of a recorded run."""
    machine = header["machine"]
    commit = (header["commit"] or "unknown")[:10] + (" with changes" if header["dirty"] else "")
    loads = [machine.get("load_1min"), machine.get("load_1min_end")]
    shown = " to ".join(f"{value:g}" for value in loads if value is not None)
    parts = [name(machine), f"load {shown}" if shown else ""]
    parts += [f"{package} {header['versions'][package]}" for package in ("mcld_kernels", "torch")]
    return "; ".join([*filter(None, parts), f"commit {commit}", header["started"][:10]])


def versions() -> dict[str, str | None]:
    """Python, the packages that are compared, and this package."""
    values: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            values[package] = None
    return values | {"torch": torch.__version__, "mcld_kernels": __version__}


def commit() -> dict[str, object]:
    """The commit of the working tree and whether files differ from it; None where there is no git history.

    A copy without one is told by MCLD_COMMIT.
    """
    if told := os.environ.get("MCLD_COMMIT"):
        return {"commit": told, "dirty": None}
    revision = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not revision:
        return {"commit": None, "dirty": None}
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": revision, "dirty": bool(changed)}


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


# Large enough for a library to reach its best, small enough to be repeated in every round.
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


def gemm(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], torch.Tensor], int]:
    """A square product of random matrices as a step, and its flop count: the ceiling of the GEMMs."""
    size = GEMM_SIZE.get(device.type, 2048)
    if device.type == "cpu" and dtype == torch.float16:
        size = 256  # CPUs without fp16 arithmetic take minutes for more
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def copy(device: torch.device) -> tuple[Callable[[], torch.Tensor], int]:
    """A copy from memory to memory as a step, and the bytes it reads and writes."""
    size = (1 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size
