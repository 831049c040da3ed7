"""MLKD by csrc/cpu/mlkd.cpp against the fp64 reference, with each instruction set and with torch's GEMMs."""

import family
import pytest
import torch
from cases import KINDS, labels, logits
from test_low_latency import MODULE, NEEDS_MODULE, PATHS
from test_mlkd import MLKD, WEIGHT

import mcld_kernels
from mcld_kernels import backends, reference
from mcld_kernels.family_options import mlkd_options
from mcld_kernels.kernels import LossInputs
from mcld_kernels.losses import mlkd, mlkd_whole

pytestmark = NEEDS_MODULE
TERMS = [WEIGHT, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.7)]
# Below a vector, on either side of a vector of 16 and of a tile of 6 rows, past the parts of a sum.
SHAPES = [(2, 1), (3, 5), (15, 16), (17, 33), (67, 130), (131, 65)]


@pytest.fixture(params=[x for x in PATHS if x.id != "torch"])
def path(request, monkeypatch):
    """Takes a path; no call may go another way."""

    def other(*_):
        raise AssertionError("the call went another way")

    monkeypatch.setattr(mlkd_whole, "compute", other)
    for step in ("correlate", "_contrast", "align"):
        monkeypatch.setattr(mlkd, step, other)
    with backends.tuned(**request.param):
        yield request.param


@pytest.mark.parametrize("weight", TERMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_bar(shape, weight, path, poison):
    for views, ignored in ((1, 0.0), (1, 0.4), (2, 0.0), (2, 0.4)):
        family.check(
            MLKD, "torch", "random", *shape, torch.float32, weight=weight, views=views, ignored=ignored, draws=2
        )


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_logits(kind, path, poison):
    family.check(MLKD, "torch", kind, 37, 29, torch.float32)
    family.check(MLKD, "torch", kind, 37, 29, torch.float32, weight=(0.0, 0.0, 1.0), views=1)


@pytest.mark.parametrize("kind", ["random", "alike"])
def test_temperatures(kind, path):
    """With rows alike the student's sums are far below the teacher's."""
    for hot, cold in ((0.025, 1.0), (0.05, 0.05), (1.0, 0.025)):
        family.check(
            MLKD, "torch", kind, 40, 31, torch.float32, correlation_temperature=hot, supervised_temperature=cold
        )


def test_a_batch_for_several_threads(path):
    family.check(MLKD, "torch", "random", 260, 150, torch.float32, draws=1)


def test_pairs_that_are_alike_keep_their_digits(path):
    """Late in training; SimCLR's form, where each row has one positive."""
    teacher = logits("random", 40, 96, torch.float32)[1]
    student = teacher + 0.3 * logits("random", 40, 96, torch.float32)[0]
    for weight in ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0)):
        results = [
            family.run(terms, student.to(dtype), teacher.to(dtype), torch.arange(40), weight=weight)
            for terms, dtype in (
                (mcld_kernels.mlkd_terms, torch.float32),
                (reference.mlkd_terms, torch.float32),
                (reference.mlkd_terms, torch.float64),
            )
        ]
        got, eager, want = results
        for name in ("loss", "student"):
            exact = getattr(want, name)
            error, bar = (float((getattr(x, name).double() - exact).norm() / exact.norm()) for x in (got, eager))
            assert error < 2 * bar + 1e-6, (weight, name, error, bar)


@pytest.mark.parametrize(
    "target",
    [
        torch.arange(24),
        torch.full((24,), 3),
        torch.arange(24) % 5,
        torch.arange(24) * (1 << 58),
        torch.where(torch.arange(24) % 2 == 0, -7, torch.arange(24)),
        torch.full((24,), -7),
    ],
    ids=["all differ", "all alike", "some alike", "large", "half ignored", "all ignored"],
)
def test_labels(target, path):
    student, teacher = logits("random", 24, 12, torch.float32)
    for views in (1, 2):
        options = {"weight": (0.5, 0.0, 2.0), "views": views, "ignore_index": -7}
        got = family.run(mcld_kernels.mlkd_terms, student, teacher, torch.stack((target, target), 1)[:, 0], **options)
        want = family.run(reference.mlkd_terms, student.double(), teacher.double(), target, **options)
        torch.testing.assert_close(got.terms.double(), want.terms, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.student.double(), want.student, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 2.0])
