"""CKD, CLKD and MLKD under one interface, held to the error bar of `cases`, and the backends that run on a CPU."""

import concurrent.futures
import contextlib
from collections.abc import Callable, Sequence
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


def assert_same_bits(got: Outcome, want: Outcome) -> None:
    assert torch.equal(got.loss, want.loss) and torch.equal(got.student, want.student)


LAYOUTS = ("transposed", "strided", "negated", "conjugate")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout of `LAYOUTS`."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "negated":
        return torch._neg_view(-x)
    if layout == "conjugate":
        return torch.complex(torch.zeros_like(x), -x).conj().imag
    wide = x.new_full((2 * x.shape[0], 3 * x.shape[1] + 1), torch.nan)
    wide[::2, 1::3] = x
    return wide[::2, 1::3]


def check_layout(terms, layout: str, target: Tensor | None = None) -> None:
    """Logits in another layout change no bit."""
    student, teacher = logits("random", 33, 21, torch.float32)
    got = run(terms, laid_out(student, layout), laid_out(teacher, layout), target)
    assert_same_bits(got, run(terms, student, teacher, target))


def check_tensor_of_weights(terms, weight, target: Tensor | None = None) -> None:
    """Weights in a tensor change no bit, and get the terms as their gradient."""
    student, teacher = logits("random", 21, 17, torch.float32)
    tensor = torch.tensor(weight, requires_grad=True)
    got = run(terms, student, teacher, target, weight=tensor)
    want = run(terms, student, teacher, target, weight=weight)
    assert_same_bits(got, want)
    assert torch.equal(tensor.grad, want.terms if tensor.ndim else want.terms[0])


def check_without_direction(terms, reference, eps, target: Tensor | None = None, *, atol, grad_atol, **options) -> None:
    """Rows and columns of zeros, and those that ``eps`` takes for zeros."""
    student, teacher = logits("zeros", 13, 11, torch.float32)
    got = run(terms, 0.7 * student, teacher, target, eps=eps, **options)
    want = run(reference, 0.7 * student.double(), teacher.double(), target, eps=eps, **options)
    torch.testing.assert_close(got.terms.double(), want.terms, rtol=1e-5, atol=atol)
    torch.testing.assert_close(got.student.double(), want.student, rtol=1e-4, atol=grad_atol)


def by_threads(evaluate: Callable[[], Any], counts: Sequence[int] = (1, 2, 5)) -> list[Any]:
    """The results of ``evaluate`` on so many threads each."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(evaluate())
    finally:
        torch.set_num_threads(threads)
    return results


def check_side_by_side(evaluate: Callable[[tuple], Outcome]) -> None:
    """Calls of several Python threads at once disturb each other in no bit. evaluate: of (student, teacher, target)."""
    problems = [(*logits("random", 40 + i, 30, torch.float32, seed=i), labels(40 + i, 30, i)) for i in range(8)]
    want = [evaluate(problem) for problem in problems]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(evaluate, problems))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


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
