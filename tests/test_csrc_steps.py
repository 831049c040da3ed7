"""Small steps of the "cuda" backend, compiled for the host, alone: labels, loss epilogue, terms; and launch counts.

Each against the same step in PyTorch operations; the whole backend is in tests/test_csrc_host.py.
"""

import cases
import csrc_host
import pytest
import torch
from launches import Counted

from mcld_kernels import backends, labels
from mcld_kernels.backends.cuda import extension
from mcld_kernels.kernels import AnchorTerms, KernelSet, LossInputs, NegativeSums, TermWeight, Tuning
from mcld_kernels.losses import mcld

TORCH = KernelSet(Tuning(chunk_bytes=1 << 20))


@pytest.fixture(scope="session")
def module():
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
    return csrc_host.load()


@pytest.fixture
def kernels(module):
    logits = torch.zeros(1, 1)
    with extension.use(module):
        return backends.kernel_set("cuda", logits, logits)


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
@pytest.mark.parametrize(("n", "classes"), [(2, 1), (33, 5), (600, 20), (257, 256), (5, 9), (7, 7), (2500, 1200)])
def test_labels_are_indexed_as_in_torch(kernels, kind, n, classes, poison):
    torch.manual_seed(n)
    target = LABELS[kind](n, classes)
    (got,) = kernels.index_labels((target,), -100, classes, torch.float32)
    (want,) = labels.index_labels((target,), -100, classes, torch.float32)
    for name in ("key", "valid", "class_index", "class_id", "counts", "starts", "order", "present"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("poison", "mean_factor"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-6, atol=0, equal_nan=True)
    assert (got.num_classes_present, got.num_classes) == (want.num_classes_present, want.num_classes)


def test_labels_of_more_rows_than_blocks_take_at_once(kernels, monkeypatch):
    """One block with three rounds of rows, and two with two."""
    target = torch.randint(-1, 5, (2600,))
    (want,) = labels.index_labels((target,), -1, 5, torch.float32)
    for blocks in (1, 2):
        monkeypatch.setattr(kernels.launch, "constants", {**kernels.launch.constants, "max_sort_blocks": blocks})
        (got,) = kernels.index_labels((target,), -1, 5, torch.float32)
        for name in ("key", "valid", "class_index", "counts", "starts", "order"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        torch.testing.assert_close(got.mean_factor, want.mean_factor, rtol=1e-6, atol=0)


def test_two_sides_share_their_class_indices(kernels):
    sides = torch.tensor([4, 1, 1]), torch.tensor([1, 7, 4, 4])
    for got, want in zip(
        kernels.index_labels(sides, -100, 9, torch.float32), labels.index_labels(sides, -100, 9, torch.float32)
    ):
        assert torch.equal(got.class_index, want.class_index) and torch.equal(got.order, want.order)


def anchor_terms(n, weights, per_anchor, temperature=0.1):
    generator = torch.Generator().manual_seed(n)
    positive, label_positive = (torch.rand(n, generator=generator) * 2 - 1 for _ in range(2))
    return AnchorTerms(
        positive=positive,
        label_positive=label_positive,
        temperature=temperature,
        weights=tuple(weights),
        per_anchor=per_anchor,
    )


def term(index, counted=None, factor=None, weight=None):
    factor, weight = (None if x is None else torch.tensor(x) for x in (factor, weight))
    return TermWeight(
        term=index,
        positives="label" if index == mcld.SAMPLE else "diagonal",
        constant=0.01,
        factor=factor,
        counted=counted,
        term_weight=0.7,
        weight=weight,
    )


@pytest.mark.parametrize("rows", [slice(0, 300), slice(7, 270), slice(299, 300)], ids=str)
@pytest.mark.parametrize(
    "make",
    {
        "one": lambda counted: [term(0)],
        "poisoned": lambda counted: [term(0, factor=torch.nan)],
        "by label": lambda counted: [term(1, counted, 0.5, 2.0)],
        "both": lambda counted: [term(0, weight=3.0), term(1, counted, 0.5, 2.0)],
        "both, poisoned": lambda counted: [term(0), term(1, counted, torch.nan)],
        "present": lambda counted: [term(2, counted, 0.25)],
    }.values(),
)
def test_loss_epilogue(kernels, rows, make, poison):
    """Also where there is no negative (-inf), where one dominates, and of NaN."""
    weights = make(torch.rand(300) < 0.7)
    neg_lse = torch.randn(rows.stop - rows.start) * 5
    for i, value in enumerate((-torch.inf, 80.0, -80.0, torch.nan)[: len(neg_lse)]):
        neg_lse[i] = value
    sums = NegativeSums(rows=rows, neg_lse=neg_lse, inv_neg_sum=torch.rand_like(neg_lse), product=None)
    per_anchor = [torch.full((2, 400), 7.0) for _ in range(2)]
    got, want = (
        kernel_set.loss_epilogue(anchor_terms(300, weights, out[: len(weights)]), sums)
        for kernel_set, out in zip((kernels, TORCH), per_anchor, strict=True)
    )
    assert (got.class_mean is None) == (want.class_mean is None)
    # x is up to 20, and an error of its last bit, 1e-6, shows in exp(x) and, times 0.01, in the parts, which cancel.
    for name in ("partner", "product", "class_mean"):
        a, b = getattr(got, name), getattr(want, name)
        assert a is b is None or torch.testing.assert_close(a, b, rtol=1e-5, atol=0, equal_nan=True) is None
    torch.testing.assert_close(*per_anchor, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("weight", [None, torch.tensor([2.0, 0.5, 3.0])], ids=["fixed", "tensor"])
@pytest.mark.parametrize("terms", [(0,), (2,), (0, 1, 2), (0, 1, 0, 1, 2)], ids=str)
@pytest.mark.parametrize("width", [1, 257, 5000])
def test_reduce_terms(kernels, terms, width, weight, poison):
    per_anchor = torch.rand(len(terms), width)
    term_weight = (0.3, 1.0, 0.0) if 2 not in terms else (0.3, 1.0, 2.0)
    got = kernels.reduce_terms(per_anchor, terms, term_weight, weight)
    want = TORCH.reduce_terms(per_anchor.double(), terms, term_weight, weight)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_reduce_terms_of_any_loss(kernels, count, poison):
    """A loss with another number of terms than MCLD's."""
    per_anchor, terms = torch.rand(2 * count, 40), tuple(range(count)) * 2
    got = kernels.reduce_terms(per_anchor, terms, (0.5,) * count, None)
    want = TORCH.reduce_terms(per_anchor.double(), terms, (0.5,) * count, None)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("direction", "classes", "most"),
    [("student", 40, 13), ("student", 300, 13), ("teacher", 40, 20), ("symmetric", 40, 30)],
)
def test_few_launches(module, direction, classes, most):
    """Above the low-latency path: instance- and sample-wise terms. A GPU waits for launches before it computes."""
    counted = Counted()

    class Spy:
        info, constants = staticmethod(module.info), module.constants

        def __getattr__(self, name):
            return lambda **fields: counted.launches.append(name) or getattr(module, name)(**fields)

    student, teacher = cases.logits("random", 310, classes, torch.bfloat16)
    options, _ = cases.options_of(weight=(1.0, 1.0, 0.0), direction=direction)
    inputs = LossInputs(
        student=student,
        teacher=teacher,
        target=cases.labels(310, classes),
        weight=None,
        options=options,
        student_grad=True,
        teacher_grad=False,
    )
    with extension.use(Spy()), backends.tuned(low_latency_limit=0), counted:
        mcld.compute(backends.kernel_set("cuda", student, teacher), inputs)
    assert len(counted.launches) + len(counted.operations) <= most, (counted.launches, counted.operations)
