"""The edges of a call: bad input and its message, empty and tiny batches, layouts and modes."""

import math
import types

import pytest
import torch
from cases import WEIGHT, labels, logits, run, truth

import mcld_kernels
from mcld_kernels import MCLDLoss, reference

BACKENDS = ("reference", "torch")
ROWS = {"weight": (1.0, 0.0, 1.0)}  # needs no labels


@pytest.fixture(params=["reference.mcld_loss", "mcld_loss", "mcld_terms", "MCLDLoss", "torch"])
def call(request):
    """Every way in: all make the same checks."""
    if request.param == "reference.mcld_loss":
        return reference.mcld_loss
    if request.param == "torch":
        return lambda *tensors, **options: mcld_kernels.mcld_loss(*tensors, backend="torch", **options)
    if request.param == "MCLDLoss":
        further = ("candidates", "candidate_target")

        def module(*tensors, **options):
            given = {name: options.pop(name) for name in further if name in options}
            return MCLDLoss(**options)(*tensors, **given)

        return module
    return getattr(mcld_kernels, request.param)


def soft(batch, classes):
    return torch.full((batch, classes), 1 / classes)


S, T, Y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
COMPLEX, META, ONE_HOT = torch.complex(S, T), torch.empty(4, 3, device="meta"), torch.eye(4, 3)

