"""The build: what it finds, what it says when something is missing, and what it puts into a module and a wheel.

Real builds run only where they are quick (a wheel without a module, or with one of a few lines in place of the CPU
kernels); an nvcc is played by a shell script, since only its answers matter here.
"""

from __future__ import annotations

import importlib.util
import json
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

import mcld_kernels

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
    """Run Python in ``tree`` with only the given build variables set; they alone ask for the CPU kernels."""
    prefixes = ("MCLD_", "CUDA", "TORCH_CUDA", "CMAKE_", "CXX")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    if not environ.keys() & {"MCLD_BUILD_CPU", "MCLD_BUILD_CUDA", "MCLD_CUDA_ARCHS"}:
        environ["MCLD_BUILD_CPU"] = "0"
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=clean | environ, capture_output=True, text=True, timeout=300
    )


def build_ext(tree: Path, **environ: str) -> subprocess.CompletedProcess:
    return run(tree, "setup.py", "build_ext", "--build-lib", "lib", **environ)


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(folder: Path, *archs: int, fails_with: str = "") -> Path:
    """An nvcc of CUDA 13.0 that knows these architectures and compiles nothing."""
    listing = "\\n".join(f"compute_{arch}" for arch in archs)
    return script(
        folder / "nvcc",
        f"""[ "$1" = --list-gpu-arch ] && printf '{listing}\\n' && exit 0
[ "$1" = --version ] && echo 'Cuda compilation tools, release 13.0, V13.0.88' && exit 0
cat <<'END'
{fails_with}
END
exit 1""",
    )