def test_rows_without_direction(eps, path):
    for views in (1, 2):
        family.check_without_direction(
            mcld_kernels.mlkd_terms, reference.mlkd_terms, eps, labels(13, 4), atol=1e-6, grad_atol=1e-5, views=views
        )


@pytest.mark.parametrize("side", range(2), ids=["student", "teacher"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e30], ids=str)
def test_values_that_are_not_finite_are_nan(value, side, path):
    pair = logits("random", 9, 7, torch.float32)
    pair[side][3, 2] = value
    got = family.run(mcld_kernels.mlkd_terms, *pair, labels(9, 4))
    assert got.loss.isnan() and got.terms.isnan().all() and got.student[3].isnan().all()


@pytest.mark.parametrize("layout", family.LAYOUTS)
def test_layouts_change_no_bit(layout, path):
    family.check_layout(mcld_kernels.mlkd_terms, layout, labels(33, 9))


def test_a_tensor_of_weights(path):
    family.check_tensor_of_weights(mcld_kernels.mlkd_terms, WEIGHT, labels(21, 9))


def test_without_gradient_the_loss_is_the_same(path):
    student, teacher = logits("random", 33, 21, torch.float32)
    for views in (1, 2):
        want = family.run(mcld_kernels.mlkd_terms, student, teacher, labels(33, 9), views=views)
        got = mcld_kernels.mlkd_terms(student, teacher, labels(33, 9), views=views)
        assert torch.equal(got.loss, want.loss) and torch.equal(torch.stack(got[1:]), want.terms)


def test_threads_change_no_bit(path):
    student, teacher = logits("random", 300, 200, torch.float32)
    first, *others = family.by_threads(lambda: family.run(mcld_kernels.mlkd_terms, student, teacher, labels(300, 100)))
    if "isa" in path:  # torch's GEMMs promise no order of a sum
        for other in others:
            family.assert_same_bits(other, first)


def test_calls_side_by_side(path):
    def evaluate(problem):
        with backends.tuned(**path):  # a thread has a context of its own
            return family.run(mcld_kernels.mlkd_terms, *problem)

    family.check_side_by_side(evaluate)


@pytest.mark.parametrize(
    ("n", "tuning", "options", "taken"),
    [
        (9, {}, {}, True),
        (9, {"low_latency": False}, {}, False),
        (9, {"compiled": False}, {}, False),
        (9, {"chunk_bytes": 1024}, {}, False),
        (1, {}, {}, False),
        (5000, {"chunk_bytes": 1 << 40}, {}, False),
        (9, {}, {"weight": (0.0, 0.0, 0.0)}, False),
        (9, {}, {"supervised_temperature": 0.02}, False),
    ],
)
def test_the_calls_that_it_takes(n, tuning, options, taken):
    student, teacher = torch.zeros(n, 7), torch.zeros(n, 7)
    shared = {"target": None, "weight": None, "student_grad": True}
    shared["options"], _ = mlkd_options(
        **{
            "correlation_temperature": 0.5, "supervised_temperature": 0.07, "weight": (1.0, 1.0, 0.0), "views": 2,
            "ignore_index": -100, "eps": 0.0,
        } | options
    )  # fmt: skip
    with backends.tuned(**tuning):
        kernels = backends.kernel_set("torch", student, teacher)
    for dtype, teacher_grad, expected in (
        (torch.float32, False, taken),
        (torch.float32, True, False),
        (torch.float64, False, False),
    ):
        pair = {"student": student.to(dtype), "teacher": teacher.to(dtype)}
        assert (
            kernels.mlkd_low_latency(LossInputs(**pair, **shared, teacher_grad=teacher_grad)) is not None
        ) == expected


def test_views_that_are_not_there():
    with pytest.raises(ValueError, match="one or two views"):
        MODULE.mlkd(MODULE.MLKD_ALL_STEPS, 0, 1, *(0,) * 14, 1.0, 1.0, 1.0, True, True, True, 3, 0, 1.0, 1.0, 0.0)
