"""The small steps of the "cuda" backend, compiled for the host, alone: labels, factors, totals; and how many launches.

Each against the same step in PyTorch operations; the whole backend is in tests/test_csrc_host.py.
"""

import cases
import csrc_host
import pytest
import torch
from launches import Counted

from mcld_kernels import blocked, cuda, labels
from mcld_kernels.cuda import common, configs
from mcld_kernels.cuda.kernels import CudaKernels
from mcld_kernels.pipeline import Anchors, Call, Share

CPU = torch.device("cpu")
TORCH = blocked.TorchKernels()


@pytest.fixture(scope="session")
def module():
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
    return csrc_host.load()


@pytest.fixture
def kernels(module):
    return CudaKernels(common.Launcher(module, CPU))


LABELS = {
    "random": lambda n, c: torch.randint(c, (n,)),
    "one class": lambda n, c: torch.full((n,), c - 1),
    "ignored": lambda n, c: torch.where(torch.rand(n) < 0.3, -100, torch.randint(c, (n,))),
    "all ignored": lambda n, c: torch.full((n,), -100),
    "too large": lambda n, c: torch.randint(c + 2, (n,)),
    "negative": lambda n, c: torch.randint(-2, c, (n,)),
    "strided": lambda n, c: torch.randint(c, (n, 2))[:, 1],
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(("n", "classes"), [(2, 1), (33, 5), (600, 20), (257, 256), (5, 9), (7, 7)])
def test_labels_are_described_as_in_torch(kernels, kind, n, classes, poison):
    torch.manual_seed(n)
    target = LABELS[kind](n, classes)
    (got,) = kernels.describe((target,), -100, classes, torch.float32)
    (want,) = labels.describe((target,), -100, classes, torch.float32)
    for name in ("same", "valid", "rank", "kinds", "counts", "starts", "order", "present"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("poison", "share"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-6, atol=0, equal_nan=True)
    assert (got.ranks, got.classes) == (want.ranks, want.classes)


def test_two_sides_share_their_ranks(kernels):
    sides = torch.tensor([4, 1, 1]), torch.tensor([1, 7, 4, 4])
    for got, want in zip(
        kernels.describe(sides, -100, 9, torch.float32), labels.describe(sides, -100, 9, torch.float32)
    ):
        assert torch.equal(got.rank, want.rank) and torch.equal(got.order, want.order)


def anchors(n, shares, values, temperature=0.1):
    generator = torch.Generator().manual_seed(n)
    positive, by_label = (torch.rand(n, generator=generator) * 2 - 1 for _ in range(2))
    return Anchors(positive, by_label, temperature, tuple(shares), values)


def share(term, counted=None, factor=None, weight=None):
    factor, weight = (None if x is None else torch.tensor(x) for x in (factor, weight))
    return Share(term, 0.01, factor, counted, 0.7, weight)


@pytest.mark.parametrize("rows", [slice(0, 300), slice(7, 270), slice(299, 300)], ids=str)
@pytest.mark.parametrize(
    "make",
    {
        "one": lambda counted: [share(0)],
        "poisoned": lambda counted: [share(0, factor=torch.nan)],
        "by label": lambda counted: [share(1, counted, 0.5, 2.0)],
        "both": lambda counted: [share(0, weight=3.0), share(1, counted, 0.5, 2.0)],
        "both, poisoned": lambda counted: [share(0), share(1, counted, torch.nan)],
        "present": lambda counted: [share(2, counted, 0.25)],
    }.values(),
)
def test_factors(kernels, rows, make, poison):
    """Also where there is no negative (-inf), where one dominates, and of NaN."""
    shares = make(torch.rand(300) < 0.7)
    found = [torch.full((2, 400), 7.0) for _ in range(2)]
    log_off = torch.randn(rows.stop - rows.start) * 5
    scale = torch.rand_like(log_off)
    for i, value in enumerate((-torch.inf, 80.0, -80.0, torch.nan)[: len(log_off)]):
        log_off[i] = value
    got = kernels.factors(anchors(300, shares, found[0][: len(shares)]), rows, log_off, scale)
    want = TORCH.factors(anchors(300, shares, found[1][: len(shares)]), rows, log_off, scale)
    assert (got.z is None) == (want.z is None)
    # x is up to 20, and an error of its last bit, 1e-6, shows in exp(x) and, times 0.01, in the values, which cancel.
    for a, b in zip((got.u, got.s, got.z), (want.u, want.s, want.z), strict=True):
        assert a is b is None or torch.testing.assert_close(a, b, rtol=1e-5, atol=0, equal_nan=True) is None
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("weight", [None, torch.tensor([2.0, 0.5, 3.0])], ids=["fixed", "tensor"])
@pytest.mark.parametrize("terms", [(0,), (2,), (0, 1, 2), (0, 1, 0, 1, 2)], ids=str)
@pytest.mark.parametrize("width", [1, 257, 5000])
def test_totals(kernels, terms, width, weight, poison):
    values = torch.rand(len(terms), width)
    scale = (0.3, 1.0, 0.0) if 2 not in terms else (0.3, 1.0, 2.0)
    loss, found = kernels.totals(values, terms, scale, weight)
    want, wanted = TORCH.totals(values.double(), terms, scale, weight)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("direction", "classes", "most"),
    [("student", 40, 13), ("student", 300, 13), ("teacher", 40, 20), ("symmetric", 40, 30)],
)
def test_few_launches(module, monkeypatch, direction, classes, most):
    """Above the low-latency path: instance- and sample-wise terms. A GPU waits for launches before it computes."""
    counted = Counted()

    class Spy:
        def __getattr__(self, name):
            return lambda **fields: counted.launches.append(name) or getattr(module, name)(**fields)

    monkeypatch.setattr(cuda, "emulated", Spy())
    monkeypatch.setattr(configs, "LATENCY_LARGEST", 0)
    student, teacher = cases.logits("random", 310, classes, torch.bfloat16)
    target = cases.labels(310, classes)
    chosen, _ = cases.options_of(weight=(1.0, 1.0, 0.0), direction=direction)
    with counted:
        cuda.forward(Call(student, teacher, target, None, chosen, student_grad=True, teacher_grad=False))
    assert len(counted.launches) + len(counted.operations) <= most, (counted.launches, counted.operations)
