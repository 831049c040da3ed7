"""CKD with the student's negatives, CLKD and MLKD over ranks: several gloo processes against one.

The truth is the reference of one process on the concatenated batch, in fp64. Functions of the top level that take a
group run in the processes of `ranks.Pool`.
"""

import copy
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import WEIGHT, labels, logits
from test_distributed import mean_over_ranks, part, relative

import mcld_kernels
from mcld_kernels import backends, distributed, reference

SIZES = {2: ((5, 5), (7, 2)), 3: ((4, 0, 6), (1, 0, 0))}
THREE = torch.tensor(WEIGHT, dtype=torch.float64)
# name -> loss, options
CASES = {
    "ckd": ("ckd", {"negatives": "student"}),
    "ckd-cold": ("ckd", {"negatives": "student", "temperature": 0.015}),
    "ckd-mutual": ("ckd", {"negatives": "student", "temperature": 0.3, "teacher_grad": True}),
    "ckd-weight": ("ckd", {"negatives": "student", "weight": torch.tensor(3.0, dtype=torch.float64)}),
    "ckd-teacher": ("ckd", {"temperature": 0.3, "teacher_grad": True}),
    "ckd-off": ("ckd", {"negatives": "student", "weight": 0.0}),
    "clkd": ("clkd", {}),
    "clkd-sum-mutual": ("clkd", {"reduction": "sum", "teacher_grad": True}),
    "clkd-weight": ("clkd", {"weight": THREE, "reduction": "sum"}),
    "clkd-instance": ("clkd", {"weight": (1.0, 0.0, 0.0)}),
    "clkd-category": ("clkd", {"weight": (0.0, 1.0, 0.0), "teacher_grad": True}),
    "clkd-correlation": ("clkd", {"weight": (0.0, 0.0, 1.0), "teacher_grad": True}),
    "mlkd": ("mlkd", {}),
    "mlkd-mutual": ("mlkd", {"teacher_grad": True}),
    "mlkd-one-view": ("mlkd", {"views": 1, "teacher_grad": True}),
    "mlkd-cold": ("mlkd", {"correlation_temperature": 0.02, "supervised_temperature": 0.015, "teacher_grad": True}),
    "mlkd-cool": ("mlkd", {"correlation_temperature": 0.05, "teacher_grad": True}),
    "mlkd-weight": ("mlkd", {"weight": THREE}),
    "mlkd-correlation": ("mlkd", {"weight": (1.0, 0.0, 0.0), "teacher_grad": True}),
    "mlkd-supervised": ("mlkd", {"weight": (0.0, 0.0, 1.0), "teacher_grad": True, "ignore_index": 1}),
    "mlkd-supervised-one-view": ("mlkd", {"weight": (0.0, 0.0, 1.0), "views": 1, "teacher_grad": True}),
    "mlkd-alignment": ("mlkd", {"weight": (0.0, 1.0, 0.0), "teacher_grad": True}),
}  # fmt: skip


def run(terms, student, teacher, target, *, teacher_grad=False, **options):
    """Values (loss and terms) and gradients of a call."""
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_(teacher_grad)
    weight = options.get("weight")
    if isinstance(weight, torch.Tensor):
        weight = options["weight"] = weight.detach().to(student.dtype).requires_grad_()
    result = terms(student, teacher, target, **options)
    result.loss.backward()
    found = {"values": torch.stack([x.detach() for x in result]), "student": student.grad}
    if teacher_grad:
        found["teacher"] = teacher.grad
    if isinstance(weight, torch.Tensor):
        found["weight"] = weight.grad
    return found


def over_ranks(group, sizes, terms, student, teacher, target, **options):
    """As `run` of the global batch: the means over ranks of values and the weight's gradient, own rows' gradients."""
    own = [part(x, sizes, group) for x in (student, teacher, target)]
    found = run(terms, *own, process_group=group, **options)
    return {
        name: mean_over_ranks(x, group) if name in ("values", "weight") else x / len(sizes) for name, x in found.items()
    }


def of_own_rows(found, sizes, group):
    return {name: part(x, sizes, group) if name in ("student", "teacher") else x for name, x in found.items()}


def problem(name, sizes, classes, dtype=torch.float64, kind="random"):
    loss, options = CASES[name]
    student, teacher = logits(kind, sum(sizes), classes, dtype)
    target = labels(sum(sizes), min(classes, 4), ignored=0.2)
    if "ignore_index" in options:
        target[target == -100] = options["ignore_index"]
    modules = mcld_kernels, reference
    return [getattr(module, f"{loss}_terms") for module in modules], (student, teacher, target), options


