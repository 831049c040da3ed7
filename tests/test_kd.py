"""kd_loss: against its definition in loops, the reference in fp64, torch's own function, and its edges."""

import concurrent.futures
import math

import family
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, labels, logits, short

import mcld_kernels
from mcld_kernels import KDLoss, backends, reference
from mcld_kernels.backends.torch_low_latency import compiled_module, unavailable_reason
from mcld_kernels.losses import kd

MODULE = compiled_module()
NEEDS_MODULE = pytest.mark.skipif(MODULE is None, reason=f"no mcld_kernels._cpu: {unavailable_reason()}")


@pytest.fixture
def by_chunks(monkeypatch):
    """The logits that the general path takes, by chunks of classes."""
    seen = []
    init = kd._LogSoftmax.__init__
    monkeypatch.setattr(kd._LogSoftmax, "__init__", lambda self, x, *args: seen.append(x) or init(self, x, *args))
    return seen


@pytest.fixture(
    params=[pytest.param(isa, id=f"compiled-{isa}", marks=NEEDS_MODULE) for isa in (MODULE.isas() if MODULE else ["x"])]
)
def isa(request, by_chunks):
    """An instruction set of the compiled module; whatever is computed must be computed there."""
    with backends.tuned(isa=request.param):
        yield request.param
    assert not by_chunks


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


def check(student, teacher, temperature):
    """Hold loss and gradients to twice the error of eager PyTorch."""
    got = run(mcld_kernels.kd_loss, student, teacher, temperature=temperature, backend="torch")
    want = run(reference.kd_loss, student.double(), teacher.double(), temperature=temperature)
    eager = run(reference.kd_loss, student, teacher, temperature=temperature)
    dtype, acc = student.dtype, torch.float64 if student.dtype == torch.float64 else torch.float32
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (acc, dtype, dtype)
    for ours, exact, theirs in zip(got, want, eager):
        # A probability is off by the rounding of its exponent, which is relative to the largest logit.
        exponent = 1 + float(torch.maximum(student.abs().max(), teacher.abs().max())) / temperature
        natural = 2 * torch.finfo(acc).eps * exponent
        natural *= temperature**2 if ours.ndim == 0 else temperature / len(student)
        floor = torch.finfo(ours.dtype).eps * float(exact.abs().max()) + natural
        assert float((ours - exact).abs().max()) <= 2 * float((theirs - exact).abs().max()) + floor


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (17, 23), (9, 130)], ids=str)
def test_against_the_reference_in_fp64(shape, dtype, temperature, chunk, by_chunks):
    with backends.tuned(chunk_bytes=chunk, low_latency=False):
        check(*logits("random", *shape, dtype), temperature)
    assert len(by_chunks) == 2


