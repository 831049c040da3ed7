"""Build of the compiled module ``mcld_kernels._C``: finds the tools, then CMake and ninja do the work (CMakeLists.txt).

Everything else about the package stands in pyproject.toml. The outcome is one of three:
  * a module with the CUDA kernels, when an nvcc is found;
  * a module without them, whose ``info()`` says why, when there is none or ``MCLD_BUILD_CUDA=0``;
  * no module, when not even a C++ compiler works; ``mcld_kernels/_C_missing.txt`` then holds the reason and the remedy.
``MCLD_BUILD_CUDA=1`` asks for the first outcome and makes any other an error. No GPU is looked for at any point.

Environment variables read here:
  MCLD_BUILD_CUDA       1, 0 or auto (default; 1 where MCLD_CUDA_ARCHS is set)
  MCLD_CUDA_ARCHS       architectures as CMake writes them ("80-real;90a-real") or as torch does ("8.0;9.0a+PTX");
                        otherwise TORCH_CUDA_ARCH_LIST, then CUDAARCHS, then DEFAULT_ARCHS
  CUDACXX, CUDA_HOME, CUDA_PATH   where nvcc is; otherwise PATH, then the nvidia-cuda-nvcc wheel
  CXX                   the C++ compiler
  CMAKE_ARGS            further arguments for CMake; they come last, so they win
  MAX_JOBS              parallel compilations
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80-real;90a-real;100a-real;120"
OLDEST_ARCH = 80  # mma.sync on bf16 and cp.async begin here
NVCC_WHEELS = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
NO_NVCC = (
    "no nvcc was found when the module was built (CUDACXX, CUDA_HOME, CUDA_PATH, PATH, the nvidia-cuda-nvcc wheel). "
    "Put a CUDA toolkit's bin folder on the PATH, or "
    "set MCLD_BUILD_CUDA=1 for pip to fetch the compiler from PyPI, and install again."
)
NO_CXX = (
    "no C++ compiler was found (CXX, c++, g++, clang++). "
    "Install one (Debian: apt install g++ python3-dev) and install again."
)


class BuildError(Exception):
    """Something this build needs is missing or wrong; the message says what to do."""


def cuda_mode(environ=os.environ) -> str:
    """``"on"``, ``"off"`` or ``"auto"``, from MCLD_BUILD_CUDA and MCLD_CUDA_ARCHS."""
    value = environ.get("MCLD_BUILD_CUDA", "auto").strip().lower() or "auto"
    modes = {"1": "on", "on": "on", "true": "on", "0": "off", "off": "off", "false": "off", "auto": "auto"}
    if value not in modes:
        raise BuildError(
            f"MCLD_BUILD_CUDA is {value!r}; it takes 1 (CUDA or an error), 0 (no CUDA) or auto (CUDA if nvcc is there)"
        )
    # Whoever names architectures wants them compiled.
    return "on" if modes[value] == "auto" and environ.get("MCLD_CUDA_ARCHS") else modes[value]


def find_nvcc(environ=os.environ) -> Path | None:
    """The nvcc to use, or None. A variable that names a toolkit without nvcc is an error: it is not searched past."""
    if environ.get("CUDACXX"):
        found = shutil.which(environ["CUDACXX"], path=environ.get("PATH", ""))
        if not found:
            raise BuildError(f"CUDACXX={environ['CUDACXX']} is not an executable. Correct it or unset it.")
        return Path(found)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            nvcc = Path(environ[variable]) / "bin" / "nvcc"
            if not nvcc.exists():
                raise BuildError(
                    f"{variable}={environ[variable]} holds no bin/nvcc. Point it at a CUDA toolkit or unset it."
                )
            return nvcc
    found = shutil.which("nvcc", path=environ.get("PATH", ""))
    return Path(found) if found else find_wheel_nvcc()


def find_wheel_nvcc() -> Path | None:
    """nvcc of the nvidia-cuda-nvcc wheel, in pip's build environment (on sys.path) or beside the package."""
    folders = [*sys.path, sysconfig.get_path("purelib"), *site.getsitepackages()]
    for folder in folders:
        nvcc = Path(folder or ".") / "nvidia" / "cu13" / "bin" / "nvcc"
        # The wheels come apart; without cicc, the runtime's headers and CUB the kernels cannot be compiled.
        parts = ("nvvm/bin/cicc", "include/cuda_runtime.h", "include/cccl/cub/cub.cuh")
        if nvcc.exists() and all((nvcc.parents[1] / part).exists() for part in parts):
            return nvcc
    return None


