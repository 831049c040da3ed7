"""Behaviour that CKD, CLKD and MLKD have in common: operator, derivatives, compilation, autocast, edges, errors."""

import math

import pytest
import torch
from cases import DTYPES, labels, logits, short
from family import run
from torch.utils.flop_counter import FlopCounterMode

import mcld_kernels
from mcld_kernels import backends, reference

# name -> function, reference, operator, options as arguments of the operator, options as keywords
CALLS = {
    "ckd": ("ckd", (0.5, 10.0, "teacher", 1e-12), {"temperature": 0.5}),
    "ckd-student": ("ckd", (0.5, 10.0, "student", 1e-12), {"temperature": 0.5, "negatives": "student"}),
    "clkd": ("clkd", ([0.5, 1.0, 0.4], "mean", 1e-12), {}),
    "mlkd": ("mlkd", (0.5, 0.07, [50.0, 20.0, 1.0], 2, -100, 1e-12), {}),
    "mlkd-supervised": (
        "mlkd",
        (0.5, 0.2, [0.0, 0.0, 1.0], 2, -100, 1e-12),
        {"weight": (0.0, 0.0, 1.0), "supervised_temperature": 0.2},
    ),
}
NAMES = tuple(dict.fromkeys(name for name, _, _ in CALLS.values()))


class Call:
    def __init__(self, name, fields, options):
        self.name, self.fields, self.options = name, fields, options
        self.operator = getattr(torch.ops.mcld_kernels, name).default
        self.terms, self.reference_terms = (getattr(m, f"{name}_terms") for m in (mcld_kernels, reference))
        self.function, self.reference = (getattr(m, f"{name}_loss") for m in (mcld_kernels, reference))
        self.module = getattr(mcld_kernels, f"{name.upper()}Loss")

    def loss(self, student, teacher, target=None, **more):
        return self.function(student, teacher, target, **self.options, **more)


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request):
    return Call(*request.param)


@pytest.fixture
def chunks():
    """One row a chunk: the path of large batches."""
    with backends.tuned(chunk_bytes=1):
        yield


