"""The PTX that nvcc makes of the CUDA kernels, run by an interpreter: ``Kernels(module).take_launches()``.

The host emulation (tests/csrc_host) replaces platform.cuh and hopper/ptx.cuh, so that their inline assembly, and all
that nvcc makes of a kernel, is not in it. Here the launchers of the emulated module hand their launches, with the
parameters as a GPU would get them, to the compiled code itself. What is left to a GPU is the step from PTX to machine
code, the order of memory accesses between threads, and time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import csrc_host

from . import program
from .machine import Program

ARCHS = {csrc_host.KERNELS: "80", csrc_host.HOPPER: "90a"}
_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
_LAUNCHER = ctypes.CFUNCTYPE(_INT, _POINTER, ctypes.c_uint, ctypes.c_uint, _INT, _INT, _POINTER, ctypes.c_int64)


def compile_source(source: Path) -> str:
    """The PTX of one file of csrc/, for the oldest architecture that it is for; kept in the tests' cache folder."""
    cache, compiler = csrc_host.cache_folder(), csrc_host.nvcc()
    headers = sorted(path for folder in (csrc_host.CSRC, *ARCHS) for path in folder.glob("*.*h"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*headers, source)) + str(compiler).encode())
    target = cache / f"{source.parent.name}-{source.stem}-{key.hexdigest()[:20]}.ptx"
    with open(target.with_suffix(".lock"), "w") as lock:  # of two processes one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            flags = [f"-arch=sm_{ARCHS[source.parent]}", f"-I{csrc_host.CSRC}", "-std=c++17", "-O3", "-ptx"]
            done = subprocess.run(
                [str(compiler), *flags, str(source), "-o", str(partial)], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            partial.replace(target)
    return target.read_text()


def _demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    types = {"__nv_bfloat16": "mcld::bf16", "__half": "mcld::fp16"}
    return [re.sub("|".join(types), lambda match: types[match[0]], name) for name in done.stdout.splitlines()]


class Kernels:
    """Every kernel of csrc/portable and csrc/hopper by its signature in the emulated module, compiled on first use."""

    def __init__(self, module: ModuleType):
        path = str(module.__file__)
        self._library = ctypes.CDLL(path)
        done = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True)
        symbols = {name: int(at, 16) for at, name in re.findall(r"^(\w+) \w (\w+)$", done.stdout, re.MULTILINE)}
        base = ctypes.cast(self._library.set_launcher, ctypes.c_void_p).value or 0
        base -= symbols["set_launcher"]
        names = [name for name in symbols if "_kernel" in name]
        self._names = {base + symbols[name]: shown for name, shown in zip(names, _demangled(names), strict=True)}
        # Each kernel is launched, and so compiled, in one file.
        sources = [path for folder in ARCHS for path in sorted(folder.glob("*.cu"))]
        self._source = {name: path for path in sources for name in re.findall(r"\w+_kernel\b", path.read_text())}
        self._programs: dict[str, Program] = {}
        self.launched: dict[str, int] = {}  # launches of each kernel

    def compiled(self) -> set[str]:
        """The signatures of all kernels in what nvcc makes of csrc/."""
        sources = (source for folder in ARCHS for source in folder.glob("*.cu"))
        return set(_demangled([name for source in sources for name in program.names(compile_source(source))]))

    def _program(self, name: str) -> Program:
        if name not in self._programs:
            (short,) = re.findall(r"\w+_kernel\b", name)
            found = program.kernels(compile_source(self._source[short]))
            for shown, kernel in zip(_demangled(list(found)), found.values(), strict=True):
                self._programs[shown] = Program(kernel)
        return self._programs[name]

    def _launch(self, name: str, x: int, y: int, threads: int, shared_bytes: int, at: int, size: int) -> None:
        self.launched[name] = self.launched.get(name, 0) + 1
        self._program(name).run((x, y), threads, shared_bytes, ctypes.string_at(at, size))

    @contextlib.contextmanager
    def take_launches(self, of: str = "") -> Iterator[None]:
        """Within, the module's launches of kernels whose name matches the expression ``of`` run here."""
        errors = self.errors = []

        def launch(address: int, *arguments: int) -> bool:
            if not re.search(of, self._names[address]):
                return False
            try:
                if not errors:
                    self._launch(self._names[address], *arguments)
            except BaseException as error:  # it cannot pass through the module
                errors.append(error)
            return True

        callback = _LAUNCHER(launch)
        self._library.set_launcher(callback)
        try:
            yield
        finally:
            self._library.set_launcher(None)
            if errors:  # what the caller found wrong then follows from it
                raise errors[0]
