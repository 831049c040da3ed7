"""The ground of every test: the interpreter, threads, the gpu mark, hypothesis, and fixtures."""

import contextlib
import importlib.machinery
import importlib.util
import os
import re
import sys

import torch

# Triton reads this when its kernels are defined, so it must be set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# tests/test_csrc_sanitizers.py gives a process the CPU kernels compiled with checks.
if path := os.environ.get("MCLD_TEST_CPU_MODULE"):
    loader = importlib.machinery.ExtensionFileLoader("mcld_kernels._cpu", path)
    sys.modules[loader.name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(sys.modules[loader.name])
# Each worker of pytest-xdist would otherwise start a thread for every core.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run; `--hypothesis-profile=explore` draws new ones.
_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, max_examples=50, **_COMMON)
settings.register_profile("explore", max_examples=1000, **_COMMON)
settings.load_profile("fixed")


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):
        # xdist rebuilds a worker's warnings in this process, and imports the modules that they are of.
        import torchvision_shim

        with contextlib.suppress(ImportError):  # the tests that need it say so; the others must run
            torchvision_shim.install()


# The longest tests by far. They start first: at the end of a run, one worker would do them and the others nothing.
LONGEST = ("test_memory_of_the_kernels", "test_compiled_kernels", "test_inductor")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


# A CI, which .ci/run and GitHub name so, has installed everything: what is missing there is a fault, no reason to skip.
MISSING = re.compile("not installed|could not import", re.IGNORECASE)


def _in_a_ci_nothing_is_missing(report):
    if report.skipped and os.environ.get("CI") and MISSING.search(reason := str(report.longrepr)):
        report.outcome, report.longrepr = "failed", f"a CI must have it: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _in_a_ci_nothing_is_missing((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _in_a_ci_nothing_is_missing((yield))


def _poisoned(make):
    def poisoned(*args, **kwargs):
        made = make(*args, **kwargs)
        # Fake and meta tensors hold nothing to poison.
        if made.device.type == "meta" or type(made) is not torch.Tensor:
            return made
        with torch.no_grad():
            if made.is_floating_point():
                made.fill_(torch.nan)
            elif made.dtype != torch.bool:
                made.fill_(torch.iinfo(made.dtype).max)
        return made

    return poisoned


@pytest.fixture
def poison(monkeypatch):
    """Fill what torch.empty and its kin return with NaN (integers: their maximum): an element nobody writes shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def matmul_precision():
    """A setter of the float32 matmul precision that is undone after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def pool():
    """Four processes with a gloo group; see `ranks`."""
    import ranks

    pool = ranks.Pool(4)
    yield pool
    pool.close()


@pytest.fixture
def small_chunks():
    """A function that limits a chunk to ``rows`` rows of ``columns`` exponentials: small inputs take several."""
    from mcld_kernels import backends

    with contextlib.ExitStack() as stack:

        def set_rows(rows, columns, itemsize=4):
            stack.enter_context(backends.tuned(chunk_bytes=rows * columns * itemsize))

        yield set_rows
