"""Build of ``mcld_kernels``: Python, and the compiled modules ``mcld_kernels._cpu`` and, on request, ``_C``.

Everything else about the package stands in pyproject.toml.
  * By default the CPU kernels ``mcld_kernels._cpu`` (csrc/cpu, by CMake and ninja) are compiled where a C++ compiler
    works. Where none does, the wheel is pure Python, with the same features and results within rounding; the build
    prints the reason, and ``python -m mcld_kernels.info`` shows it. ``MCLD_BUILD_CPU=1`` makes it an error,
    ``MCLD_BUILD_CPU=0`` compiles nothing.
  * ``MCLD_BUILD_CUDA=1`` compiles the CUDA kernels (CMakeLists.txt) and the CPU's: they are there, or the install fails
    and says why. Without an nvcc on the machine, pip fetches one from PyPI.

Environment variables read here:
  MCLD_BUILD_CPU        1, 0, or unset for the default (1 where the CUDA kernels are compiled)
  MCLD_BUILD_CUDA       1 or 0 (default; 1 where MCLD_CUDA_ARCHS is set)
  MCLD_CUDA_ARCHS       architectures as CMake writes them ("80-real;90a-real") or as torch does ("8.0;9.0a+PTX");
                        otherwise TORCH_CUDA_ARCH_LIST, CUDAARCHS, those of the machine's GPUs, DEFAULT_ARCHS
  CUDACXX, CUDA_HOME, CUDA_PATH   where nvcc is; otherwise PATH, then the nvidia-cuda-nvcc wheel
  CXX                   the C++ compiler
  CMAKE_ARGS            further arguments for CMake; they come last, so they win
  MAX_JOBS              parallel compilations
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80-real;90a-real;100;110-real;120"
OLDEST_ARCH = 80  # mma.sync on bf16 and cp.async begin here
VARIANTS = {90: "90a"}  # the variant that holds wgmma; no kernel has tcgen05 of 100a, whose code 10.3 could not run
BUILD_TOOLS = ["pybind11>=2.13", "cmake>=3.26", "ninja>=1.11"]
NVCC_WHEELS = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
NO_NVCC = (
    "no nvcc was found (CUDACXX, CUDA_HOME, CUDA_PATH, PATH, the nvidia-cuda-nvcc wheel). Put a CUDA toolkit's bin "
    "folder on the PATH. Or take PyPI's: pip fetches it without --no-build-isolation, or by hand:\n"
    f"  pip install {shlex.join(NVCC_WHEELS)}"
)
NO_CXX = (
    "no C++ compiler was found (CXX, c++, g++, clang++). "
    "Install one (Debian, Ubuntu: apt install g++ python3-dev) and try again."
)
# Beside the package: the commit it was built from, and why it has no CPU kernels (None where it has them).
BUILD_RECORD = "_build.json"


class BuildError(Exception):
    """Something this build needs is missing or wrong; the message says what to do."""


def cuda_requested(environ=os.environ) -> bool:
    """The choice made by MCLD_BUILD_CUDA or, where that is unset, by MCLD_CUDA_ARCHS."""
    # Architectures are named by those who want them compiled.
    choice = read_choice("MCLD_BUILD_CUDA", "CUDA", "the default: install without them", environ)
    return bool(environ.get("MCLD_CUDA_ARCHS")) if choice is None else choice


def cpu_demanded(environ=os.environ) -> bool:
    """True where a build without the CPU kernels is an error; a build with CUDA has them too."""
    return bool(cpu_choice(environ)) or cuda_requested(environ)


def cpu_choice(environ=os.environ) -> bool | None:
    """MCLD_BUILD_CPU; None, the default, compiles the CPU kernels where a compiler works."""
    return read_choice("MCLD_BUILD_CPU", "CPU", "install without them", environ)


def read_choice(variable: str, device: str, off: str, environ) -> bool | None:
    """The value of a variable that is 1 or 0; None where it is unset."""
    value = environ.get(variable, "").strip().lower()
    if not value:
        return None
    choices = {"1": True, "on": True, "true": True, "0": False, "off": False, "false": False}
    if value not in choices:
        raise BuildError(f"{variable} is {value!r}; it takes 1 (compile the {device} kernels, or fail) or 0 ({off})")
    return choices[value]


def without_cpu_kernels(environ=os.environ) -> str | None:
    """The reason for which this build does not try to compile the CPU kernels; None where it tries."""
    if cpu_demanded(environ):
        return None
    if cpu_choice(environ) is False:
        return "MCLD_BUILD_CPU=0 left them out"
    return None if find_cxx(environ) else NO_CXX


def find_nvcc(environ=os.environ) -> Path | None:
    """The nvcc to use, or None. A CUDA_HOME without nvcc is an error only where the PATH has none either."""
    search_path = environ.get("PATH", "")
    if environ.get("CUDACXX"):
        nvcc = shutil.which(environ["CUDACXX"], path=search_path)
        if not nvcc:
            raise BuildError(f"CUDACXX={environ['CUDACXX']} is not an executable. Correct it, or `unset CUDACXX`.")
        return Path(nvcc)
    stale = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            nvcc = Path(environ[variable]) / "bin" / "nvcc"
            if nvcc.exists():
                return nvcc
            stale.append(variable)
    on_path = shutil.which("nvcc", path=search_path)
    if on_path:
        return Path(on_path)
    if stale:
        values = " and ".join(f"{variable}={environ[variable]}" for variable in stale)
        raise BuildError(
            f"{values} holds no bin/nvcc, and there is none on the PATH. Point it at a CUDA toolkit, "
            f"or `unset {' '.join(stale)}` for pip to fetch the compiler from PyPI."
        )
    return find_wheel_nvcc()


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
    paths = (shutil.which(name, path=environ.get("PATH", "")) for name in names)
    return next(filter(None, paths), None)


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


def machine_archs(environ=os.environ) -> list[str]:
    """The architectures of this machine's GPUs that the kernels run on; empty where no GPU answers."""
    nvidia_smi = shutil.which("nvidia-smi", path=environ.get("PATH", ""))
    if not nvidia_smi:
        return []
    query = [nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    numbers = sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", answer, re.MULTILINE)})
    if numbers and numbers[-1] < OLDEST_ARCH:
        raise BuildError(
            f"the GPU of this machine is sm_{numbers[-1]} and the kernels need sm_{OLDEST_ARCH} (Ampere) or later. "
            "To compile for another machine, name its architecture, as in MCLD_CUDA_ARCHS=9.0a."
        )
    return [f"{VARIANTS.get(number, number)}-real" for number in numbers if number >= OLDEST_ARCH]


def requested_archs(environ=os.environ) -> tuple[list[str], str | None]:
    """The architectures to compile and who asks for them: a variable, this machine, or None for the default list."""
    for variable in ("MCLD_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS"):
        if environ.get(variable):
            archs = parse_archs(environ[variable])
            if variable == "TORCH_CUDA_ARCH_LIST":
                # That list is often set machine-wide, for other projects too: what is too old here is left out.
                archs = [arch for arch in archs if arch_number(arch) >= OLDEST_ARCH] or archs
            return archs, variable
    archs = machine_archs(environ)
    return (archs, "the GPU of this machine") if archs else (parse_archs(DEFAULT_ARCHS), None)


def check_archs(archs: list[str], source: str | None, known: set[int], nvcc: str) -> list[str]:
    """The architectures to compile, given the numbers that nvcc knows: all those asked for, or an error.

    Of the default list, those that an older nvcc does not know are left out.
    """
    too_old = [arch for arch in archs if arch_number(arch) < OLDEST_ARCH]
    if too_old:
        raise BuildError(
            f"{source} asks for {', '.join(too_old)}: the kernels need sm_{OLDEST_ARCH} (Ampere) or later."
        )
    unknown = [arch for arch in archs if arch_number(arch) not in known]
    usable = [arch for arch in archs if arch not in unknown]
    if (unknown and source) or not usable:
        older = [number for number in known if OLDEST_ARCH <= number < max(map(arch_number, unknown))]
        portable = f"MCLD_CUDA_ARCHS={max(older)}" if older else ""
        raise BuildError(
            f"{source or 'the default list'} asks for {', '.join(unknown)}, which {nvcc} does not know "
            f"(it knows {', '.join(map(str, sorted(known)))}). Install a newer CUDA toolkit"
            + (f", or set {portable}: its PTX runs on newer GPUs too." if portable else ".")
        )
    return usable


def nvcc_archs(nvcc: Path) -> set[int]:
    """The architecture numbers that this nvcc knows."""
    try:
        listing = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} --list-gpu-arch failed ({error}). Is it a CUDA toolkit of 11.8 or later?") from error
    return {int(number) for number in re.findall(r"compute_(\d+)", listing)}


