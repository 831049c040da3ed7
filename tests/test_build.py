"""The build: what it finds, what it says when something is missing, and what it puts into a module and a wheel.

Real builds run only where they are quick (the module without CUDA, a wheel without a module); an nvcc is played by a
shell script, since only its answers matter here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import mcld_kernels
from mcld_kernels import compiled

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def build():
    """The names of setup.py, without running it."""

    class Namespace:
        def __init__(self, names):
            self.__dict__.update(names)

    return Namespace(runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads, so that it leaves nothing in the source tree."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("read by pyproject.toml\n")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "mcld_kernels", tmp_path / "mcld_kernels", ignore=ignore)
    return tmp_path


def run(tree: Path, *command: str, **environ: str) -> subprocess.CompletedProcess:
    """Run Python in ``tree`` with only the given build variables set."""
    prefixes = ("MCLD_", "CUDA", "TORCH_CUDA", "CMAKE_", "CXX")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=clean | environ, capture_output=True, text=True, timeout=300
    )


def build_ext(tree: Path, **environ: str) -> subprocess.CompletedProcess:
    return run(tree, "setup.py", "build_ext", "--build-lib", "lib", **environ)


def fake_nvcc(folder: Path, *archs: int) -> Path:
    """An nvcc that knows these architectures and compiles nothing."""
    folder.mkdir(exist_ok=True)
    nvcc = folder / "nvcc"
    listing = "\\n".join(f"compute_{arch}" for arch in archs)
    nvcc.write_text(f"#!/bin/sh\n[ \"$1\" = --list-gpu-arch ] && printf '{listing}\\n' && exit 0\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc


def needs_build_tools():
    missing = [name for name in ("pybind11", "cmake", "ninja") if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} in this environment")


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80-real;90a-real;100a-real;120", ["80-real", "90a-real", "100a-real", "120"]),
        ("8.0;9.0a+PTX", ["80-real", "90a"]),
        ("8.0 8.6, 12.0", ["80-real", "86-real", "120-real"]),
        ("10.3f", ["103f-real"]),
    ],
)
def test_architectures_are_read_as_cmake_and_as_torch_write_them(build, text, archs):
    assert build.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["Hopper", "native", "9.0b", "sm_90", " ; "])
def test_other_architectures_are_refused_with_examples(build, text):
    with pytest.raises(build.BuildError, match="80-real"):
        build.parse_archs(text)


def test_own_variable_wins_over_torchs_and_cmakes(build):
    environ = {"MCLD_CUDA_ARCHS": "90a", "TORCH_CUDA_ARCH_LIST": "8.6", "CUDAARCHS": "80"}
    found = []
    for variable in list(environ):
        found.append(build.requested_archs(environ))
        del environ[variable]
    assert found == [
        (["90a"], "MCLD_CUDA_ARCHS"),
        (["86-real"], "TORCH_CUDA_ARCH_LIST"),
        (["80"], "CUDAARCHS"),
    ]
    assert build.requested_archs({}) == (build.DEFAULT_ARCHS.split(";"), None)


def test_torchs_list_may_name_gpus_too_old_for_the_kernels(build):
    assert build.requested_archs({"TORCH_CUDA_ARCH_LIST": "7.5;8.0"})[0] == ["80-real"]
    with pytest.raises(build.BuildError, match=r"75-real.*sm_80"):
        build.check_archs(["75-real"], "MCLD_CUDA_ARCHS", {75, 80}, "nvcc")


def test_an_older_nvcc_compiles_the_defaults_it_knows_and_refuses_what_was_asked_for(build):
    defaults = build.parse_archs(build.DEFAULT_ARCHS)
    assert build.check_archs(defaults, None, {80, 90}, "nvcc") == ["80-real", "90a-real"]
    with pytest.raises(build.BuildError, match=r"MCLD_CUDA_ARCHS asks for 100a-real.*knows 80, 90.*newer CUDA toolkit"):
        build.check_archs(["80-real", "100a-real"], "MCLD_CUDA_ARCHS", {80, 90}, "nvcc")


def test_mode(build):
    modes = {"": "auto", "0": "off", "1": "on", "OFF": "off", "auto": "auto"}
    assert {value: build.cuda_mode({"MCLD_BUILD_CUDA": value}) for value in modes} == modes
    assert build.cuda_mode({}) == "auto"
    assert build.cuda_mode({"MCLD_CUDA_ARCHS": "90a"}) == "on"
    with pytest.raises(build.BuildError, match="'yes please'.*takes 1"):
        build.cuda_mode({"MCLD_BUILD_CUDA": "yes please"})


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_a_variable_that_names_no_nvcc_is_an_error(build, variable, tmp_path):
    with pytest.raises(build.BuildError, match=f"{variable}={tmp_path}.*unset it"):
        build.find_nvcc({variable: str(tmp_path), "PATH": os.environ["PATH"]})


def test_nvcc_is_found_where_it_is_named_then_on_the_path(build, tmp_path):
    home, path = fake_nvcc(tmp_path / "bin", 80), fake_nvcc(tmp_path / "path", 80)
    assert build.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": str(path.parent)}) == home
    assert build.find_nvcc({"PATH": str(path.parent)}) == path
    assert build.nvcc_archs(path) == {80}


def test_pypi_provides_nvcc_only_when_cuda_is_asked_for(build, monkeypatch):
    monkeypatch.setitem(build.cuda_wheels.__globals__, "find_nvcc", lambda: None)
    monkeypatch.setenv("MCLD_BUILD_CUDA", "auto")
    monkeypatch.delenv("MCLD_CUDA_ARCHS", raising=False)
    assert build.cuda_wheels() == []
    monkeypatch.setenv("MCLD_BUILD_CUDA", "1")
    assert any(name.startswith("nvidia-cuda-nvcc") for name in build.cuda_wheels())


def test_without_a_compiler_the_package_installs_and_says_why(tree):
    done = build_ext(tree, PATH="")
    assert done.returncode == 0, done.stderr
    assert "without the compiled module: no C++ compiler" in done.stderr
    assert "apt install g++" in (tree / "lib/mcld_kernels/_C_missing.txt").read_text()


def test_without_a_compiler_asking_for_cuda_is_an_error(tree):
    done = build_ext(tree, PATH="", MCLD_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "CUDA was asked for, but no C++ compiler" in done.stderr


@needs_build_tools()
def test_a_compiler_that_fails_is_reported_in_its_own_words(tree):
    done = build_ext(tree, CXX="false", MCLD_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    note = (tree / "lib/mcld_kernels/_C_missing.txt").read_text()
    assert "install again" in note and "not able to compile a simple test program" in note


def test_asking_for_an_architecture_that_nvcc_does_not_know_is_an_error(tree):
    nvcc = fake_nvcc(tree / "bin", 80, 90)
    done = build_ext(tree, CUDACXX=str(nvcc), MCLD_CUDA_ARCHS="100a-real")
    assert done.returncode != 0
    assert "100a-real, which" in done.stderr and "newer CUDA toolkit" in done.stderr


@needs_build_tools()
def test_the_module_without_cuda_builds_and_says_why(tree):
    """Here because torch's list names what nvcc does not know; any other reason takes the same way."""
    nvcc = fake_nvcc(tree / "bin", 80)
    done = build_ext(tree, CUDACXX=str(nvcc), TORCH_CUDA_ARCH_LIST="9.0a")
    assert done.returncode == 0, done.stdout + done.stderr
    check = "import sys; sys.path.insert(0, 'lib/mcld_kernels'); import _C; print(_C.info())"
    info = eval(run(tree, "-c", check).stdout)
    assert info["version"] == mcld_kernels.__version__
    assert info["cuda"] is None and "90a-real, which" in info["reason"]
    assert info["architectures"] == [] and not info["portable"] and not info["hopper"]


