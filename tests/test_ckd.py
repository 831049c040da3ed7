"""CKD: against its definition in loops, the released form, the reference on every backend, and MCLD's own term."""

import copy
import math

import loops
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import DTYPES, labels, logits, short
from family import Loss, check, on_the_cpu, run, spread

import mcld_kernels
from mcld_kernels import CKDLoss, backends, reference
from mcld_kernels.losses.ckd import PRESETS

FORMS = ("teacher", "student")


def magnitude(student, teacher, options):
    size = options.get("weight", 10.0) / options.get("temperature", 1.0)
    # With the negatives among the students every row is pulled as an anchor and as a candidate.
    roles = 2 if options["negatives"] == "student" else 1
    return size, roles * size * math.hypot(spread(student, 1), spread(teacher, 1))


CASES = {
    "teacher": Loss(mcld_kernels.ckd_terms, reference.ckd_terms, magnitude, {"negatives": "teacher"}),
    "student": Loss(mcld_kernels.ckd_terms, reference.ckd_terms, magnitude, {"negatives": "student"}),
}


def by_loops(student, teacher, temperature, negatives, eps=1e-12):
    s, t = ([loops.unit(row, eps) for row in rows] for rows in (student, teacher))
    losses = []
    for i in range(len(s)):
        positive = loops.cosine(s[i], t[i]) / temperature
        if negatives == "teacher":
            row = [loops.cosine(t[i], s[j]) / temperature for j in range(len(s))]
        else:
            row = [positive if j == i else loops.cosine(s[i], s[j]) / temperature for j in range(len(s))]
        losses.append(loops.log_sum_exp(row) - positive)
    return loops.mean(losses)


