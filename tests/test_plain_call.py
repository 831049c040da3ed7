"""The short way of plain calls: what takes it, what does not, and that it gives what the general way gives."""

import pytest
import torch
from cases import logits
from torch.utils._python_dispatch import TorchDispatchMode

import mcld_kernels
from mcld_kernels import backends, ops
from mcld_kernels.backends import torch_kd, torch_low_latency
from mcld_kernels.backends.torch_low_latency import compiled_module, unavailable_reason
from mcld_kernels.family_options import KDOptions

pytestmark = pytest.mark.skipif(compiled_module() is None, reason=f"no mcld_kernels._cpu: {unavailable_reason()}")

LOSSES = {
    "info_nce": lambda s, t, **o: mcld_kernels.info_nce(s, t, temperature=0.2, **o),
    "InfoNCELoss": lambda s, t, **o: mcld_kernels.InfoNCELoss(temperature=0.2, **o)(s, t),
    "ckd": lambda s, t, **o: mcld_kernels.ckd_loss(s, t, temperature=0.2, **o),
    "CKDLoss": lambda s, t, **o: mcld_kernels.CKDLoss(temperature=0.2, **o)(s, t),
    "ckd, student negatives": lambda s, t, **o: mcld_kernels.ckd_loss(s, t, negatives="student", **o),
    "kd": lambda s, t, **o: mcld_kernels.kd_loss(s, t, **o),
    "KDLoss": lambda s, t, **o: mcld_kernels.KDLoss(temperature=0.5, **o)(s, t),
}


@pytest.fixture
def general(monkeypatch):
    """The calls that go the general way, by the operator's name."""
    seen = []
    evaluate = ops.LossOperator.evaluate
    monkeypatch.setattr(ops.LossOperator, "evaluate", lambda self, call: seen.append(self.name) or evaluate(self, call))
    return seen


def pair(n=33, d=21, dtype=torch.float32):
    student, teacher = logits("random", n, d, dtype)
    return student.requires_grad_(), teacher


def value_and_gradient(loss, student, teacher, factor=3.0):
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(factor * value, student)
    return value.detach(), gradient


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (33, 21), (64, 100), (130, 65)], ids=str)
def test_no_bit_differs_from_the_general_way(shape, name, general, poison):
    student, teacher = pair(*shape)
    got = value_and_gradient(LOSSES[name], student, teacher)
    with torch.no_grad():
        forward = LOSSES[name](student, teacher)
    assert not general
    with backends.tuned(compiled_gemm=None):
        want = value_and_gradient(LOSSES[name], student, teacher)
    assert len(general) == 1
    assert all(torch.equal(x, y) for x, y in zip((*got, forward), (*want, want[0]), strict=True))
    assert got[0].shape == () and got[1].is_contiguous()


@pytest.mark.parametrize("name", LOSSES)
def test_against_fp64(name, general):
    student, teacher = pair()
    got = value_and_gradient(LOSSES[name], student, teacher)
    assert not general
    exact = value_and_gradient(
        lambda s, t: LOSSES[name](s, t, backend="reference"),
        student.detach().double().requires_grad_(),
        teacher.double(),
    )
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-4, atol=1e-6)


def test_any_strides_and_parameters(general):
    student, teacher = pair()
    want = value_and_gradient(LOSSES["ckd"], student, teacher)
    wide = torch.full((66, 64), torch.nan)
    wide[::2, 1::3] = student.detach()
    for x in (wide[::2, 1::3].requires_grad_(), torch.nn.Parameter(student.detach().T.contiguous().T)):
        got = value_and_gradient(LOSSES["ckd"], x, teacher.T.contiguous().T)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not general