def find_cxx(environ=os.environ) -> str | None:
    """The C++ compiler, or None."""
    names = [shlex.split(environ["CXX"])[-1]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name, path=environ.get("PATH", "")))), None)


def parse_archs(text: str) -> list[str]:
    """Architectures in CMake's notation, from CMake's or torch's: ``"8.0;9.0a+PTX"`` is ``["80-real", "90a"]``."""
    archs = []
    for item in re.split(r"[;,\s]+", text.strip()):
        if not item:
            continue
        torch_style = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if torch_style:
            major, minor, ptx = torch_style.groups()
            archs.append(f"{major}{minor}" + ("" if ptx else "-real"))
        elif re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", item):
            archs.append(item)
        else:
            raise BuildError(
                f"{item!r} is not a CUDA architecture. Write them as CMake does, {DEFAULT_ARCHS!r}, "
                "or as torch does, '8.0;9.0a;12.0+PTX'."
            )
    if not archs:
        raise BuildError(f"the list of CUDA architectures is empty. Unset it for the default, {DEFAULT_ARCHS}.")
    return archs


def arch_number(arch: str) -> int:
    """``80`` of ``"80-real"``, ``90`` of ``"90a"``."""
    return int(re.match(r"\d+", arch)[0])


def requested_archs(environ=os.environ) -> tuple[list[str], str | None]:
    """The architectures asked for and the variable that asked, None where they are the default."""
    for variable in ("MCLD_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS"):
        if environ.get(variable):
            archs = parse_archs(environ[variable])
            if variable == "TORCH_CUDA_ARCH_LIST":
                # That list is often set machine-wide, for other projects too: what is too old here is left out.
                archs = [arch for arch in archs if arch_number(arch) >= OLDEST_ARCH] or archs
            return archs, variable
    return parse_archs(DEFAULT_ARCHS), None


def check_archs(archs: list[str], variable: str | None, known: set[int], nvcc: str) -> list[str]:
    """The architectures to compile, given the numbers that nvcc knows: all those asked for, or an error.

    Of the default list, those that an older nvcc does not know are left out.
    """
    too_old = [arch for arch in archs if arch_number(arch) < OLDEST_ARCH]
    if too_old:
        raise BuildError(
            f"{variable} asks for {', '.join(too_old)}: the kernels need sm_{OLDEST_ARCH} (Ampere) or later."
        )
    unknown = [arch for arch in archs if arch_number(arch) not in known]
    usable = [arch for arch in archs if arch not in unknown]
    if (unknown and variable) or not usable:
        asked = f"{variable} asks for" if variable else "the default list has"
        raise BuildError(
            f"{asked} {', '.join(unknown)}, which {nvcc} does not know "
            f"(it knows {', '.join(map(str, sorted(known)))}). "
            "Name architectures it knows in MCLD_CUDA_ARCHS, or install a newer CUDA toolkit."
        )
    return usable


def nvcc_archs(nvcc: Path) -> set[int]:
    """The architecture numbers that this nvcc knows."""
    try:
        listing = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} --list-gpu-arch failed ({error}). Is it a CUDA toolkit of 11.8 or later?") from error
    return {int(number) for number in re.findall(r"compute_(\d+)", listing)}


