"""The calls that the tests of replays share, and fixtures that every file of them imports."""

import csrc_host
import pytest
import torch
from cases import labels, logits

import mcld_kernels
from mcld_kernels import backends, ops, options, replay
from mcld_kernels.backends.cuda import extension
from mcld_kernels.losses import mcld

BATCH, CLASSES = 9, 6


@pytest.fixture(scope="module")
def module():
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
    return csrc_host.load()


@pytest.fixture(autouse=True)
def unreadable_labels(module, monkeypatch):
    """Labels on the CPU are taken as labels on a GPU are, whose values are not read."""
    for part in (options, ops, replay):
        monkeypatch.setattr(part, "is_readable", lambda tensor: False)
    caches = replay._REPLAYS.clear, backends.cuda._kernel_set.cache_clear
    for clear in caches:
        clear()
    with extension.use(module):
        yield
    for clear in caches:
        clear()


@pytest.fixture
def checked(monkeypatch):
    """The calls whose tensors are checked."""
    calls = []
    check = mcld.check_mcld_inputs
    monkeypatch.setattr(mcld, "check_mcld_inputs", lambda *args: calls.append(args) or check(*args))
    return calls


def inputs(seed=0, dtype=torch.float32, batch=BATCH):
    student, teacher = logits("random", batch, CLASSES, dtype, seed)
    return student.requires_grad_(), teacher, labels(batch, CLASSES, seed, 0.2)


def loss_of(student, teacher, target, **options):
    return mcld_kernels.mcld_loss(student, teacher, target, backend="cuda", **options)


def value_and_gradient(loss, student, *rest, factor=3.0):
    value = loss(student, *rest)
    (gradient,) = torch.autograd.grad(factor * value, student)
    return value.detach(), gradient


def warm(loss=loss_of, **kind):
    for seed in range(2):
        loss(*inputs(seed, **kind))


FORMS = {
    "low latency": {},
    "flash": {"low_latency_limit": 0},
    "two products": {"low_latency_limit": 0, "flash_row_bytes": 0},
    "library product": {"low_latency_limit": 0, "flash_row_bytes": 0, "library_product": True},
}