class TestCompiled:
    @pytest.mark.usefixtures("poison")
    @pytest.mark.parametrize("temperature", [0.01, 0.5, 4.0, 100.0])
    # One row or class, on either side of a vector of 16, of the 32 vectors of a sum and of a block of rows, and blocks
    # that threads share.
    @pytest.mark.parametrize(
        "shape",
        [(1, 1), (1, 5), (5, 1), (2, 15), (3, 16), (17, 23), (9, 130), (130, 17), (7, 513), (33, 1000)],
        ids=str,
    )
    def test_against_the_reference_in_fp64(self, shape, temperature, isa):
        for kind in ("random", "converged"):
            check(*logits(kind, *shape, torch.float32), temperature)

    @pytest.mark.parametrize("kind", ["zeros", "large"])
    def test_kinds_of_logits(self, kind, isa):
        check(*logits(kind, 37, 29, torch.float32), 4.0)

    def test_a_converged_loss_keeps_its_digits(self, isa):
        student, teacher = logits("converged", 64, 1000, torch.float32)
        want = run(reference.kd_loss, student.double(), teacher.double())
        got = run(mcld_kernels.kd_loss, student, teacher)
        assert 0 < float(want[0]) < 1e-3
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-3, atol=0)
        for ours, exact in zip(got[1:], want[1:]):
            assert float((ours - exact).norm() / exact.norm()) < 1e-4

    @pytest.mark.parametrize("grads", [(True, False), (False, True), (False, False)], ids=str)
    def test_what_is_asked_for_changes_no_bit(self, grads, isa):
        student, teacher = logits("random", 70, 33, torch.float32)
        want = run(mcld_kernels.kd_loss, student, teacher)
        student.requires_grad_(grads[0]), teacher.requires_grad_(grads[1])
        value = mcld_kernels.kd_loss(student, teacher)
        assert torch.equal(value, want[0])
        for x, needed, gradient in zip((student, teacher), grads, want[1:]):
            if needed:
                assert torch.equal(torch.autograd.grad(value, x, retain_graph=True)[0], gradient)

    def test_layouts_change_no_bit(self, isa):
        student, teacher = logits("random", 33, 21, torch.float32)
        want = run(mcld_kernels.kd_loss, student, teacher)
        wide = torch.full((66, 64), torch.nan)
        wide[::2, 1::3] = student
        for x in (student.T.contiguous().T, wide[::2, 1::3], torch.nn.Parameter(student)):
            got = run(mcld_kernels.kd_loss, x, teacher.T.contiguous().T)
            assert all(torch.equal(a, b) for a, b in zip(got, want))
        for rows, columns in ((slice(0, 1), slice(None)), (slice(None), slice(0, 1))):
            expanded = teacher[rows, columns].expand(33, 21)
            got, want = (run(mcld_kernels.kd_loss, student, x, False) for x in (expanded, expanded.clone()))
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])

    def test_inputs_are_not_written(self, isa):
        tensors = logits("random", 33, 21, torch.float32)
        before = [x.clone() for x in tensors]
        run(mcld_kernels.kd_loss, *tensors)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before))

    @pytest.mark.parametrize("shape", [(1100, 10), (300, 70), (9, 4000)], ids=str)
    def test_threads_change_no_bit(self, shape, isa):
        student, teacher = logits("random", *shape, torch.float32)
        first, *others = family.by_threads(lambda: run(mcld_kernels.kd_loss, student, teacher))
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(other, first))

    def test_calls_side_by_side_share_nothing(self, isa):
        problems = [logits("random", 40 + i, 300, torch.float32, seed=i) for i in range(8)]

        def evaluate(problem):
            with backends.tuned(isa=isa):  # a thread has a context of its own
                return run(mcld_kernels.kd_loss, *problem)

        want = [evaluate(problem) for problem in problems]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            got = list(pool.map(evaluate, problems))
        assert all(torch.equal(x, y) for a, b in zip(got, want) for x, y in zip(a, b))

    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
    @pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
    @pytest.mark.parametrize("column", [0, 5, 20])
    def test_a_value_that_is_not_finite_shows(self, column, side, value, isa):
        pair = logits("random", 9, 21, torch.float32)
        pair[side][3, column] = value
        loss, *gradients = run(mcld_kernels.kd_loss, *pair)
        assert loss.isnan()
        for gradient in gradients:
            assert gradient[3].isnan().all() and gradient[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()

    def test_a_class_that_is_ruled_out(self, isa):
        """A logit of -inf: no part of the loss where the teacher rules the class out, infinite where it does not."""
        student, teacher = logits("random", 9, 21, torch.float32)
        teacher[:, 4] = -math.inf
        kept = [c for c in range(21) if c != 4]
        loss, gradient, _ = run(mcld_kernels.kd_loss, student, teacher, False)
        want = run(reference.kd_loss, student.double(), teacher.double().clamp(min=-1e9), False)
        torch.testing.assert_close((loss, gradient), want[:2], rtol=1e-5, atol=1e-7, check_dtype=False)
        student[:, 4] = -math.inf
        loss, *gradients = run(mcld_kernels.kd_loss, student, teacher)
        want = run(reference.kd_loss, student[:, kept].double(), teacher[:, kept].double())
        torch.testing.assert_close(loss, want[0], rtol=1e-5, atol=0, check_dtype=False)
        for ours, exact in zip(gradients, want[1:]):
            assert not ours[:, 4].any()
            torch.testing.assert_close(ours[:, kept], exact, rtol=1e-4, atol=1e-7, check_dtype=False)
        teacher[0, 4] = 0.0
        assert mcld_kernels.kd_loss(student, teacher) == math.inf
        student[0], teacher[0] = 0.0, -math.inf
        assert mcld_kernels.kd_loss(student, teacher).isnan()

    @pytest.mark.parametrize("temperature", [2.0, 4.0])
    def test_logits_at_the_end_of_the_range(self, temperature, isa):
        """Logits whose difference overflows, where that over the temperature does not."""
        student, teacher = torch.full((2, 64), 3e38), torch.full((2, 64), 3e38)
        student[0, 0], teacher[1, 5:] = -3e38, -3e38
        got = run(mcld_kernels.kd_loss, student, teacher, temperature=temperature)
        want = run(reference.kd_loss, student.double(), teacher.double(), temperature=temperature)
        for ours, exact in zip(got, want):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-7)

    def test_equal_logits_give_exactly_0(self, isa):
        student, _ = logits("random", 40, 37, torch.float32)
        assert not any(x.any() for x in run(mcld_kernels.kd_loss, student, student.clone(), temperature=3.0))

    def test_an_empty_batch_is_0(self, isa):
        loss, *gradients = run(mcld_kernels.kd_loss, torch.zeros(0, 5), torch.zeros(0, 5))
        assert float(loss) == 0 and all(x.shape == (0, 5) for x in gradients)

    def test_the_precision_of_products_does_not_matter(self, isa, matmul_precision):
        student, teacher = logits("random", 9, 21, torch.float32)
        want = mcld_kernels.kd_loss(student, teacher)
        matmul_precision("medium")
        with backends.tuned(fast_bf16=True):
            assert torch.equal(mcld_kernels.kd_loss(student, teacher), want)

    def test_compiled_whole(self, isa):
        pair = logits("random", 9, 7, torch.float32)
        loss = torch.compile(mcld_kernels.kd_loss, backend="aot_eager", fullgraph=True)
        assert all(torch.equal(x, y) for x, y in zip(run(loss, *pair), run(mcld_kernels.kd_loss, *pair)))


