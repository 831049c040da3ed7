"""The CUDA kernels compiled for the host: ``load()`` builds the module and imports it.

Its kernels fail at a data race (races.h). With MCLD_TEST_CHECK=memory, in a process started with the variables that
``memory_environment()`` gives, they run under AddressSanitizer and UndefinedBehaviorSanitizer instead, which end it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
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
KERNELS, HOPPER, CPU = CSRC / "portable", CSRC / "hopper", CSRC / "cpu"
FLAGS = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
# A fortified longjmp takes a jump to another fiber for a corrupt stack.
FLAGS += ["-U_FORTIFY_SOURCE", "-DMCLD_HOST_EMULATION", "-DMCLD_HAS_HOPPER=1"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# By check, the flags of the emulator, those of the kernels, and the linker's. The sanitizers' code takes half as long
# again to compile at -O2 as at -O1, and few tests run it.
CHECKS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "races": (["-O3", "-DMCLD_CHECK_RACES"], ["-O2", "-DMCLD_CHECK_RACES", "-fsanitize=thread"], []),
    # The sanitizers' code sets off warnings that are not the kernels'.
    "memory": (
        ["-O2", "-DMCLD_CHECK_MEMORY"],
        ["-O1", "-DMCLD_CHECK_MEMORY", "-Wno-maybe-uninitialized", *_SANITIZERS],
        _SANITIZERS,
    ),
}
REPORTED = 66  # exit status of a process that the memory check ended
EMULATOR = [HERE / name for name in ("emulation.cpp", "emulation_sm90.cpp", "races.cpp")]
BINDINGS = [CSRC / "bindings.cpp"]
CONTROLS = [HERE / "controls.cu"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def cache_folder() -> Path:
    """The folder of what the tests compile, kept from run to run."""
    cache = Path(os.environ.get("MCLD_TEST_CACHE") or Path(tempfile.gettempdir()) / f"mcld_kernels-tests-{os.getuid()}")
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def checks_memory() -> bool:
    """True in a process that runs the kernels under the memory check."""
    return os.environ.get("MCLD_TEST_CHECK") == "memory"


def memory_environment() -> dict[str, str]:
    """The variables that a process needs beside its parent's to run the memory check.

    Raises RuntimeError where the compiler has no sanitizers.
    """

    def library(name: str) -> str:
        command = [str(compiler()), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            raise RuntimeError(f"{compiler()} has no {name}")
        return path

    library("libubsan.so")
    return {
        "MCLD_TEST_CHECK": "memory",
        # Python does not link the C++ library, of which AddressSanitizer must find __cxa_throw when it starts.
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so')}",
        # Python and torch leave what they allocated at import.
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={REPORTED}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={REPORTED}",
    }


def memory_command() -> list[str]:
    """The words before the command of such a process. Raises RuntimeError where none can be started.

    AddressSanitizer of older compilers may find its shadow memory taken where the system places mappings with more than
    28 random bits.
    """
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    if not bits.exists() or int(bits.read_text()) <= 28:
        return []
    fixed = ["setarch", "-R"]
    if shutil.which(fixed[0]) is None or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        raise RuntimeError("vm.mmap_rnd_bits is above 28, and setarch -R is not there or not allowed")
    return fixed


def memory_command_line() -> str:
    """Both, for a shell, to put before the command."""
    variables = (f"{name}={value}" for name, value in memory_environment().items())
    return shlex.join([*memory_command(), "env", *variables])


def build(check: str = "races", *, controls: bool = False, bindings: str = "-O0") -> Path:
    """Compile what changed into the cache folder and return the path of the module, or of the negative controls."""
    of_emulator, of_kernels, of_linker = CHECKS[check]

    def flags_of(source: Path) -> list[str]:
        return FLAGS + ([bindings] if source in BINDINGS else of_emulator if source in EMULATOR else of_kernels)

    # What only a driver can do is emulated whole.
    kernels = sorted(path for folder in (KERNELS, HOPPER) for path in folder.glob("*.cu") if path.stem != "tensor_map")
    kernels.append(HERE / "probes.cu")
    # Of an inline function that several sources define, the linker takes the first: the kernels', which are checked.
    sources = [*(CONTROLS if controls else kernels), *EMULATOR, *([] if controls else BINDINGS)]
    name = "controls" if controls else "mcld_emulated"
    return _build(name, [(source, flags_of(source)) for source in sources], of_linker, (HERE, KERNELS, HOPPER))


def build_cpu() -> Path:
    """The module mcld_kernels._cpu with every access and every sum of integers checked, as `build("memory")` is."""
    text = (CPU / "CMakeLists.txt").read_text()
    isas = re.findall(r"^ *mcld_cpu_library\((\w+) (\d+) ?(.*)\)$", text, re.MULTILINE)
    (files,) = re.findall(r"OBJECT ([\w.\s]+)\)", text)
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ["-std=c++17", "-g1", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    flags += [*_SANITIZERS, *(["-DMCLD_CPU_X86=1"] if on_x86 else [])]
    sources = [(CPU / name, flags) for name in ("bindings.cpp", "dispatch.cpp")]
    for isa, vector_bytes, options in isas if on_x86 else isas[:1]:
        own = [f"-DMCLD_CPU_ISA={isa}", f"-DMCLD_VECTOR_BYTES={vector_bytes}", *options.split()]
        sources += [(CPU / name, flags + own) for name in files.split()]
    return _build("_cpu", sources, [*_SANITIZERS, "-ldl"], (CPU,))


def _build(name: str, sources: list[tuple[Path, list[str]]], of_linker: list[str], folders: tuple[Path, ...]) -> Path:
    """A module of sources with their flags; headers are in csrc/ and ``folders``. Only what changed is compiled."""
    import pybind11

    cache = cache_folder()
    includes = [f"-I{path}" for path in (*folders, CSRC, sysconfig.get_path("include"), pybind11.get_include())]
    headers = sorted(path for folder in (CSRC, *folders) for path in folder.glob("*.*h"))
    common = b"".join(path.read_bytes() for path in headers) + repr((includes, compiler(), sys.version)).encode()

    def compile_one(source_and_flags: tuple[Path, list[str]]) -> Path:
        source, flags = source_and_flags
        key = hashlib.sha256(common + repr(flags).encode() + source.read_bytes()).hexdigest()[:20]
        target = cache / f"{source.parent.name}-{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            _call([compiler(), *flags, *includes, "-c", "-x", "c++", source, "-o", partial])
            partial.replace(target)
        return target

    # Of two processes one builds, and the other then finds what it built.
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        link = [compiler(), "-shared", *objects, *of_linker]
        key = hashlib.sha256(repr(link).encode()).hexdigest()[:20]
        module = cache / f"{name}-{key}.so"
        if not module.exists():
            partial = module.with_suffix(f".{os.getpid()}.so")
            _call([*link, "-o", partial])
            partial.replace(module)
    return module


def load(bindings: str = "-O0") -> ModuleType:
    """The bindings of mcld_kernels._C over kernels compiled for the host, and three functions more.

    bindings: how they are optimized. They compile the fastest without, and as an install has them with "-O3".

    ``vector_accesses(bytes)``: the vector accesses of so many bytes, 8 or 16, that the kernels have made.
    ``stub_launches(on)``: from now on launch nothing, or all; returns the number that was left out so far.
    ``stubbed_launch(before)``: the kernel of the launch that was left out after ``before`` others.
    """
    path = build(os.environ.get("MCLD_TEST_CHECK", "races"), bindings=bindings)
    spec = importlib.util.spec_from_file_location("mcld_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.vector_accesses = ctypes.CDLL(str(path)).vector_accesses  # type: ignore[attr-defined]
    module.vector_accesses.restype = ctypes.c_int64
    module.stub_launches = ctypes.CDLL(str(path)).stub_launches  # type: ignore[attr-defined]
    module.stub_launches.restype = ctypes.c_int64
    stubbed_launch = ctypes.CDLL(str(path)).stubbed_launch
    stubbed_launch.restype, stubbed_launch.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    module.stubbed_launch = lambda before: (  # type: ignore[attr-defined]
        stubbed_launch(before).decode().removeprefix("launch of ")
    )
    return module


def _call(command: list) -> None:
    # The compiler itself is not checked.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
