"""Derivatives of the fast backends beyond backward(): each is right, or raises with a way out; none is lost in silence.

Also what surrounds a call: modes that trace, fake tensors, flop counting, terms that are changed in place.
"""

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import labels, logits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

import mcld_kernels
from mcld_kernels import kd_loss, mcld_loss, reference

TWICE = "cannot be differentiated twice; backend='reference' can"
LOSSES = {
    "mcld": (lambda s, t, y: mcld_loss(s, t, y), lambda s, t, y: reference.mcld_loss(s, t, y)),
    "mcld-symmetric": (
        lambda s, t, y: mcld_loss(s, t, y, direction="symmetric"),
        lambda s, t, y: reference.mcld_loss(s, t, y, direction="symmetric"),
    ),
    "kd": (lambda s, t, y: kd_loss(s, t), lambda s, t, y: reference.kd_loss(s, t)),
}


@pytest.fixture(params=LOSSES.values(), ids=LOSSES)
def losses(request):
    """(fast, reference) as functions of the student, and the student (9, 7) fp64."""
    student, teacher = logits("random", 9, 7)
    target = labels(9, 7)
    return *((lambda s, f=f: f(s, teacher, target)) for f in request.param), student


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class TestSecondDerivatives:
    """Of the loss by the logits: not computed, so every form of asking for one raises."""

    def test_of_a_gradient_penalty(self, losses):
        fast, _, student = losses
        student.requires_grad_()
        loss = fast(student)
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.grad(loss + gradient.square().sum(), student)

    def test_of_a_parameter_before_the_logits(self, losses):
        """A meta-gradient: through the gradient step, back to what made the logits."""
        fast, _, student = losses
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        moved = student * scale
        (gradient,) = torch.autograd.grad(fast(moved), moved, create_graph=True)
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.grad((moved - gradient).sum(), scale)

    def test_hessian_and_hvp(self, losses):
        fast, _, student = losses
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.functional.hessian(fast, student)
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.functional.hvp(fast, student, torch.ones_like(student))
        with pytest.raises(RuntimeError, match=TWICE):
            grad(lambda s: grad(fast)(s).square().sum())(student)
        with pytest.raises(RuntimeError, match=TWICE):
            jvp(grad(fast), (student,), (torch.ones_like(student),))

    def test_by_a_loss_weight_needs_none(self, losses):
        """GradNorm: the gradient's norm as a function of the weight of the loss."""
        results = []
        for function in losses[:2]:
            student = losses[2].clone().requires_grad_()
            weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
            (gradient,) = torch.autograd.grad(weight * function(student), student, create_graph=True)
            results.append(torch.autograd.grad(gradient.norm(), weight)[0])
        close(*results)
        assert float(results[0]) > 0

    def test_double_backward_trick_for_a_jvp(self, losses):
        fast, slow, student = losses
        direction = torch.randn_like(student)
        got, want = (torch.autograd.functional.jvp(f, student, direction)[1] for f in (fast, slow))
        close(got, want)

    def test_by_a_tensor_of_weights(self):
        student, teacher = logits("random", 9, 7)
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        loss = mcld_loss(student.requires_grad_(), teacher, labels(9, 7), weight=weight)
        by_weight, by_student = torch.autograd.grad(loss, (weight, student), create_graph=True)
        for gradient, other in ((by_weight, student), (by_student, weight)):
            with pytest.raises(RuntimeError, match=TWICE):
                torch.autograd.grad(gradient.sum(), other, retain_graph=True)


