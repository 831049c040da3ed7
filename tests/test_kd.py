"""kd_loss: against its definition in loops, the reference in fp64, torch's own function, and its edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, labels, logits, short

import mcld_kernels
from mcld_kernels import KDLoss, backends, reference


def run(loss, student, teacher, teacher_grad=True, **options):
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_(teacher_grad)
    value = loss(student, teacher, **options)
    value.backward()
    return value.detach(), student.grad, teacher.grad


def test_the_reference_is_the_definition():
    student, teacher, t = [[0.5, -1.0, 2.0], [3.0, 0.0, 0.1]], [[1.0, 1.5, -0.5], [0.2, 0.4, 0.8]], 3.0

    def softmax(row):
        total = sum(math.exp(x / t) for x in row)
        return [math.exp(x / t) / total for x in row]

    pairs = [(p, q) for s, z in zip(student, teacher) for p, q in zip(softmax(z), softmax(s))]
    expected = t * t / 2 * sum(p * math.log(p / q) for p, q in pairs)
    tensors = torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)
    assert float(reference.kd_loss(*tensors, temperature=t)) == pytest.approx(expected, rel=1e-13)
    torchs = F.kl_div(
        F.log_softmax(tensors[0] / t, 1), F.log_softmax(tensors[1] / t, 1), reduction="batchmean", log_target=True
    )
    assert float(reference.kd_loss(*tensors, temperature=t)) == pytest.approx(float(torchs) * t * t, rel=1e-13)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (17, 23), (9, 130)], ids=str)
def test_against_the_reference_in_fp64(shape, dtype, temperature, chunk):
    student, teacher = logits("random", *shape, dtype)
    with backends.tuned(chunk_bytes=chunk):
        got = run(mcld_kernels.kd_loss, student, teacher, temperature=temperature, backend="torch")
    want = run(reference.kd_loss, student.double(), teacher.double(), temperature=temperature)
    eager = run(reference.kd_loss, student, teacher, temperature=temperature)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (acc, dtype, dtype)
    for ours, exact, theirs in zip(got, want, eager):
        # A probability is off by the rounding of its exponent, which is relative to the largest logit.
        exponent = 1 + float(torch.maximum(student.abs().max(), teacher.abs().max())) / temperature
        natural = 2 * torch.finfo(acc).eps * exponent * (temperature**2 if ours.ndim == 0 else temperature / shape[0])
        floor = torch.finfo(ours.dtype).eps * float(exact.abs().max()) + natural
        assert float((ours - exact).abs().max()) <= 2 * float((theirs - exact).abs().max()) + floor


def test_gradcheck_and_operator():
    student, teacher = logits("random", 5, 4)
    student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: mcld_kernels.kd_loss(s, t, backend="torch"), (student, teacher))
    operator = torch.ops.mcld_kernels.kd.default
    for needed in ((False, False), (True, False), (True, True)):
        torch.library.opcheck(operator, (student.detach(), teacher.detach(), None, None, 4.0, "torch", *needed))


def test_compiles_whole():
    student, teacher = logits("random", 9, 7, torch.float32)
    compiled = torch.compile(mcld_kernels.kd_loss, backend="aot_eager", fullgraph=True)
    got, want = run(compiled, student, teacher), run(mcld_kernels.kd_loss, student, teacher)
    torch.testing.assert_close(got, want)


class TestEdges:
    def test_an_empty_batch_is_0_and_differentiable(self):
        for backend in ("torch", "reference"):
            student = torch.empty(0, 5, requires_grad=True)
            value = mcld_kernels.kd_loss(student, torch.empty(0, 5), backend=backend)
            value.backward()
            assert float(value) == 0 and student.grad.shape == (0, 5)

    def test_equal_logits_have_no_loss(self):
        student, _ = logits("random", 9, 7, torch.float32)
        value, gradient, _ = run(mcld_kernels.kd_loss, student, student)
        assert abs(float(value)) < 1e-6 and float(gradient.abs().max()) < 1e-7

    def test_a_probability_of_0_adds_nothing(self):
        student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1e5]])
        for backend in ("torch", "reference"):
            value = mcld_kernels.kd_loss(student, teacher, temperature=1.0, backend=backend)
            assert float(value) == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)

    def test_nan_shows(self):
        student, teacher = logits("random", 4, 3, torch.float32)
        student[1, 1] = math.nan
        assert torch.isnan(mcld_kernels.kd_loss(student, teacher))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
            ({"temperature": math.nan}, ValueError, "temperature must be positive and finite; got nan"),
            ({"temperature": "4"}, TypeError, "temperature must be a number; got '4'"),
            ({"backend": "numpy"}, ValueError, "backend must be one of"),
            ({"backend": "cuda"}, backends.BackendUnavailable, "no kernels for this loss; use 'torch'"),
        ],
    )
    def test_bad_options_say_what_came(self, change, error, words):
        student, teacher = logits("random", 4, 3, torch.float32)
        with pytest.raises(error, match=words):
            mcld_kernels.kd_loss(student, teacher, **change)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"same shape .* got \(4, 3\) and \(4, 2\)"):
            mcld_kernels.kd_loss(torch.zeros(4, 3), torch.zeros(4, 2))

    def test_it_cannot_be_differentiated_twice(self):
        student, teacher = logits("random", 4, 3)
        student.requires_grad_()
        (gradient,) = torch.autograd.grad(mcld_kernels.kd_loss(student, teacher), student, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.square().sum().backward()


def test_the_module_is_the_function():
    student, teacher = logits("random", 4, 3, torch.float32)
    module = KDLoss(temperature=2.0)
    assert torch.equal(module(student, teacher, labels(4, 3)), mcld_kernels.kd_loss(student, teacher, temperature=2.0))
    assert repr(module) == "KDLoss(temperature=2, backend='auto')"
    with pytest.raises(ValueError, match="temperature"):
        KDLoss(temperature=-1)