def needs_build_tools():
    missing = [name for name in ("pybind11", "cmake", "ninja") if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80-real;90a-real;100;110-real;120", ["80-real", "90a-real", "100", "110-real", "120"]),
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


def test_cuda_is_compiled_only_when_it_is_requested(build):
    choices = {"": False, "0": False, "1": True, "OFF": False, "on": True}
    assert {value: build.cuda_requested({"MCLD_BUILD_CUDA": value}) for value in choices} == choices
    assert not build.cuda_requested({"CUDA_HOME": "/usr/local/cuda", "CUDAARCHS": "90"})
    assert build.cuda_requested({"MCLD_CUDA_ARCHS": "90a"})
    assert not build.cuda_requested({"MCLD_CUDA_ARCHS": "90a", "MCLD_BUILD_CUDA": "0"})
    for value in ("auto", "yes please"):
        for variable in ("MCLD_BUILD_CUDA", "MCLD_BUILD_CPU"):
            with pytest.raises(build.BuildError, match=f"{variable} is '{value}'; it takes 1 .*or 0"):
                build.cpu_demanded({variable: value})


def test_the_cpu_kernels_are_tried_unless_they_are_left_out_or_no_compiler_is_there(build):
    compiler = {"PATH": os.path.dirname(sys.executable), "CXX": sys.executable}  # only its being there counts
    assert build.without_cpu_kernels(compiler) is None and not build.cpu_demanded(compiler)
    assert "no C++ compiler" in build.without_cpu_kernels({"PATH": ""})
    assert "MCLD_BUILD_CPU=0" in build.without_cpu_kernels(compiler | {"MCLD_BUILD_CPU": "0"})
    for variable in ("MCLD_BUILD_CPU", "MCLD_BUILD_CUDA"):
        environ = {"PATH": "", variable: "1"}
        assert build.without_cpu_kernels(environ) is None and build.cpu_demanded(environ)
    # The CUDA kernels bring the CPU's, whatever is said of them.
    assert build.without_cpu_kernels({"PATH": "", "MCLD_BUILD_CUDA": "1", "MCLD_BUILD_CPU": "0"}) is None


def test_a_gpu_of_this_machine_is_compiled_for_alone(build, tmp_path):
    def machine(*capabilities: str) -> dict[str, str]:
        answer = "\\n".join(capabilities)
        script(tmp_path / "nvidia-smi", f"[ $1 = --query-gpu=compute_cap ] && printf '{answer}\\n'")
        return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    source = "the GPU of this machine"
    assert build.requested_archs(machine("9.0")) == (["90a-real"], source)
    assert build.requested_archs(machine("8.9", "8.9")) == (["89-real"], source)
    assert build.requested_archs(machine("7.5", "10.0", "12.0")) == (["100-real", "120-real"], source)
    assert build.requested_archs(machine("9.0") | {"CUDAARCHS": "80"}) == (["80"], "CUDAARCHS")
    with pytest.raises(build.BuildError, match=r"GPU of this machine is sm_75.*MCLD_CUDA_ARCHS=9.0a"):
        build.requested_archs(machine("7.5"))
    with pytest.raises(build.BuildError, match=r"asks for 110-real.*MCLD_CUDA_ARCHS=100: its PTX runs"):
        build.check_archs(*build.requested_archs(machine("11.0")), {80, 90, 100}, "nvcc")


@pytest.mark.parametrize("answer", ["exit 9", "echo No devices were found; exit 6", "echo '[N/A]'"])
def test_a_gpu_that_does_not_answer_leaves_the_default_list(build, tmp_path, answer):
    script(tmp_path / "nvidia-smi", answer)
    environ = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert build.requested_archs(environ) == (build.DEFAULT_ARCHS.split(";"), None)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_stale_variable_is_an_error_only_where_the_path_has_no_nvcc(build, variable, tmp_path):
    nvcc = fake_nvcc(tmp_path / "path", 80)
    assert build.find_nvcc({variable: "/usr/local/gone", "PATH": str(nvcc.parent)}) == nvcc
    with pytest.raises(build.BuildError, match=f"{variable}=/usr/local/gone.*`unset {variable}`"):
        build.find_nvcc({variable: "/usr/local/gone", "PATH": ""})


def test_a_compiler_named_by_hand_must_exist(build):
    with pytest.raises(build.BuildError, match="CUDACXX=/usr/local/gone.*`unset CUDACXX`"):
        build.find_nvcc({"CUDACXX": "/usr/local/gone", "PATH": os.environ["PATH"]})


def test_nvcc_is_found_where_it_is_named_then_on_the_path(build, tmp_path):
    home, path = fake_nvcc(tmp_path / "bin", 80), fake_nvcc(tmp_path / "path", 80)
    assert build.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": str(path.parent)}) == home
    assert build.find_nvcc({"PATH": str(path.parent)}) == path
    assert build.nvcc_archs(path) == {80}


def test_pip_is_asked_for_tools_where_something_compiles_and_for_nvcc_only_when_cuda_is_requested(build, monkeypatch):
    monkeypatch.setitem(build.build_requirements.__globals__, "find_nvcc", lambda: None)
    for variable in ("MCLD_CUDA_ARCHS", "MCLD_BUILD_CUDA", "MCLD_BUILD_CPU"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    assert build.build_requirements() == build.BUILD_TOOLS
    monkeypatch.setenv("CXX", "gone")
    assert build.build_requirements() == []
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("MCLD_BUILD_CPU", "0")
    assert build.build_requirements() == []
    monkeypatch.setenv("MCLD_BUILD_CUDA", "1")
    names = {re.split("[=>]", requirement)[0] for requirement in build.build_requirements()}
    assert names >= {"cmake", "ninja", "pybind11", "nvidia-cuda-nvcc"}
    monkeypatch.setitem(build.build_requirements.__globals__, "find_nvcc", lambda: Path("nvcc"))
    assert build.build_requirements() == build.BUILD_TOOLS


TRANSCRIPT = """\
[1 of 3, 2.0 s] Building CUDA object CMakeFiles/mcld_portable.dir/csrc/portable/flash.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5errorv' for 'sm_90a'
ptxas info    : Function properties for _Z5errorv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
[2 of 3, 3.0 s] Building CUDA object CMakeFiles/mcld_portable.dir/csrc/portable/labels.cu.o
FAILED: [code=1] CMakeFiles/mcld_portable.dir/csrc/portable/labels.cu.o
/usr/bin/nvcc -Wno-error=x -DMESSAGE="error" -c csrc/portable/labels.cu -o labels.cu.o
csrc/portable/labels.cu(7): warning #177-D: variable "x" was declared but never referenced
csrc/portable/labels.cu(9): error: identifier "rank" is undefined
    rank = 1;
    ^

1 error detected in the compilation of "csrc/portable/labels.cu".
ninja: build stopped: subcommand failed.
"""


def test_the_first_error_of_a_build_is_the_compilers(build):
    report = build.first_error(TRANSCRIPT)
    assert report.startswith('csrc/portable/labels.cu(9): error: identifier "rank" is undefined\n    rank = 1;')
    assert "ptxas" not in report and "bytes stack frame" not in report


@pytest.mark.parametrize(
    "line",
    [
        "nvcc fatal   : Unsupported gpu architecture 'compute_999'",
        "ptxas fatal   : Value 'sm_999' is not defined for option 'gpu-name'",
        "nvcc error   : 'cicc' died due to signal 9 (Kill signal)",
        "a.cu(3): error #20: identifier is undefined",
        "a.cpp:3:10: fatal error: Python.h: No such file or directory",
        "/usr/bin/ld: cannot find -lcudart_static",
        "CMake Error at CMakeLists.txt:29 (message):",
    ],
)
def test_errors_are_known_as_each_tool_writes_them(build, line):
    assert build.first_error(f"[1 of 2, 1 s] Building\nFAILED: x\nnvcc -c x\n{line}\nninja: stopped\n").startswith(line)


def test_asking_for_cuda_without_a_compiler_is_an_error(tree):
    done = build_ext(tree, PATH="", MCLD_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "CUDA kernels were asked for (MCLD_BUILD_CUDA=1), but no C++ compiler" in done.stderr
    assert "apt install g++" in done.stderr


def test_asking_for_an_architecture_that_nvcc_does_not_know_is_an_error(tree):
    nvcc = fake_nvcc(tree / "bin", 80, 90)
    done = build_ext(tree, CUDACXX=str(nvcc), MCLD_CUDA_ARCHS="100a-real")
    assert done.returncode != 0
    assert "100a-real, which" in done.stderr and "newer CUDA toolkit, or set MCLD_CUDA_ARCHS=90" in done.stderr


@needs_build_tools()
def test_a_failing_cuda_compile_is_an_error_in_the_compilers_words(tree):
    message = 'kernel.cu(3): error: expected a ")reason"'
    nvcc = fake_nvcc(tree / "bin", 80, fails_with=f"ptxas info    : Used 40 registers\n{message}\nand more\nof it")
    done = build_ext(tree, CUDACXX=str(nvcc), CUDA_HOME="/usr/local/gone", MCLD_BUILD_CUDA="1", MCLD_CUDA_ARCHS="8.0")
    assert done.returncode != 0
    assert "CUDA_HOME=/usr/local/gone is not used" in done.stdout
    report = done.stderr.partition("The first error:")[2]
    assert report.strip().startswith(message) and "of it" in report, done.stdout + done.stderr
    assert "registers" not in report
    assert "Without MCLD_BUILD_CUDA the package installs without them." in report


@needs_build_tools()
def test_a_host_compiler_that_fails_is_reported(tree):
    nvcc = fake_nvcc(tree / "bin", 80)
    done = build_ext(tree, CUDACXX=str(nvcc), CXX="false", MCLD_CUDA_ARCHS="8.0")
    assert done.returncode != 0
    assert "CMake Error" in done.stderr.partition("The first error:")[2]


WHEEL = ("-c", "import setuptools.build_meta as b; print(b.build_wheel('dist'))")


def wheel_of(done: subprocess.CompletedProcess, tree: Path) -> tuple[str, list[str], dict]:
    """Name, content and record of the wheel that a build left."""
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return path.name, wheel.namelist(), json.loads(wheel.read("mcld_kernels/_build.json"))


DEFAULT = {"MCLD_BUILD_CPU": ""}
PURE = f"mcld_kernels-{mcld_kernels.__version__}-py3-none-any.whl"
# A module in place of the CPU kernels that compiles at once.
TINY = """#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", 0, 0, 0, 0, 0, 0, 0};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cpu() { return PyModule_Create(&module); }
"""


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"PATH": "", **DEFAULT}, "no C++ compiler was found"),
        ({"CXX": "gone", "CUDA_HOME": "/usr/local/gone", **DEFAULT}, "no C++ compiler was found"),
        ({"MCLD_BUILD_CPU": "0"}, "MCLD_BUILD_CPU=0 left them out"),
    ],
    ids=["nothing", "names of nothing", "left out"],
)
def test_an_install_without_a_compiler_is_pure_python_and_says_why(tree, environ, reason):
    done = run(tree, *WHEEL, **environ)
    name, content, record = wheel_of(done, tree)
    assert name == PURE and not [name for name in content if name.endswith(".so")]
    assert record["without_cpu_kernels"].startswith(reason)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("mcld_kernels: "))
    assert line.startswith(f"mcld_kernels: installing without the compiled CPU kernels: {reason}")


