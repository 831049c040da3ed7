"""Properties that hold for any logits: invariances, bounds and linearity, on examples that hypothesis draws."""

import math

import pytest
import torch
from cases import run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mcld_kernels
from mcld_kernels import reference

BACKENDS = ("reference", "torch")
more = settings(max_examples=8 * settings.default.max_examples)
ROWS, CATEGORY = (1.0, 1.0, 0.0), (0.0, 0.0, 1.0)


@st.composite
def inputs(draw, ignored=True, zeros=True):
    """fp64 student and teacher of any shape, a row and a column without direction, and labels."""
    n, c = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    student, teacher = torch.randn(2, n, c, generator=generator, dtype=torch.float64).unbind()
    student, teacher = student.clone(), teacher.clone()
    if zeros and draw(st.booleans()):
        student[draw(st.integers(0, n - 1))] = 0
        teacher[:, draw(st.integers(0, c - 1))] = 0
    target = torch.tensor(
        draw(st.lists(st.integers(-1 if ignored else 0, c - 1), min_size=n, max_size=n)), dtype=torch.int64
    )
    return student, teacher, target.where(target >= 0, -100)


weights = st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 7.0])] * 3)
temperatures = st.one_of(st.floats(0.02, 5), st.tuples(*[st.floats(0.02, 5)] * 3))
options = st.fixed_dictionaries(
    {
        "temperature": temperatures,
        "weight": weights,
        "direction": st.sampled_from(["student", "teacher", "symmetric"]),
        "mask_same_class": st.booleans(),
        "present_only": st.booleans(),
    }
)


