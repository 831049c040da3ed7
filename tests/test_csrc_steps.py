"""Small steps of the "cuda" backend, compiled for the host, alone: labels, loss epilogue, terms; and launch counts.

Each against the same step in PyTorch operations; the whole backend is in tests/test_csrc_host.py.
"""

import re

import cases
import csrc_host
import pytest
import torch
from launches import Counted

from mcld_kernels import backends, infonce, labels
from mcld_kernels.backends.cuda import extension
from mcld_kernels.kernels import AnchorTerms, KernelSet, LossInputs, NegativeSums, TermWeight, Tuning, UnitRows
from mcld_kernels.losses import mcld
from mcld_kernels.options import SAMPLE

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
@pytest.mark.parametrize(("n", "classes"), [(2, 1), (33, 5), (600, 20), (257, 256), (5, 9), (7, 7)])
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


@pytest.mark.parametrize(("classes", "blocks"), [(5, 1), (5, 2), (1200, 64)])
def test_labels_of_several_blocks(kernels, monkeypatch, classes, blocks, poison):
    """One block with three rounds of rows, two with two, three with one; class indices of two rounds."""
    target = torch.randint(-1, classes, (2600,))
    monkeypatch.setattr(kernels.launch, "constants", {**kernels.launch.constants, "max_sort_blocks": blocks})
    (got,) = kernels.index_labels((target,), -1, classes, torch.float32)
    (want,) = labels.index_labels((target,), -1, classes, torch.float32)
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
        positives="label" if index == SAMPLE else "diagonal",
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


ALL, ROWS = (1.0, 1.0, 1.0), (1.0, 1.0, 0.0)


# Bounds are the present numbers: each may fall, none may rise. With 300 classes there are two products; on a GPU the
# library computes one of them.
@pytest.mark.parametrize(
    ("direction", "classes", "weight", "limit", "launches", "operations"),
    [
        ("student", 40, ALL, 1024, 5, 0),
        ("teacher", 40, ALL, 1024, 6, 0),
        ("symmetric", 40, ALL, 1024, 6, 0),
        ("student", 40, ROWS, 0, 8, 0),
        ("student", 300, ROWS, 0, 9, 0),
        ("teacher", 40, ROWS, 0, 14, 3),
        ("teacher", 300, ROWS, 0, 14, 3),
        ("symmetric", 40, ROWS, 0, 19, 6),
    ],
)
def test_few_launches(module, direction, classes, weight, limit, launches, operations):
    """A GPU waits for launches before it computes. ``limit``: up to where the low-latency path is taken."""
    counted = Counted()
    student, teacher = cases.logits("random", 310, classes, torch.bfloat16)
    options, _ = cases.options_of(weight=weight, direction=direction)
    inputs = LossInputs(
        student=student,
        teacher=teacher,
        target=cases.labels(310, classes),
        weight=None,
        options=options,
        student_grad=True,
        teacher_grad=False,
    )
    first = module.stub_launches(1)
    try:
        with extension.use(module), backends.tuned(low_latency_limit=limit), counted:
            mcld.compute(backends.kernel_set("cuda", student, teacher), inputs)
    finally:
        last = module.stub_launches(0)
    kernels = [module.stubbed_launch(index) for index in range(first, last)]
    assert 0 < len(kernels) <= launches and len(counted.operations) <= operations, (kernels, counted.operations)


class Arguments(dict):
    """The arguments of a launcher: zeros but for those given."""

    def __init__(self, launcher, **given):
        names = re.search(r"Keyword arguments: (.*)", launcher.__doc__)
        super().__init__(dict.fromkeys(names[1].split(", "), 0), **given)


@pytest.mark.parametrize("rows", [65_535 * 32 + 1, 2_600_000])
def test_a_grid_holds_the_columns_of_more_logits_than_its_second_dimension(module, rows):
    """A column-major bank of candidates, or as many classes: nothing is launched, but the launches are checked."""
    d, padded = 64, (rows + 127) // 128 * 128
    first = module.stub_launches(1)
    try:
        module.normalize_columns(
            **Arguments(
                module.normalize_columns, row_stride=1, column_stride=rows, n=rows, d=d, padded_rows=padded, pitch=64,
                splits=1,
            )
        )  # fmt: skip
        sizes = {"rows": rows, "d": d, "pitch": 64, "product_pitch": 64}
        module.grad_epilogue(
            **Arguments(module.grad_epilogue, projection=16, row_stride=1, column_stride=rows, **sizes)
        )
    finally:
        last = module.stub_launches(0)
    assert [module.stubbed_launch(index) for index in range(first, last)] == [
        "column_squares", "normalize_columns", "grad_epilogue_projection", "grad_epilogue_transposed"
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m", "d", "offset"), [(70, 150, 36, 60), (150, 270, 37, 100), (130, 140, 260, 0)])
def test_the_one_epilogue_is_the_steps_one_after_another(module, dtype, n, m, d, offset, poison):
    """Rows that are no vectors, splits of flash, chunks; a sum over two contrasts, one of them masked."""
    torch.manual_seed(0)
    student, teacher = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    target, candidate_target = torch.randint(-1, 5, (n,)), torch.randint(-1, 5, (m,))
    unit_args = {"operand_dtype": dtype, "eps": 1e-8}

    def run(one_epilogue, fp64):
        acc = torch.float64 if fp64 else torch.float32
        launches = []

        class Spy:
            info, constants = staticmethod(module.info), module.constants

            def __getattr__(self, name):
                return lambda **fields: launches.append(name) or getattr(module, name)(**fields)

        with extension.use(Spy()), backends.tuned(one_epilogue=one_epilogue, chunk_bytes=1):
            logits = (student.double(), teacher.double()) if fp64 else (student, teacher)
            kernels = backends.kernel_set("torch" if fp64 else "cuda", *logits)
            sides = labels.index_labels((target, candidate_target), -1, 5, acc)
            units = [TORCH.l2_normalize(x, dtype, 1e-8) for x in (student, teacher)]
            if fp64:
                units = [UnitRows(rows=x.rows.double(), inv_norm=x.inv_norm.double(), n=x.n, d=x.d) for x in units]
            else:
                units = [kernels.l2_normalize(x, **unit_args) for x in (student, teacher)]
            grads = [infonce.GradBuffer(x.to(acc), needed) for x, needed in ((student, True), (teacher, False))]
            first, second = (
                infonce.Side(unit=unit, grad=grad, labels=side)
                for unit, grad, side in zip(units, grads, sides, strict=True)
            )
            weights = (
                TermWeight(term=0, positives="diagonal", constant=1 / n),
                TermWeight(
                    term=1, positives="label", constant=0.5, factor=sides[0].mean_factor, counted=sides[0].valid,
                    weight=torch.tensor(0.7, dtype=acc), term_weight=2.0,
                ),
            )  # fmt: skip
            per_anchor = torch.empty(2, n, dtype=acc)
            for mask in (False, True):
                infonce.contrast(
                    kernels, infonce.Anchors(side=first, weights=weights, per_anchor=per_anchor), second,
                    temperature=0.2, offset=offset, mask_same_class=mask,
                )  # fmt: skip
        return per_anchor, grads[0].result(), launches

    want = run(False, True)
    one, steps = run(True, False), run(False, False)
    assert "anchor_epilogue" in one[2] and not {"loss_epilogue", "row_sums", "grad_epilogue"} & set(one[2])
    assert "anchor_epilogue" not in steps[2]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for got in (one, steps):
        for a, b in zip(got[:2], want[:2], strict=True):
            assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()