def compare(group, sizes, names, dtype, bar, classes, chunk_bytes):
    for name in names:
        (fast, truth), (student, teacher, target), options = problem(name, sizes, classes, dtype)
        want = of_own_rows(run(truth, student.double(), teacher.double(), target, **options), sizes, group)
        for backend in ("reference", "torch"):
            with backends.tuned(chunk_bytes=chunk_bytes):
                got = over_ranks(group, sizes, fast, student, teacher, target, backend=backend, **options)
            errors = relative(got, want)
            assert max(errors.values()) < bar, (name, backend, classes, chunk_bytes, errors)


@pytest.mark.parametrize(("count", "sizes"), [(n, sizes) for n, several in SIZES.items() for sizes in several], ids=str)
@pytest.mark.parametrize(("classes", "chunk_bytes"), [(11, 1 << 25), (11, 1), (40, 1 << 25), (40, 500)])
def test_ranks_equal_one_process(pool, count, sizes, classes, chunk_bytes):
    """Loss, terms and gradients in fp64: every option, unequal and empty ranks, every form, whole and by chunks."""
    pool.run(compare, sizes, tuple(CASES), torch.float64, 1e-10, classes, chunk_bytes, ranks=count)


def test_ranks_equal_one_process_in_fp32(pool):
    names = "ckd", "clkd-sum-mutual", "mlkd-mutual", "mlkd-cold"
    pool.run(compare, (7, 2), names, torch.float32, 2e-5, 11, 1 << 25, ranks=2)


def special(group):
    sizes = (4, 0, 5)
    for name in ("ckd", "clkd-sum-mutual", "mlkd-mutual", "mlkd-cool"):
        for kind in ("zeros", "converged", "collinear", "alike"):
            (fast, truth), inputs, options = problem(name, sizes, 7, kind=kind)
            want = of_own_rows(run(truth, *inputs, **options), sizes, group)
            for backend in ("reference", "torch"):
                got = over_ranks(group, sizes, fast, *inputs, backend=backend, **options)
                size = 1e-9 * float(inputs[0].norm())
                assert all(torch.allclose(got[key], want[key], rtol=1e-9, atol=size) for key in want), (name, kind)
        for bad in (torch.nan, torch.inf):
            _, inputs, _ = problem(name, sizes, 7)
            inputs[0][1, 2] = bad  # of rank 0
            for backend in ("reference", "torch"):
                got = over_ranks(group, sizes, fast, *inputs, backend=backend, **options)
                assert got["values"][0].isnan(), (name, bad, backend)
            if name == "mlkd-mutual":  # without an anchor too
                nobody = torch.full_like(inputs[2], -100)
                alone = {**options, "weight": (0.0, 0.0, 1.0)}
                for backend in ("reference", "torch"):
                    got = over_ranks(group, sizes, fast, *inputs[:2], nobody, backend=backend, **alone)
                    assert got["values"][0].isnan(), (bad, backend)
        # Late in training the terms keep their digits in fp32.
        if name != "ckd":
            (fast, truth), (student, teacher, target), options = problem(name, sizes, 7, torch.float32, "converged")
            want = run(truth, student.double(), teacher.double(), target, **options)["values"]
            got = over_ranks(group, sizes, fast, student, teacher, target, backend="torch", **options)["values"]
            # Against what a difference of the similarities' exponentials would leave.
            assert (got.double() - want).abs().max() < 1e-4 * want.abs().max(), (name, got, want)
        if name == "mlkd-cool":  # and early, where the student's sums are small beside the teacher's
            (fast, truth), inputs, options = problem(name, sizes, 40, torch.float32, "alike")
            want = run(truth, *(x.double() if x.is_floating_point() else x for x in inputs), **options)
            got = over_ranks(group, sizes, fast, *inputs, backend="torch", **options)
            errors = relative(got, of_own_rows(want, sizes, group))
            assert max(errors.values()) < 1e-5, (name, errors)
        # Nothing at all.
        empty = torch.zeros(0, 5, requires_grad=True)
        for backend in ("reference", "torch"):
            result = fast(
                empty, empty.detach(), torch.zeros(0, dtype=torch.int64), process_group=group, backend=backend
            )
            result.loss.backward()
            assert float(result.loss.detach()) == 0 and empty.grad.shape == (0, 5)


def test_zero_rows_late_training_nan_and_no_rows(pool):
    pool.run(special, ranks=3)


