"""Which backend runs: what is available, what is refused and why, and what "auto" takes without measurements."""

import os
import subprocess
import sys

import pytest
import torch
from cases import labels, logits

import mcld_kernels
from mcld_kernels import backends


class TestChoice:
    def test_available(self):
        names = backends.available()
        assert {"reference", "torch"} <= set(names) <= set(backends.NAMES)

    def test_explain_has_a_word_on_every_backend(self):
        student, teacher = logits("random", 4, 3, torch.float32)
        words = backends.explain(student, teacher)
        assert tuple(words) == backends.NAMES
        assert words["reference"] == words["torch"] == "can run"
        assert all(words.values())

    @pytest.mark.parametrize("teacher_grad", [False, True], ids=["frozen", "mutual"])
    @pytest.mark.parametrize("name", backends.NAMES)
    def test_what_cannot_run_raises_with_the_reason(self, name, teacher_grad):
        student, teacher = logits("random", 4, 3, torch.float32)
        student.requires_grad_(), teacher.requires_grad_(teacher_grad)
        word = backends.explain(student, teacher)[name]
        target = labels(4, 3)
        if word == "can run":
            assert torch.isfinite(mcld_kernels.mcld_loss(student, teacher, target, backend=name))
        else:
            with pytest.raises(backends.BackendUnavailable) as raised:
                mcld_kernels.mcld_loss(student, teacher, target, backend=name)
            assert name in str(raised.value) and word in str(raised.value)

    @pytest.mark.parametrize("name", ["triton", "cuda"])
    def test_no_teacher_gradient_from_the_kernels(self, name):
        student, teacher = logits("random", 4, 3, torch.float32)
        with pytest.raises(backends.BackendUnavailable, match="teacher"):
            mcld_kernels.mcld_loss(student, teacher.requires_grad_(), labels(4, 3), backend=name)
        with torch.no_grad():  # nobody asks for it here
            assert backends.unsupported_reason(
                name, student, teacher, False
            ) is None or "gradient" not in backends.unsupported_reason(name, student, teacher, False)

    def test_auto_on_the_cpu_is_torch(self):
        student, teacher = logits("random", 4, 3, torch.float32)
        assert backends.choose("auto", student, teacher, False) == "torch"
        assert backends.choose("auto", student, teacher, True) == "torch"

    @pytest.mark.gpu
    def test_auto_on_a_gpu_gives_the_teacher_its_gradient(self):
        student, teacher = logits("random", 40, 30, torch.float32, device="cuda")
        assert backends.choose("auto", student, teacher, True) == "torch"
        assert backends.choose("auto", student, teacher, False) in backends.available()

    @pytest.mark.parametrize("name", ["cpu", "Torch", "", None, 3])
    def test_an_unknown_name_is_an_error(self, name):
        with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference', 'torch', 'triton', 'cuda'"):
            mcld_kernels.mcld_loss(torch.randn(3, 4), torch.randn(3, 4), weight=(1, 0, 1), backend=name)

    def test_triton_refuses_cpu_tensors_without_the_interpreter(self):
        code = (
            "import torch, mcld_kernels\n"
            "x = torch.randn(3, 4)\n"
            "try:\n"
            "    mcld_kernels.mcld_loss(x, x, weight=(1, 0, 1), backend='triton')\n"
            "except mcld_kernels.backends.BackendUnavailable as error:\n"
            "    print('refused:', error)\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("refused: backend 'triton' cannot run: ")
        assert done.stdout.endswith("; backend='auto' takes one that can\n")


class TestAutoWithoutFusedKernels:
    """A GPU on which neither Triton nor CUDA can run: `auto` takes torch, and says so once."""

    @pytest.fixture
    def reasons(self, monkeypatch):
        monkeypatch.setattr(backends, "_WARNED", set())
        reasons = {"triton": "triton is not installed", "cuda": "built without CUDA"}
        monkeypatch.setattr(backends, "unsupported_reason", lambda name, *_: reasons[name])
        monkeypatch.setattr(backends, "preference", lambda *_: ("triton", "cuda"))
        return reasons

    def fastest(self, teacher_grad=False, supported=backends.NAMES):
        student, teacher = logits("random", 4, 3, torch.float32)
        return backends._fastest(student, teacher, teacher_grad, supported)

    def test_one_warning_with_every_reason(self, reasons, recwarn):
        assert [self.fastest() for _ in range(3)] == ["torch"] * 3
        (warning,) = recwarn.list
        assert "triton: triton is not installed; cuda: built without CUDA" in str(warning.message)
        reasons["cuda"] = "the driver is too old"
        self.fastest()
        assert len(recwarn.list) == 2

    def test_none_where_torch_is_the_choice(self, reasons, recwarn):
        assert self.fastest(teacher_grad=True) == "torch"
        assert self.fastest(supported=("torch",)) == "torch"
        reasons["cuda"] = None
        assert self.fastest() == "cuda"
        assert not recwarn.list


def test_triton_interpret_set_too_late_says_so():
    """Triton reads it when its own functions are defined, and then when the kernels are."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = """
import os, torch, triton, mcld_kernels
x = torch.zeros(2, 2)

def set_late():
    os.environ["TRITON_INTERPRET"] = "1"
    print(mcld_kernels.backends.explain(x, x)["triton"])
    try:
        mcld_kernels.mcld_loss(x, x, weight=(1, 0, 0), backend="triton")
    except mcld_kernels.backends.BackendUnavailable as error:
        print(error)

set_late()
del os.environ["TRITON_INTERPRET"]
from mcld_kernels.backends.triton import flash
set_late()
"""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    for earlier in ("triton", "the kernels"):
        assert done.stdout.count(f"TRITON_INTERPRET was set after {earlier} had been imported") == 2
    assert done.stdout.count("set it before anything imports triton") == 4
