"""The compiled CPU module's contrast in one pass (csrc/cpu/contrast.h), against its definition in fp64.

Every instruction set; rows on either side of a vector, of a slice of 64 anchors and of a block of candidates;
candidates that are read in place and such that are copied.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_cpu_rows import check, matrix
from test_low_latency import MODULE, NEEDS_MODULE

import mcld_kernels
from mcld_kernels import backends, info_nce
from mcld_kernels.backends import torch_contrast
from mcld_kernels.backends.torch import TorchKernels
from mcld_kernels.kernels import AnchorPassArgs, ContrastArgs, TermWeight, UnitRows

pytestmark = NEEDS_MODULE
ISAS = MODULE.isas() if MODULE else ["fastest"]
# Anchors, candidates, columns, offset. The last two have three blocks of candidates and rows that fill no vector.
SHAPES = [
    (1, 1, 1, 0),
    (2, 7, 3, 5),
    (16, 16, 16, 0),
    (5, 40, 33, 2),
    (70, 131, 64, 61),
    (65, 300, 290, 17),
    (33, 280, 301, 150),
]
TEMPERATURE = 0.2


@pytest.fixture(params=ISAS)
def isa(request):
    with backends.tuned(isa=request.param):
        yield request.param


@pytest.fixture
def chunks(monkeypatch):
    """The contrasts that went by chunks."""
    seen = []
    contrast = TorchKernels.contrast
    monkeypatch.setattr(TorchKernels, "contrast", lambda self, args: seen.append(args) or contrast(self, args))
    return seen


def unit_rows(n, d, generator):
    """Unit rows with NaN between them, and 1 / norm of their logits; the first row of several has no direction."""
    rows = matrix(n, d, False, generator)
    rows /= rows.norm(dim=1, keepdim=True)
    inv_norm = torch.rand(n, generator=generator) + 0.5
    if n > 2:
        rows[0], inv_norm[0] = 0, 0
    return UnitRows(rows=rows, inv_norm=inv_norm, n=n, d=d)


def definition(args, weights, means, index, dtype):
    """Each anchor's parts (terms, n) and the gradient by the anchors' logits (n, d)."""
    rows, candidates = args.anchors.rows.to(dtype, copy=True).requires_grad_(), args.candidates.rows.to(dtype)
    n = rows.shape[0]
    similarity = rows @ candidates.T / args.temperature
    partner = torch.arange(n) + args.offset
    own = F.one_hot(partner, candidates.shape[0]).bool()
    dropped = torch.zeros_like(own) if args.mask is None else (args.mask[0][:, None] == args.mask[1]) & ~own
    similarity = similarity.masked_fill(dropped, -math.inf)
    lse, positive = similarity.logsumexp(1), similarity[own]
    parts, total = [], 0.0
    for weight in weights:
        at = positive if weight.positives == "diagonal" else (rows * means[index].to(dtype)).sum(1) / args.temperature
        part = (lse - at) * weight.constant * (1.0 if weight.factor is None else weight.factor.to(dtype))
        parts.append(part if weight.counted is None else part * weight.counted)
        total = total + parts[-1].sum() * weight.term_weight * (1.0 if weight.weight is None else weight.weight)
    (gradient,) = torch.autograd.grad(total, rows)
    x = rows.detach()
    gradient = (gradient - x * (gradient * x).sum(1, keepdim=True)) * args.anchors.inv_norm.to(dtype)[:, None]
    return torch.stack(parts).detach(), gradient


def term_weights(kind, n, generator):
    by_label = TermWeight(
        term=1,
        positives="label",
        constant=0.3,
        factor=torch.tensor(0.9),
        counted=torch.rand(n, generator=generator) < 0.7,
        term_weight=0.5,
        weight=torch.tensor(1.5),
    )
    diagonal = TermWeight(term=0, positives="diagonal", constant=1 / n, term_weight=2.0)
    return {"diagonal": (diagonal,), "label": (by_label,), "both": (diagonal, by_label)}[kind]


@pytest.mark.parametrize("kind", ["diagonal", "label", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_contrast_of_unit_rows(shape, kind, isa, poison):
    n, m, d, offset = shape
    g = torch.Generator().manual_seed(0)
    masked = SHAPES.index(shape) % 2
    anchors, candidates = unit_rows(n, d, g), unit_rows(m, d, g)
    mask = tuple(torch.randint(-2, 3, (2 * k,), generator=g)[::2] for k in (n, m)) if masked else None
    means = matrix(4, d, False, g) if kind != "diagonal" else None
    index = torch.randint(4, (n,), generator=g) if kind != "diagonal" else None
    weights = term_weights(kind, n, g)
    args = ContrastArgs(
        anchors=anchors, candidates=candidates, temperature=TEMPERATURE, offset=offset, mask=mask, anchor_grad=True
    )
    (exact, exact_grad), (eager, eager_grad) = (
        definition(args, weights, means, index, dtype) for dtype in (torch.float64, torch.float32)
    )
    for with_grad, accumulate in ((True, False), (True, True), (False, False)):
        start = matrix(n, d, False, g)
        out = start.clone() if with_grad else None
        per_anchor = torch.full((len(weights), n + 2), torch.nan)
        kernels = backends.kernel_set("torch", anchors.rows, candidates.rows)
        compute = kernels.anchor_pass(args, out)
        compute(
            AnchorPassArgs(
                weights=weights, per_anchor=per_anchor, out=out, class_means=means, class_index=index,
                accumulate=accumulate,
            )
        )  # fmt: skip
        check(per_anchor[:, :n], exact, eager)
        assert per_anchor[:, n:].isnan().all()
        if with_grad:
            before = start if accumulate else torch.zeros_like(start)
            check(out, before + exact_grad, before + eager_grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_info_nce(shape, isa, poison, chunks):
    """Rows as they come: strided, transposed, of any norm; offset, mask, reductions and the temperature's gradient."""
    n, m, d, offset = shape
    g = torch.Generator().manual_seed(0)
    by_columns = SHAPES.index(shape) % 2 == 1
    rows = matrix(n, d, by_columns, g) * 10 ** torch.randn(n, 1, generator=g)
    candidates = matrix(m, d, by_columns, g)
    if m > 3:
        candidates[0] = 0
    target, theirs = (torch.randint(3, (k,), generator=g) for k in (n, m))
    target[::3], theirs[::3] = -100, -100
    masked = {"mask_same_class": True, "anchor_target": target, "candidate_target": theirs}
    upstream = torch.rand(n, generator=g)

    def run(dtype, backend, labels, reduction):
        leaf = rows.to(dtype, copy=True).requires_grad_()
        temperature = torch.tensor(TEMPERATURE, dtype=dtype, requires_grad=True)
        options = {"temperature": temperature, "offset": offset, "reduction": reduction, "backend": backend, **labels}
        loss = info_nce(leaf, candidates.to(dtype), **options)
        loss.backward(upstream.to(dtype) if reduction == "none" else None)
        with torch.no_grad():
            torch.testing.assert_close(info_nce(leaf, candidates.to(dtype), **options), loss, rtol=0, atol=0)
        return loss.detach(), leaf.grad, temperature.grad

    for labels, reduction in itertools.product(({}, masked), ("mean", "sum", "none")):
        got = run(torch.float32, "torch", labels, reduction)
        exact = run(torch.float64, "reference", labels, reduction)
        eager = run(torch.float32, "reference", labels, reduction)
        for a, b, c in zip(got[:2], exact[:2], eager[:2], strict=True):
            if m > 1:
                check(a, b, c)
            else:  # all is 0 but for rounding
                assert float(a.abs().max()) < 1e-5
        # The temperature's gradient: its parts, of the size of a loss over the temperature, cancel.
        a, b, c = (float(result[2]) for result in (got, exact, eager))
        assert abs(a - b) <= 2 * abs(c - b) + 4e-7 * float(exact[0].abs().sum() + 1) / TEMPERATURE
    assert not chunks


