"""Tensors whose memory does not hold their numbers, in every loss and on every backend.

The kernels read memory by its address. That of a negated view holds the negated numbers, and lazy zeros have none.
"""

import family
import pytest
import torch
from cases import labels, logits

import mcld_kernels
from mcld_kernels import backends

N, C = 9, 7


def _negated(x):
    """x as a negated view; a floating tensor as what complex numbers give: the imaginary part of a conjugate."""
    if not x.is_floating_point():
        return torch._neg_view(-x)
    return torch.complex(torch.zeros_like(x), -x.detach()).conj().imag.requires_grad_(x.requires_grad)


def _problem():
    student, teacher = logits("random", N, C, torch.float32)
    more = logits("random", 4, C, torch.float32, seed=1)[0]
    return {
        "student": student.requires_grad_(),
        "teacher": teacher,
        "target": labels(N, C),
        "soft": torch.softmax(teacher, 1),
        "more": more,
        "more_soft": torch.softmax(more, 1),
        "weights": torch.tensor([1.0, 2.0, 0.5]),
        "weight": torch.tensor(1.5),
        "temperature": torch.tensor(0.2, requires_grad=True),
        "upstream": torch.linspace(-1, 2, N),
    }


def _info_nce(x, backend):
    return mcld_kernels.info_nce(
        x["student"], x["teacher"].requires_grad_(), temperature=x["temperature"], reduction="none", backend=backend
    )


LOSSES = {
    "mcld": lambda x, backend: mcld_kernels.mcld_loss(
        x["student"], x["teacher"], x["target"], weight=x["weights"], backend=backend
    ),
    "mcld, soft labels": lambda x, backend: mcld_kernels.mcld_loss(
        x["student"],
        x["teacher"],
        x["soft"],
        candidates=x["more"],
        candidate_target=x["more_soft"],
        backend=backend,
    ),
    "a short call": lambda x, backend: mcld_kernels.info_nce(x["student"], x["teacher"], backend=backend),
    "info_nce": _info_nce,
    "kd": lambda x, backend: mcld_kernels.kd_loss(x["student"], x["teacher"], backend=backend),
    "ckd": lambda x, backend: mcld_kernels.ckd_loss(x["student"], x["teacher"], weight=x["weight"], backend=backend),
    "clkd": lambda x, backend: mcld_kernels.clkd_loss(x["student"], x["teacher"], x["target"], backend=backend),
    "mlkd": lambda x, backend: mcld_kernels.mlkd_loss(x["student"], x["teacher"], x["target"], backend=backend),
}


def _run(loss, x, backend):
    """The loss and all gradients."""
    value = loss(x, backend)
    leaves = [x[name] for name in ("student", "teacher", "temperature") if x[name].requires_grad]
    gradients = torch.autograd.grad(value, leaves, x["upstream"] if value.ndim else None, allow_unused=True)
    return [value, *(gradient for gradient in gradients if gradient is not None)]


CASES = [(name, "torch") for name in LOSSES] + [
    (name, backend) for name in ("mcld", "mcld, soft labels", "info_nce") for backend in ("triton", "cuda")
]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_negated_view_counts_as_its_numbers(name, backend):
    loss = LOSSES[name]
    with family.on_the_cpu(backend), backends.tuned(**({"low_latency_limit": 0} if backend == "cuda" else {})):
        want = _run(loss, _problem(), backend)
        got = _run(loss, {name: _negated(x) for name, x in _problem().items()}, backend)
    assert len(got) == len(want)
    assert all(torch.equal(ours, value) for ours, value in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_lazy_zeros_are_zeros(backend):
    zeros, teacher = torch._efficientzerotensor((N, C)), _problem()["teacher"]
    with family.on_the_cpu(backend):
        got, want = (mcld_kernels.info_nce(x, teacher, backend=backend) for x in (zeros, torch.zeros(N, C)))
    assert torch.equal(got, want)
