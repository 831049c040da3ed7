"""The compiled CPU module's contrast in one pass (csrc/cpu/contrast.h), against its definition in fp64.

Every instruction set; rows on either side of a vector, of a slice of 64 anchors and of a block of candidates;
candidates that are read in place and such that are copied; the same of columns.
"""

import itertools
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from test_cpu_rows import check, matrix
from test_low_latency import MODULE, NEEDS_MODULE

import mcld_kernels
from mcld_kernels import backends, info_nce
from mcld_kernels.backends import torch_contrast
from mcld_kernels.backends.torch import TorchKernels
from mcld_kernels.backends.torch_low_latency import _is_for_contrast, has_slices
from mcld_kernels.kernels import AnchorPassArgs, ContrastArgs, TermWeight, UnitRows
from mcld_kernels.options import mcld_options

pytestmark = NEEDS_MODULE
ISAS = MODULE.isas() if MODULE else ["fastest"]
# Anchors, candidates, columns, offset. The last two have three blocks of candidates and rows that fill no vector.
SHAPES = [
    (1, 1, 1, 0),
    (2, 7, 3, 5),
    (16, 16, 16, 0),
    (3, 513, 3, 1),  # a block that ends less than a vector before the last row does
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


def unit_rows(n, d, generator, by_columns=False):
    """Unit rows with NaN between them, and 1 / norm of their logits; the first row of several has no direction."""
    rows = matrix(n, d, by_columns, generator)
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
    check_pass(args, weights, means, index, matrix(n, d, False, g))


@pytest.mark.parametrize("shape", [*SHAPES, (20, 1100, 40, 1000)], ids=str)
def test_the_contrast_of_unit_columns(shape, isa, poison):
    """The category-wise term: as rows, without mask and label positives; also several blocks of candidates."""
    n, m, d, offset = shape
    g = torch.Generator().manual_seed(0)
    anchors, candidates = (unit_rows(k, d, g, by_columns=True) for k in (n, m))
    weight = term_weights("label", n, g)[0]
    if shape[0] % 2:
        weight = TermWeight(term=2, positives="diagonal", constant=1 / n)
    else:
        weight.positives = "diagonal"  # of present columns alone, by a factor
    args = ContrastArgs(
        anchors=anchors, candidates=candidates, temperature=TEMPERATURE, offset=offset, anchor_grad=True
    )
    check_pass(args, (weight,), None, None, matrix(n, d, True, g))


def check_pass(args, weights, means, index, start):
    """The pass against the definition, with a gradient, with one that adds to ``start`` and without any."""
    n = args.anchors.n
    kernels = backends.kernel_set("torch", args.anchors.rows, args.candidates.rows)
    (exact, exact_grad), (eager, eager_grad) = (
        definition(args, weights, means, index, dtype) for dtype in (torch.float64, torch.float32)
    )
    for with_grad, accumulate in ((True, False), (True, True), (False, False)):
        whole = start._base.clone()
        out = whole.as_strided(start.shape, start.stride()) if with_grad else None
        per_anchor = torch.full((len(weights), n + 2), torch.nan)
        compute = kernels.anchor_pass(args, out, None if means is None else "class")
        compute(
            AnchorPassArgs(
                weights=weights, per_anchor=per_anchor, out=out, class_means=means, class_index=index,
                accumulate=accumulate,
            )
        )  # fmt: skip
        check(per_anchor[:, :n], exact, eager)
        assert per_anchor[:, n:].isnan().all()
        if out is not None:
            before = start if accumulate else torch.zeros_like(start)
            check(out, before + exact_grad, before + eager_grad)
            assert whole.isnan().sum() == start._base.isnan().sum()  # nothing writes into the gaps


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


@pytest.mark.parametrize("further", [False, True], ids=["batch", "queue"])
def test_mcld_with_soft_labels(further, isa, chunks):
    """Each anchor has a mean of its own; the anchors' hard labels are those of the largest weight."""
    torch.manual_seed(0)
    student, teacher, queue = (torch.randn(k, 40) for k in (70, 70, 30))
    target, theirs = (torch.randn(k, 40).mul(3).softmax(1) for k in (70, 30))
    target[::5] = 0  # rows without a class
    target[1::5] = F.one_hot(torch.arange(14), 40).float()

    def run(dtype, backend, options):
        leaf = student.to(dtype, copy=True).requires_grad_()
        if further:
            options = options | {"candidates": queue.to(dtype), "candidate_target": theirs}
        loss = mcld_kernels.mcld_loss(leaf, teacher.to(dtype), target, backend=backend, **options)
        loss.backward()
        return loss.detach(), leaf.grad

    for options in ({"weight": (0.0, 1.0, 0.0)}, {"weight": (1.0, 0.7, 0.0)}):
        got = run(torch.float32, "torch", options)
        exact, eager = (run(dtype, "reference", options) for dtype in (torch.float64, torch.float32))
        for a, b, c in zip(got, exact, eager, strict=True):
            check(a, b, c)
    assert not chunks


def test_mcld_takes_it_by_columns(isa, chunks):
    """The category-wise term: alone, of the classes that occur, and after it row terms, which add to its gradient."""
    torch.manual_seed(0)
    student, teacher, target = torch.randn(30, 70), torch.randn(30, 70), torch.randint(70, (30,))

    def run(dtype, backend, options):
        leaf = student.to(dtype, copy=True).requires_grad_()
        loss = mcld_kernels.mcld_loss(leaf, teacher.to(dtype), target, backend=backend, **options)
        loss.backward()
        return loss.detach(), leaf.grad

    for options in ({"weight": (0.0, 0.0, 1.0)}, {"present_only": True}, {"temperature": (0.1, 0.1, 0.3)}):
        with backends.tuned(low_latency=False, isa=isa):
            got = run(torch.float32, "torch", options)
        exact, eager = (run(dtype, "reference", options) for dtype in (torch.float64, torch.float32))
        for a, b, c in zip(got, exact, eager, strict=True):
            check(a, b, c)
    assert not chunks


@pytest.mark.parametrize(("n", "num_classes"), [(2, 1600), (161, 914), (160, 914)])
def test_large_category_wise_terms_take_it(n, num_classes, monkeypatch):
    """More columns than the low-latency path takes, or, alone, 2^27 multiply-adds; also a plain call."""
    seen = []
    compute = torch_contrast._anchor_pass
    monkeypatch.setattr(torch_contrast, "_anchor_pass", lambda *args: seen.append(args) or compute(*args))
    x = torch.randn(n, num_classes)
    for call in (mcld_kernels.mcld_loss, mcld_kernels.mcld_terms):
        call(x, x, weight=(0.0, 0.0, 1.0))
    assert len(seen) == (0 if n == 160 else 2)
    del seen[:]
    mcld_kernels.mcld_loss(x, x, weight=(1.0, 0.0, 1.0))
    assert len(seen) == (2 if num_classes > 1536 else 0)  # rows and columns


def test_sizes_at_which_it_is_faster_than_matrices():
    all_terms, rows, columns, teacher = (
        mcld_options(
            weight=weight, direction=direction, temperature=0.1, mask_same_class=False, present_only=False,
            ignore_index=-100, eps=1e-12,
        )[0]
        for weight, direction in (
            ((1.0, 1.0, 1.0), "student"),
            ((1.0, 1.0, 0.0), "student"),
            ((0.0, 0.0, 1.0), "teacher"),
            ((1.0, 0.0, 1.0), "teacher"),
        )
    )  # fmt: skip
    for options in (all_terms, rows):
        assert _is_for_contrast(options, 1537, 10) and not _is_for_contrast(options, 1536, 10)
    assert _is_for_contrast(all_terms, 1074, 1000) and not _is_for_contrast(all_terms, 1073, 1000)
    assert _is_for_contrast(all_terms, 2, 1537) and not _is_for_contrast(rows, 1536, 1537)
    assert _is_for_contrast(columns, 3356, 100) and not _is_for_contrast(columns, 3355, 100)
    assert _is_for_contrast(columns, 161, 914) and not _is_for_contrast(columns, 160, 914)
    assert not _is_for_contrast(teacher, 4000, 1600)
    assert has_slices(5, 2) and has_slices(17, 4) and not has_slices(16, 3)


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
def test_the_number_of_threads_changes_nothing(by_columns, isa):
    torch.manual_seed(0)
    threads, results = torch.get_num_threads(), []
    student, teacher = (torch.randn(k, 40) for k in (150, 1100))
    if by_columns:
        student, teacher = torch.randn(100, 300), torch.randn(100, 300)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = student.clone().requires_grad_()
            if by_columns:
                with backends.tuned(low_latency=False, isa=isa):
                    loss = mcld_kernels.mcld_loss(leaf, teacher, weight=(0.0, 0.0, 1.0), backend="torch")
            else:
                loss = info_nce(leaf, teacher, backend="torch")
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_a_large_call_in_parts_hears_a_signal(isa, monkeypatch):
    torch.manual_seed(0)
    rows, candidates = torch.randn(700, 40), torch.randn(900, 40)
    whole = info_nce(rows, candidates, backend="torch", reduction="none")
    monkeypatch.setattr(torch_contrast, "PART", 1)
    mean = info_nce(rows, candidates, backend="torch")
    assert torch.equal(info_nce(rows, candidates, backend="torch", reduction="none"), whole)
    assert float(mean) == pytest.approx(float(whole.mean()), rel=1e-6)

    class HeardError(Exception):
        pass

    def hear(*_):
        raise HeardError

    rows = UnitRows(rows=F.normalize(torch.randn(16384, 64)), inv_norm=torch.ones(16384), n=16384, d=64)
    args = ContrastArgs(anchors=rows, candidates=rows, temperature=TEMPERATURE, offset=0)
    per_anchor = torch.full((1, rows.n), torch.nan)
    weights = (TermWeight(term=0, positives="diagonal", constant=1.0),)
    compute = backends.kernel_set("torch", rows.rows, rows.rows).anchor_pass(args, None, None)
    before = signal.signal(signal.SIGALRM, hear)
    try:
        with pytest.raises(HeardError):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            compute(
                AnchorPassArgs(
                    weights=weights, per_anchor=per_anchor, out=None, class_means=None, class_index=None,
                    accumulate=False,
                )
            )  # fmt: skip
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert per_anchor[0, -1].isnan()  # the rest was not computed


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


def test_columns_that_are_not_finite_show(isa):
    torch.manual_seed(0)
    for value in (torch.nan, torch.inf):
        for side in range(2):
            logits = [torch.randn(50, 70), torch.randn(50, 70)]
            logits[side][40, 66] = value
            anchors, candidates = (F.normalize(x, dim=0).T for x in logits)
            units = [UnitRows(rows=x, inv_norm=torch.ones(70), n=70, d=50) for x in (anchors, candidates)]
            args = ContrastArgs(anchors=units[0], candidates=units[1], temperature=0.1, offset=0, anchor_grad=True)
            per_anchor, out = torch.empty(1, 70), torch.empty(50, 70).T
            backends.kernel_set("torch", *logits).anchor_pass(args, out, None)(
                AnchorPassArgs(
                    weights=(TermWeight(term=2, positives="diagonal", constant=1.0),), per_anchor=per_anchor, out=out,
                    class_means=None, class_index=None, accumulate=False,
                )
            )  # fmt: skip
            bad = torch.zeros(70, dtype=torch.bool)
            bad[66 if side == 0 else slice(70)] = True
            assert (per_anchor[0].isnan() == bad).all() and (out.isnan() == bad[:, None]).all()


def test_what_it_does_not_serve_goes_by_chunks(chunks, monkeypatch):
    """A range that fp32 does not have, half precision, a partner that is no candidate; and on demand."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 8), torch.randn(9, 8)
    rows, candidates = (UnitRows(rows=F.normalize(z), inv_norm=torch.ones(len(z)), n=len(z), d=8) for z in (x, y))
    out = torch.empty(5, 8)
    kernels = backends.kernel_set("torch", x, y)
    args = {"anchors": rows, "candidates": candidates, "temperature": 0.1, "offset": 4, "anchor_grad": True}
    assert kernels.anchor_pass(ContrastArgs(**args), out, None) is not None
    for changed in ({"offset": 5}, {"offset": -1}, {"temperature": 0.02}, {"is_bounded": False}):
        assert kernels.anchor_pass(ContrastArgs(**args | changed), out, None) is None
    assert kernels.anchor_pass(ContrastArgs(**args), torch.empty(8, 5).T, None) is None
    assert kernels.anchor_pass(ContrastArgs(**args), out.double(), None) is None
    for unit in (rows, candidates):
        unit.rows = unit.rows.T.contiguous().T
    mask, out = (torch.arange(5), torch.arange(9)), torch.empty(8, 5).T
    assert kernels.anchor_pass(ContrastArgs(**args), out, None) is not None
    assert kernels.anchor_pass(ContrastArgs(**args), out, "class") is None
    assert kernels.anchor_pass(ContrastArgs(**args, mask=mask), out, None) is None
    assert kernels.anchor_pass(ContrastArgs(**args), torch.empty(5, 8), None) is None
    # exp(80) times 4096 is below the largest number of fp32, times 8192 it is not.
    assert torch_contrast._has_range(0.025, 512) and not torch_contrast._has_range(0.025, 4096)
    with backends.tuned(compiled_contrast=False, low_latency=False):
        info_nce(x, y, backend="torch")
    assert len(chunks) == 1
