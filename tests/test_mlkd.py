"""MLKD: against its definition in loops, SupConLoss of pytorch-metric-learning, and the reference on every backend."""

import math

import loops
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, labels, logits, short
from family import Loss, check, on_the_cpu, run, spread
from torch.profiler import ProfilerActivity, profile

import mcld_kernels
from mcld_kernels import MLKDLoss, backends, reference
from mcld_kernels.losses import mlkd_correlation
from mcld_kernels.losses.mlkd import PRESETS

WEIGHT = (50.0, 20.0, 1.0)
SUPERVISED = (0.0, 0.0, 1.0)
LARGEST = (1 << 63) - 2  # of all labels


def magnitude(student, teacher, options):
    w = options.get("weight", WEIGHT)
    cold, hot = options.get("supervised_temperature", 0.07), options.get("correlation_temperature", 0.5)
    loss = 2 * w[0] / hot + 4 * w[1] + w[2] / cold
    # A row is an anchor, a candidate and, of the supervised term, a positive of others.
    rows = math.hypot(spread(student, 1), spread(teacher, 1))
    return loss, (4 * w[0] / hot + 4 * w[1] + 4 * w[2] / cold) * rows


MLKD = Loss(mcld_kernels.mlkd_terms, reference.mlkd_terms, magnitude, {})
CASES = {
    "all": {},
    "one view": {"views": 1},
    "cold": {"correlation_temperature": 0.02, "supervised_temperature": 0.015},
    "supervised": {"weight": SUPERVISED},
    "supervised, cold, one view": {"weight": SUPERVISED, "views": 1, "supervised_temperature": 0.015},
}


