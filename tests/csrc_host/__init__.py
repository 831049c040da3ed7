"""The portable CUDA kernels compiled for the host: ``load()`` builds the module and imports it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNELS, HOPPER = CSRC / "portable", CSRC / "hopper"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
# A fortified longjmp takes a jump to another fiber for a corrupt stack.
FLAGS += ["-U_FORTIFY_SOURCE", "-DMCLD_HOST_EMULATION", "-DMCLD_HAS_HOPPER=1"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build() -> Path:
    """Compile what changed into the cache folder and return the module's path."""
    import pybind11

    cache = Path(os.environ.get("MCLD_TEST_CACHE") or Path(tempfile.gettempdir()) / f"mcld_kernels-tests-{os.getuid()}")
    cache.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (HERE, KERNELS, CSRC, sysconfig.get_path("include"), pybind11.get_include())]
    headers = sorted(path for folder in (KERNELS, HOPPER, HERE) for path in folder.glob("*.*h"))
    common = b"".join(path.read_bytes() for path in headers) + repr((FLAGS, includes, compiler(), sys.version)).encode()

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(common + source.read_bytes()).hexdigest()[:20]
        target = cache / f"{source.parent.name}-{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            _call([compiler(), *FLAGS, *includes, "-c", "-x", "c++", source, "-o", partial])
            partial.replace(target)
        return target

    sources = sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cpp"), *HERE.glob("*.cpp"), *HERE.glob("*.cu")])
    # What only a driver can do is emulated whole.
    sources += sorted(path for path in HOPPER.glob("*.cu") if path.stem != "tensor_map")
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    key = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:20]
    module = cache / f"mcld_emulated-{key}.so"
    if not module.exists():
        partial = module.with_suffix(f".{os.getpid()}.so")
        _call([compiler(), "-shared", *objects, "-o", partial])
        partial.replace(module)
    return module


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mcld_emulated", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