def own_parts(group):
    """The parts of a rank are the reference's: (number of ranks) x its rows, the correlation of CLKD alike on all."""
    sizes = (3, 5)
    for name in ("ckd", "clkd", "mlkd"):
        for classes in (5, 40):
            (fast, _), inputs, options = problem(name, sizes, classes)
            own = [part(x, sizes, group) for x in inputs]
            values = [
                run(fast, *own, process_group=group, backend=b, **options)["values"] for b in ("torch", "reference")
            ]
            torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)


def test_both_backends_return_the_same_part(pool):
    pool.run(own_parts, ranks=2)


# What ranks receive, as docs/distributed.md states it.
COMMUNICATION = runpy.run_path(str(Path(__file__).resolve().parents[1] / "docs" / "communication.py"))


def count_traffic(group):
    count, rows = dist.get_world_size(group), 4
    sizes = (rows,) * count
    for name, (loss, options) in CASES.items():
        if name in ("ckd-teacher", "ckd-off"):
            continue
        for classes in (6, 40):
            for chunk_bytes in (1 << 25, 500):
                (fast, _), inputs, options = problem(name, sizes, classes)
                options = dict(options)
                teacher_grad = options.pop("teacher_grad", False)
                for student_grad in (True, False):
                    own = [part(x, sizes, group).clone() for x in inputs]
                    own[0].requires_grad_(student_grad), own[1].requires_grad_(teacher_grad)
                    with backends.tuned(chunk_bytes=chunk_bytes), distributed.count_collectives() as counted:
                        result = fast(*own, process_group=group, backend="torch", **options)
                    priced = {"views": options.get("views", 2)}
                    if not isinstance(options.get("weight", 1), (int, torch.Tensor)):
                        priced["weight"] = options["weight"]
                    want = COMMUNICATION["family_collectives"](
                        loss, count, rows, classes, student_grad=student_grad, teacher_grad=teacher_grad,
                        operand=8, acc=8, chunk=chunk_bytes, **priced,
                    )  # fmt: skip
                    assert [tuple(x) for x in counted] == want, (name, classes, chunk_bytes, counted, want)
                    if result.loss.requires_grad:
                        with distributed.count_collectives() as counted:
                            result.loss.backward()
                        assert counted == [], name


@pytest.mark.parametrize("count", [2, 3])
def test_collectives_and_bytes_are_those_documented(pool, count):
    """In order; backward communicates nothing."""
    pool.run(count_traffic, ranks=count)


def derivatives(group):
    sizes = (3, 4)
    for name in ("ckd", "clkd", "mlkd"):
        (fast, truth), inputs, options = problem(name, sizes, 5)
        own = [part(x, sizes, group).clone() for x in inputs]
        own[0].requires_grad_()

        def penalty(loss, x):
            return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()

        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            penalty(fast(*own, process_group=group, backend="torch", **options).loss, own[0]).backward()
        # The reference over ranks is exact to the second order: rank r has the gradient of
        # (number of ranks)^2 x the sum over ranks.
        whole = inputs[0].clone().requires_grad_()
        penalty(truth(whole, *inputs[1:], **options).loss, whole).backward()
        leaf = own[0].detach().requires_grad_()
        penalty(truth(leaf, *own[1:], process_group=group, **options).loss, leaf).backward()
        torch.testing.assert_close(leaf.grad / 4, part(whole.grad, sizes, group), rtol=1e-9, atol=1e-11)


def test_derivatives_beyond_the_first(pool):
    pool.run(derivatives, ranks=2)


def programs(group):
    """A module that is copied, pickled, given its group later; and compiled without a graph break."""
    sizes = (4, 4)
    for name in ("ckd", "clkd", "mlkd"):
        loss, options = CASES[name]
        (fast, _), inputs, _ = problem(name, sizes, 6)
        own = [part(x, sizes, group).clone() for x in inputs]
        own[0].requires_grad_()
        module = getattr(mcld_kernels, f"{loss.upper()}Loss")
        criterion = module(process_group=group, **options)
        want = fast(*own, process_group=group, **options).loss
        (gradient,) = torch.autograd.grad(want, own[0])
        assert criterion.process_group == group.group_name
        assert f"process_group={group.group_name!r}, gather='all', even=False" in repr(criterion)
        later = module(**options)
        assert later.process_group is None and "process_group" not in repr(later)
        later.process_group = group
        even = module(process_group=group, even=True, **options)
        for other in (criterion, pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion), later, even):
            assert torch.equal(other(*own), want)
        torch._dynamo.reset()
        compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*own), want)
        torch.testing.assert_close(torch.autograd.grad(compiled(*own), own[0])[0], gradient)
        operator = getattr(torch.ops.mcld_kernels, f"{loss}_ranks").default
        fields = [list(x) if isinstance(x, tuple) else x for x in criterion.options]
        used = own[2] if loss == "mlkd" else None
        torch.library.opcheck(
            operator,
            (own[0].detach(), own[1], used, None, *fields, "torch", True, False, group.group_name, "all", False),
        )