@pytest.mark.parametrize("labels", ["without", "with"])
def test_mcld_takes_it_and_keeps_no_matrix(labels, isa, chunks):
    """Above the low-latency path's sizes, and where the teacher has further candidates."""
    torch.manual_seed(0)
    student, teacher, queue = (torch.randn(k, 40) for k in (90, 90, 50))
    target, theirs = torch.randint(7, (90,)), torch.randint(7, (50,))
    target[::4] = -100
    weight = (1.0, 0.7, 0.0) if labels == "with" else (1.0, 0.0, 0.0)

    def run(dtype, backend, **options):
        leaf = student.to(dtype, copy=True).requires_grad_()
        loss = mcld_kernels.mcld_loss(
            leaf, teacher.to(dtype), target, weight=weight, backend=backend, candidates=queue.to(dtype),
            candidate_target=theirs, **options,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), leaf.grad

    for options in ({}, {"mask_same_class": True, "temperature": (0.1, 0.3, 1.0)}):
        got = run(torch.float32, "torch", **options)
        exact, eager = (run(dtype, "reference", **options) for dtype in (torch.float64, torch.float32))
        for a, b, c in zip(got, exact, eager, strict=True):
            check(a, b, c)
    assert not chunks


def test_the_number_of_threads_changes_nothing(isa):
    torch.manual_seed(0)
    rows, candidates, threads = torch.randn(150, 40), torch.randn(1100, 40), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = rows.clone().requires_grad_()
            loss = info_nce(leaf, candidates, backend="torch")
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_late_in_training_the_loss_keeps_its_digits(isa):
    """The positives are close: the loss is the logarithm of a little more than 1."""
    torch.manual_seed(0)
    teacher = torch.randn(40, 64)
    student = (teacher + 1e-3 * torch.randn(40, 64)).requires_grad_()
    loss = info_nce(student, torch.cat((teacher, -teacher)), temperature=0.03, backend="torch")
    exact = info_nce(student.detach().double(), torch.cat((teacher, -teacher)).double(), temperature=0.03)
    torch.testing.assert_close(loss.detach().double(), exact, rtol=2e-5, atol=0)
    assert 0 < float(exact) < 1e-6


