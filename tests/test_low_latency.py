"""The CPU's low-latency path against the fp64 reference, on every way it can take.

compiled: the module mcld_kernels._cpu computes the whole call, with each instruction set of this machine; compiled-mm:
torch takes the GEMMs; torch: there is no compiled module.
"""

import family
import pytest
import torch
from cases import KINDS, WEIGHT, check, labels, logits, options_of, run, truth
from test_ckd import CASES as CKD
from test_clkd import CLKD
from torch.utils._python_dispatch import TorchDispatchMode

import mcld_kernels
from mcld_kernels import backends
from mcld_kernels.backends.torch import TorchKernels
from mcld_kernels.backends.torch_low_latency import compiled_module, unavailable_reason
from mcld_kernels.family_options import clkd_options
from mcld_kernels.kernels import LossInputs
from mcld_kernels.losses import clkd

MODULE = compiled_module()
NEEDS_MODULE = pytest.mark.skipif(MODULE is None, reason=f"no mcld_kernels._cpu: {unavailable_reason()}")
ANY_SIZE = 1 << 62
PATHS = [
    *(
        pytest.param({"compiled_gemm": ANY_SIZE, "isa": isa}, id=f"compiled-{isa}", marks=NEEDS_MODULE)
        for isa in (MODULE.isas() if MODULE else ["fastest"])
    ),
    pytest.param({"compiled_gemm": 0}, id="compiled-mm", marks=NEEDS_MODULE),
    pytest.param({"compiled": False}, id="torch"),
]
TERMS = [(1.0, 0.7, 0.4), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
# One row or class, below a vector, on either side of a vector of 16 and of a tile of 6 rows, past the parts of a sum.
SHAPES = [(1, 1), (1, 5), (5, 1), (2, 3), (15, 16), (16, 17), (33, 31), (67, 130), (131, 65)]


@pytest.fixture
def contrasts(monkeypatch):
    """The contrasts that the general path computes."""
    seen = []
    for name in ("contrast", "anchor_pass"):
        step = getattr(TorchKernels, name)
        monkeypatch.setattr(TorchKernels, name, lambda *args, step=step: seen.append(args) or step(*args))
    return seen


@pytest.fixture(params=PATHS)
def path(request, contrasts):
    """Takes a path; whatever is computed must be computed there."""
    with backends.tuned(**request.param):
        yield request.param
    assert not contrasts


@pytest.mark.parametrize("weight", TERMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_bar(shape, weight, path, poison):
    check("torch", "cpu", "random", *shape, torch.float32, weight=weight)


@pytest.mark.parametrize("weight", [(1.3, 0.0, 0.0), (1.0, 0.0, 0.4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_teacher_anchors_within_the_error_bar(shape, weight, path, poison):
    check("torch", "cpu", "random", *shape, torch.float32, weight=weight, direction="teacher")


@pytest.mark.parametrize("negatives", ["teacher", "student"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ckd_within_the_error_bar(shape, negatives, path, poison):
    family.check(CKD[negatives], "torch", "random", *shape, torch.float32, temperature=0.2, weight=3.0)


@pytest.mark.parametrize("negatives", ["teacher", "student"])
def test_ckd_on_the_threads_share(negatives, path):
    family.check(CKD[negatives], "torch", "random", 260, 150, torch.float32, draws=1)
    family.check(CKD[negatives], "torch", "zeros", 37, 29, torch.float32)


@pytest.fixture(params=[x for x in PATHS if "isa" in x.values[0]])
def clkd_path(request, monkeypatch):
    """Takes an instruction set; no call may go by chunks."""

    def by_chunks(*_):
        raise AssertionError("the call went by chunks")

    monkeypatch.setattr(clkd, "_CLKD", by_chunks)
    with backends.tuned(**request.param):
        yield request.param


@pytest.mark.parametrize("weight", [(0.5, 1.0, 0.4), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (260, 150)], ids=str)
def test_clkd_within_the_error_bar(shape, weight, clkd_path, poison):
    for reduction in ("mean", "sum"):
        family.check(CLKD, "torch", "random", *shape, torch.float32, weight=weight, reduction=reduction)


@pytest.mark.parametrize("kind", KINDS)
def test_clkd_of_kinds_of_logits(kind, clkd_path, poison):
    family.check(CLKD, "torch", kind, 37, 29, torch.float32)


def test_clkd_late_in_training_keeps_its_digits(clkd_path):
    teacher = logits("random", 40, 31)[1].float()
    student = teacher + 1e-4 * logits("random", 40, 31, torch.float32)[0]
    options = {"weight": (0.0, 0.0, 1.0)}
    want = family.run(mcld_kernels.reference.clkd_terms, student.double(), teacher.double(), **options)
    got = family.run(mcld_kernels.clkd_terms, student, teacher, **options)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-4, atol=0)
    assert float((got.student - want.student).norm()) < 2e-4 * float(want.student.norm())


@pytest.mark.parametrize("side", range(2), ids=["student", "teacher"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e30], ids=str)
def test_clkd_of_values_that_are_not_finite_is_nan(value, side, clkd_path):
    pair = logits("random", 9, 7, torch.float32)
    pair[side][3, 2] = value
    got = family.run(mcld_kernels.clkd_terms, *pair)
    assert got.loss.isnan() and got.terms[:2].isnan().all() and not got.terms[2].isfinite()
    assert got.student[3].isnan().all()


@pytest.mark.parametrize("eps", [0.0, 1e-12, 2.0])
def test_clkd_of_rows_and_columns_without_direction(eps, clkd_path):
    family.check_without_direction(
        mcld_kernels.clkd_terms, mcld_kernels.reference.clkd_terms, eps, atol=1e-7, grad_atol=1e-6
    )


@pytest.mark.parametrize("layout", family.LAYOUTS)
def test_layouts_change_no_bit_of_clkd(layout, clkd_path):
    family.check_layout(mcld_kernels.clkd_terms, layout)


def test_a_tensor_of_weights_of_clkd(clkd_path):
    family.check_tensor_of_weights(mcld_kernels.clkd_terms, WEIGHT)


@NEEDS_MODULE
@pytest.mark.parametrize(
    ("n", "num_classes", "tuning", "taken"),
    [
        (9, 7, {}, True),
        (9, 7, {"low_latency": False}, False),
        (9, 7, {"compiled": False}, False),
        (9, 7, {"chunk_bytes": 1024}, False),
        (5000, 2, {}, False),
        (8, 1000, {}, False),  # (B, B) matrices
        (9, 7, {"compiled_gemm": 9 * 49 - 1}, False),
    ],
)
def test_the_calls_of_clkd_that_the_compiled_module_takes(n, num_classes, tuning, taken):
    student, teacher = torch.zeros(n, num_classes), torch.zeros(n, num_classes)
    options, _ = clkd_options(weight=WEIGHT, reduction="mean", eps=0.0)
    shared = {"target": None, "weight": None, "options": options, "student_grad": True}
    with backends.tuned(**tuning):
        kernels = backends.kernel_set("torch", student, teacher)
    for dtype, teacher_grad, expected in (
        (torch.float32, False, taken),
        (torch.float32, True, False),
        (torch.float64, False, False),
    ):
        pair = {"student": student.to(dtype), "teacher": teacher.to(dtype)}
        inputs = LossInputs(**pair, **shared, teacher_grad=teacher_grad)
        assert (kernels.clkd_low_latency(inputs) is not None) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_logits(kind, path):
    check("torch", "cpu", kind, 37, 29, torch.float32)


@pytest.mark.parametrize("temperature", [0.025, 1.0, (0.3, 0.3, 0.05)], ids=str)
def test_temperatures(temperature, path):
    check("torch", "cpu", "random", 37, 29, torch.float32, temperature=temperature)


def test_fp64(contrasts):
    check("torch", "cpu", "random", 37, 29, torch.float64)
    assert not contrasts


def test_larger_than_the_threads_share(path):
    check("torch", "cpu", "random", 260, 150, torch.float32, draws=1)
    check("torch", "cpu", "random", 150, 260, torch.float32, draws=1)


def test_a_tensor_of_weights_and_its_gradient(path):
    student, teacher = logits("random", 21, 17, torch.float32)
    target, weight = labels(21, 17), torch.tensor(WEIGHT, requires_grad=True)
    want = truth(student, teacher, target, weight=WEIGHT)
    got = run("torch", student, teacher, target, weight=weight)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.student.double(), want.student, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(weight.grad.double(), want.terms, rtol=1e-5, atol=0)


def test_a_small_loss_keeps_its_digits(path):
    """Where the positive dominates, a log-sum-exp less the positive would be rounding alone."""
    teacher = logits("random", 64, 512, torch.float32)[1]
    student = teacher + 1e-3 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 0.05, "weight": (1.0, 0.0, 0.0)}
    want = truth(student, teacher, **options)
    got = run("torch", student, teacher, **options)
    assert 0 < float(want.loss) < 1e-5
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-4, atol=0)
    assert float((got.student.double() - want.student).norm() / want.student.norm()) < 1e-3


@pytest.mark.parametrize("side", range(2), ids=["student", "teacher"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30], ids=str)
def test_values_that_are_not_finite_give_nan(value, side, path):
    pair = logits("random", 9, 7, torch.float32)
    pair[side][3, 2] = value  # the square of 1e30 overflows
    got = run("torch", *pair, labels(9, 7))
    assert got.loss.isnan() and got.terms.isnan().all()
    assert got.student[3].isnan().all()


@pytest.mark.parametrize("eps", [0.0, 1e-12, 2.0])
def test_rows_and_columns_without_direction(eps, path):
    """With eps 2 some rows are short of it, and count as zeros as well."""
    student, teacher = logits("zeros", 13, 11, torch.float32)
    if eps == 2.0:
        student = student * 0.7
    got = run("torch", student, teacher, labels(13, 11), eps=eps)
    want = truth(student, teacher, labels(13, 11), eps=eps)
    torch.testing.assert_close(got.terms.double(), want.terms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.student.double(), want.student, rtol=1e-4, atol=1e-5)
    assert not got.student[student.norm(dim=1) <= eps][:, student.norm(dim=0) <= eps].any()


@pytest.mark.parametrize("layout", family.LAYOUTS)
def test_layouts_change_no_bit(layout, path):
    student, teacher = logits("random", 33, 21, torch.float32)
    target = labels(33, 21)
    spread = target.repeat_interleave(2)[::2]
    with backends.tuned(**path):
        want = run("torch", student, teacher, target)
        got = run("torch", family.laid_out(student, layout), family.laid_out(teacher, layout), spread)
        expanded = run("torch", student, teacher[:1].expand(33, 21), target)
        copied = run("torch", student, teacher[:1].repeat(33, 1), target)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.student, want.student)
    assert torch.equal(expanded.loss, copied.loss) and torch.equal(expanded.student, copied.student)


def test_inputs_are_not_written(path):
    student, teacher = logits("random", 33, 21, torch.float32)
    tensors = (student, teacher, labels(33, 21))
    before = [x.clone() for x in tensors]
    run("torch", *tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@NEEDS_MODULE
@pytest.mark.parametrize("negatives", [None, "teacher", "student", "clkd"], ids=str)
def test_threads_change_no_bit(negatives):
    student, teacher = logits("random", 300, 200, torch.float32)

    def evaluate():
        if negatives is None:
            return run("torch", student, teacher, labels(300, 200))
        if negatives == "clkd":
            return family.run(mcld_kernels.clkd_terms, student, teacher)
        return family.run(mcld_kernels.ckd_terms, student, teacher, negatives=negatives)

    with backends.tuned(compiled_gemm=ANY_SIZE):
        first, *others = family.by_threads(evaluate)
    for other in others:
        family.assert_same_bits(other, first)


def test_calls_side_by_side(path):
    """The compiled module releases the GIL and keeps nothing between calls."""

    def evaluate(problem):
        with backends.tuned(**path):  # a thread has a context of its own
            return run("torch", *problem)

    family.check_side_by_side(evaluate)


DECLINED = {
    "switched off": {"tuned": {"low_latency": False}},
    "larger than a chunk": {"tuned": {"chunk_bytes": 4 * 20 * 20}},
    "teacher anchors": {"direction": "teacher"},
    "both directions": {"direction": "symmetric"},
    "mask": {"mask_same_class": True},
    "present classes": {"present_only": True},
    "a second temperature for rows": {"temperature": (0.1, 0.2, 0.1)},
    "exponentials beyond the range": {"temperature": 0.02},
    "ignored labels": {"ignored": 0.3},
    "a label that may be ignored": {"ignore_index": 0},
    "teacher gradient": {"teacher_grad": True},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", DECLINED.values(), ids=DECLINED)
def test_declined(options, contrasts):
    options = dict(options)
    dtype, ignored = options.pop("dtype", torch.float32), options.pop("ignored", 0.0)
    student, teacher = logits("random", 21, 17, dtype)
    with backends.tuned(**options.pop("tuned", {})):
        run("torch", student, teacher, labels(21, 17, ignored=ignored), **options)
    assert contrasts


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


# Operations with the gradient and without it. Here they are the time of a call: a small one costs 2 to 4 us each.
COUNTS = {
    "compiled": ({"compiled_gemm": ANY_SIZE}, 4, 3),
    "compiled-mm": ({"compiled_gemm": 0}, 18, 13),
    "torch": ({"compiled": False}, 66, 48),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=NEEDS_MODULE) if n != "torch" else n for n in COUNTS])
def test_number_of_operations(name):
    tuning, with_grad, without_grad = COUNTS[name]
    student, teacher = logits("random", 64, 100, torch.float32)
    for student_grad, most in ((True, with_grad), (False, without_grad)):
        inputs = LossInputs(
            student=student,
            teacher=teacher,
            target=labels(64, 100),
            weight=None,
            options=options_of()[0],
            student_grad=student_grad,
            teacher_grad=False,
            labels_are_classes=True,
        )
        with backends.tuned(**tuning):
            kernels = backends.kernel_set("torch", student, teacher)
        with _Operations() as seen:
            assert kernels.mcld_low_latency(inputs) is not None
        assert len(seen.names) <= most, seen.names


@NEEDS_MODULE
def test_an_instruction_set_that_is_not_there():
    with pytest.raises(ValueError), backends.tuned(isa="none"):
        mcld_kernels.mcld_loss(*logits("random", 4, 3, torch.float32), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("batch", [1, 9, 33])
def test_a_class_of_one_row_has_no_gap(batch, path):
    """Its mean is the partner: late in training nothing else may remain of the sample-wise term."""
    student, teacher = logits("random", batch, 40, torch.float32)
    terms = mcld_kernels.mcld_terms(student, teacher, torch.arange(batch), weight=(1.0, 1.0, 0.0))
    assert torch.equal(terms.instance, terms.sample)