def test_modules_and_compile_without_graph_breaks(pool):
    pool.run(programs, ranks=2)


def interpreted(group):
    import triton_interpreter

    sizes = (5, 2)
    with triton_interpreter.faithful():
        for name in ("ckd", "ckd-teacher", "mlkd-supervised"):
            (fast, truth), inputs, options = problem(name, sizes, 7)
            options = {**options, "teacher_grad": False}
            want = of_own_rows(run(truth, *inputs, **options), sizes, group)
            got = over_ranks(group, sizes, fast, *inputs, backend="triton", **options)
            assert max(relative(got, want).values()) < 1e-9, name


def test_triton_under_the_interpreter(pool):
    pytest.importorskip("triton", reason="triton is not installed")
    pool.run(interpreted, ranks=2)


# What rank 1 does otherwise, and what the others are told.
DIFFERENCES = {
    "ckd": {"temperature": ({"temperature": 0.7}, "rank 1 has 0.7"), "ring": ({"gather": "ring"}, 'gather="ring"')},
    "clkd": {
        "reduction": ({"reduction": "sum"}, "rank 1 has 'sum'"),
        "weights": ({"weight": (1, 2)}, "weight must be"),
    },
    "mlkd": {"views": ({"views": 1}, "rank 1 has 1"), "labels": ({"target": None}, "target is None")},
}
EVERYWHERE = {
    "dtype": "student dtype",
    "eps": "eps must be",
    "shape": "the same shape",
    "backend": "rank 1 has 'of the reference'",
    "cuda": "backend 'cuda' cannot run",
}


def differ(group):
    rank, found = dist.get_rank(group), {}
    for name, several in DIFFERENCES.items():
        loss, options = CASES[name]
        function = getattr(mcld_kernels, f"{loss}_loss")
        for what in (*several, *EVERYWHERE):
            student, teacher = logits("random", 4, 5)
            arguments = {"student": student, "teacher": teacher, "target": labels(4, 5), "backend": "torch", **options}
            if rank == 1:
                arguments |= several[what][0] if what in several else {
                    "dtype": {"student": student.float(), "teacher": teacher.float()},
                    "eps": {"eps": -1.0},
                    "shape": {"teacher": teacher[1:]},
                    "backend": {"backend": "reference"},
                    "cuda": {"backend": "cuda"},
                }[what]  # fmt: skip
            arguments.setdefault("gather", "all")
            try:
                function(process_group=group, **arguments)
                found[name, what] = "nothing"
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                found[name, what] = f"{type(error).__name__}: {error}"
            # The group is as good as before.
            assert function(student, teacher, labels(4, 5), process_group=group, **options).isfinite()
    return found


def test_ranks_that_differ_raise_on_all_of_them(pool):
    results = pool.run(differ, ranks=3)
    for name, several in DIFFERENCES.items():
        for what, words in {**{key: text for key, (_, text) in several.items()}, **EVERYWHERE}.items():
            for rank, found in enumerate(results):
                text = found[name, what]
                assert words in text, (name, what, rank, text)
                assert rank == 1 or "rank 1" in text


@pytest.mark.parametrize("name", ["ckd", "clkd", "mlkd"])
@pytest.mark.parametrize("package", [mcld_kernels, reference], ids=["fast", "reference"])
def test_the_ring_is_refused(name, package):
    loss, options = CASES[name]
    student, teacher = logits("random", 4, 3)
    with pytest.raises(NotImplementedError, match=re.escape('gather="ring": ') + '.* pass gather="all"'):
        getattr(package, f"{loss}_loss")(
            student, teacher, labels(4, 3), process_group="a group", gather="ring", **options
        )
    module = getattr(mcld_kernels, f"{loss.upper()}Loss")
    with pytest.raises(NotImplementedError, match="has no form in which rows travel"):
        module(process_group="a group", gather="ring", **options)
    criterion = module(gather="ring", **options)
    with pytest.raises(NotImplementedError, match="has no form in which rows travel"):
        criterion.process_group = "a group"
    with pytest.raises(ValueError, match="gather must be one of"):
        module(process_group="a group", gather="some", **options)