def close(got, want, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("needed", [(False, False), (True, False), (True, True)], ids=str)
def test_opcheck(call, needed, small):
    student, teacher = logits("random", 9, 7, torch.float32)
    with backends.tuned(chunk_bytes=1 << 25 if small else 1):
        torch.library.opcheck(call.operator, (student, teacher, labels(9, 7), None, *call.fields, "torch", *needed))


@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_gradcheck(call, chunk):
    student, teacher = logits("random", 6, 4)
    target = labels(6, 4, ignored=0.2)
    student.requires_grad_(), teacher.requires_grad_()
    with backends.tuned(chunk_bytes=chunk):
        assert torch.autograd.gradcheck(lambda s: call.loss(s, teacher.detach(), target, backend="torch"), (student,))
        assert torch.autograd.gradcheck(
            lambda s, t: call.loss(s, t, target, backend="torch"), (student, teacher), check_forward_ad=True
        )


def test_second_derivatives_raise_and_are_right_on_the_reference(call):
    student, teacher = logits("random", 5, 4)
    target = labels(5, 4)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(call.loss(student, teacher, target, backend="torch"), student, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; backend='reference' can"):
        gradient.square().sum().backward()
    assert torch.autograd.gradgradcheck(lambda s: call.loss(s, teacher, target, backend="reference"), (student,))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_compiles_whole_for_any_batch(call, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t, y: call.loss(s, t, y, backend=backend), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for batch in (9, 12):
        student, teacher = logits("random", batch, 7, torch.float32)
        target = labels(batch, 7)
        results = []
        for function in (compiled, lambda s, t, y: call.loss(s, t, y, backend=backend)):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher, target)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_and_inference_mode_change_nothing(call, backend):
    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7)
    want = run(call.terms, student, teacher, target, backend=backend, **call.options)
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = call.loss(leaf, teacher, target, backend=backend)
    loss.backward()
    assert torch.equal(loss, want.loss) and torch.equal(leaf.grad, want.student)
    with torch.inference_mode():
        assert torch.equal(call.loss(student, teacher, target, backend=backend), want.loss)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_two_dtypes_are_computed_in_the_wider_one(call, dtypes, chunks):
    student, teacher = logits("random", 9, 7)
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    wide = torch.promote_types(*dtypes)
    got = run(call.terms, student, teacher, labels(9, 7), backend="torch", **call.options)
    want = run(call.terms, student.to(wide), teacher.to(wide), labels(9, 7), backend="torch", **call.options)
    close(got.loss, want.loss, rtol=1e-6)
    close(got.student, want.student.to(dtypes[0]), rtol=2 * torch.finfo(dtypes[0]).eps, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_strides_do_not_matter_and_inputs_are_not_written(call, chunk):
    student, teacher = logits("random", 9, 7)
    target = labels(9, 7)
    with backends.tuned(chunk_bytes=chunk):
        want = run(call.terms, student, teacher, target, backend="torch", teacher_grad=True, **call.options)
        wide = torch.full((9, 14), math.nan, dtype=torch.float64)
        wide[:, ::2] = student
        got = run(
            call.terms, wide[:, ::2], teacher.T.contiguous().T, target, backend="torch", teacher_grad=True,
            **call.options,
        )  # fmt: skip
    close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(wide[:, ::2], student) and torch.equal(student, logits("random", 9, 7)[0])


def test_the_flop_formula_is_counted(call):
    student, teacher = logits("random", 9, 7, torch.float32)
    counts = []
    for student_grad, teacher_grad in ((False, False), (True, False), (True, True)):
        leaves = student.clone().requires_grad_(student_grad), teacher.clone().requires_grad_(teacher_grad)
        with FlopCounterMode(display=False) as counter:
            call.loss(*leaves, labels(9, 7), backend="torch")
        counts.append(counter.get_total_flops())
    assert 0 < counts[0] < counts[1] <= counts[2]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("chunk", [1, 1 << 25])
class TestEdges:
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_an_empty_batch_is_0_and_differentiable(self, call, dtype, backend, chunk):
        empty = torch.empty(0, 5, dtype=dtype)
        got = run(call.terms, empty, empty, torch.empty(0, dtype=torch.int64), backend=backend, **call.options)
        assert got.loss == 0 and got.student.shape == (0, 5) and not got.terms.any()

    @pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)], ids=str)
    def test_one_row_and_one_class_are_finite(self, call, shape, backend, chunk):
        student, teacher = logits("random", *shape)
        with backends.tuned(chunk_bytes=chunk):
            got = run(call.terms, student, teacher, labels(*shape), teacher_grad=True, backend=backend, **call.options)
        want = run(call.reference_terms, student, teacher, labels(*shape), teacher_grad=True, **call.options)
        assert all(torch.isfinite(x).all() for x in got)
        close(got, want)

    def test_zeros_are_finite(self, call, backend, chunk):
        """An all-zero student, as from a zero-initialised classifier."""
        _, teacher = logits("random", 6, 4)
        with backends.tuned(chunk_bytes=chunk):
            got = run(call.terms, torch.zeros_like(teacher), teacher, labels(6, 4), backend=backend, **call.options)
        assert torch.isfinite(got.loss) and torch.isfinite(got.student).all()
        want = run(call.reference_terms, torch.zeros_like(teacher), teacher, labels(6, 4), **call.options)
        close(got, want)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("side", [0, 1])
    def test_what_is_not_finite_shows(self, call, bad, side, backend, chunk):
        both = logits("random", 6, 4, torch.float32)
        both[side][2, 1] = bad
        with backends.tuned(chunk_bytes=chunk):
            assert torch.isnan(call.loss(*both, labels(6, 4), backend=backend))

    def test_an_overflowing_square_shows(self, call, backend, chunk):
        student, teacher = logits("random", 6, 4, torch.float32)
        student[3, 2] = 3e38
        with backends.tuned(chunk_bytes=chunk):
            assert torch.isnan(call.loss(student, teacher, labels(6, 4), backend=backend))

    def test_no_gradient_no_work(self, call, backend, chunk):
        student, teacher = logits("random", 6, 4)
        with backends.tuned(chunk_bytes=chunk):
            loss = call.loss(student, teacher, labels(6, 4), backend=backend)
            want = run(call.terms, student, teacher, labels(6, 4), backend=backend, **call.options).loss
            only_teacher = teacher.clone().requires_grad_()
            call.loss(student, only_teacher, labels(6, 4), backend=backend).backward()
        assert not loss.requires_grad
        close(loss, want)
        close(
            only_teacher.grad,
            run(call.reference_terms, student, teacher, labels(6, 4), teacher_grad=True, **call.options).teacher,
        )


@pytest.mark.parametrize("function", ["loss", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0; got -1.0"),
        ({"weight": None}, TypeError, "weight must be .* got None"),
        ({"process_group": object()}, TypeError, "process_group of type object: pass a torch.distributed.ProcessGroup"),
        ({"gather": "some"}, ValueError, "gather must be one of 'all', 'ring'; got 'some'"),
        ({"even": 1}, TypeError, "even must be"),
        ({"student": torch.zeros(4, 2)}, ValueError, r"same shape .* got \(4, 2\) and \(4, 3\)"),
        ({"student": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "student must be of a floating dtype"),
        ({"teacher": [[0.0] * 3] * 4}, TypeError, "teacher must be a tensor"),
    ],
)
def test_bad_arguments_say_what_came(call, function, change, error, words):
    arguments = {"student": torch.ones(4, 3), "teacher": torch.ones(4, 3), "target": labels(4, 3)} | change
    with pytest.raises(error, match=words):
        getattr(call, "function" if function == "loss" else function)(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_modules_take_keywords_alone_and_a_known_backend(name):
    module = getattr(mcld_kernels, f"{name.upper()}Loss")
    with pytest.raises(TypeError):
        module(1.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        module(backend="numpy")
    with pytest.raises(TypeError, match="process_group of type object"):
        module(process_group=object())
    student, teacher = logits("random", 9, 7, torch.float32)
    criterion = module(backend="torch")
    result = criterion.terms(student, teacher, labels(9, 7))
    assert torch.equal(criterion(student, teacher, labels(9, 7)), result.loss)
    assert type(result) is getattr(mcld_kernels, f"{name.upper()}Terms")
    assert "backend='torch'" in repr(criterion)
