"""Soft labels and further teacher rows in mcld_loss: against loops, hard labels, B x B weights and the reference."""

import loops
import pytest
import torch
from cases import WEIGHT, labels, logits
from test_info_nce import WAYS, skip_without, soft

import mcld_kernels
from mcld_kernels import backends, mcld_loss, mcld_terms, reference
from mcld_kernels.labels import SoftLabels

EXACT = {"rtol": 1e-10, "atol": 1e-12}
BACKENDS = ("reference", "torch")


def mixup(batch, classes, seed=0):
    """Soft labels (batch, classes) of pairs, with the labels and weights that they are of."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(classes, (batch,), generator=generator) for _ in range(2))
    part = torch.rand(batch, generator=generator, dtype=torch.float64)
    rows = torch.zeros(batch, classes, dtype=torch.float64)
    rows[torch.arange(batch), first] += part
    rows[torch.arange(batch), second] += 1 - part
    return rows, first, second, part


def problem(batch=9, classes=6, further=5):
    student, teacher = logits("random", batch, classes)
    candidates = logits("random", further, classes, seed=1)[1]
    target, theirs = labels(batch, classes, ignored=0.2), labels(further, classes, seed=2, ignored=0.2)
    return student, teacher, candidates, target, theirs


TARGETS = {
    "hard": lambda batch, classes: labels(batch, classes, ignored=0.2),
    "soft": lambda batch, classes: soft(batch, classes),
    "mixup": lambda batch, classes: mixup(batch, classes)[0],
}
FURTHER = {
    "none": lambda rows, hard: {},
    "no labels": lambda rows, hard: {"candidates": rows},
    "labels": lambda rows, hard: {"candidates": rows, "candidate_target": hard},
    "soft labels": lambda rows, hard: {"candidates": rows, "candidate_target": soft(*rows.shape, seed=3)},
}
OPTIONS = {
    "student": {},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "mask": {"mask_same_class": True, "present_only": True, "direction": "symmetric", "temperature": (0.1, 0.2, 0.3)},
    "sample": {"weight": (0.0, 1.0, 0.0), "temperature": 0.02},
}


def run(function, student, teacher, target, **options):
    leaves = student.detach().requires_grad_(), teacher.detach().requires_grad_(options.pop("teacher_grad", False))
    terms = function(*leaves, target, **options)
    terms.loss.backward()
    return [torch.stack(terms).detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("further", FURTHER)
@pytest.mark.parametrize("kind", TARGETS)
def test_terms_are_the_loops(kind, further, backend):
    student, teacher, candidates, _, theirs = problem()
    target = TARGETS[kind](9, 6)
    options = {"weight": WEIGHT, "temperature": (0.2, 0.3, 0.4), "mask_same_class": True, "present_only": True}
    given = FURTHER[further](candidates, theirs)
    got = mcld_terms(student, teacher, target, backend=backend, **options, **given)
    rows, row_labels = teacher.tolist(), target.tolist()
    if given:
        rows = rows + candidates.tolist()
        row_labels = row_labels + given.get("candidate_target", torch.full((5,), -100)).tolist()
    own = target.tolist()
    instance = loops.info_nce(student.tolist(), rows, own, row_labels, temperature=0.2, mask_same_class=True)
    sample = loops.sample_with_queue(student.tolist(), rows, own, row_labels, 0.3, -100)
    present = [loops.largest(label) for label in own]
    category = loops.category(
        *([loops.unit(column, 1e-12) for column in loops.columns(x.tolist())] for x in (student, teacher)),
        0.4, present, True, -100,
    )  # fmt: skip
    want = torch.tensor([loops.mean(instance), sample, category], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(got[1:]), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["student", "symmetric"])
def test_candidates_are_taken_in_the_wider_dtype(backend, direction):
    """An fp32 queue beside the bf16 logits of a teacher under autocast, and an fp32 student."""
    student, teacher, candidates, target, theirs = problem()
    inputs = student.float(), teacher.bfloat16()
    options = {"candidate_target": theirs, "direction": direction, "temperature": 0.05}
    exact = [x.double() for x in inputs]
    want = run(reference.mcld_terms, *exact, target, candidates=candidates.float().double(), **options)
    terms = reference.mcld_terms if backend == "reference" else mcld_terms
    got = run(terms, *inputs, target, candidates=candidates.float(), **options)
    for ours, value in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), value, rtol=2e-6, atol=2e-6)


# The interpreter is slow: for it, some combinations.
COMBINATIONS = [
    (way, name, kind, further)
    for way in ("torch", "triton, flash", "triton, products")
    for name in OPTIONS
    for kind in ("soft", "mixup")
    for further in FURTHER
    if (name != "teacher" or further == "none")  # candidates are for student anchors
    and (way == "torch" or (kind, further) in (("soft", "labels"), ("mixup", "none")))
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("way", "name", "kind", "further"), COMBINATIONS)
def test_fp64_is_the_reference(way, name, kind, further):
    backend, tuning = WAYS[way]
    skip_without(backend)
    options = {"weight": WEIGHT, **OPTIONS[name], **FURTHER[further](*(problem()[i] for i in (2, 4)))}
    student, teacher, *_ = problem()
    options["teacher_grad"] = backend == "torch"
    want = run(reference.mcld_terms, student, teacher, TARGETS[kind](9, 6), **options)
    with backends.tuned(**tuning):
        got = run(
            lambda *args, **kw: mcld_terms(*args, backend=backend, **kw),
            student,
            teacher,
            TARGETS[kind](9, 6),
            **options,
        )
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_one_hot_is_hard(name, backend):
    student, teacher, candidates, target, theirs = problem(12, 7, 5)
    rows = torch.nn.functional.one_hot(target.clamp(min=0), 7).double() * (target >= 0)[:, None]
    for given in ({}, {"candidates": candidates, "candidate_target": theirs}):
        if OPTIONS[name].get("direction") == "teacher" and given:
            continue
        got, want = (
            run(mcld_terms, student, teacher, y, backend=backend, teacher_grad=True, **OPTIONS[name], **given)
            for y in (rows, target)
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixup_is_the_definition_of_b_by_b(backend):
    """The weights of all pairs, from the labels and parts that were mixed, and not from the rows."""
    student, teacher, *_ = problem(16, 5)
    rows, first, second, part = mixup(16, 5)
    weights = torch.zeros(16, 16, dtype=torch.float64)
    for ours, a in ((first, part), (second, 1 - part)):
        for theirs, b in ((first, part), (second, 1 - part)):
            weights += (ours[:, None] == theirs) * a[:, None] * b
    leaf = student.clone().requires_grad_()
    similarities = torch.nn.functional.normalize(leaf) @ torch.nn.functional.normalize(teacher).T / 0.1
    want = torch.nn.functional.cross_entropy(similarities, weights / weights.sum(1, keepdim=True))
    want.backward()
    got = run(mcld_terms, student, teacher, rows, weight=(0.0, 1.0, 0.0), backend=backend)
    torch.testing.assert_close(got[0][0], want.detach(), **EXACT)
    torch.testing.assert_close(got[1], leaf.grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_few_entries_are_taken_alone(dtype):
    """The sparse products of soft labels are the dense ones."""
    rows = mixup(40, 30)[0]
    dense, sparse = SoftLabels(rows.to(dtype)), SoftLabels(rows.to(dtype))
    dense._entries = None
    assert sparse._entries is not None and SoftLabels(soft(40, 30).to(dtype))._entries is None
    x, table = torch.randn(40, 200, dtype=dtype), torch.randn(30, 200, dtype=dtype)
    torch.testing.assert_close(sparse.class_sums(x), dense.class_sums(x))
    torch.testing.assert_close(sparse.mix(table), dense.mix(table))
    assert sparse.class_sums(x.to(torch.bfloat16)).dtype == dtype


def test_no_matrix_of_the_batch_is_held():
    """Soft labels at B = 3000: the largest tensor is a chunk, or of the size of the logits."""
    from test_low_latency import _Operations

    class Sizes(_Operations):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    student, teacher = logits("random", 3000, 20, torch.float32)
    with backends.tuned(chunk_bytes=1 << 20), Sizes() as seen:
        mcld_loss(student, teacher, soft(3000, 20).float(), backend="torch")
    assert seen.largest <= max(1 << 20, 3000 * 20 * 8 * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes_are_near(dtype):
    student, teacher, candidates, _, theirs = (x.to(dtype) if x.is_floating_point() else x for x in problem(40, 30, 20))
    target = mixup(40, 30)[0].to(dtype)
    given = {"candidates": candidates, "candidate_target": theirs, "weight": WEIGHT}
    exact = [x.double() for x in (student, teacher, target)]
    want = run(reference.mcld_terms, *exact, **{**given, "candidates": candidates.double()})
    eager = run(reference.mcld_terms, student, teacher, target, **given)
    got = run(mcld_terms, student, teacher, target, backend="torch", **given)
    for ours, theirs_, value in zip(got, eager, want, strict=True):
        errors = [float((x.double() - value).norm()) for x in (ours, theirs_)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(ours.dtype).eps * float(value.norm())


def test_they_compile_and_pass_opcheck():
    student, teacher, candidates, target, theirs = (x.float() if x.is_floating_point() else x for x in problem(8, 6, 5))
    rows = mixup(8, 6)[0].float()
    for y, given in ((rows, (candidates, theirs)), (target, (candidates, None)), (rows, (None, None))):
        options = ([0.1] * 3, [1.0] * 3, "student", False, False, -100, 1e-12, "torch", True, False)
        torch.library.opcheck(torch.ops.mcld_kernels.mcld.default, (student, teacher, y, None, *options, *given))
    torch._dynamo.reset()
    compiled = torch.compile(mcld_loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, mcld_loss):
        leaf = student.clone().requires_grad_()
        function(leaf, teacher, rows, candidates=candidates, candidate_target=theirs).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


class TestEdges:
    def test_an_empty_queue_is_none(self):
        student, teacher, candidates, target, theirs = problem()
        want = mcld_loss(student, teacher, target)
        for backend in BACKENDS:
            got = mcld_loss(
                student, teacher, target, candidates=candidates[:0], candidate_target=theirs[:0], backend=backend
            )
            torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_rows_without_a_class_do_not_count(self, backend):
        student, teacher, *_ = problem(8, 5)
        rows = mixup(8, 5)[0]
        rows[2:] = 0
        loss = mcld_loss(student, teacher, torch.zeros_like(rows), weight=(0.0, 1.0, 0.0), backend=backend)
        assert float(loss) == 0
        each = loops.info_nce(
            student.tolist(), teacher.tolist(), rows.tolist(), rows.tolist(), temperature=0.1, positives="label"
        )
        loss = mcld_loss(student, teacher, rows, weight=(0.0, 1.0, 0.0), backend=backend)
        assert each[2:] == [None] * 6 and float(loss) == pytest.approx(loops.reduce(each, "mean"), rel=1e-12)

    def test_bad_soft_labels_that_are_not_read_make_nan(self):
        """As on a GPU: behind the checks."""
        student, teacher, *_ = problem(4, 3)
        rows = torch.full((4, 3), 1 / 3, dtype=torch.float64)
        operator = torch.ops.mcld_kernels.mcld.default
        options = ([0.1] * 3, [1.0] * 3, "student", False, False, -100, 1e-12, "torch", True, False)
        for bad in (2.0, -1.0, float("nan")):
            changed = rows.clone()
            changed[2, 1] = bad
            assert operator(student, teacher, changed, None, *options)[0].isnan()
        assert operator(student, teacher, rows, None, *options)[0].isfinite()

    def test_the_module_takes_them(self):
        student, teacher, candidates, target, theirs = problem()
        got = mcld_kernels.MCLDLoss()(student, teacher, target, candidates, theirs)
        want = mcld_loss(student, teacher, target, candidates=candidates, candidate_target=theirs)
        torch.testing.assert_close(got, want)
