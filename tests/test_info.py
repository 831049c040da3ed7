"""``python -m mcld_kernels.info``, and what the package shows of itself."""

import json
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import mcld_kernels
from mcld_kernels import backends, info, installation
from mcld_kernels.backends import torch_low_latency
from mcld_kernels.backends.triton import configs


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mcld_kernels.info", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_prints_what_a_bug_report_needs():
    shown = run()
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())  # a long line is wrapped
    for word in (
        "versions", "build", "driver", "devices", "backends", "state", info.GPU_STATE, "environment",
        mcld_kernels.__version__, torch.__version__, "cpu", "MCLD_CHUNK_MB", *backends.NAMES,
    ):  # fmt: skip
        assert word in text
    reasons = filter(None, map(backends.unavailable_reason, backends.NAMES))
    for reason in reasons:
        assert text.count(reason) == 1


def test_json_is_the_same_description():
    description, here = json.loads(run("--json")), json.loads(json.dumps(info.describe()))
    # A worker of pytest-xdist takes one thread; the process that it starts takes its own number.
    description["devices"]["cpu"].pop("threads"), here["devices"]["cpu"].pop("threads")
    assert description == here
    assert description["versions"]["torch"] == torch.__version__
    assert description["build"]["commit"] == installation.commit()
    assert set(description["driver"]) == {"version", "CUDA"}


def test_a_pipe_that_is_closed_early_is_no_error():
    """As in `python -m mcld_kernels.info --json | head -1`."""
    command = [sys.executable, "-m", "mcld_kernels.info", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_the_cpu_kernels_are_shown_or_the_reason_and_the_command(monkeypatch):
    module = SimpleNamespace(isas=lambda: ["baseline", "avx2"])
    monkeypatch.setattr(torch_low_latency, "_import", lambda: (module, None))
    assert info.describe()["build"]["CPU kernels"] == "avx2 (of baseline avx2)"
    monkeypatch.setattr(torch_low_latency, "_import", torch_low_latency._import_module)
    monkeypatch.setattr(installation, "_record", lambda: {"without_cpu_kernels": "no C++ compiler was found"})
    errors = {
        "none: no C++ compiler was found": ModuleNotFoundError("no module"),
        "none: the module does not load (undefined symbol: x)": ImportError("undefined symbol: x"),
    }
    for reason, error in errors.items():
        monkeypatch.setattr(torch_low_latency.importlib, "import_module", Mock(side_effect=error))
        text = info.describe()["build"]["CPU kernels"]
        assert text.startswith(f"{reason}. To compile them: `MCLD_BUILD_CPU=1 pip install -v ")
        assert text.endswith(f"{installation.source()[0]}`")


def test_cpu_kernels_of_other_sources_are_named(monkeypatch):
    """As in an editable checkout that has moved on."""
    module = SimpleNamespace(clkd=1, grad_epilogue=1, low_latency=1, normalize=1)
    monkeypatch.setattr(torch_low_latency.importlib, "import_module", lambda name: module)
    with pytest.warns(
        RuntimeWarning,
        match=r"other sources, without contrast, mlkd, softmax_kl, teacher_anchors\. To compile them: `MCLD_",
    ):
        assert torch_low_latency._import_module()[0] is None


def test_torchs_version_is_that_of_the_imported_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9+cu999")
    assert info.describe()["versions"]["torch"] == "9.9.9+cu999"


def test_every_device_says_what_auto_takes():
    devices = info.describe()["devices"]
    assert set(devices) == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    assert devices["cpu"]["auto takes"] == {"float32": "torch", "bfloat16": "torch"}
    for device in devices.values():
        assert set(device["auto takes"].values()) <= set(backends.NAMES)


def test_a_gpu_of_amd_shows_its_architecture_and_state(monkeypatch):
    properties = SimpleNamespace(
        name="AMD Test", gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304, total_memory=192 << 30
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(info, "_auto", lambda device: {"float32": "triton"})
    configs.architecture.cache_clear()
    description = info.describe()
    configs.architecture.cache_clear()
    assert description["devices"]["cuda:0"]["architecture"] == "gfx942"
    assert description["devices"]["cuda:0"]["state"].endswith("gfx942 and gfx950, never run")
    assert description["versions"]["HIP of torch"] == "7.0"


def test_triton_is_found_under_each_of_its_names(monkeypatch):
    monkeypatch.setattr(info, "_distribution_version", {"pytorch-triton-rocm": "3.7.1"}.get)
    assert info.describe()["versions"]["triton"] == "3.7.1"


def test_every_backend_is_available_or_explained():
    reasons = info.describe()["backends"]
    assert tuple(reasons) == backends.NAMES
    assert tuple(name for name, reason in reasons.items() if reason is None) == backends.available()
    assert all(reason is None or reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\nGCC 12.3.0\n", "580.65.06"),
    ],
)
def test_the_drivers_version_is_read(text, expected, monkeypatch):
    monkeypatch.setattr(info.Path, "read_text", lambda path: text)
    assert info._driver_version() == expected


def test_values_of_variables_are_shown(monkeypatch):
    monkeypatch.setenv("MCLD_CHUNK_MB", "17")
    assert info.describe()["environment"]["MCLD_CHUNK_MB"] == "17"
    assert "  MCLD_CHUNK_MB     17" in info.lines(info.describe())
    monkeypatch.delenv("MCLD_CHUNK_MB")
    assert info.describe()["environment"]["MCLD_CHUNK_MB"] is None
    assert any("MCLD_CHUNK_MB     unset (" in line for line in info.lines(info.describe()))


@pytest.mark.parametrize(
    ("record", "origin"),
    [
        ({"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://host/a.git@abc"),
        ({"url": "file:///a%20b/mcld", "dir_info": {}}, "/a b/mcld"),
        ({"url": "https://host/x.tar.gz", "archive_info": {}}, "https://host/x.tar.gz"),
        ({}, "mcld-kernels"),
    ],
)
def test_the_command_for_cuda_names_the_source_of_this_installation(record, origin, monkeypatch, tmp_path):
    class Distribution:
        def read_text(self, name):
            return json.dumps(record) if record else None

    monkeypatch.setattr(installation, "_PACKAGE", tmp_path / "mcld_kernels")
    monkeypatch.setattr(installation, "distribution", lambda name: Distribution())
    assert installation.source() == (origin, False)
    command = installation.cuda_command()
    assert command.startswith("MCLD_BUILD_CUDA=1 pip install -v ") and "--no-cache-dir" in command
    (tmp_path / "setup.py").touch()
    assert installation.cuda_command().endswith(f"--no-deps -e {tmp_path}")


def test_public_names():
    assert set(mcld_kernels.__all__) == {
        "CKDLoss", "CKDTerms", "CLKDLoss", "CLKDTerms", "InfoNCELoss", "KDLoss", "MCLDLoss", "MCLDTerms", "MLKDLoss",
        "MLKDTerms", "TeacherQueue", "__version__", "accumulate", "backends", "ckd_loss", "ckd_terms", "clkd_loss",
        "clkd_terms", "info_nce", "kd_loss", "mcld_loss", "mcld_terms", "mlkd_loss", "mlkd_terms", "reference",
    }  # fmt: skip
    assert all(hasattr(mcld_kernels, name) for name in mcld_kernels.__all__)
    assert mcld_kernels.MCLDTerms._fields == ("loss", "instance", "sample", "category")


def test_importing_the_package_imports_no_kernels():
    """The import stays quick, and works where Triton and the compiled module are missing or broken."""
    code = "import sys, mcld_kernels; print({'triton', 'mcld_kernels._C', 'torch._dynamo'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"