def test_what_is_not_finite_shows(isa):
    torch.manual_seed(0)
    for value in (torch.nan, torch.inf, 3e38):
        for side in range(2):
            tensors = [torch.randn(20, 33), torch.randn(60, 33)]
            tensors[side][7, 5] = value
            if value == 3e38:
                tensors[side][7, 6] = value  # a norm out of range
            rows = tensors[0].requires_grad_()
            loss = info_nce(rows, tensors[1], backend="torch", reduction="none")
            loss.sum().backward()
            bad = [7] if side == 0 else list(range(20))
            assert loss[bad].isnan().all() and rows.grad[bad].isnan().all()
            others = [i for i in range(20) if i not in bad]
            assert torch.isfinite(loss[others]).all() and torch.isfinite(rows.grad[others]).all()


def test_what_it_does_not_serve_goes_by_chunks(chunks, monkeypatch):
    """A range that fp32 does not have, half precision, a partner that is no candidate; and on demand."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 8), torch.randn(9, 8)
    rows, candidates = (UnitRows(rows=F.normalize(z), inv_norm=torch.ones(len(z)), n=len(z), d=8) for z in (x, y))
    out = torch.empty(5, 8)
    kernels = backends.kernel_set("torch", x, y)
    args = {"anchors": rows, "candidates": candidates, "temperature": 0.1, "offset": 4, "anchor_grad": True}
    assert kernels.anchor_pass(ContrastArgs(**args), out) is not None
    for changed in ({"offset": 5}, {"offset": -1}, {"temperature": 0.02}, {"is_bounded": False}):
        assert kernels.anchor_pass(ContrastArgs(**args | changed), out) is None
    assert kernels.anchor_pass(ContrastArgs(**args), torch.empty(8, 5).T) is None
    assert kernels.anchor_pass(ContrastArgs(**args), out.double()) is None
    # exp(80) times 4096 is below the largest number of fp32, times 8192 it is not.
    assert torch_contrast._has_range(0.025, 512) and not torch_contrast._has_range(0.025, 4096)
    with backends.tuned(compiled_contrast=False, low_latency=False):
        info_nce(x, y, backend="torch")
    assert len(chunks) == 1