GENERAL = {
    "fp64": lambda s, t, f: f(s.double(), t.double()),
    "a negated view": lambda s, t, f: f(torch._neg_view(s), t),
    "a negated teacher": lambda s, t, f: f(s, torch._neg_view(t)),
    "no rows": lambda s, t, f: f(s[:0], t[:0]),
    "a matrix larger than a chunk": lambda s, t, f: f(s.repeat(90, 1)[:, :4], t.repeat(90, 1)[:, :4]),
    "a temperature below the range": lambda s, t, f: mcld_kernels.ckd_loss(s, t, temperature=0.01),
    "a tensor of weight": lambda s, t, f: mcld_kernels.ckd_loss(s, t, weight=torch.tensor(2.0)),
    "a tensor of temperature": lambda s, t, f: mcld_kernels.info_nce(s, t, temperature=torch.tensor(0.2)),
    "a teacher that learns": lambda s, t, f: mcld_kernels.info_nce(s, t.detach().requires_grad_()),
    "a sum": lambda s, t, f: mcld_kernels.info_nce(s, t, reduction="sum"),
    "rows as they are": lambda s, t, f: mcld_kernels.info_nce(s, t, normalize=False),
    "KD of a teacher that learns": lambda s, t, f: mcld_kernels.kd_loss(s, t.detach().requires_grad_()),
    "KD of a negated view": lambda s, t, f: mcld_kernels.kd_loss(torch._neg_view(s), t),
    "KD at a temperature out of range": lambda s, t, f: mcld_kernels.kd_loss(s, t, temperature=1e-13),
    "further candidates": lambda s, t, f: mcld_kernels.info_nce(s, t.repeat(2, 1)),
}


@pytest.mark.parametrize("call", GENERAL.values(), ids=GENERAL)
def test_the_general_way_takes(call, general):
    student, teacher = pair(33, 256)
    call(student, teacher, LOSSES["ckd"])
    assert len(general) == 1


def test_settings_that_take_the_general_way(general, monkeypatch):
    student, teacher = pair()
    with backends.tuned(low_latency=False):
        LOSSES["ckd"](student, teacher)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        LOSSES["ckd"](student, teacher)
    finally:
        torch.set_float32_matmul_precision(precision)
    monkeypatch.setenv("MCLD_CHUNK_MB", "1")
    LOSSES["ckd"](student, teacher)
    assert len(general) == 3
    monkeypatch.setenv("MCLD_CHUNK_MB", "none")
    with pytest.raises(ValueError, match="MCLD_CHUNK_MB"):
        LOSSES["ckd"](student, teacher)


@pytest.mark.parametrize("name", ["info_nce", "ckd", "kd"])
def test_errors_stay(name):
    student, teacher = pair()
    for bad in (teacher[:, :4], teacher[0], teacher.long(), teacher.to_sparse(), teacher.to("meta"), None):
        with pytest.raises((TypeError, ValueError)):
            LOSSES[name](student, bad)
    with pytest.raises(ValueError, match="backend"):
        LOSSES[name](student, teacher, backend="fast")
    with pytest.raises(backends.BackendUnavailable):
        LOSSES[name](student, teacher, backend="cuda")


def test_derivatives(general):
    student, teacher = pair()
    loss = LOSSES["ckd"](student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
    loss = LOSSES["ckd"](student, teacher)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * gradient.detach())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert not general
    by_func = torch.func.grad(lambda s: LOSSES["ckd"](s, teacher))(student.detach())
    assert torch.equal(by_func, gradient)


def test_the_default_device_is_not_asked():
    student, teacher = pair()
    want = value_and_gradient(LOSSES["ckd"], student, teacher)
    target = torch.arange(33) % 21
    whole = mcld_kernels.mcld_loss(student, teacher, target)
    torch.set_default_device("meta")
    try:
        got = value_and_gradient(LOSSES["ckd"], student, teacher)
        assert torch.equal(mcld_kernels.mcld_loss(student, teacher, target), whole)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_grad", [False, True])
def test_three_operations(with_grad):
    """The workspace, the loss and the gradient: a small call's time is what surrounds its arithmetic."""
    student, teacher = pair()
    options = mcld_kernels.options.instance_term(0.2, 1e-12)
    for module, given in ((torch_low_latency, options), (torch_kd, KDOptions(temperature=4.0))):
        with _Operations() as seen, torch.no_grad():
            assert module.plain_call(student, teacher, given, with_grad) is not None
        assert [name.split(".")[1] for name in seen.names] == ["new_empty"] * (2 + with_grad)
