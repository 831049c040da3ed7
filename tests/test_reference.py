"""The reference against the definitions as plain loops, and against public libraries where definitions coincide."""

import itertools

import loops
import pytest
import torch
from cases import WEIGHT, labels, logits

import mcld_kernels
from mcld_kernels import reference

EXACT = {"rtol": 1e-11, "atol": 1e-11}
PUBLIC = {"rtol": 1e-6, "atol": 1e-6}
BACKENDS = ("reference", "torch")

OPTIONS = {
    "default": {},
    "temperatures": {"temperature": (0.07, 0.5, 1.3)},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "mask": {"mask_same_class": True},
    "mask-symmetric": {"mask_same_class": True, "direction": "symmetric", "temperature": (0.2, 0.3, 0.4)},
    "mask-teacher": {"mask_same_class": True, "direction": "teacher"},
    "present": {"present_only": True},
    "eps": {"eps": 2.0},  # rows below a norm of 2 count as zeros
    "ignore-7": {"ignore_index": 7, "mask_same_class": True, "present_only": True},
    "ignore-class": {"ignore_index": 1, "mask_same_class": True, "present_only": True},  # a label that is also a class
}


def close(got, want, **tolerance):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "zeros", "collinear"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1), (6, 4), (5, 9)], ids=str)
def test_terms_are_the_loops(shape, options, kind, backend):
    student, teacher = logits(kind, *shape)
    target = labels(*shape, seed=sum(shape))
    target[1::4] = options.get("ignore_index", -100)
    got = mcld_kernels.mcld_terms(student, teacher, target, weight=WEIGHT, backend=backend, **options)
    plain = {"temperature": (0.1, 0.1, 0.1), **options}
    want = loops.terms(student.tolist(), teacher.tolist(), target.tolist(), **plain)
    for name, value in zip(("instance", "sample", "category"), want, strict=True):
        close(getattr(got, name), value, **EXACT)
    close(got.loss, sum(w * x for w, x in zip(WEIGHT, want, strict=True)), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", list(itertools.product((0.0, 1.5), repeat=3)), ids=str)
def test_any_subset_of_terms(weight, backend):
    student, teacher = logits("random", 5, 4)
    target = labels(5, 4)
    got = mcld_kernels.mcld_terms(student, teacher, target, weight=weight, backend=backend)
    want = loops.terms(student.tolist(), teacher.tolist(), target.tolist(), active=[w != 0 for w in weight])
    assert [float(x) for x in got[1:]] == pytest.approx(want, rel=1e-11)
    assert float(got.loss) == pytest.approx(1.5 * sum(want), rel=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["default", "symmetric", "mask-symmetric", "mask-teacher", "ignore-class", "temperatures"]
)
def test_gradients_are_the_slopes_of_the_loops(name, backend):
    options = {"temperature": (0.4, 0.4, 0.4), **OPTIONS[name]}
    student, teacher = logits("random", 4, 3, seed=5)
    target = torch.tensor([1, 0, 1, 2])
    student.requires_grad_(), teacher.requires_grad_()
    loss = mcld_kernels.mcld_loss(student, teacher, target, weight=WEIGHT, backend=backend, **options)
    loss.backward()
    s, t, y = student.tolist(), teacher.tolist(), target.tolist()
    by_student = loops.slopes(lambda rows: loops.loss(rows, t, y, weight=WEIGHT, **options), s)
    by_teacher = loops.slopes(lambda rows: loops.loss(s, rows, y, weight=WEIGHT, **options), t)
    close(student.grad, by_student, rtol=1e-6, atol=1e-7)
    close(teacher.grad, by_teacher, rtol=1e-6, atol=1e-7)


def only(term, backend, student, teacher, target=None, **options):
    """One term's value and gradient by the student."""
    student = student.clone().requires_grad_()
    weight = [float(term == name) for name in ("instance", "sample", "category")]
    loss = mcld_kernels.mcld_loss(student, teacher, target, weight=weight, backend=backend, **options)
    loss.backward()
    return loss.detach(), student.grad


def public(function, student):
    student = student.clone().requires_grad_()
    loss = function(student)
    loss.backward()
    return loss.detach(), student.grad


SHAPES = [(2, 3), (17, 5), (33, 40)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestPublicLibraries:
    """Each library is imported by the fixture of its name: where one is missing, its tests alone are skipped."""

    @pytest.fixture
    def info_nce(self):
        return pytest.importorskip("info_nce", reason="info-nce-pytorch is not installed").info_nce

    @pytest.fixture
    def metric_learning(self):
        reason = "pytorch-metric-learning is not installed"
        return pytest.importorskip("pytorch_metric_learning.losses", reason=reason)

    def compare(self, got, want):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **PUBLIC)

    def test_instance_is_info_nce(self, shape, temperature, backend, info_nce):
        student, teacher = logits("random", *shape)
        got = only("instance", backend, student, teacher, temperature=temperature)
        self.compare(got, public(lambda s: info_nce(s, teacher, temperature=temperature), student))

    def test_teacher_anchors_are_info_nce_the_other_way_round(self, shape, temperature, backend, info_nce):
        student, teacher = logits("random", *shape)
        got = only("instance", backend, student, teacher, temperature=temperature, direction="teacher")
        self.compare(got, public(lambda s: info_nce(teacher, s, temperature=temperature), student))

    def test_category_is_info_nce_of_columns(self, shape, temperature, backend, info_nce):
        student, teacher = logits("random", *shape)
        got = only("category", backend, student, teacher, temperature=temperature)
        self.compare(got, public(lambda s: info_nce(s.T, teacher.T, temperature=temperature), student))

    def test_instance_is_nt_xent_of_every_row_its_own_class(self, shape, temperature, backend, metric_learning):
        student, teacher = logits("random", *shape)
        own = torch.arange(shape[0])
        loss = metric_learning.NTXentLoss(temperature)
        got = only("instance", backend, student, teacher, temperature=temperature)
        self.compare(got, public(lambda s: loss(s, own, ref_emb=teacher, ref_labels=own.clone()), student))

    def test_masked_instance_is_nt_xent_over_rows_of_other_classes(self, shape, temperature, backend, metric_learning):
        student, teacher = logits("random", *shape)
        target = torch.arange(shape[0]) % min(shape[1], 3)  # every row has a row of another class
        own = torch.arange(shape[0])
        pairs = (own, own, *torch.where(target[:, None] != target))
        loss = metric_learning.NTXentLoss(temperature)
        got = only("instance", backend, student, teacher, target, temperature=temperature, mask_same_class=True)
        want = public(lambda s: loss(s, indices_tuple=pairs, ref_emb=teacher, ref_labels=own.clone()), student)
        self.compare(got, want)

    def test_sample_is_sup_con_against_the_teacher(self, shape, temperature, backend, metric_learning):
        student, teacher = logits("random", *shape)
        target = torch.arange(shape[0]) % min(shape[1], 3)
        loss = metric_learning.SupConLoss(temperature)
        got = only("sample", backend, student, teacher, target, temperature=temperature)
        self.compare(got, public(lambda s: loss(s, target, ref_emb=teacher, ref_labels=target.clone()), student))

    def test_category_is_nt_xent_of_columns(self, shape, temperature, backend, metric_learning):
        student, teacher = logits("random", *shape)
        own = torch.arange(shape[1])
        loss = metric_learning.NTXentLoss(temperature)
        got = only("category", backend, student, teacher, temperature=temperature)
        self.compare(got, public(lambda s: loss(s.T, own, ref_emb=teacher.T, ref_labels=own.clone()), student))


def test_the_equivalent_of_the_documentation():
    """The eager PyTorch code in the docstring of mcld_loss is the default loss."""
    functional = torch.nn.functional
    temperature = 0.1
    student, teacher = logits("random", 17, 9)
    target = labels(17, 9)
    rows = functional.normalize(student) @ functional.normalize(teacher).T / temperature
    columns = functional.normalize(student, dim=0).T @ functional.normalize(teacher, dim=0) / temperature
    same = (target[:, None] == target).double()
    loss = (
        functional.cross_entropy(rows, torch.arange(len(rows)))
        + functional.cross_entropy(rows, same / same.sum(1, keepdim=True))
        + functional.cross_entropy(columns, torch.arange(len(columns)))
    )
    torch.testing.assert_close(reference.mcld_loss(student, teacher, target), loss, **EXACT)
    torch.testing.assert_close(mcld_kernels.mcld_loss(student, teacher, target), loss, **EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"direction": "symmetric", "mask_same_class": True, "present_only": True}], ids=str
)
def test_double_backward(options):
    student, teacher = logits("random", 4, 3)
    student.requires_grad_(), teacher.requires_grad_()
    target = torch.tensor([0, 2, 0, -100])

    def loss(s, t):
        return reference.mcld_loss(s, t, target, temperature=0.5, **options)

    assert torch.autograd.gradgradcheck(loss, (student, teacher))