def nvcc_version(nvcc: Path) -> str:
    """``"13.0"``; empty where nvcc does not say."""
    try:
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    version = re.search(r"release (\d+\.\d+)", text)
    return version[1] if version else ""


def find_tool(name: str) -> str:
    """cmake or ninja: that of the wheel this Python imports first, since a system's may be too old."""
    try:
        wheel = importlib.import_module(name)
        folder = getattr(wheel, "CMAKE_BIN_DIR" if name == "cmake" else "BIN_DIR", None)
    except ImportError:
        folder = None
    folders = [*([folder] if folder else []), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    tool = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if not tool:
        raise BuildError(missing_tool(name))
    return tool


def missing_tool(name: str) -> str:
    return f"{name} was not found. Let pip build in isolation, or install it:\n  pip install {shlex.join(BUILD_TOOLS)}"


PTXAS_REPORT = re.compile(r"^\s*ptxas info|bytes stack frame|bytes spill|Used \d+ registers|Function properties for")
# Those of gcc ("x.cpp:1:2: error: "), nvcc ("x.cu(3): error: "), its parts ("ptxas fatal   : ") and linkers.
COMPILER_ERROR = re.compile(r"(\berror\b|\bfatal\b)[^:]{0,12}: |undefined reference|cannot find -l")


def first_error(output: str, count: int = 12) -> str:
    """The compiler's first error and what follows it; CMake's where no compiler reported one."""
    lines = [line for line in output.splitlines() if line.strip() and not PTXAS_REPORT.search(line)]
    for pattern in (COMPILER_ERROR, re.compile("CMake Error"), re.compile("^FAILED:")):
        start = next((i for i, line in enumerate(lines) if pattern.search(line)), None)
        if start is not None:
            margin = len(lines[start]) - len(lines[start].lstrip())
            report = lines[start : start + count]
            outdented = (i for i, line in enumerate(report) if margin and line[:margin].strip())
            return textwrap.dedent("\n".join(report[: next(outdented, count)]))
    return "\n".join(lines[-count:])


def advice(output: str) -> str:
    """The remedy where the error alone does not say it."""
    if "signal 9" in output:
        return " A process was killed, as happens where memory runs out: set MAX_JOBS=1."
    if "Could NOT find Python" in output:
        return " The headers of this Python are missing (Debian, Ubuntu: apt install python3-dev)."
    return ""


def commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` after it where files differ; None where it is not known."""
    if not (ROOT / ".git").exists():  # an sdist holds the record of the tree that it was made from
        record = ROOT / "mcld_kernels" / BUILD_RECORD
        return json.loads(record.read_text())["commit"] if record.exists() else None
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changes.strip() else "")


def write_record(package: Path, without_cpu: str | None, origin: str | None) -> None:
    record = {"commit": origin, "without_cpu_kernels": without_cpu}
    (package / BUILD_RECORD).write_text(json.dumps(record) + "\n")


def report_without_cpu(reason: str) -> None:
    print(f"mcld_kernels: installing without the compiled CPU kernels: {reason}")


def remove_stale_modules(distribution) -> None:
    """Of an editable install: the modules in the tree are those that its last install made."""
    for name in {"_C", "_cpu"} - {extension.name.rpartition(".")[2] for extension in distribution.ext_modules or ()}:
        for stale in ROOT.glob(f"mcld_kernels/{name}.*so"):
            print(f"mcld_kernels: removing {stale} of an earlier install")
            stale.unlink()


class FreshBuild(build_py):
    """Setuptools keeps what earlier builds left in its folder, and would put a module since removed into a wheel."""

    def run(self) -> None:
        package = Path(self.build_lib) / "mcld_kernels"
        if self.editable_mode:
            remove_stale_modules(self.distribution)
            package = ROOT / "mcld_kernels"
        else:
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        reason = without_cpu_kernels()
        if reason:
            report_without_cpu(reason)
        write_record(package, reason, commit())


class RecordedSource(sdist):
    def make_release_tree(self, base_dir, files) -> None:
        origin = commit()  # the release's own folder, in this tree until it is packed, is no change of it
        super().make_release_tree(base_dir, files)
        write_record(Path(base_dir) / "mcld_kernels", "this is a source distribution, not an install", origin)


class TaggedWheel(bdist_wheel):
    """A wheel with the module says so in its name, as in ``mcld_kernels-0.1.0-1cu130-cp311-cp311-linux_x86_64.whl``.

    A local version, ``0.1.0+cu130``, would make pip refuse the source distribution of version 0.1.0 as inconsistent.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        try:
            nvcc = find_nvcc() if self.has_cuda() else None
        except BuildError:  # the build itself reports it
            nvcc = None
        version = nvcc_version(nvcc) if nvcc else ""
        if version and not self.build_number:
            self.build_number = "1cu" + version.replace(".", "")

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":  # which leaves the CPU kernels out where they do not compile
            self.root_is_pure = not self.distribution.has_ext_modules()

    def has_cuda(self) -> bool:
        return any(extension.name != "mcld_kernels._cpu" for extension in self.distribution.ext_modules or ())


class CMakeBuild(build_ext):
    """Drives CMake once for the extensions."""

    def run(self) -> None:
        device = "CUDA" if cuda_requested() else "CPU"
        try:
            self.build_modules(device == "CUDA")
        except BuildError as error:
            if not cpu_demanded():
                self.leave_out(str(error))
                return
            # Setuptools takes every Exception of an editable build for a reason to go on without the extension.
            raise SystemExit(
                f"\nmcld_kernels: the {device} kernels were asked for (MCLD_BUILD_{device}=1), but {error}\n"
                f"Without MCLD_BUILD_{device} the package installs without them.\n"
            ) from None
        if self.inplace:
            self.copy_extensions_to_source()

    def leave_out(self, reason: str) -> None:
        """Go on without the CPU kernels: what follows sees a build of Python files."""
        self.extensions = self.distribution.ext_modules = []
        reason = " ".join(reason.split())
        report_without_cpu(reason)
        if self.inplace:
            remove_stale_modules(self.distribution)
        write_record((ROOT if self.inplace else Path(self.build_lib)) / "mcld_kernels", reason, commit())

    def build_modules(self, cuda: bool) -> None:
        if not find_cxx():
            raise BuildError(NO_CXX)
        if cuda:
            nvcc = find_nvcc()
            if nvcc is None:
                raise BuildError(NO_NVCC)
            archs, source = requested_archs()
            archs = check_archs(archs, source, nvcc_archs(nvcc), str(nvcc))
        try:
            import pybind11
        except ImportError:
            raise BuildError(missing_tool("pybind11")) from None

        inplace, self.inplace = self.inplace, False
        module = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        self.inplace = inplace
        # A folder that outlives pip's temporary ones, so that a second install compiles only what changed.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{'cuda' if cuda else 'cpu'}"
        folder.mkdir(parents=True, exist_ok=True)
        # pip's isolated tools move at every install; a remembered path to them would be wrong.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        # CMake shows what a compiler says in its tests of it only here.
        tests = folder / "CMakeFiles" / "CMakeConfigureLog.yaml"
        tests.unlink(missing_ok=True)
        environ = dict(os.environ, NINJA_STATUS="[%f of %t, %e s] ")
        configure = [
            *(find_tool("cmake"), "-S", str(ROOT if cuda else ROOT / "csrc" / "cpu"), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMCLD_OUTPUT_DIR={module.parent}",
        ]
        jobs = environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        if cuda:
            # The wheels have lib where a toolkit has lib64, which nvcc does not search.
            library_path = [str(nvcc.resolve().parents[1] / "lib"), environ.get("LIBRARY_PATH", "")]
            environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, library_path))
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(archs)}"]
            listed = f"{';'.join(archs)} ({source or 'the default list'}) with {nvcc}"
            print(f"mcld_kernels: compiling for {listed}, {jobs} jobs")
            for variable in ("CUDA_HOME", "CUDA_PATH"):
                if environ.get(variable) and Path(environ[variable], "bin", "nvcc") != nvcc:
                    print(f"mcld_kernels: {variable}={environ[variable]} is not used")
        configure += shlex.split(environ.get("CMAKE_ARGS", ""))
        for command in (configure, [configure[0], "--build", str(folder), "--parallel", jobs]):
            status, output = run_logged(command, environ, folder / "build.log")
            if status:
                if command is configure and tests.exists():
                    output += tests.read_text(errors="replace")
                killed = (
                    " A process was killed, as where memory ran out: try MAX_JOBS=1." if "signal 9" in output else ""
                )
                raise BuildError(f"their build failed.{killed} The first error:\n\n{first_error(output)}\n")


def run_logged(command: list[str], environ: dict[str, str], log: Path) -> tuple[int, str]:
    """Run a tool and return its exit status and output.

    All of the output also goes to ``log``, for .ci/check_cuda.py, and to the terminal as it comes, but for the
    registers of every kernel.
    """
    output = []
    with (
        log.open("a") as file,
        subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        for line in process.stdout:
            output.append(line)
            file.write(line)
            if not PTXAS_REPORT.search(line):
                print(line, end="", flush=True)
    return process.returncode, "".join(output)


def build_requirements() -> list[str]:
    """The build's further requirements, for a frontend such as pip: the tools and, for CUDA, nvcc if none is here."""
    if without_cpu_kernels() or not find_cxx():
        return []
    return BUILD_TOOLS + (NVCC_WHEELS if cuda_requested() and find_nvcc() is None else [])


if __name__ == "__main__":
    try:
        requested = {"mcld_kernels._C": cuda_requested(), "mcld_kernels._cpu": without_cpu_kernels() is None}
        modules = [Extension(name, sources=[]) for name, is_requested in requested.items() if is_requested]
        # Run by hand, setuptools would fetch the requirements as eggs that lie apart, which nvcc's parts cannot.
        requirements = [] if Path(sys.argv[0]).name == "setup.py" else build_requirements()
    except BuildError as error:
        raise SystemExit(f"\nmcld_kernels: {error}\n") from None
    setup(
        ext_modules=modules,
        cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild, "bdist_wheel": TaggedWheel, "sdist": RecordedSource},
        setup_requires=requirements,
    )
