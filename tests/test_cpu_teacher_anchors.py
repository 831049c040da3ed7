"""Teacher anchors by csrc/cpu/teacher_anchors.cpp, in one pass over slices, with each instruction set."""

import family
import pytest
import torch
from cases import KINDS, check, labels, logits, run
from test_ckd import CASES as CKD
from test_low_latency import MODULE, NEEDS_MODULE, SHAPES, contrasts  # noqa: F401

import mcld_kernels
from mcld_kernels import backends, reference
from mcld_kernels.backends import torch_teacher_anchors

pytestmark = NEEDS_MODULE
ONE_CHUNK = 1  # bytes: no matrix fits, so that no call takes the path that keeps one
# Beside those of the small calls: two slices, the last one short of a group; three, and parts of a block.
LARGE = [(700, 33), (1100, 9)]
INSTANCE = {"weight": (1.3, 0.0, 0.0), "direction": "teacher"}


@pytest.fixture(params=MODULE.isas() if MODULE else ["fastest"])
def isa(request, contrasts):  # noqa: F811
    """Takes an instruction set; whatever is computed must be computed there."""
    with backends.tuned(isa=request.param, chunk_bytes=ONE_CHUNK):
        yield request.param
    assert not contrasts


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_within_the_error_bar(shape, isa, poison):
    draws = 1 if shape in LARGE else 3
    family.check(CKD["teacher"], "torch", "random", *shape, torch.float32, temperature=0.2, weight=3.0, draws=draws)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_logits(kind, isa, poison):
    family.check(CKD["teacher"], "torch", kind, 37, 29, torch.float32, temperature=0.1)
    check("torch", "cpu", kind, 37, 29, torch.float32, **INSTANCE)


@pytest.mark.parametrize("temperature", [0.025, 1.0, 20.0])
def test_temperatures(temperature, isa):
    family.check(CKD["teacher"], "torch", "random", 40, 31, torch.float32, temperature=temperature)


def test_late_in_training_the_loss_keeps_its_digits(isa):
    teacher = 3 * logits("random", 40, 96, torch.float32)[1]
    student = teacher + 1e-2 * logits("random", 40, 96, torch.float32)[0]
    options = {"temperature": 0.07, "weight": 1.0}
    got = family.run(mcld_kernels.ckd_terms, student, teacher, **options)
    want = family.run(reference.ckd_terms, student.double(), teacher.double(), **options)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-4, atol=0)
    assert float((got.student - want.student).norm()) < 1e-3 * float(want.student.norm())


@pytest.mark.parametrize("eps", [0.0, 1e-12, 2.0])
def test_rows_without_direction(eps, isa):
    family.check_without_direction(mcld_kernels.ckd_terms, reference.ckd_terms, eps, atol=1e-6, grad_atol=1e-6)


@pytest.mark.parametrize("side", range(2), ids=["student", "teacher"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e30], ids=str)
def test_values_that_are_not_finite_are_nan(value, side, isa):
    pair = logits("random", 9, 7, torch.float32)
    pair[side][3, 2] = value
    got = family.run(mcld_kernels.ckd_terms, *pair)
    assert got.loss.isnan() and got.terms.isnan().all() and got.student[3].isnan().all()


@pytest.mark.parametrize("layout", family.LAYOUTS)
def test_layouts_change_no_bit(layout, isa):
    family.check_layout(mcld_kernels.ckd_terms, layout)


def test_a_tensor_as_weight_and_no_gradient(isa):
    family.check_tensor_of_weights(mcld_kernels.ckd_terms, 3.0)
    student, teacher = logits("random", 21, 17, torch.float32)
    want = family.run(mcld_kernels.ckd_terms, student, teacher, weight=3.0)
    assert torch.equal(mcld_kernels.ckd_loss(student, teacher, weight=3.0), want.loss)


def test_threads_and_parts_change_no_bit(isa, monkeypatch):
    """A part ends where Python hears signals, after a slice."""
    student, teacher = logits("random", 1100, 40, torch.float32)
    first, *others = family.by_threads(lambda: family.run(mcld_kernels.ckd_terms, student, teacher))
    monkeypatch.setattr(torch_teacher_anchors, "PART", 1)
    others.append(family.run(mcld_kernels.ckd_terms, student, teacher))
    for other in others:
        family.assert_same_bits(other, first)


DECLINED = {
    "switched off": {"tuned": {"compiled_contrast": False}},
    "not compiled": {"tuned": {"compiled": False}},
    "student anchors": {"direction": "student", "tuned": {"compiled_contrast": False}},
    "further terms": {"weight": (1.0, 1.0, 0.0)},
    "mask": {"mask_same_class": True},
    "exponentials beyond the range": {"temperature": 0.02},
    "teacher gradient": {"teacher_grad": True},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", DECLINED.values(), ids=DECLINED)
def test_declined(options, contrasts):  # noqa: F811
    options = INSTANCE | options
    student, teacher = logits("random", 21, 17, options.pop("dtype", torch.float32))
    with backends.tuned(chunk_bytes=ONE_CHUNK, **options.pop("tuned", {})):
        run("torch", student, teacher, labels(21, 17), **options)
    assert contrasts


def test_without_avx2_large_calls_take_the_librarys_gemms(contrasts, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch_teacher_anchors, "isa_index", lambda name: 0)
    with backends.tuned(chunk_bytes=ONE_CHUNK):
        run("torch", *logits("random", 21, 17, torch.float32), None, **INSTANCE)
    assert contrasts