def test_a_wheel_holds_the_package_and_nothing_else(tree):
    (tree / "tests").mkdir()
    (tree / "tests/test_nothing.py").write_text("")
    removed = tree / "mcld_kernels/removed.py"
    removed.write_text("")
    build_wheel = ("-c", "import setuptools.build_meta as b; b.build_wheel('dist')")
    assert run(tree, *build_wheel, PATH="").returncode == 0
    removed.unlink()
    done = run(tree, *build_wheel, PATH="")
    assert done.returncode == 0, done.stderr
    wheel = next((tree / "dist").glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mcld_kernels"}
    assert {f"mcld_kernels/{path.name}" for path in (ROOT / "mcld_kernels").glob("*.py")} <= set(names)
    assert "mcld_kernels/_C_missing.txt" in names
    assert "mcld_kernels/removed.py" not in names, "left over from the first build"


@pytest.fixture
def module():
    found, reason = compiled.load()
    if found is None:
        pytest.skip(reason)
    return found


def test_module_describes_itself(module):
    info = module.info()
    assert info["version"] == mcld_kernels.__version__
    assert (info["cuda"] is None) == bool(info["reason"]) == (info["architectures"] == [])
    assert info["portable"] == hasattr(module, "CudaError") == hasattr(module, "similarity")
    assert info["hopper"] == hasattr(module, "hopper_similarity")


def test_module_needs_neither_torch_nor_the_driver(module):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    text = subprocess.run([readelf, "-d", module.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", text)
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if re.match(r"lib(torch|c10|cuda|cudart|nv|python)", name)]


def test_module_does_not_offer_its_cuda_runtime_to_others(module):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    text = subprocess.run(
        [nm, "-D", "--defined-only", module.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r" T (\S+)", text) == ["PyInit__C"]


def test_a_launch_without_a_device_is_an_error_that_names_the_call(module):
    if not hasattr(module, "CudaError"):
        pytest.skip(module.info()["reason"])
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    arguments = dict.fromkeys(("parts", "maxima", "row_maxima", "out", "rows", "padded_rows", "pitch"), 0)
    with pytest.raises(module.CudaError, match=r"cudaGetDevice\(.*\) failed: cudaError\w+ \(.*\) at .*checks.cu:\d+"):
        module.combine(**arguments, splits=1, device=0, stream=0)
    with pytest.raises(TypeError, match="missing argument device"):
        module.combine(**arguments, splits=1, stream=0)


def test_reason_for_a_missing_module(tmp_path, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(compiled.importlib, "import_module", fail)
    monkeypatch.setattr(compiled, "_NOTE", tmp_path / "note.txt")
    assert "pip install" in compiled.load.__wrapped__()[1]
    (tmp_path / "note.txt").write_text("no C++ compiler was found\n")
    assert compiled.load.__wrapped__()[1] == "no C++ compiler was found"


def test_suffix_is_the_one_this_python_imports(module):
    assert module.__file__.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
