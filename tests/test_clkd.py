"""CLKD: against its definition in loops, the published form, and the reference in every form of the correlation."""

import math

import loops
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, labels, logits, short
from family import Loss, check, run, spread

import mcld_kernels
from mcld_kernels import CLKDLoss, backends, reference
from mcld_kernels.losses.clkd import PRESETS

WEIGHT = (0.5, 1.0, 0.4)
# A few rows: (B, B) matrices. Else (C, C), or blocks of its columns where it does not fit a chunk.
SHAPES = {"by rows": (9, 40), "by classes": (23, 17), "square": (16, 16)}


def magnitude(student, teacher, options):
    batch, classes = student.shape
    w = options.get("weight", WEIGHT)
    per = (1 / classes, 1 / batch) if options.get("reduction") != "sum" else (1.0, 1.0)
    centred = [x - x.mean(0) for x in (student, teacher)]
    factor = w[2] / (max(classes - 1, 1) ** 2 * classes**2)
    squares = [(x.T @ x).square().sum().item() for x in centred]
    loss = 4 * (w[0] * per[0] + w[1] * per[1]) + factor * sum(squares)
    rows = math.hypot(spread(student, 1), spread(teacher, 1))
    columns = math.hypot(spread(student, 0), spread(teacher, 0))
    gram = 4 * factor * max(float((x @ (y.T @ y)).norm()) for x in centred for y in centred)
    return loss, 4 * (w[0] * per[0] * rows + w[1] * per[1] * columns) + gram


CLKD = Loss(mcld_kernels.clkd_terms, reference.clkd_terms, magnitude, {})