# tensors, options, error, and words of its message: what came and what is wanted
BAD = {
    "shapes": ((S, T[:3], Y), {}, ValueError, ["same shape", "(4, 3)", "(3, 3): pass the rows of the same samples"]),
    "classes": ((S, torch.randn(4, 5), Y), {}, ValueError, ["same shape", "(4, 3)", "(4, 5): pass the columns"]),
    "transposed": ((S, T.T, Y), {}, ValueError, ["same shape", "(3, 4): one of them is transposed, pass teacher.T"]),
    "rank 1": ((S[0], T[0], Y), {}, ValueError, ["student", "(batch, classes)", "(3,): pass student[None]"]),
    "rank 3": (
        (S[None], T[None], Y), {}, ValueError, ["student", "(batch, classes)", "(1, 4, 3): pass student.flatten(0, 1)"],
    ),
    "teacher of rank 3": ((S, T[None], Y), {}, ValueError, ["teacher", "(batch, classes)", "(1, 4, 3)"]),
    "integer student": ((S.long(), T, Y), {}, TypeError, ["student", "floating", "torch.int64: pass student.float()"]),
    "integer teacher": ((S, T.int(), Y), {}, TypeError, ["teacher", "floating", "torch.int32"]),
    "labels second": ((S, Y, T), {}, TypeError, ["teacher", "torch.int64: labels come third"]),
    "bool": ((S, T > 0, Y), {}, TypeError, ["teacher", "floating", "torch.bool"]),
    "complex": ((COMPLEX, T, Y), {}, TypeError, ["student", "floating", "torch.complex64"]),
    "float8": ((S.to(torch.float8_e4m3fn), T, Y), {}, TypeError, ["student", "float16", "torch.float8_e4m3fn"]),
    "list": ((S.tolist(), T, Y), {}, TypeError, ["student", "tensor", "list: pass torch.as_tensor(student)"]),
    "array": ((S, T.numpy(), Y), {}, TypeError, ["teacher", "tensor", "ndarray: pass torch.as_tensor(teacher)"]),
    "output of a model": (
        (types.SimpleNamespace(logits=S), T, Y), {}, TypeError, ["SimpleNamespace: pass student.logits"],
    ),
    "mapping": ((S, {"logits": T}, Y), {}, TypeError, ['got dict: pass teacher["logits"]']),
    "other mapping": ((S, {}, Y), {}, TypeError, ["teacher must be a tensor of logits (batch, classes); got dict"]),
    "several tensors": (((S, S), T, Y), {}, TypeError, ["got tuple: pass one tensor of them"]),
    "no classes": ((S[:, :0], T[:, :0], Y), {}, ValueError, ["at least one class", "(4, 0)"]),
    "devices": ((S, META, Y), {}, ValueError, ["one device", "cpu and meta: pass teacher.to(student.device)"]),
    "label too high": ((S, T, torch.tensor([0, 3, 1, 0])), {}, ValueError, ["target", "3", "[0, 3)", "-100"]),
    "label negative": ((S, T, torch.tensor([0, -1, 1, 0])), {}, ValueError, ["target", "-1", "[0, 3)"]),
    "-100 is a label": ((S, T, torch.tensor([0, -100, 1, 0])), {"ignore_index": 5}, ValueError, ["-100", "=5"]),
    "labels of int32": ((S, T, Y.int()), {}, TypeError, ["target", "int64", "torch.int32: pass target.long()"]),
    "labels of float": ((S, T, Y.float()), {}, TypeError, ["target", "int64", "torch.float32: pass target.long()"]),
    "labels of bool": ((S, T, Y > 0), {}, TypeError, ["target", "int64", "torch.bool: pass target.long()"]),
    "one-hot int64": ((S, T, ONE_HOT.long()), {}, ValueError, ["(4, 3): of one-hot rows pass target.long().a"]),
    "one-hot bool": ((S, T, ONE_HOT > 0), {}, TypeError, ["bool: of one-hot rows pass target.long().argmax"]),
    "too few labels": ((S, T, Y[:3]), {}, ValueError, ["target", "(4,)", "(3,)"]),
    "labels of rank 2": ((S, T, Y[:, None]), {}, ValueError, ["target", "(4,)", "(4, 1): pass target.squeeze(1)"]),
    "list of labels": ((S, T, Y.tolist()), {}, TypeError, ["target", "int64", "list: pass torch.as_tensor(target)"]),
    "labels elsewhere": ((S, T, Y.to("meta")), {}, ValueError, ["target", "cpu", "meta: pass target.to('cpu')"]),
    "soft labels of 2 classes": ((S, T, soft(4, 2)), {}, ValueError, ["soft labels", "(4, 3)", "(4, 2)"]),
    "soft labels of sum 2": ((S, T, 2 * soft(4, 3)), {}, ValueError, ["soft labels", "sum of 1", "row 0", "2"]),
    "negative soft labels": ((S, T, soft(4, 3) * torch.tensor([-1, 2, 2])), {}, ValueError, [">= 0", "minimum of -"]),
    "soft labels elsewhere": ((S, T, soft(4, 3).to("meta")), {}, ValueError, ["target", "cpu", "meta"]),
    "soft labels that require grad": ((S, T, soft(4, 3).requires_grad_()), {}, ValueError, ["target.detach()"]),
    "candidates of 2 classes": ((S, T, Y), {"candidates": T[:, :2]}, ValueError, ["candidates", "(rows, 3)", "(4, 2)"]),
    "candidates of int64": ((S, T, Y), {"candidates": T.long()}, TypeError, ["candidates", "floating", "int64"]),
    "candidates elsewhere": ((S, T, Y), {"candidates": META}, ValueError, ["candidates", "cpu", "meta"]),
    "candidates with grad": (
        (S, T, Y), {"candidates": T.clone().requires_grad_()}, ValueError, ["no gradient", "candidates.detach()"],
    ),
    "candidates of teacher anchors": (
        (S, T, Y), {"candidates": T, "direction": "teacher"}, ValueError, ["direction='student'", "'symmetric'"],
    ),
    "labels of no candidates": ((S, T, Y), {"candidate_target": Y}, ValueError, ["candidate_target", "candidates"]),
    "too few labels of candidates": (
        (S, T, Y), {"candidates": T, "candidate_target": Y[:3]}, ValueError, ["candidate_target", "(rows,)", "(3,)"],
    ),
    "bad label of a candidate": (
        (S, T, Y), {"candidates": T, "candidate_target": Y + 1}, ValueError, ["candidate_target", "3", "[0, 3)"],
    ),
    "missing labels": ((S, T), {}, ValueError, ["target is None", "sample-wise", "weight"]),
    "missing for mask": ((S, T), {**ROWS, "mask_same_class": True}, ValueError, ["target is None", "mask_same_class"]),
    "missing for present": ((S, T), {**ROWS, "present_only": True}, ValueError, ["target is None", "present_only"]),
    "temperature 0": ((S, T, Y), {"temperature": 0.0}, ValueError, ["temperature", "positive", "0.0"]),
    "temperature < 0": ((S, T, Y), {"temperature": (0.1, -0.2, 0.1)}, ValueError, ["temperature", "positive", "-0.2"]),
    "temperature nan": ((S, T, Y), {"temperature": math.nan}, ValueError, ["temperature", "finite", "nan"]),
    "temperature inf": ((S, T, Y), {"temperature": math.inf}, ValueError, ["temperature", "finite", "inf"]),
    "two temperatures": ((S, T, Y), {"temperature": (0.1, 0.1)}, TypeError, ["temperature", "three", "(0.1, 0.1)"]),
    "temperature text": ((S, T, Y), {"temperature": "0.1"}, TypeError, ["temperature", "number", "'0.1'"]),
    "temperature of tensors": (
        (S, T, Y), {"temperature": torch.ones(3)}, TypeError, ["three", "tensor([1., 1., 1.]): pass numbers"],
    ),
    "temperature None": ((S, T, Y), {"temperature": None}, TypeError, ["temperature", "number", "None"]),
    "weight < 0": ((S, T, Y), {"weight": (1, -1, 1)}, ValueError, ["weight", ">= 0", "-1"]),
    "weight nan": ((S, T, Y), {"weight": (1, 1, math.nan)}, ValueError, ["weight", "finite", "nan"]),
    "weight inf": ((S, T, Y), {"weight": (math.inf, 1, 1)}, ValueError, ["weight", "finite", "inf"]),
    "weight of text": ((S, T, Y), {"weight": "1.0"}, TypeError, ["weight", "three", "1.0"]),
    "two weights": ((S, T, Y), {"weight": (1, 1)}, TypeError, ["weight", "three", "(1, 1)"]),
    "weight text": ((S, T, Y), {"weight": ("1", "1", "1")}, TypeError, ["weight", "numbers"]),
    "weight tensor of two": ((S, T, Y), {"weight": torch.ones(2)}, ValueError, ["weight", "(3,)", "(2,)"]),
    "weight of int32": ((S, T, Y), {"weight": torch.ones(3).int()}, TypeError, ["weight", "floating", "torch.int32"]),
    "weight tensor < 0": ((S, T, Y), {"weight": torch.tensor([1.0, -2, 1])}, ValueError, ["weight", ">= 0", "-2.0"]),
    "weight tensor nan": ((S, T, Y), {"weight": S.sum() * math.nan * S[0]}, ValueError, ["weight", "finite", "nan"]),
    "weight elsewhere": ((S, T, Y), {"weight": torch.ones(3, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
    "direction": ((S, T, Y), {"direction": "both"}, ValueError, ["direction", "'symmetric'", "'both'"]),
    "mask of int": ((S, T, Y), {"mask_same_class": 1}, TypeError, ["mask_same_class", "bool", "1"]),
    "present text": ((S, T, Y), {"present_only": "yes"}, TypeError, ["present_only", "bool", "'yes'"]),
    "ignore_index": ((S, T, Y), {"ignore_index": 1.0}, TypeError, ["ignore_index", "int", "float"]),
    "ignore_index None": ((S, T, Y), {"ignore_index": None}, TypeError, ["ignore_index", "int", "NoneType"]),
    "eps < 0": ((S, T, Y), {"eps": -1e-12}, ValueError, ["eps", ">= 0", "-1e-12"]),
    "eps nan": ((S, T, Y), {"eps": math.nan}, ValueError, ["eps", "finite", "nan"]),
    "process_group": ((S, T, Y), {"process_group": object()}, TypeError, ["process_group", "object", "None"]),
    "gather": ((S, T, Y), {"gather": "none"}, ValueError, ["gather", "'all'", "'ring'", "'none'"]),
    "even": ((S, T, Y), {"even": 1}, TypeError, ["even", "bool", "1"]),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "options", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(tensors, options, error, words, call):
    with pytest.raises(error) as raised:
        call(*tensors, **options)
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


def test_an_unknown_backend_of_the_module_is_found_at_once():
    with pytest.raises(ValueError, match="backend must be one of 'auto'"):
        MCLDLoss(backend="fast")


def test_labels_are_not_looked_at_where_no_term_needs_them(call):
    """Out-of-range labels do no harm to terms that use none; a wrong shape or dtype is still an error."""
    call(S, T, torch.tensor([0, 99, -7, 0]), **ROWS)
    call(S, T, None, **ROWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_is_0_and_differentiable(backend, dtype):
    student, teacher = torch.empty(0, 5, dtype=dtype), torch.empty(0, 5, dtype=dtype)
    target = torch.empty(0, dtype=torch.int64)
    got = run(backend, student, teacher, target, teacher_grad=True, mask_same_class=True, present_only=True)
    assert float(got.loss) == 0 and not got.terms.any()
    assert got.student.shape == got.teacher.shape == (0, 5) and got.student.dtype == dtype
    assert float(mcld_kernels.mcld_loss(student, teacher, target, backend=backend)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
class TestFewOrNone:
    def test_one_row(self, backend):
        """The only candidate is the positive, so row terms vanish with their gradient."""
        student, teacher = logits("random", 1, 6)
        got = run(backend, student, teacher, torch.tensor([2]), weight=(1.0, 1.0, 0.0), teacher_grad=True)
        for x in (got.loss, got.student, got.teacher):
            torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-13)

    def test_one_class(self, backend):
        student, teacher = logits("random", 6, 1)
        got = run(backend, student, teacher, torch.zeros(6, dtype=torch.int64))
        assert torch.isfinite(got.loss)
        torch.testing.assert_close(got.terms[2], got.loss.new_zeros(()), rtol=0, atol=1e-13)
        torch.testing.assert_close(got.student, torch.zeros_like(student), rtol=0, atol=1e-12)

    def test_everything_masked(self, backend):
        """One class only: under mask_same_class no negative is left, and the term is 0."""
        student, teacher = logits("random", 6, 4)
        target = torch.full((6,), 3)
        options = {"weight": (1.0, 0.0, 0.0), "mask_same_class": True}
        for direction in ("student", "teacher", "symmetric"):
            got = run(backend, student, teacher, target, teacher_grad=True, direction=direction, **options)
            for x in (got.loss, got.student, got.teacher):
                torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-13)

    def test_all_ignored(self, backend):
        """No anchor is left to the sample-wise term nor, with present_only, to the category-wise one."""
        student, teacher = logits("random", 6, 4)
        target = torch.full((6,), -100)
        options = {"mask_same_class": True, "present_only": True, "teacher_grad": True}
        got = run(backend, student, teacher, target, **options)
        want = run(backend, student, teacher, weight=(1.0, 0.0, 0.0), teacher_grad=True)
        assert not got.terms[1:].any()
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.student, want.student)
        torch.testing.assert_close(got.teacher, want.teacher)

    def test_ignored_rows_stay_candidates_and_instance_anchors(self, backend):
        student, teacher = logits("random", 6, 4)
        target = torch.tensor([0, 1, 0, -100, 2, -100])
        got = run(backend, student, teacher, target)
        plain = run(backend, student, teacher, torch.tensor([0, 1, 0, 3, 2, 3]))
        torch.testing.assert_close(got.terms[0], plain.terms[0])
        assert not torch.isclose(got.terms[1], plain.terms[1])

    def test_ignored_rows_are_of_no_common_class(self, backend):
        student, teacher = logits("random", 6, 4)
        options = {"mask_same_class": True, "weight": (1.0, 0.0, 0.0)}
        ignored = run(backend, student, teacher, torch.full((6,), -100), **options)
        unmasked = run(backend, student, teacher, weight=(1.0, 0.0, 0.0))
        torch.testing.assert_close(ignored.loss, unmasked.loss)

    def test_ignore_index_may_be_a_class(self, backend):
        student, teacher = logits("random", 6, 4)
        target = torch.tensor([0, 1, 0, 2, 1, 3])
        got = run(backend, student, teacher, target, ignore_index=1, present_only=True)
        want = run(backend, student, teacher, target.where(target != 1, -100), present_only=True)
        torch.testing.assert_close(got.terms, want.terms)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "wide rows": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "flipped storage": lambda x: x.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_gives_the_same(layout, dtype, backend):
    student, teacher = logits("random", 33, 17, dtype)
    target = labels(33, 17)
    want = run(backend, student, teacher, target, teacher_grad=True)
    got = run(backend, layout(student), layout(teacher), target.repeat_interleave(2)[::2], teacher_grad=True)
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps * float(b.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    """Rows that are one row in memory: writing a gradient or a normalised row in place would show."""
    row, teacher = logits("random", 1, 17)[0], logits("random", 9, 17)[1]
    expanded, target = row.expand(9, 17), labels(9, 17)
    got = run(backend, expanded, teacher, target)
    want = run(backend, expanded.clone(), teacher, target)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.student, want.student)
    leaf = row.clone().requires_grad_()
    mcld_kernels.mcld_loss(leaf.expand(9, 17), teacher, target, backend=backend).backward()
    torch.testing.assert_close(leaf.grad, want.student.sum(0, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["student", "teacher", "symmetric"])
def test_inputs_are_never_written(direction, backend):
    student, teacher = logits("zeros", 33, 17, torch.float32)
    target, weight = labels(33, 17, ignored=0.3), torch.tensor(WEIGHT)
    kept = [x.clone() for x in (student, teacher, target, weight)]
    student.requires_grad_(), teacher.requires_grad_()
    loss = mcld_kernels.mcld_loss(
        student, teacher, target, weight=weight, direction=direction, mask_same_class=True, backend=backend
    )
    upstream = torch.tensor(2.0)
    loss.backward(upstream)
    assert all(torch.equal(a, b) for a, b in zip((student, teacher, target, weight), kept, strict=True))
    assert float(upstream) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_nan_and_inf_give_nan(value, side, dtype, backend, temperature):
    student, teacher = logits("random", 9, 7, dtype)
    {"student": student, "teacher": teacher}[side][3, 2] = value
    for direction in ("student", "teacher", "symmetric"):
        got = run(backend, student, teacher, labels(9, 7), direction=direction, temperature=temperature)
        assert torch.isnan(got.loss) and torch.isnan(got.terms).all()
        assert torch.isnan(got.student).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [99, 7, -1, -(2**40), 2**40])
def test_out_of_range_labels_under_compile_are_nan(bad, backend):
    """No value can be read while tracing, so the terms that use labels become NaN, as on a GPU."""
    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7)
    target[4] = bad

    @torch.compile(backend="eager", fullgraph=True)
    def terms(s, t, y):
        return mcld_kernels.mcld_terms(s, t, y, present_only=True, backend=backend)

    got = terms(student.requires_grad_(), teacher, target)
    assert torch.isfinite(got.instance)
    assert torch.isnan(got.sample) and torch.isnan(got.category) and torch.isnan(got.loss)
    got.loss.backward()
    assert torch.isnan(student.grad).any()  # nor does an optimiser step go unnoticed


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_range_labels_under_compile_poison_the_mask(backend):
    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7)
    target[4] = 7

    @torch.compile(backend="eager", fullgraph=True)
    def terms(s, t, y):
        return mcld_kernels.mcld_terms(s, t, y, mask_same_class=True, weight=(1.0, 0.0, 1.0), backend=backend)

    got = terms(student, teacher, target)
    assert torch.isnan(got.instance) and torch.isfinite(got.category)


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_large_and_very_small_logits(backend):
    """Squares stay inside fp32 from 1e-18 to 1e18; a row whose squares overflow reads as infinite."""
    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7)
    want = run(backend, student, teacher, target)
    for factor in (1e-15, 1e15):
        got = run(backend, student * factor, teacher * factor, target, eps=0.0)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.student * factor, want.student, rtol=1e-4, atol=1e-6)
    assert torch.isnan(run(backend, student * 1e25, teacher, target).loss)