@needs_build_tools()
def test_a_compiler_that_fails_leaves_a_default_install_pure_and_its_first_error_as_the_reason(tree):
    for source in (tree / "csrc/cpu").glob("*.cpp"):
        source.write_text("")
    (tree / "csrc/cpu/bindings.cpp").write_text(TINY.replace("0};", "0}"))
    done = run(tree, *WHEEL, **DEFAULT)
    name, content, record = wheel_of(done, tree)
    assert name == PURE and not [name for name in content if name.endswith(".so")]
    assert re.search(r"The first error: \S*bindings.cpp:3:\d+: error: expected", record["without_cpu_kernels"])
    assert record["without_cpu_kernels"] in done.stdout
    demanded = run(tree, *WHEEL, MCLD_BUILD_CPU="1")
    assert demanded.returncode != 0 and "CPU kernels were asked for (MCLD_BUILD_CPU=1)" in demanded.stderr
    assert "bindings.cpp:3" in demanded.stderr


@needs_build_tools()
def test_a_default_install_compiles_the_cpu_kernels_where_a_compiler_works(tree):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for source in (tree / "csrc/cpu").glob("*.cpp"):
        source.write_text("")
    (tree / "csrc/cpu/bindings.cpp").write_text(TINY)
    name, content, record = wheel_of(run(tree, *WHEEL, **DEFAULT), tree)
    assert name.startswith(f"mcld_kernels-{mcld_kernels.__version__}-cp") and "any" not in name
    assert f"mcld_kernels/_cpu{suffix}" in content and record["without_cpu_kernels"] is None
    # The tree of an editable install holds what its last install made, and no more.
    modules = [tree / f"mcld_kernels/{module}{suffix}" for module in ("_C", "_cpu")]
    modules[0].touch()
    (tree / "mcld_kernels/_C.pyi").touch()
    editable = "-c", "import setuptools.build_meta as b; b.build_editable('dist')"
    for environ, expected in ((DEFAULT, [False, True]), ({"MCLD_BUILD_CPU": "0"}, [False, False])):
        done = run(tree, *editable, **environ)
        assert done.returncode == 0, done.stderr
        assert [module.exists() for module in modules] == expected
    assert (tree / "mcld_kernels/_C.pyi").exists()