def by_loops(student, teacher, weight, reduction, eps=1e-12):
    batch, classes = len(student), len(student[0])

    def error(a, b):
        pairs = [(loops.unit(x, eps), loops.unit(y, eps)) for x, y in zip(a, b, strict=True)]
        total = sum((p - q) ** 2 for x, y in pairs for p, q in zip(x, y, strict=True))
        return total / (len(a) * len(a[0]) if reduction == "mean" else len(a))

    def correlation(rows):
        columns = [[x - loops.mean(column) for x in column] for column in loops.columns(rows)]
        return [[loops.cosine(a, b) / (classes - 1) for b in columns] for a in columns]

    pairs = zip(correlation(student), correlation(teacher), strict=True)
    square = sum((p - q) ** 2 for x, y in pairs for p, q in zip(x, y, strict=True)) / classes**2
    terms = error(student, teacher), error(loops.columns(student), loops.columns(teacher)), square
    assert batch > 0
    return sum(w * term for w, term in zip(weight, terms, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["random", "zeros"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_loss_is_its_definition_in_loops(backend, kind, reduction):
    student, teacher = logits(kind, 6, 5)
    got = run(mcld_kernels.clkd_terms, student, teacher, weight=WEIGHT, reduction=reduction, backend=backend)
    lists = student.tolist(), teacher.tolist()
    assert float(got.loss) == pytest.approx(by_loops(*lists, WEIGHT, reduction), rel=1e-12)
    if kind == "random":
        slopes = loops.slopes(lambda rows: by_loops(rows, lists[1], WEIGHT, reduction), lists[0])
        torch.testing.assert_close(got.student, torch.tensor(slopes, dtype=torch.float64), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_preset_is_the_published_form(backend):
    """Mean squared errors of normalized rows, normalized columns and class correlations."""
    student, teacher = logits("random", 23, 9)
    leaf = student.clone().requires_grad_()

    def correlation(x):
        return torch.cov(x.T) * (len(x) - 1) / (x.shape[1] - 1)

    published = 0.5 * (
        F.mse_loss(F.normalize(leaf), F.normalize(teacher))
        + 2 * F.mse_loss(F.normalize(leaf, dim=0), F.normalize(teacher, dim=0))
    ) + 0.4 * F.mse_loss(correlation(leaf), correlation(teacher))
    published.backward()
    got = run(mcld_kernels.clkd_terms, student, teacher, backend=backend, **PRESETS["published"])
    torch.testing.assert_close(got.loss, published.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.student, leaf.grad, rtol=1e-9, atol=1e-14)


def test_the_mean_of_unit_vectors_is_bounded_by_their_length_and_the_sum_is_not():
    student, teacher = logits("random", 23, 9)
    mean, total = (mcld_kernels.clkd_terms(student, teacher, reduction=name) for name in ("mean", "sum"))
    torch.testing.assert_close((9 * mean.instance, 23 * mean.category), (total.instance, total.category))
    assert mean.instance <= 4 / 9 and mean.category <= 4 / 23 and mean.correlation == total.correlation


@pytest.fixture
def by_chunks():
    """The path in torch operations; test_low_latency.py has the compiled one."""
    with backends.tuned(low_latency=False):
        yield


@pytest.mark.usefixtures("poison", "by_chunks")
class TestTorch:
    @pytest.mark.parametrize("rows", [0, 1, 5])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_any_dtype_and_chunk_is_the_reference(self, dtype, shape, rows):
        """rows: of a chunk; 0: the batch at once. With chunks of a row or column the matrices come by blocks, too."""
        itemsize = 8 if dtype == torch.float64 else 4
        for reduction in ("mean", "sum"):
            with backends.tuned(chunk_bytes=rows * 8 * shape[1] * itemsize if rows else 1 << 25):
                check(CLKD, "torch", "random", *shape, dtype, reduction=reduction, teacher_grad=rows == 5, draws=4)

    @pytest.mark.parametrize("kind", ["converged", "collinear", "large", "zeros"])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
    def test_any_kind_of_logits(self, dtype, shape, kind):
        for chunk, teacher_grad in ((1 << 25, False), (1500, True)):
            with backends.tuned(chunk_bytes=chunk):
                check(CLKD, "torch", kind, *shape, dtype, teacher_grad=teacher_grad)

    @pytest.mark.parametrize("chunk", [1 << 25, 1500])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_late_in_training_the_correlation_keeps_its_digits(self, shape, chunk):
        """Eager's difference of Gram matrices does not: the student is its teacher to 1e-4."""
        teacher = logits("random", *shape)[1].float()
        student = teacher + 1e-4 * logits("random", *shape, torch.float32)[0]
        options = {"weight": (0.0, 0.0, 1.0)}
        want = run(reference.clkd_terms, student.double(), teacher.double(), **options)
        with backends.tuned(chunk_bytes=chunk):
            got = run(mcld_kernels.clkd_terms, student, teacher, backend="torch", **options)
        eager = run(reference.clkd_terms, student, teacher, **options)

        def error(outcome):
            return float((outcome.student - want.student).norm() / want.student.norm())

        torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-4, atol=0)
        assert error(got) < 2e-4 and error(got) < error(eager) / 4

    @pytest.mark.parametrize("weight", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)], ids=str)
    def test_zero_removes_a_term(self, weight):
        student, teacher = logits("random", 9, 7)
        for chunk in (1, 1 << 25):
            with backends.tuned(chunk_bytes=chunk):
                got, want = (
                    run(terms, student, teacher, teacher_grad=True, weight=weight)
                    for terms in (mcld_kernels.clkd_terms, reference.clkd_terms)
                )
            torch.testing.assert_close(tuple(got), tuple(want))
            assert [bool(term) for term in got.terms] == [bool(w) for w in weight]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_tensor_of_weights_gets_the_terms_as_its_gradient(backend):
    student, teacher = logits("random", 9, 7)
    weight = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    for chunk in (1, 1 << 25):
        leaf, weight.grad = student.clone().requires_grad_(), None
        with backends.tuned(chunk_bytes=chunk):
            result = mcld_kernels.clkd_terms(leaf, teacher, weight=weight, backend=backend)
            result.loss.backward()
            want = run(mcld_kernels.clkd_terms, student, teacher, weight=(3.0, 0.5, 2.0), backend=backend)
        torch.testing.assert_close(weight.grad, torch.stack(result[1:]))
        torch.testing.assert_close((result.loss.detach(), leaf.grad), (want.loss, want.student))


def test_the_module_is_the_function():
    student, teacher = logits("random", 9, 7, torch.float32)
    module = CLKDLoss(weight=[1.0, 2.0, 0.0], reduction="sum")
    want = mcld_kernels.clkd_terms(student, teacher, weight=(1.0, 2.0, 0.0), reduction="sum")
    assert torch.equal(module(student, teacher, labels(9, 7)), want.loss) and module.terms(student, teacher) == want
    assert repr(module) == "CLKDLoss(weight=(1.0, 2.0, 0.0), reduction='sum', eps=1e-12, backend='auto')"
    learned = CLKDLoss(weight=torch.nn.Parameter(torch.ones(3)))
    learned(student, teacher).backward()
    assert (learned.weight.grad > 0).all() and "weight" in CLKDLoss(weight=torch.ones(3)).state_dict()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum'; got 'none'"),
        ({"weight": (1.0, -1.0, 0.0)}, ValueError, r"weight must be finite and >= 0; got \(1.0, -1.0, 0.0\)"),
        ({"weight": 1.0}, TypeError, r"3 numbers \(instance, category, correlation\) or a tensor; got 1.0"),
        ({"weight": torch.ones(2)}, ValueError, r"shape \(3,\) \(instance, category, correlation\); got \(2,\)"),
    ],
)
def test_bad_options_say_what_came(change, error, words):
    student, teacher = logits("random", 4, 3, torch.float32)
    for function in (mcld_kernels.clkd_loss, reference.clkd_terms):
        with pytest.raises(error, match=words):
            function(student, teacher, **change)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_without_a_kernel_refuse(name):
    student, teacher = logits("random", 4, 3, torch.float32)
    with pytest.raises(backends.BackendUnavailable, match="it has no kernels for this loss; use 'torch'"):
        mcld_kernels.clkd_loss(student, teacher, backend=name)


