"""CKD, CLKD and MLKD under one interface, held to the error bar of `cases`, and the backends that run on a CPU."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import BAR, BAR64, Outcome, labels, logits
from torch import Tensor

from mcld_kernels import backends


class Loss(NamedTuple):
    """A loss with options of its own; ``magnitude``: of the parts that cancel in loss and gradient."""

    terms: Callable[..., Any]
    reference: Callable[..., Any]
    magnitude: Callable[..., tuple[float, float]]  # (student fp64, teacher fp64, options) -> loss, gradient
    options: dict[str, Any]


def run(terms, student, teacher, target=None, *, upstream=1.0, teacher_grad=False, **options) -> Outcome:
    """Loss, terms and gradients, the loss multiplied by ``upstream`` on its way back."""
    student = student.detach().requires_grad_()
    teacher = teacher.detach().requires_grad_(teacher_grad)
    result = terms(student, teacher, target, **options)
    result.loss.backward(torch.as_tensor(upstream, dtype=result.loss.dtype))
    return Outcome(result.loss.detach(), torch.stack(result[1:]), student.grad, teacher.grad)


def spread(x: Tensor, dim: int) -> float:
    """The norm of 1 / (norm of rows or columns), over their number: the size of a gradient through a normalization."""
    norm = x.double().norm(dim=dim)
    return float((1 / norm[norm > 0]).square().sum().sqrt()) / len(norm)


def check(loss: Loss, backend, kind, batch, classes, dtype, *, draws=3, ignored=0.0, teacher_grad=False, **more):
    """Twice eager's error at the same dtype, plus the floor of `cases.Bar`, over several draws; NaN fails."""
    bar, stat = (BAR64, torch.float64) if dtype == torch.float64 else (BAR, torch.float32)
    options = {**loss.options, **more}
    totals: dict[str, list[float]] = {}
    for seed in range(draws):
        student, teacher = logits(kind, batch, classes, dtype, seed)
        target = labels(batch, classes, seed, ignored)
        upstream = float(torch.randn((), generator=torch.Generator().manual_seed(seed)))
        if dtype == torch.float16:  # as a GradScaler would, so that eager's gradient stays inside fp16
            upstream *= 256.0
        both = {"upstream": upstream, "teacher_grad": teacher_grad, **options}
        got = run(loss.terms, student, teacher, target, backend=backend, **both)
        want = run(loss.reference, student.double(), teacher.double(), target, **both)
        eager = run(loss.reference, student, teacher, target, **both)
        assert (got.loss.dtype, got.terms.dtype, got.student.dtype) == (stat, stat, dtype)
        of_loss, of_gradient = loss.magnitude(student.double(), teacher.double(), options)
        natural = {"loss": of_loss, "terms": of_loss, "student": of_gradient, "teacher": of_gradient}
        for name, ours, exact, theirs in zip(Outcome._fields, got, want, eager, strict=True):
            if exact is None:
                continue
            size = natural[name] * (abs(upstream) if name in ("student", "teacher") else 1.0)
            floor = bar.ulps * torch.finfo(dtype).eps * float(exact.norm()) + bar.natural * torch.finfo(stat).eps * size
            squares = totals.setdefault(name, [0.0, 0.0, 0.0])
            squares[0] += float((ours.double() - exact).square().sum())
            error = float((theirs.double() - exact).square().sum())
            squares[1] += error if error < float("inf") else 0.0  # where eager is not finite the floor alone applies
            squares[2] += floor**2
    for name, (ours, eager, floor) in totals.items():
        assert ours**0.5 <= 2 * eager**0.5 + floor**0.5, (
            f"{name}: error {ours**0.5:.3g}, eager's {eager**0.5:.3g}, floor {floor**0.5:.3g}"
        )


@contextlib.contextmanager
def on_the_cpu(name: str):
    """Run backend ``name`` on CPU tensors: Triton interpreted, the CUDA kernels compiled for the host."""
    with contextlib.ExitStack() as stack:
        if name == "cuda":
            import csrc_host

            from mcld_kernels.backends.cuda import extension

            if csrc_host.compiler() is None:
                pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
            stack.enter_context(extension.use(csrc_host.load()))
        if name == "triton":
            pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")
            import triton_interpreter

            stack.enter_context(triton_interpreter.faithful())
        x = torch.zeros(1, 1)
        if (reason := backends.unsupported_reason(name, x, x, False)) is not None:
            pytest.skip(f"backend {name!r}: {reason}")
        yield