def close(got, want, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def flat(outcome):
    return [x for x in outcome if x is not None]


@more
@given(inputs(), options, st.booleans(), st.floats(-3, 3))
def test_torch_is_the_reference(tensors, chosen, teacher_grad, upstream):
    got, want = (
        run(name, *tensors, upstream=upstream, teacher_grad=teacher_grad, **chosen) for name in ("torch", "reference")
    )
    close(flat(got), flat(want), atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
class TestInvariance:
    @given(inputs(), options, st.data())
    def test_row_scaling(self, backend, tensors, chosen, data):
        """Row terms see directions only: positive factors on the rows change nothing, the gradient by their inverse."""
        student, teacher, target = tensors
        factors = st.lists(st.floats(0.01, 100), min_size=len(student), max_size=len(student))
        a, b = (torch.tensor(data.draw(factors), dtype=torch.float64)[:, None] for _ in range(2))
        chosen = {**chosen, "weight": ROWS}
        want = run(backend, student, teacher, target, **chosen)
        got = run(backend, a * student, b * teacher, target, **chosen)
        close(got.terms, want.terms)
        close(a * got.student, want.student)

    @given(inputs(), options, st.data())
    def test_column_scaling(self, backend, tensors, chosen, data):
        student, teacher, target = tensors
        factors = st.lists(st.floats(0.01, 100), min_size=student.shape[1], max_size=student.shape[1])
        a, b = (torch.tensor(data.draw(factors), dtype=torch.float64) for _ in range(2))
        chosen = {**chosen, "weight": CATEGORY}
        want = run(backend, student, teacher, target, **chosen)
        got = run(backend, a * student, b * teacher, target, **chosen)
        close(got.terms, want.terms)
        close(a * got.student, want.student)

    @given(inputs(), options)
    def test_gradients_are_orthogonal(self, backend, tensors, chosen):
        """No gradient along a row for row terms, nor along a column for the category-wise term."""
        student, teacher, target = tensors
        for weight, dim in ((ROWS, 1), (CATEGORY, 0)):
            got = run(backend, student, teacher, target, teacher_grad=True, **{**chosen, "weight": weight})
            for x, gradient in ((student, got.student), (teacher, got.teacher)):
                size = (x.norm(dim=dim) * gradient.norm(dim=dim)).clamp(min=1e-3)
                assert ((x * gradient).sum(dim).abs() <= 1e-9 * size).all()

    @given(inputs(), options, st.data())
    def test_order_of_the_batch(self, backend, tensors, chosen, data):
        student, teacher, target = tensors
        order = torch.tensor(data.draw(st.permutations(range(len(student)))))
        want = run(backend, student, teacher, target, teacher_grad=True, **chosen)
        got = run(backend, student[order], teacher[order], target[order], teacher_grad=True, **chosen)
        close([got.loss, got.terms], [want.loss, want.terms])
        close([got.student, got.teacher], [want.student[order], want.teacher[order]], atol=1e-8)

    @given(inputs(), options, st.data())
    def test_names_of_the_classes(self, backend, tensors, chosen, data):
        student, teacher, target = tensors
        order = torch.tensor(data.draw(st.permutations(range(student.shape[1]))))
        renamed = order.argsort()[target.clamp(min=0)].where(target >= 0, -100)
        want = run(backend, student, teacher, target, **chosen)
        got = run(backend, student[:, order], teacher[:, order], renamed, **chosen)
        close([got.loss, got.terms], [want.loss, want.terms])
        close(got.student, want.student[:, order], atol=1e-8)

    @given(inputs(), options)
    def test_teacher_anchors_are_student_anchors_with_the_sides_changed(self, backend, tensors, chosen):
        student, teacher, target = tensors
        chosen = {**chosen, "weight": ROWS}
        got = run(backend, student, teacher, target, teacher_grad=True, **{**chosen, "direction": "teacher"})
        want = run(backend, teacher, student, target, teacher_grad=True, **{**chosen, "direction": "student"})
        close([got.terms, got.student, got.teacher], [want.terms, want.teacher, want.student], atol=1e-8)

    @given(inputs(), options)
    def test_symmetric_is_the_mean_of_both_directions(self, backend, tensors, chosen):
        both, one, other = (
            run(backend, *tensors, teacher_grad=True, **{**chosen, "direction": direction})
            for direction in ("symmetric", "student", "teacher")
        )
        for a, b, c in zip(both, one, other, strict=True):
            close(a, (b + c) / 2, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
class TestBounds:
    @given(inputs(), options)
    def test_of_every_term(self, backend, tensors, chosen):
        """0 <= InfoNCE <= log(candidates) + 2 / temperature, and sample-wise >= 0 as a cross-entropy."""
        student, teacher, target = tensors
        chosen = {**chosen, "weight": (1.0, 1.0, 1.0)}
        terms = run(backend, student, teacher, target, **chosen).terms
        temperature = chosen["temperature"]
        temperature = temperature if isinstance(temperature, tuple) else (temperature,) * 3
        for term, t, candidates in zip(
            terms.tolist(), temperature, (*[len(student)] * 2, student.shape[1]), strict=True
        ):
            assert -1e-9 <= term <= math.log(candidates) + 2 / t + 1e-9

    @given(inputs(), options)
    def test_the_mask_only_removes_from_the_denominator(self, backend, tensors, chosen):
        masked, whole = (
            run(backend, *tensors, **{**chosen, "mask_same_class": mask, "weight": (1.0, 0.0, 0.0)}).loss
            for mask in (True, False)
        )
        assert masked <= whole + 1e-9

    @given(inputs(ignored=False), options)
    def test_sample_is_instance_where_every_class_is_alone(self, backend, tensors, chosen):
        student, teacher, _ = tensors
        n = min(student.shape)
        temperature = chosen["temperature"] if isinstance(chosen["temperature"], float) else chosen["temperature"][0]
        chosen = {"direction": chosen["direction"], "temperature": temperature}
        got = run(backend, student[:n], teacher[:n], torch.arange(n), **chosen)
        close(got.terms[0], got.terms[1])

    @given(inputs(zeros=False))
    def test_a_step_along_the_gradient_lowers_the_loss(self, backend, tensors):
        student, teacher, target = tensors
        assume(student.norm(dim=0).min() > 0.05 and student.norm(dim=1).min() > 0.05)
        got = run(backend, student, teacher, target, temperature=0.5)
        step = student - 1e-6 * got.student / got.student.norm().clamp(min=1e-6)
        after = run(backend, step, teacher, target, temperature=0.5)
        assert after.loss <= got.loss + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
class TestWeights:
    @given(inputs(), options, weights)
    def test_linear(self, backend, tensors, chosen, other):
        """The loss and its gradients are linear in the weights; the terms do not see them."""
        first = run(backend, *tensors, teacher_grad=True, **chosen)
        second = run(backend, *tensors, teacher_grad=True, **{**chosen, "weight": other})
        total = tuple(a + b for a, b in zip(chosen["weight"], other, strict=True))
        both = run(backend, *tensors, teacher_grad=True, **{**chosen, "weight": total})
        for name in ("loss", "student", "teacher"):
            close(getattr(both, name), getattr(first, name) + getattr(second, name), atol=1e-8)
        close(first.loss, (torch.tensor(chosen["weight"], dtype=torch.float64) * first.terms).sum())

    @given(inputs(), options)
    def test_a_tensor_is_the_same_as_numbers(self, backend, tensors, chosen):
        want = run(backend, *tensors, teacher_grad=True, **chosen)
        tensor = torch.tensor(chosen["weight"], dtype=torch.float64)
        got = run(backend, *tensors, teacher_grad=True, **{**chosen, "weight": tensor})
        close([got.loss, got.student, got.teacher], [want.loss, want.student, want.teacher], atol=1e-8)


@given(inputs(), options, st.integers(1, 5))
def test_chunks_change_nothing(tensors, chosen, rows):
    whole = run("torch", *tensors, teacher_grad=True, **chosen)
    with mcld_kernels.backends.tuned(chunk_bytes=rows * 8 * max(tensors[0].shape)):
        parts = run("torch", *tensors, teacher_grad=True, **chosen)
    close(list(parts), list(whole), atol=1e-8)


@given(inputs(), options)
def test_the_module_is_the_function(tensors, chosen):
    got = mcld_kernels.MCLDLoss(**chosen, backend="torch")(*tensors)
    close(got, reference.mcld_loss(*tensors, **chosen))