GENERAL = {
    "switched off": ({"low_latency": False}, torch.float32, torch.float32, 4.0),
    "without the module": ({"compiled": False}, torch.float32, torch.float32, 4.0),
    "fp64": ({}, torch.float64, torch.float64, 4.0),
    "bf16": ({}, torch.bfloat16, torch.bfloat16, 4.0),
    "a teacher of another dtype": ({}, torch.float32, torch.bfloat16, 4.0),
    "a temperature out of range": ({}, torch.float32, torch.float32, 1e20),
}


@pytest.mark.parametrize(("fields", "dtype", "teacher_dtype", "temperature"), GENERAL.values(), ids=GENERAL)
def test_by_chunks_are(fields, dtype, teacher_dtype, temperature, by_chunks):
    student, teacher = logits("random", 9, 7)
    with backends.tuned(**fields):
        run(mcld_kernels.kd_loss, student.to(dtype), teacher.to(teacher_dtype), temperature=temperature)
    assert len(by_chunks) == 2


@NEEDS_MODULE
def test_an_instruction_set_that_is_not_there():
    with pytest.raises(ValueError), backends.tuned(isa="none"):
        mcld_kernels.kd_loss(*logits("random", 4, 3, torch.float32))


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
            ({"temperature": torch.tensor(4.0)}, TypeError, r"got tensor\(4.\): pass a number, as of temperature.item"),
            ({"backend": "numpy"}, ValueError, "backend must be one of"),
            ({"backend": "cuda"}, backends.BackendUnavailable, "no kernels for this loss; use 'torch'"),
        ],
    )
    def test_bad_options_say_what_came(self, change, error, words):
        student, teacher = logits("random", 4, 3, torch.float32)
        with pytest.raises(error, match=words):
            mcld_kernels.kd_loss(student, teacher, **change)

    def test_labels_are_accepted_as_by_the_other_losses(self):
        student, teacher = logits("random", 4, 3)
        for function in (mcld_kernels.kd_loss, reference.kd_loss):
            assert torch.equal(function(student, teacher, labels(4, 3)), function(student, teacher))

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