@pytest.mark.parametrize("negatives", FORMS)
@pytest.mark.parametrize("kind", ["random", "zeros"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_loss_is_its_definition_in_loops(backend, kind, negatives):
    student, teacher = logits(kind, 6, 5)
    options = {"negatives": negatives, "temperature": 0.3, "weight": 1.0}
    got = run(mcld_kernels.ckd_terms, student, teacher, backend=backend, **options)
    lists = student.tolist(), teacher.tolist()
    assert float(got.loss) == pytest.approx(by_loops(*lists, 0.3, negatives), abs=1e-13)
    if kind == "random":  # a row without direction has no derivative
        slopes = loops.slopes(lambda rows: by_loops(rows, lists[1], 0.3, negatives), lists[0])
        torch.testing.assert_close(got.student, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_the_released_form(preset):
    """Cross-entropy of teacher rows against all student rows, at temperature 1, times a constant."""
    student, teacher = logits("random", 17, 9)
    factor = {"cifar100": 100.0, "imagenet": 10.0}[preset]
    leaf = student.clone().requires_grad_()
    similarity = F.normalize(teacher) @ F.normalize(leaf).T
    released = factor * F.cross_entropy(similarity, torch.arange(17))
    released.backward()
    for backend in ("reference", "torch"):
        got = run(mcld_kernels.ckd_terms, student, teacher, backend=backend, **PRESETS[preset])
        torch.testing.assert_close(got.loss, released.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got.student, leaf.grad, rtol=1e-9, atol=1e-14)


def test_the_teachers_form_is_mclds_instance_term_with_teacher_anchors():
    student, teacher = logits("random", 17, 9)
    mcld = {"temperature": 0.2, "weight": (2.0, 0.0, 0.0), "direction": "teacher"}
    want = run(mcld_kernels.mcld_terms, student, teacher, teacher_grad=True, backend="torch", **mcld)
    got = run(mcld_kernels.ckd_terms, student, teacher, teacher_grad=True, temperature=0.2, weight=2.0, backend="torch")
    torch.testing.assert_close((got.loss, got.student, got.teacher), (want.loss, want.student, want.teacher))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("form", CASES)
class TestTorch:
    @pytest.mark.parametrize("rows", [0, 1, 5])
    @pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_any_dtype_and_chunk_is_the_reference(self, form, dtype, temperature, rows):
        """rows: of a chunk of the first pass; 0: whole matrices."""
        shapes = [(1, 1), (1, 5), (5, 1), (23, 17)]
        for shape in shapes:
            budget = rows * shape[0] * (8 if dtype == torch.float64 else 4) if rows else 1 << 25
            with backends.tuned(chunk_bytes=budget, low_latency=not rows):
                check(CASES[form], "torch", "random", *shape, dtype, temperature=temperature, draws=6)

    @pytest.mark.parametrize("kind", ["converged", "collinear", "large", "zeros"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
    def test_any_kind_of_logits(self, form, dtype, kind):
        for chunk, teacher_grad in ((1 << 25, False), (3000, False), (3000, True)):
            with backends.tuned(chunk_bytes=chunk):
                check(CASES[form], "torch", kind, 40, 31, dtype, teacher_grad=teacher_grad, temperature=0.2)

    def test_late_in_training_the_loss_keeps_its_digits(self, form):
        """Few rows that are far apart, and a cold temperature: the loss is 1e-6 and smaller."""
        teacher = torch.eye(6, dtype=torch.float64) + 1e-3 * torch.ones(6, 6, dtype=torch.float64)
        student = teacher + 1e-3 * logits("random", 6, 6)[0]
        want = run(reference.ckd_terms, student, teacher, temperature=0.06, **CASES[form].options)
        assert 0 < float(want.terms) < 1e-6
        for chunk in (1 << 25, 1):
            with backends.tuned(chunk_bytes=chunk):
                got = run(
                    mcld_kernels.ckd_terms, student.float(), teacher.float(), temperature=0.06, backend="torch",
                    **CASES[form].options,
                )  # fmt: skip
            torch.testing.assert_close(got.terms.double(), want.terms, rtol=3e-5, atol=0)
            assert float((got.student - want.student).norm() / want.student.norm()) < 3e-5


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("form", CASES)
@pytest.mark.parametrize("name", ["triton", "cuda"])
class TestKernels:
    @pytest.mark.parametrize(
        ("dtype", "temperature"), [(torch.float32, 1.0), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
    )
    @pytest.mark.parametrize("shape", [(37, 20), (9, 140)], ids=str)
    def test_the_reference(self, name, form, shape, dtype, temperature):
        with on_the_cpu(name):
            check(CASES[form], name, "random", *shape, dtype, temperature=temperature, draws=2)

    def test_two_products_by_chunks(self, name, form):
        with on_the_cpu(name), backends.tuned(flash_pitch=0, flash_row_bytes=0, chunk_bytes=1):
            check(CASES[form], name, "converged", 150, 40, torch.float32, temperature=0.2, draws=1)

    def test_a_teacher_that_requires_grad_is_refused(self, name, form):
        student, teacher = logits("random", 5, 4, torch.float32)
        with on_the_cpu(name), pytest.raises(backends.BackendUnavailable, match="no gradient by the teacher"):
            run(mcld_kernels.ckd_terms, student, teacher, teacher_grad=True, backend=name, **CASES[form].options)


def _over_ranks(group, backend, sizes):
    """Run on every rank: the mean over ranks and this rank's gradient against one process."""
    student, teacher = logits("random", sum(sizes), 7)
    own = [x.split(sizes)[dist.get_rank(group)] for x in (student, teacher)]
    weight = torch.tensor(3.0, dtype=torch.float64)
    got = run(mcld_kernels.ckd_terms, *own, temperature=0.5, weight=weight, backend=backend, process_group=group)
    want = run(reference.ckd_terms, student, teacher, temperature=0.5, weight=3.0)
    values = torch.stack([got.loss, *got.terms])
    dist.all_reduce(values, group=group)
    torch.testing.assert_close(values / len(sizes), torch.stack([want.loss, *want.terms]))
    torch.testing.assert_close(got.student / len(sizes), want.student.split(sizes)[dist.get_rank(group)])
    module = copy.deepcopy(CKDLoss(temperature=0.5, weight=3.0, backend=backend, process_group=group))
    torch.testing.assert_close(module(*own).detach(), got.loss)


def test_two_ranks_are_one_process(pool):
    for backend in ("reference", "torch"):
        for sizes in ((5, 5), (7, 2)):
            pool.run(_over_ranks, backend, sizes, ranks=2)


@pytest.mark.parametrize("function", [mcld_kernels.ckd_loss, reference.ckd_loss])
def test_a_group_that_is_none_is_refused(function):
    student, teacher = logits("random", 4, 3)
    with pytest.raises(TypeError, match="process_group of type object: pass a torch.distributed.ProcessGroup"):
        function(student, teacher, process_group=object())


class TestWeight:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("chunk", [1, 1 << 25])
    def test_a_tensor_gets_the_term_as_its_gradient(self, backend, chunk):
        student, teacher = logits("random", 9, 7)
        weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        leaf = student.clone().requires_grad_()
        with backends.tuned(chunk_bytes=chunk):
            result = mcld_kernels.ckd_terms(leaf, teacher, weight=weight, backend=backend)
            result.loss.backward()
            want = run(mcld_kernels.ckd_terms, student, teacher, weight=3.0, backend=backend)
        torch.testing.assert_close(weight.grad, result.contrast)
        torch.testing.assert_close((result.loss.detach(), leaf.grad), (want.loss, want.student))

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_zero_removes_the_term(self, backend):
        student, teacher = logits("random", 9, 7)
        student[2, 3] = math.nan
        got = run(mcld_kernels.ckd_terms, student, teacher, weight=0.0, backend=backend)
        assert got.loss == 0 and not got.terms.any() and not got.student.any()


def test_the_module_is_the_function():
    student, teacher = logits("random", 9, 7, torch.float32)
    module = CKDLoss(temperature=0.5, weight=2.0, negatives="student")
    want = mcld_kernels.ckd_terms(student, teacher, temperature=0.5, weight=2.0, negatives="student")
    assert torch.equal(module(student, teacher, labels(9, 7)), want.loss)
    assert module.terms(student, teacher) == want
    assert repr(module) == "CKDLoss(temperature=0.5, weight=2.0, negatives='student', eps=1e-12, backend='auto')"
    module.temperature = 0.1
    assert module(student, teacher) == mcld_kernels.ckd_loss(
        student, teacher, temperature=0.1, weight=2.0, negatives="student"
    )
    with pytest.raises(ValueError, match="temperature"):
        module.temperature = 0
    learned = CKDLoss(weight=torch.nn.Parameter(torch.tensor(2.0)))
    learned(student, teacher).backward()
    assert [name for name, _ in learned.named_parameters()] == ["weight"] and float(learned.weight.grad) > 0
    assert "weight" in CKDLoss(weight=torch.tensor(2.0)).state_dict() and "weight" not in module.state_dict()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"negatives": "both"}, ValueError, "negatives must be 'teacher' or 'student'; got 'both'"),
        ({"weight": -1.0}, ValueError, "weight must be finite and >= 0; got -1.0"),
        ({"weight": "1"}, TypeError, "weight must be a number or a tensor of shape"),
        ({"weight": (1.0, 1.0)}, TypeError, "weight must be a number or a tensor of shape"),
        ({"weight": torch.ones(3)}, ValueError, r"weight as a tensor must have shape \(\) or \(1,\); got \(3,\)"),
        ({"weight": torch.tensor(1)}, TypeError, "weight as a tensor must be of a floating dtype; got torch.int64"),
        ({"weight": torch.tensor(-1.0)}, ValueError, "weight must be finite and >= 0"),
    ],
)
@pytest.mark.parametrize("function", [mcld_kernels.ckd_loss, mcld_kernels.ckd_terms, reference.ckd_loss])
def test_bad_options_say_what_came(function, change, error, words):
    student, teacher = logits("random", 4, 3, torch.float32)
    with pytest.raises(error, match=words):
        function(student, teacher, **change)