def by_loops(student, teacher, target, weight, views=2, hot=0.5, cold=0.07, ignored=-100, eps=1e-12):
    s, t = ([loops.unit(row, eps) for row in rows] for rows in (student, teacher))

    def softmax(rows, i):
        values = [loops.cosine(rows[i], rows[j]) / hot for j in range(len(rows)) if j != i]
        total = loops.log_sum_exp(values)
        return [math.exp(v - total) for v in values]

    divergences = []
    for i in range(len(s)):
        p, q = softmax(t, i), softmax(s, i)
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    alignment = loops.mean([2 - 2 * loops.cosine(a, b) for a, b in zip(s, t, strict=True)])
    z, y = (s + t, target * 2) if views == 2 else (s, target)
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if y[j] == y[i] and y[i] != ignored]
        if positives:
            total = loops.log_sum_exp([loops.cosine(z[i], z[j]) / cold for j in others])
            losses.append(total - loops.mean([loops.cosine(z[i], z[j]) / cold for j in positives]))
    terms = loops.mean(divergences), alignment, loops.mean(losses)
    return sum(w * term for w, term in zip(weight, terms, strict=True))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["random", "zeros"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_loss_is_its_definition_in_loops(backend, kind, views):
    student, teacher = logits(kind, 6, 5)
    target = torch.tensor([3, 1, 3, -100, 900, 1])  # 900: labels are compared with one another alone
    options = {"weight": (5.0, 2.0, 1.0), "views": views}
    got = run(mcld_kernels.mlkd_terms, student, teacher, target, backend=backend, **options)
    lists, y = (student.tolist(), teacher.tolist()), target.tolist()
    assert float(got.loss) == pytest.approx(by_loops(*lists, y, **options), rel=1e-12)
    if kind == "random":
        slopes = loops.slopes(lambda rows: by_loops(rows, lists[1], y, **options), lists[0])
        torch.testing.assert_close(got.student, torch.tensor(slopes, dtype=torch.float64), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("weight", [SUPERVISED, (1e-300, 0.0, 1.0)], ids=["alone", "with the correlation"])
def test_the_supervised_term_is_supcon_of_pytorch_metric_learning(weight, views):
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    student, teacher = logits("random", 24, 9)
    target = labels(24, 9)
    leaf = student.clone().requires_grad_()
    rows, y = (torch.cat((leaf, teacher)), torch.cat((target, target))) if views == 2 else (leaf, target)
    public = losses.SupConLoss(temperature=0.07)(rows, y)
    public.backward()
    for backend in ("reference", "torch"):
        got = run(mcld_kernels.mlkd_terms, student, teacher, target, weight=weight, views=views, backend=backend)
        torch.testing.assert_close(got.loss, public.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(got.student, leaf.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_the_terms_of_torchs_own_functions(preset):
    student, teacher = logits("random", 12, 9)
    leaf = student.clone().requires_grad_()
    s, t, others = F.normalize(leaf), F.normalize(teacher), ~torch.eye(12, dtype=torch.bool)
    q, p = ((x @ x.T / 0.5)[others].view(12, 11).log_softmax(1) for x in (s, t))
    correlation = F.kl_div(q, p, reduction="batchmean", log_target=True)
    alignment = (s - t).square().sum(1).mean()
    target = labels(12, 9)
    got = run(mcld_kernels.mlkd_terms, student, teacher, target, backend="torch", **PRESETS[preset])
    torch.testing.assert_close(got.terms[:2], torch.stack((correlation, alignment)).detach(), rtol=1e-9, atol=0)
    w = {"cifar100": (50, 20, 1), "imagenet": (20, 10, 0.5)}[preset]
    torch.testing.assert_close(got.loss, (got.terms * torch.tensor(w)).sum(), rtol=1e-12, atol=0)


@pytest.fixture
def operations():
    """The paths in torch operations; test_cpu_mlkd.py has the compiled one."""
    with backends.tuned(compiled=False):
        yield


@pytest.mark.usefixtures("poison", "operations")
class TestTorch:
    @pytest.mark.parametrize("rows", [0, 1, 5])
    @pytest.mark.parametrize("options", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_any_dtype_and_chunk_is_the_reference(self, dtype, options, rows):
        """rows: of a chunk of the correlation; 0: the batch at once."""
        itemsize = 8 if dtype == torch.float64 else 4
        for shape in ((5, 1), (23, 17)):
            with backends.tuned(chunk_bytes=rows * 8 * shape[0] * itemsize if rows else 1 << 25):
                check(MLKD, "torch", "random", *shape, dtype, teacher_grad=rows == 5, ignored=0.2, draws=4, **options)

    @pytest.mark.parametrize("kind", ["converged", "collinear", "large", "zeros"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
    def test_any_kind_of_logits(self, dtype, kind):
        for chunk, teacher_grad in ((1 << 25, False), (9000, True)):
            with backends.tuned(chunk_bytes=chunk):
                check(MLKD, "torch", kind, 40, 31, dtype, teacher_grad=teacher_grad, ignored=0.1)

    @pytest.mark.parametrize("chunk", [1 << 25, 9000])
    def test_late_in_training_the_correlation_keeps_its_digits(self, chunk):
        """The student is its teacher to 1e-3; eager's divergence is its rounding error."""
        teacher = logits("random", 40, 31)[1].float()
        student = teacher + 1e-3 * logits("random", 40, 31, torch.float32)[0]
        options = {"weight": (1.0, 0.0, 0.0)}
        want = run(reference.mlkd_terms, student.double(), teacher.double(), **options)
        with backends.tuned(chunk_bytes=chunk):
            got = run(mcld_kernels.mlkd_terms, student, teacher, backend="torch", **options)
        eager = run(reference.mlkd_terms, student, teacher, **options)
        assert abs(float(got.loss - want.loss)) < 0.01 * float(want.loss) < 0.5 * abs(float(eager.loss - want.loss))
        assert float((got.student - want.student).norm()) <= 1.2 * float((eager.student - want.student).norm())

    @pytest.mark.parametrize("is_readable", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
    def test_early_in_training_the_sums_of_the_student_keep_their_digits(self, dtype, is_readable, monkeypatch):
        """Its similarities lie far below the teacher's: sums of its exponentials are e^-10 and e^-40 of the other's.

        is_readable: False: as on a GPU, where nothing is read.
        """
        if not is_readable:
            monkeypatch.setattr(mlkd_correlation, "is_readable", lambda tensor: False)
        for temperature in (0.1, 0.05, 0.026):
            for chunk, teacher_grad in ((1 << 25, False), (9000, True)):
                with backends.tuned(chunk_bytes=chunk):
                    options = {"correlation_temperature": temperature, "weight": (1.0, 0.0, 0.0)}
                    check(MLKD, "torch", "alike", 40, 31, dtype, teacher_grad=teacher_grad, **options)

    @pytest.mark.parametrize("chunk", [1 << 25, 1500])
    @pytest.mark.parametrize("shape", [(8, 17), (64, 16)], ids=str)
    def test_cold_rows_that_resemble_one_other_get_no_rounding_error(self, shape, chunk):
        """Both softmaxes are all but one pair: term and gradients all but 0, as eager's, not the error of 1 / t."""
        student, teacher = (x.float() for x in logits("random", *shape))
        for x in (student, teacher):
            x[1::2] = x[::2] + 0.02 * x[1::2]
        options = {"weight": (1.0, 0.0, 0.0), "correlation_temperature": 0.005, "teacher_grad": True}
        want = run(reference.mlkd_terms, student.double(), teacher.double(), **options)
        with backends.tuned(chunk_bytes=chunk):
            got = run(mcld_kernels.mlkd_terms, student, teacher, backend="torch", **options)
        assert abs(got.loss.item() - want.loss.item()) < 1e-9
        scale = 1 / (shape[0] * 0.005 * min(float(x.norm(dim=1).min()) for x in (student, teacher)))
        for name in ("student", "teacher"):
            assert float((getattr(got, name) - getattr(want, name)).abs().max()) < 1e-9 * scale

    def test_rows_with_one_other_row_have_no_divergence(self):
        """Opposite student rows beside equal teacher rows: softmaxes over one row are 1."""
        student, teacher = torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1)
        for chunk in (1 << 25, 1):
            with backends.tuned(chunk_bytes=chunk):
                options = {"correlation_temperature": 0.05, "weight": (1.0, 0.0, 0.0)}
                got = run(mcld_kernels.mlkd_terms, student, teacher, backend="torch", **options)
            assert abs(float(got.loss)) < 1e-5  # of similarities of 20
            assert got.student.tolist() == [[0.0], [0.0]]

    @pytest.mark.parametrize("weight", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)], ids=str)
    def test_zero_removes_a_term(self, weight):
        student, teacher = logits("random", 9, 7)
        target = labels(9, 7) if weight[2] else None
        for chunk in (1, 1 << 25):
            with backends.tuned(chunk_bytes=chunk):
                got, want = (
                    run(terms, student, teacher, target, teacher_grad=True, weight=weight)
                    for terms in (mcld_kernels.mlkd_terms, reference.mlkd_terms)
                )
            torch.testing.assert_close(tuple(got), tuple(want))
            assert [bool(term) for term in got.terms] == [bool(w) for w in weight]

    def test_one_view_multiplies_the_students_rows_alone(self):
        student, teacher = logits("random", 40, 16, torch.float32)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            run(mcld_kernels.mlkd_terms, student, teacher, labels(40, 5), backend="torch", weight=SUPERVISED, views=1)
        products = [event.input_shapes for event in profiled.events() if event.name in ("aten::mm", "aten::addmm")]
        assert products and all(80 not in size for shapes in products for size in shapes)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ["triton", "cuda"])
class TestKernels:
    @pytest.mark.parametrize(
        ("dtype", "temperature"), [(torch.float32, 0.07), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
    )
    def test_the_supervised_term_is_the_references(self, name, dtype, temperature):
        options = {"weight": (0.0, 2.0, 1.0), "supervised_temperature": temperature}
        with on_the_cpu(name):
            check(MLKD, name, "random", 37, 20, dtype, ignored=0.2, draws=2, **options)

    def test_two_products_by_chunks_and_one_view(self, name):
        options = {"weight": SUPERVISED, "views": 1}
        with on_the_cpu(name), backends.tuned(flash_pitch=0, flash_row_bytes=0, chunk_bytes=1):
            check(MLKD, name, "converged", 150, 40, torch.float32, draws=1, **options)

    def test_the_correlation_is_refused(self, name):
        student, teacher = logits("random", 4, 3, torch.float32)
        with pytest.raises(backends.BackendUnavailable, match="it has no kernels for this loss; use 'torch'"):
            mcld_kernels.mlkd_loss(student, teacher, labels(4, 3), backend=name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
class TestLabels:
    def test_without_an_anchor_the_supervised_term_is_0(self, backend):
        student, teacher = logits("random", 5, 4)
        for target, views in ((torch.arange(5), 1), (torch.full((5,), -100), 2)):
            got = run(
                mcld_kernels.mlkd_terms, student, teacher, target, weight=SUPERVISED, views=views, backend=backend
            )
            assert got.loss == 0 and not got.student.any()

    def test_only_the_equality_of_labels_counts(self, backend):
        student, teacher = logits("random", 9, 7)
        target = labels(9, 7, ignored=0.3)
        renamed = torch.where(target == -100, -1, 10**12 + 7 * target)
        want, got = (
            run(mcld_kernels.mlkd_terms, student, teacher, y, ignore_index=ignored, backend=backend)
            for y, ignored in ((target, -100), (renamed, -1))
        )
        torch.testing.assert_close(tuple(got)[:3], tuple(want)[:3])

    def test_bad_labels_raise(self, backend):
        student, teacher = logits("random", 3, 4)
        for target, error, words in (
            (None, ValueError, r"target is None, but labels .* weight=\(correlation, alignment, 0\)"),
            (torch.tensor([0, -7, 1]), ValueError, r"-7; labels must be >= 0 and below 2\^63 - 1 or equal .*=-100"),
            (torch.tensor([0, LARGEST + 1, 1]), ValueError, "target holds 9223372036854775807; labels must be"),
            (torch.zeros(3, 4), ValueError, r"got soft labels \(3, 4\).* target.argmax"),
            (torch.zeros(2, dtype=torch.int64), ValueError, r"target must have shape \(batch,\) = \(3,\)"),
            (torch.zeros(3, dtype=torch.int32), TypeError, r"of dtype int64; got torch.int32: pass target.long\(\)"),
        ):
            with pytest.raises(error, match=words):
                mcld_kernels.mlkd_loss(student, teacher, target, backend=backend)
        assert torch.isfinite(mcld_kernels.mlkd_loss(student, teacher, weight=(1.0, 1.0, 0.0), backend=backend))

    def test_under_compile_a_bad_label_makes_the_term_nan(self, backend):
        torch._dynamo.reset()
        student, teacher = logits("random", 3, 4)
        compiled = torch.compile(
            lambda y: mcld_kernels.mlkd_terms(student, teacher, y, backend=backend), backend="aot_eager"
        )
        got = compiled(torch.tensor([0, -7, 1]))
        assert torch.isnan(got.loss) and torch.isnan(got.supervised) and torch.isfinite(got.correlation)


TUNINGS = {"compiled": {}, "whole": {"compiled": False}, "chunks": {"low_latency": False, "chunk_bytes": 200}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 2])
def test_labels_of_any_size_are_compared_with_one_another(dtype, views):
    """As hashes of an image's name or content are."""
    student, teacher = logits("random", 6, 5, dtype)
    classes = torch.tensor([0, 1, 0, 2, 1, 2])
    hashes = torch.tensor([LARGEST, LARGEST - 1, 1 << 62])[classes]
    for tuning in TUNINGS.values():
        with backends.tuned(**tuning):
            got, want = (run(mcld_kernels.mlkd_terms, student, teacher, y, views=views) for y in (hashes, classes))
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.student, want.student)


@pytest.mark.parametrize("weight", [SUPERVISED, WEIGHT], ids=["alone", "all"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_shows_in_the_supervised_term_without_an_anchor_too(weight, views, bad):
    student, teacher = logits("random", 6, 5, torch.float32)
    target = torch.full((6,), -100)
    options = {"weight": weight, "views": views}
    for tuning in TUNINGS.values():
        with backends.tuned(**tuning):
            assert float(mcld_kernels.mlkd_terms(student, teacher, target, **options).supervised) == 0
    assert float(reference.mlkd_terms(student, teacher, target, **options).supervised) == 0
    student[2, 1] = bad
    for tuning in TUNINGS.values():
        with backends.tuned(**tuning):
            got = run(mcld_kernels.mlkd_terms, student, teacher, target, **options)
            assert got.loss.isnan() and got.terms[2].isnan() and got.student[2].isnan().all()
    assert reference.mlkd_terms(student, teacher, target, **options).supervised.isnan()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_tensor_of_weights_gets_the_terms_as_its_gradient(backend):
    student, teacher = logits("random", 9, 7)
    weight = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    for chunk in (1, 1 << 25):
        leaf, weight.grad = student.clone().requires_grad_(), None
        with backends.tuned(chunk_bytes=chunk):
            result = mcld_kernels.mlkd_terms(leaf, teacher, labels(9, 7), weight=weight, backend=backend)
            result.loss.backward()
            want = run(mcld_kernels.mlkd_terms, student, teacher, labels(9, 7), weight=(3.0, 0.5, 2.0), backend=backend)
        torch.testing.assert_close(weight.grad, torch.stack(result[1:]))
        torch.testing.assert_close((result.loss.detach(), leaf.grad), (want.loss, want.student))


def test_the_module_is_the_function():
    student, teacher = logits("random", 9, 7, torch.float32)
    module = MLKDLoss(weight=[1.0, 2.0, 0.5], views=1)
    want = mcld_kernels.mlkd_terms(student, teacher, labels(9, 7), weight=(1.0, 2.0, 0.5), views=1)
    assert torch.equal(module(student, teacher, labels(9, 7)), want.loss)
    assert module.terms(student, teacher, labels(9, 7)) == want
    assert repr(module) == (
        "MLKDLoss(correlation_temperature=0.5, supervised_temperature=0.07, views=1, ignore_index=-100, eps=1e-12, "
        "weight=(1.0, 2.0, 0.5), backend='auto')"
    )
    learned = MLKDLoss(weight=torch.nn.Parameter(torch.ones(3)))
    learned(student, teacher, labels(9, 7)).backward()
    assert (learned.weight.grad > 0).all() and "weight" in MLKDLoss(weight=torch.ones(3)).state_dict()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"views": 3}, ValueError, "views must be 2 or 1; got 3"),
        ({"views": True}, ValueError, "views must be 2 or 1; got True"),
        ({"correlation_temperature": 0.0}, ValueError, "correlation_temperature must be positive and finite; got 0.0"),
        ({"supervised_temperature": "1"}, TypeError, "supervised_temperature must be a number; got '1'"),
        ({"weight": (1.0, 2.0)}, TypeError, r"3 numbers \(correlation, alignment, supervised\) or a tensor"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int; got float"),
    ],
)
def test_bad_options_say_what_came(change, error, words):
    student, teacher = logits("random", 4, 3, torch.float32)
    for function in (mcld_kernels.mlkd_loss, reference.mlkd_terms):
        with pytest.raises(error, match=words):
            function(student, teacher, labels(4, 3), **change)


def test_few_classes_at_a_large_batch_keep_their_precision():
    """Rows of a label nearly coincide and the terms' gradients cancel: sums over the batch by parts."""
    batch, classes = 1024, 10
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (batch,), generator=generator)
    teacher = torch.randn(batch, classes, generator=generator)
    teacher[torch.arange(batch), target] += 6.0
    student = 0.5 * teacher + torch.randn(batch, classes, generator=generator)
    exact = run(reference.mlkd_terms, student.double(), teacher.double(), target).student
    eager, got = (
        (run(terms, student, teacher, target).student.double() - exact).norm()
        for terms in (reference.mlkd_terms, mcld_kernels.mlkd_terms)
    )
    assert got <= 1.2 * eager