class TestTransforms:
    def test_reverse_mode(self, losses):
        fast, slow, student = losses
        want = grad(slow)(student)
        close(grad(fast)(student), want)
        close(jacrev(fast)(student), want)
        close(vjp(fast, student)[1](torch.tensor(3.0, dtype=torch.float64))[0], 3 * want)

    def test_forward_mode(self, losses):
        fast, slow, student = losses
        direction = torch.randn_like(student)
        want = jvp(slow, (student,), (direction,))
        for a, b in zip(jvp(fast, (student,), (direction,)), want, strict=True):
            close(a, b)
        close(jacfwd(fast)(student), grad(slow)(student))
        close(linearize(fast, student)[1](direction), want[1])
        with forward_ad.dual_level():
            result = forward_ad.unpack_dual(fast(forward_ad.make_dual(student, direction)))
        close(result.tangent, want[1])

    def test_the_tangent_of_16_bit_logits_has_the_dtype_of_the_loss(self):
        student, teacher = (x.bfloat16() for x in logits("random", 9, 7))

        def of(s):
            return mcld_loss(s, teacher, labels(9, 7), backend="torch")

        loss, tangent = jvp(of, (student,), (torch.ones_like(student),))
        assert loss.dtype == tangent.dtype == torch.float32
        torch.testing.assert_close(tangent, grad(of)(student).float().sum())

    def test_forward_mode_by_teacher_and_weights(self):
        student, teacher = logits("random", 9, 7)
        target, weight = labels(9, 7), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

        def tangent(function):
            return jvp(
                lambda t, w: function(student, t, target, weight=w),
                (teacher, weight),
                (torch.ones_like(teacher), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
            )[1]

        close(tangent(mcld_loss), tangent(reference.mcld_loss))

    def test_vmap_over_problems(self, losses):
        fast, slow, student = losses
        batch = torch.stack([student, 2 * student + 1, student.flip(0)])
        close(vmap(fast)(batch), torch.stack([slow(x) for x in batch]))
        close(vmap(grad(fast))(batch), torch.stack([grad(slow)(x) for x in batch]))
        close(vmap(fast, in_dims=1)(batch.transpose(0, 1)), vmap(fast)(batch))

    def test_vmap_warns_of_nothing(self, capfd, recwarn):
        """PyTorch has no rule for operators that it does not know, and says so on stderr or by a warning."""
        student, teacher = (torch.stack([x, x.flip(0)]) for x in logits("random", 4, 3))
        each = torch.stack([kd_loss(x, y) for x, y in zip(student, teacher, strict=True)])
        close(vmap(kd_loss)(student, teacher), each)
        by_candidates = grad(lambda y, x: mcld_kernels.info_nce(x, y, reduction="none").square().sum())
        each = torch.stack([by_candidates(y, x) for x, y in zip(student, teacher, strict=True)])
        close(vmap(by_candidates)(teacher, student), each)
        assert not recwarn.list
        assert not capfd.readouterr().err


class TestCompile:
    @pytest.mark.parametrize("dynamic", [True, None])
    def test_new_options_and_sizes_stay_in_one_graph(self, dynamic):
        torch._dynamo.reset()  # the graphs of other tests count towards the limit of this function's
        compiled = torch.compile(mcld_loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for i, batch in enumerate((9, 9, 12, 5)):
            student, teacher = logits("random", batch, 7)
            target = labels(batch, 7)
            options = {"temperature": 0.1 + i / 10, "weight": (1.0, 0.5 + i, 1.0), "eps": 1e-9 * (1 + i)}
            close(compiled(student, teacher, target, **options), mcld_loss(student, teacher, target, **options))

    def test_a_bad_option_is_refused_while_compiling(self):
        compiled = torch.compile(mcld_loss, backend="aot_eager", dynamic=True)
        student, teacher = logits("random", 9, 7)
        with pytest.raises(ValueError, match="temperature must be positive"):
            compiled(student, teacher, labels(9, 7), temperature=-1.0)


class TestSurroundings:
    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_a_logged_term_may_change_in_place(self, backend):
        student, teacher = logits("random", 9, 7)
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        results = []
        for change in (False, True):
            s = student.clone().requires_grad_()
            terms = mcld_kernels.mcld_terms(s, teacher, labels(9, 7), weight=weight, backend=backend)
            if change:
                for term in terms[1:]:
                    term.mul_(0)
            results.append(torch.autograd.grad(terms.loss, (s, weight)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    def test_terms_share_no_memory(self):
        student, teacher = logits("random", 9, 7)
        terms = reference.mcld_terms(student, teacher, weight=(0.0, 0.0, 0.0))
        assert len({term.data_ptr() for term in terms}) == 4

    def test_fake_tensors(self):
        with FakeTensorMode():
            student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
            target = torch.zeros(4, dtype=torch.int64)
            loss = mcld_loss(student, teacher, target, weight=torch.ones(3))
            loss.backward()
            assert loss.shape == () and student.grad.shape == (4, 3)

    @pytest.mark.parametrize(
        ("options", "products"),
        [
            ({}, 2 * 2 * (9 * 9 * 7 + 7 * 7 * 9)),
            ({"weight": (1.0, 0.0, 0.0)}, 2 * 2 * 9 * 9 * 7),
            ({"temperature": (0.1, 0.2, 0.1)}, 2 * 2 * (2 * 9 * 9 * 7 + 7 * 7 * 9)),
            ({"direction": "symmetric", "weight": (1.0, 0.0, 0.0)}, 3 * 2 * 9 * 9 * 7),
        ],
        ids=str,
    )
    def test_flop_are_counted(self, options, products):
        student, teacher = logits("random", 9, 7, torch.float32)
        with FlopCounterMode(display=False) as counter:
            mcld_loss(student.requires_grad_(), teacher, labels(9, 7), **options)
        assert counter.get_total_flops() == products

    def test_the_first_call_loads_no_compiler(self):
        code = """
import sys, torch, mcld_kernels
student = torch.randn(4, 3, requires_grad=True)
mcld_kernels.mcld_loss(student, torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)).backward()
print([name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