class TestModes:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_changes_nothing(self, dtype, autocast, backend):
        student, teacher = logits("random", 33, 17, dtype)
        target = labels(33, 17)
        want = run(backend, student, teacher, target)
        student.requires_grad_()
        with torch.autocast("cpu", dtype=autocast):
            got = mcld_kernels.mcld_loss(student, teacher, target, backend=backend)
        got.backward()
        assert torch.equal(got, want.loss) and torch.equal(student.grad, want.student)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_autocast_around_a_network(self, backend):
        model, x = torch.nn.Linear(5, 7), torch.randn(9, 5)
        teacher, target = logits("random", 9, 7, torch.float32)[1], labels(9, 7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            student = model(x)
            loss = mcld_kernels.mcld_loss(student, teacher, target, backend=backend)
        assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
        loss.backward()
        assert model.weight.grad.dtype == torch.float32 and torch.isfinite(model.weight.grad).all()

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode, backend):
        student, teacher = logits("random", 9, 7)
        target = labels(9, 7)
        want = run(backend, student, teacher, target)
        with mode():
            got = mcld_kernels.mcld_terms(student.requires_grad_(), teacher, target, backend=backend)
        assert not got.loss.requires_grad
        torch.testing.assert_close(got.loss, want.loss)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_teacher_made_in_inference_mode(self, backend):
        student, teacher = logits("random", 9, 7)
        with torch.inference_mode():
            teacher = teacher * 1
        assert teacher.is_inference()
        got = run_with(student, teacher, backend)
        torch.testing.assert_close(got, run(backend, student, teacher.clone(), labels(9, 7)).student)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_backward_twice(self, backend):
        student, teacher = logits("random", 9, 7)
        student.requires_grad_()
        loss = mcld_kernels.mcld_loss(student, teacher, labels(9, 7), backend=backend)
        loss.backward(retain_graph=True)
        once = student.grad.clone()
        loss.backward()
        torch.testing.assert_close(student.grad, 2 * once, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradients_accumulate_without_touching_what_was_saved(self, backend):
        student, teacher = logits("random", 9, 7)
        student.requires_grad_()
        loss = mcld_kernels.mcld_loss(student, teacher, labels(9, 7), backend=backend)
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(loss, student)
        assert torch.equal(second, kept)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_under_a_grad_scaler_in_fp16(self, backend):
        student, teacher = logits("random", 33, 17, torch.float16)
        want = truth(student, teacher, labels(33, 17))
        student.requires_grad_()
        loss = mcld_kernels.mcld_loss(student, teacher, labels(33, 17), backend=backend)
        (loss * 64).backward()
        error = (student.grad.double() / 64 - want.student).norm() / want.student.norm()
        assert error < 5e-3


def run_with(student, teacher, backend):
    """The student's gradient, with the teacher passed on as it is."""
    student = student.clone().requires_grad_()
    mcld_kernels.mcld_loss(student, teacher, labels(*student.shape), backend=backend).backward()
    return student.grad


class TestTheReference:
    """The oracle's behaviour beside its equations."""

    OPTIONS = {"mask_same_class": True, "present_only": True, "direction": "symmetric"}

    def test_the_default_dtype_changes_nothing(self):
        student, teacher = logits("random", 9, 7, torch.float32)
        want = reference.mcld_loss(student, teacher, labels(9, 7), **self.OPTIONS)
        torch.set_default_dtype(torch.float64)
        try:
            got = reference.mcld_loss(student, teacher, labels(9, 7), **self.OPTIONS)
        finally:
            torch.set_default_dtype(torch.float32)
        assert got.dtype == torch.float32 and torch.equal(got, want)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_meta_tensors(self, backend):
        student, teacher = torch.empty(6, 4, device="meta", requires_grad=True), torch.empty(6, 4, device="meta")
        target = torch.empty(6, dtype=torch.int64, device="meta")
        loss = mcld_kernels.mcld_loss(student, teacher, target, backend=backend, **self.OPTIONS)
        loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32 and student.grad.shape == (6, 4)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_a_nan_row_that_is_no_anchor_still_shows_in_the_loss(self, backend):
        student, teacher = logits("random", 9, 7, torch.float32)
        target = labels(9, 7)
        student[2], target[2] = math.nan, -100
        got = run(backend, student, teacher, target, weight=(0.0, 1.0, 0.0))
        assert torch.isnan(got.loss) and torch.isnan(got.student).any()


class TestUnusualTensors:
    """Each is refused by name, and with what to pass instead."""

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("name", ["student", "teacher", "target"])
    def test_sparse(self, name, backend):
        student, teacher = logits("random", 4, 3, torch.float32)
        tensors = {"student": student, "teacher": teacher, "target": labels(4, 3)}
        tensors[name] = tensors[name].to_sparse()
        with pytest.raises(TypeError, match=rf"{name} must be a dense tensor; got layout torch.sparse_coo"):
            mcld_kernels.mcld_loss(**tensors, backend=backend)

    @pytest.mark.filterwarnings("ignore")
    def test_nested_and_masked(self):
        student, teacher = logits("random", 4, 3, torch.float32)
        nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])
        with pytest.raises(TypeError, match="student must be a dense tensor .*got a nested tensor"):
            mcld_kernels.mcld_loss(nested, teacher, labels(4, 3))
        masked = torch.masked.masked_tensor(student, student > 0)
        with pytest.raises(TypeError, match="student must be a dense tensor .*got a MaskedTensor"):
            mcld_kernels.mcld_loss(masked, teacher, labels(4, 3))

    def test_dtensor(self, tmp_path):
        import torch.distributed as dist
        from torch.distributed.tensor import DeviceMesh, distribute_tensor

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            student, teacher = logits("random", 4, 3, torch.float32)
            sharded = distribute_tensor(student, DeviceMesh("cpu", [0]))
            with pytest.raises(TypeError, match=r"student must be a plain tensor; got a DTensor: pass student.full_"):
                mcld_kernels.mcld_loss(sharded, teacher, labels(4, 3))
        finally:
            dist.destroy_process_group()


