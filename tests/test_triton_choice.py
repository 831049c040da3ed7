"""Where the interpreted Triton kernels run, and which launches they take: reasons, configurations and autotuning."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

import triton_interpreter
from cases import check
from test_triton import faithful, path, pytestmark  # noqa: F401 (fixtures)

from mcld_kernels import backends
from mcld_kernels.backends import triton as backend
from mcld_kernels.backends.triton import autotune, configs
from mcld_kernels.backends.triton.configs import Configs, Launch, TritonTuning


class TestReasons:
    def test_bf16_needs_a_patched_interpreter(self, faithful):  # noqa: F811
        x = torch.zeros(2, 2, dtype=torch.bfloat16)
        assert backends.unsupported_reason("triton", x, x, False) is None
        create_dot = triton_interpreter.InterpreterBuilder.create_dot
        try:
            triton_interpreter.InterpreterBuilder.create_dot = create_dot.__wrapped__
            assert "bf16" in backends.unsupported_reason("triton", x, x, False)
        finally:
            triton_interpreter.InterpreterBuilder.create_dot = create_dot

    def test_the_interpreter_rounds_no_fp64_to_bf16(self):
        pair = torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.float64)
        for student, teacher in (pair, pair[::-1]):
            assert "fp64 to bf16" in backends.unsupported_reason("triton", student, teacher, False)

    def test_cpu_tensors_without_the_interpreter(self, monkeypatch):
        monkeypatch.setattr(backend, "interpreted", lambda: False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert "CUDA" in backends.unsupported_reason("triton", torch.zeros(2, 2), torch.zeros(2, 2), False)

    @pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx950", "gfx90a:sramecc+", "gfx1100"])
    def test_of_amds_gpus_it_takes_those_with_a_table(self, name, monkeypatch):
        """torch calls them "cuda" too, with a capability of its own, (9, 4) for gfx942."""
        monkeypatch.setattr(backend, "interpreted", lambda: False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        properties = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        logits = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
        configs.architecture.cache_clear()
        reason, architecture = backend.unsupported_reason(logits, logits), configs.architecture(logits.device)
        configs.architecture.cache_clear()
        assert architecture == name.partition(":")[0]
        if architecture in configs.AMD:
            assert reason is None
        else:
            assert reason == f"of AMD's GPUs it takes gfx942 and gfx950, and cuda:0 is {architecture}"

    def test_no_device_of_amd(self, monkeypatch):
        monkeypatch.setattr(backend, "interpreted", lambda: False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no HIP device" in backends.unavailable_reason("triton")

    def test_no_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert backends.unavailable_reason("triton") == "triton is not installed"

    def test_an_old_triton(self, monkeypatch):
        monkeypatch.setattr("triton.__version__", "3.2.0")
        assert "3.2.0" in backends.unavailable_reason("triton")

    @pytest.mark.parametrize("setting, want", [("tf32", "high"), ("ieee", "highest")])
    def test_newer_precision_settings(self, setting, want, monkeypatch):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            pytest.skip(f"torch {torch.__version__} has no torch.backends.cuda.matmul.fp32_precision")

        def mixed():
            raise RuntimeError("mix of the legacy and new APIs")

        monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            torch.backends.cuda.matmul.fp32_precision = setting
            assert backend.float32_precision() == want
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def test_chunk_budget(self):
        for budget, rows in ((1 << 20, 128), (1 << 30, 4096), (1, 128)):
            assert Configs(TritonTuning(chunk_bytes=budget)).chunk_rows(4096, 2 * 4096) == rows


class TestProductStages:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_they_take_the_place_of_the_tables(self, dtype):
        own = Configs(TritonTuning(chunk_bytes=1, architecture="sm_90")).product(dtype)
        other = Configs(TritonTuning(chunk_bytes=1, architecture="sm_90", product_stages=4)).product(dtype)
        assert own.stages == 3 and other == own._replace(stages=4)

    @pytest.mark.parametrize("stages", [0, -1, True, 2.0, "3"])
    def test_what_is_no_number_of_stages(self, stages):
        with pytest.raises(ValueError, match=f"product_stages must be a whole number .* got {stages!r}"):
            TritonTuning(chunk_bytes=1, product_stages=stages)


class TestAutotuning:
    """Timing needs a GPU; which launch is taken does not."""

    launches = Launch(32, 32, 32), Launch(64, 32, 32)

    @pytest.fixture
    def bench(self, monkeypatch):
        """do_bench that launches once and gives the second launch the least time and the third none."""
        calls = []

        def do_bench(trial, **options):
            trial()
            calls.append(len(calls))
            if calls[-1] % 3 == 2:
                raise autotune.OutOfResources(1, 0, "shared memory")
            return 1.0 - calls[-1] % 3

        monkeypatch.setattr("triton.testing.do_bench", do_bench)
        autotune.fastest.clear()
        # The tables' launches, not the interpreter's, which are never timed.
        tuned = {"blocks": None, "flash_alternatives": self.launches, "product_alternatives": self.launches}
        with backends.tuned(**tuned):
            yield calls
        autotune.fastest.clear()

    def test_it_is_off(self, bench, path):  # noqa: F811
        check("triton", "cpu", "random", 70, 40, torch.float32, draws=1)
        assert not bench

    def test_the_interpreter_times_nothing(self, bench, path, monkeypatch):  # noqa: F811
        monkeypatch.setenv("MCLD_AUTOTUNE", "1")
        with backends.tuned(blocks=Launch(128, 128, 128)):
            check("triton", "cpu", "random", 70, 40, torch.float32, draws=1)
        assert not bench

    def test_stages_that_are_given_are_not_timed_against_others(self, bench, path, monkeypatch):  # noqa: F811
        monkeypatch.setenv("MCLD_AUTOTUNE", "1")
        with backends.tuned(product_stages=2):
            check("triton", "cpu", "random", 70, 40, torch.float32, draws=1)
        assert not any(key[0] == "similarity" for key in autotune.fastest)

    def test_the_fastest_is_kept(self, bench, path, monkeypatch):  # noqa: F811
        monkeypatch.setenv("MCLD_AUTOTUNE", "1")
        check("triton", "cpu", "random", 70, 40, torch.float32, draws=2)
        assert len(bench) == 3 * len(autotune.fastest) > 0
        assert set(autotune.fastest.values()) == {self.launches[0]}
