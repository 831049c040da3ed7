"""Gradients: against finite differences, by the weight tensor, of second order, and where there is no direction."""

import pytest
import torch
from cases import labels, logits, run

import mcld_kernels
from mcld_kernels import reference

BACKENDS = ("reference", "torch")
OPTIONS = {
    "default": {},
    "temperatures": {"temperature": (0.3, 0.5, 0.9)},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "mask": {"mask_same_class": True},
    "mask-symmetric": {"mask_same_class": True, "direction": "symmetric"},
    "present": {"present_only": True},
    "0.01": {"temperature": 0.01},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(5, 4), (3, 7), (1, 3), (4, 1)], ids=str)
def test_gradcheck(shape, options, backend):
    student, teacher = logits("random", *shape)
    weight = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    for x in (student, teacher, weight):
        x.requires_grad_()
    target = labels(*shape)
    target[1:2] = -100
    options = {"temperature": 0.4, **options}

    def loss(s, t, w):
        return mcld_kernels.mcld_loss(s, t, target, weight=w, backend=backend, **options)

    # A second backward of the same graph must give the same bits.
    assert torch.autograd.gradcheck(loss, (student, teacher, weight), nondet_tol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_several_chunks(backend, small_chunks):
    small_chunks(2, 7, 8)
    student, teacher = logits("random", 7, 5)
    student.requires_grad_(), teacher.requires_grad_()
    target = labels(7, 5)

    def loss(s, t):
        return mcld_kernels.mcld_loss(s, t, target, direction="symmetric", temperature=0.3, backend=backend)

    assert torch.autograd.gradcheck(loss, (student, teacher))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_of_a_weight_is_its_term(dtype, backend):
    student, teacher = logits("random", 9, 7, torch.float32)
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=dtype, requires_grad=True)
    result = mcld_kernels.mcld_terms(student, teacher, labels(9, 7), weight=weight, backend=backend)
    (3 * result.loss).backward()
    assert weight.grad.dtype == dtype
    terms = torch.stack([result.instance, result.sample, result.category])
    torch.testing.assert_close(weight.grad, (3 * terms).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_weight_needs_a_gradient(backend):
    student, teacher = logits("random", 9, 7, torch.float32)
    weight = torch.ones(3, requires_grad=True)
    mcld_kernels.mcld_loss(student, teacher, labels(9, 7), weight=weight, backend=backend).backward()
    assert (weight.grad > 0).all() and student.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_teacher_needs_a_gradient(backend):
    student, teacher = logits("random", 9, 7)
    target = labels(9, 7)
    both = run(backend, student, teacher, target, teacher_grad=True)
    teacher.requires_grad_()
    mcld_kernels.mcld_loss(student, teacher, target, backend=backend).backward()
    torch.testing.assert_close(teacher.grad, both.teacher)


def test_mutual_learning_gives_both_their_gradients():
    """Two networks that teach each other, through one backward."""
    first, second = logits("random", 9, 7)
    target = labels(9, 7)
    grads = {}
    for backend in BACKENDS:
        a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
        (
            mcld_kernels.mcld_loss(a, b, target, backend=backend)
            + mcld_kernels.mcld_loss(b, a, target, backend=backend, direction="teacher")
        ).backward()
        grads[backend] = [a.grad, b.grad]
    torch.testing.assert_close(grads["torch"], grads["reference"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_student_and_teacher(backend):
    x, _ = logits("random", 6, 4)
    target = labels(6, 4)
    x.requires_grad_()
    loss = mcld_kernels.mcld_loss(x, x, target, temperature=0.4, backend=backend)
    (got,) = torch.autograd.grad(loss, x)
    by_student, by_teacher = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    want = torch.autograd.grad(
        reference.mcld_loss(by_student, by_teacher, target, temperature=0.4), (by_student, by_teacher)
    )
    torch.testing.assert_close(got, sum(want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_reaches_a_network(backend):
    """Through a matrix product, a sum of two losses and an upstream factor, as in training."""
    x, weights = torch.randn(9, 5, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    _, teacher = logits("random", 9, 7)
    target = labels(9, 7)

    def loss(w):
        student = x @ w
        contrast = mcld_kernels.mcld_loss(student, teacher, target, temperature=0.4, backend=backend)
        return 0.3 * contrast + torch.nn.functional.cross_entropy(student, target)

    assert torch.autograd.gradcheck(loss, weights.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [0.0, -2.5, 1e6])
def test_upstream_scales_the_gradient(upstream, backend):
    student, teacher = logits("random", 9, 7)
    target = labels(9, 7)
    once = run(backend, student, teacher, target)
    got = run(backend, student, teacher, target, upstream=upstream)
    torch.testing.assert_close(got.student, upstream * once.student, rtol=1e-12, atol=0)


class TestSecondDerivative:
    """Only the reference has one. Taking the gradient for a constant would be a wrong answer that nobody notices."""

    def gradient(self, factor=1.0):
        student, teacher = logits("random", 5, 4)
        student.requires_grad_()
        loss = mcld_kernels.mcld_loss(student, teacher, labels(5, 4), backend="torch")
        return student, torch.autograd.grad(loss * factor, student, create_graph=True)[0]

    def test_of_a_scaled_loss(self):
        factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        _, gradient = self.gradient(factor)
        with pytest.raises(RuntimeError, match="twice"):
            gradient.sum().backward()

    def test_of_a_gradient_penalty(self):
        student, gradient = self.gradient()
        with pytest.raises(RuntimeError, match="twice"):
            (gradient.square().sum() + student.square().sum()).backward()

    def test_create_graph_alone_is_no_error(self):
        _, gradient = self.gradient()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("options", [{}, {"direction": "symmetric", "mask_same_class": True}], ids=["default", "both"])
def test_gradgradcheck_of_the_reference(options):
    student, teacher = logits("random", 4, 3)
    student.requires_grad_(), teacher.requires_grad_()
    target = torch.tensor([0, 2, 0, -100])

    def loss(s, t):
        return reference.mcld_loss(s, t, target, temperature=0.5, **options)

    assert torch.autograd.gradgradcheck(loss, (student, teacher))


class TestNoDirection:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_a_zero_row_gets_no_gradient_from_row_terms(self, dtype, backend):
        student, teacher = logits("random", 9, 7, dtype)
        student[4] = 0
        got = run(backend, student, teacher, labels(9, 7), weight=(1.0, 1.0, 0.0))
        assert not got.student[4].any()
        assert torch.isfinite(got.student).all() and got.student[3].any()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_zero_column_gets_no_gradient_from_the_category_term(self, backend):
        student, teacher = logits("random", 9, 7)
        student[:, 2] = 0
        got = run(backend, student, teacher, weight=(0.0, 0.0, 1.0))
        assert not got.student[:, 2].any()
        assert got.student[:, 3].all()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_rows_up_to_eps_count_as_zeros(self, backend):
        student, teacher = logits("random", 9, 7)
        student[4] *= 0.5 / student[4].norm()
        target = labels(9, 7)
        options = {"weight": (1.0, 1.0, 0.0), "eps": 0.5001}
        got = run(backend, student, teacher, target, **options)
        zeroed = student.clone()
        zeroed[4] = 0
        want = run(backend, zeroed, teacher, target, **options)
        torch.testing.assert_close(got.loss, want.loss)
        assert not got.student[4].any()
        options["eps"] = 0.4999
        assert run(backend, student, teacher, target, **options).student[4].any()

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("direction", ["student", "teacher", "symmetric"])
    def test_an_untrained_classifier(self, direction, backend):
        """All-zero student logits: finite loss (the logarithm of the number of candidates), no gradient, no NaN."""
        student, (_, teacher) = torch.zeros(9, 7), logits("random", 9, 7, torch.float32)
        got = run(backend, student, teacher, labels(9, 7), direction=direction, teacher_grad=True)
        torch.testing.assert_close(got.terms, torch.tensor([9.0, 9.0, 7.0]).log())
        assert not got.student.any() and not got.teacher.any()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_no_zeros_at_eps_0_but_true_zeros(self, backend):
        student, teacher = logits("random", 9, 7)
        student[4] = 0
        got = run(backend, student, teacher, labels(9, 7), eps=0.0)
        assert torch.isfinite(got.loss) and torch.isfinite(got.student).all()