class TestScalars:
    @pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
    def test_an_ignore_index_beyond_int64(self, value):
        student, teacher = logits("random", 4, 3, torch.float32)
        with pytest.raises(ValueError, match=f"ignore_index must fit int64, the dtype of target; got {value}"):
            mcld_kernels.mcld_loss(student, teacher, labels(4, 3), ignore_index=value)

    def test_integers_of_numpy_and_one_weight(self):
        numpy = pytest.importorskip("numpy")
        student, teacher = logits("random", 9, 7, torch.float32)
        target = labels(9, 7, ignored=0.3)
        want = mcld_kernels.mcld_loss(student, teacher, target, weight=(2.0, 2.0, 2.0), temperature=0.5)
        options = {"ignore_index": numpy.int64(-100), "weight": numpy.float64(2.0), "temperature": numpy.float64(0.5)}
        assert torch.equal(mcld_kernels.mcld_loss(student, teacher, target, **options), want)
        assert torch.equal(mcld_kernels.mcld_loss(student, teacher, target, weight=2, temperature=0.5), want)

    def test_a_tensor_of_weights_without_labels_is_told_how_to_remove_a_term(self):
        student, teacher = logits("random", 4, 3, torch.float32)
        with pytest.raises(ValueError, match="a tensor computes all three terms, whatever its values"):
            mcld_kernels.mcld_loss(student, teacher, weight=torch.tensor([1.0, 0.0, 1.0]))