def find_tool(name: str) -> str:
    """cmake or ninja: the one beside this Python first, since a system's may be too old."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    if "pip-build-env" not in path:  # outside pip's build isolation
        path = os.pathsep.join([sysconfig.get_path("scripts"), path])
    found = shutil.which(name, path=path)
    if not found:
        raise BuildError(f"{name} was not found. Install it (pip install {name}), or let pip build in isolation.")
    return found


def last_lines(output: str, count: int = 15) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return "\n".join(errors[:5] + ["..."] + lines[-count:])


class FreshBuild(build_py):
    """Setuptools keeps what earlier builds left in its folder, and would put a module since removed into a wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "mcld_kernels", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Drives CMake for the one extension, and falls back as the file's docstring says."""

    def run(self) -> None:
        mode = cuda_mode()
        note = self.package_folder() / "_C_missing.txt"
        note.unlink(missing_ok=True)
        try:
            self.build_module(mode)
        except BuildError as error:
            if mode == "on":
                raise SystemExit(f"\nmcld_kernels: CUDA was asked for, but {error}\n") from None
            print(f"mcld_kernels: installing without the compiled module: {error}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            for stale in note.parent.glob("_C.*"):  # an earlier build's module no longer matches the sources
                if stale.suffix != ".pyi":
                    stale.unlink()
            note.write_text(f"{error}\n")
            self.extensions = []
            return
        if self.inplace:
            self.copy_extensions_to_source()

    def package_folder(self) -> Path:
        return ROOT / "mcld_kernels" if self.inplace else Path(self.build_lib).resolve() / "mcld_kernels"

    def build_module(self, mode: str) -> None:
        if not find_cxx():
            raise BuildError(NO_CXX)
        if mode == "off":
            return self.cmake("OFF", "MCLD_BUILD_CUDA=0 was set when the module was built. Unset it and install again.")
        try:
            nvcc = find_nvcc()
            if nvcc is None:
                raise BuildError(NO_NVCC)
            archs, variable = requested_archs()
            archs = check_archs(archs, variable, nvcc_archs(nvcc), str(nvcc))
            return self.cmake("ON", "", nvcc, archs)
        except BuildError as error:
            if mode == "on":
                raise
            print(f"mcld_kernels: building without CUDA: {error}", file=sys.stderr)
            return self.cmake("OFF", str(error))

    def cmake(self, cuda: str, reason: str, nvcc: Path | None = None, archs: list[str] | None = None) -> None:
        """Configure and build; raise BuildError with the compiler's last words if either fails."""
        import pybind11

        inplace, self.inplace = self.inplace, False
        module = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        self.inplace = inplace
        # A folder that outlives pip's temporary ones, so that a second install compiles only what changed.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{'cuda' if nvcc else 'cpu'}"
        folder.mkdir(parents=True, exist_ok=True)
        # pip's isolated tools move at every install; a remembered path to them would be wrong.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        environ = dict(os.environ)
        configure = [
            *(find_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMCLD_OUTPUT_DIR={module.parent}",
            f"-DMCLD_BUILD_CUDA={cuda}",
            f"-DMCLD_CUDA_REASON={reason}",
        ]
        if nvcc and archs:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(archs)}"]
            # The wheels have lib where a toolkit has lib64, which nvcc does not search.
            library_path = [str(nvcc.resolve().parents[1] / "lib"), environ.get("LIBRARY_PATH", "")]
            environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, library_path))
        configure += shlex.split(environ.get("CMAKE_ARGS", ""))
        build = [configure[0], "--build", str(folder), "--parallel", environ.get("MAX_JOBS", str(os.cpu_count() or 1))]
        for command in (configure, build):
            done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout, flush=True)
            with (folder / "build.log").open("a") as log:  # registers and spills of every kernel, for .ci/check_cuda.py
                log.write(done.stdout)
            if done.returncode:
                raise BuildError(
                    "the build of the compiled module failed. Correct what is reported here and install again with "
                    f"`pip install -v`, which shows all of it:\n{last_lines(done.stdout)}"
                )


def cuda_wheels() -> list[str]:
    """The compiler from PyPI, as a build requirement, when CUDA was asked for and none is here."""
    return NVCC_WHEELS if cuda_mode() == "on" and find_cxx() and find_nvcc() is None else []


if __name__ == "__main__":
    try:
        # Requirements are for a frontend such as pip to install. Run by hand, setuptools would fetch them itself, as
        # eggs that lie apart, which the compiler's parts cannot.
        requirements = [] if Path(sys.argv[0]).name == "setup.py" else cuda_wheels()
    except BuildError as error:
        raise SystemExit(f"\nmcld_kernels: {error}\n") from None
    setup(
        ext_modules=[Extension("mcld_kernels._C", sources=[], optional=cuda_mode() != "on")],
        cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild},
        setup_requires=requirements,
    )