def test_the_cpu_kernels_are_compiled_for_no_machine_in_particular():
    """-march=native would make a wheel that other machines cannot run; instruction sets are chosen when it runs."""
    flags = (ROOT / "csrc/cpu/CMakeLists.txt").read_text()
    assert "native" not in flags and "-mtune" not in flags
    assert [line.split()[0] for line in flags.splitlines() if line.startswith("  mcld_cpu_library(")] == [
        "mcld_cpu_library(avx2",
        "mcld_cpu_library(avx512",
    ], "only inside the branch of x86-64"


def test_the_name_of_a_wheel_tells_its_cuda(tree):
    nvcc = fake_nvcc(tree / "bin", 80)
    script = "import setup as s; print(s.nvcc_version(s.Path('bin/nvcc')))"
    assert run(tree, "-c", script).stdout.strip() == "13.0"
    code = (
        "import setuptools.dist, setup; d = setuptools.dist.Distribution({'ext_modules': [setup.Extension('x', [])]});"
        "c = setup.TaggedWheel(d); c.finalize_options(); print(c.build_number)"
    )
    assert run(tree, "-c", code, CUDACXX=str(nvcc)).stdout.splitlines()[-1] == "1cu130"


def test_a_source_distribution_and_its_wheel_carry_the_commit(tree):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tree)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "setup.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    done = run(tree, "-c", "import setuptools.build_meta as b; print(b.build_sdist('dist'))")
    assert done.returncode == 0, done.stderr
    sdist = next((tree / "dist").glob("*.tar.gz"))
    shutil.unpack_archive(sdist, tree / "unpacked", filter="data")
    source = tree / "unpacked" / sdist.name.removesuffix(".tar.gz")
    assert (source / "csrc").is_dir() and (source / "CMakeLists.txt").exists()
    done = run(source, *WHEEL)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as wheel:
        assert json.loads(wheel.read("mcld_kernels/_build.json"))["commit"] == f"{head}-dirty"
    # The folder that is packed is in the tree while it is: no change of a tree that has none.
    (tree / ".gitignore").write_text("*.egg-info/\ndist/\nunpacked/\n__pycache__/\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "y"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert run(tree, "-c", "import setuptools.build_meta as b; print(b.build_sdist('dist'))").returncode == 0
    shutil.unpack_archive(sdist, tree / "unpacked", filter="data")
    assert json.loads((source / "mcld_kernels" / "_build.json").read_text())["commit"] == head


def test_the_command_that_adds_cuda_is_not_answered_from_pips_cache(tree):
    """pip keeps a wheel by its source, and would give the one without CUDA to a requirement of the same source."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip in this environment")
    assert run(tree, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')").returncode == 0
    sdist = next((tree / "dist").glob("*.tar.gz"))
    places = ("--no-build-isolation", "--no-index", "--cache-dir", str(tree / "cache"), "--target", str(tree / "site"))

    def install(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
        return run(tree, "-m", "pip", "install", *places, "--no-deps", *arguments, **environ)

    requirement = f"mcld-kernels @ {sdist.as_uri()}"
    assert install(requirement).returncode == 0
    cached = install("--upgrade", requirement, MCLD_BUILD_CUDA="1", CXX="/usr/bin/gone")
    assert cached.returncode == 0 and "site" in os.listdir(tree), "pip began to tell the two apart"
    code = "import sys; sys.path.insert(0, 'site'); from mcld_kernels import installation as i; print(i.cuda_command())"
    command = run(tree / "dist", "-c", code.replace("'site'", "'../site'")).stdout.strip()
    assert command == (f"MCLD_BUILD_CUDA=1 pip install -v --no-cache-dir --force-reinstall --no-deps {sdist}")
    flags = command.removeprefix("MCLD_BUILD_CUDA=1 pip install ").removesuffix(str(sdist)).split()
    for source in (str(sdist), requirement):
        done = install("--upgrade", *flags, source, MCLD_BUILD_CUDA="1", CXX="/usr/bin/gone")
        assert done.returncode != 0
        assert "no C++ compiler was found" in done.stdout + done.stderr


def test_a_wheel_holds_the_package_and_nothing_else(tree):
    (tree / "tests").mkdir()
    (tree / "tests/test_nothing.py").write_text("")
    (tree / "mcld_kernels/_C.pyi").write_text("")
    removed = tree / "mcld_kernels/removed.py"
    removed.write_text("")
    assert run(tree, *WHEEL).returncode == 0
    removed.unlink()
    done = run(tree, *WHEEL)
    assert done.returncode == 0, done.stderr
    wheel = next((tree / "dist").glob("*.whl"))
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(tree)) for path in (tree / "mcld_kernels").rglob("*.py*")}
    assert names == sources | {"mcld_kernels/py.typed", "mcld_kernels/_build.json"}
    assert "mcld_kernels/removed.py" not in names, "left over from the first build"
    assert "mcld_kernels/losses/mcld.py" in names and "mcld_kernels/backends/cuda/extension.py" in names