def test_a_sum_over_many_pairs_of_classes_keeps_its_precision():
    """(C, C) with a million entries: the term's rounding error stays a few epsilons, as eager's does."""
    student, teacher = (x + 2 for x in logits("random", 420, 1000, torch.float32))
    options = {"weight": (0.0, 0.0, 1.0)}
    want = reference.clkd_loss(student.double(), teacher.double(), **options).item()
    got = mcld_kernels.clkd_loss(student, teacher, backend="torch", **options).item()
    assert abs(got - want) <= 4 * torch.finfo(torch.float32).eps * want


@pytest.mark.parametrize("low_latency", [True, False], ids=["compiled", "by chunks"])
@pytest.mark.parametrize("chunk", [1 << 25, 1500])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_side_much_smaller_than_the_other_keeps_its_digits(shape, chunk, low_latency):
    """The gradient by a student of small logits, as early in training, and by a small teacher."""
    small, large = (x.float() + 1 for x in logits("random", *shape))
    small = small * 1e-4
    options = {"weight": (0.0, 0.0, 1.0)}

    def gradient(loss, student, teacher, **more):
        side = student if student.max() < teacher.max() else teacher
        side.requires_grad_()
        return torch.autograd.grad(loss(student, teacher, **options, **more), side)[0]

    for sides in ((small, large), (large, small)):
        want = gradient(reference.clkd_loss, *(x.double() for x in sides))
        with backends.tuned(chunk_bytes=chunk, low_latency=low_latency):
            got = gradient(mcld_kernels.clkd_loss, *(x.clone() for x in sides), backend="torch")
        assert float((got - want).norm()) < 2e-6 * float(want.norm())
