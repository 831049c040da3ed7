"""The loss over ranks: several gloo processes against one, what they communicate, and what happens when they differ.

The truth is the reference of one process on the concatenated batch, in fp64. Functions of the top level that take a
group run in the processes of `ranks.Pool`.
"""

import functools
import math
import runpy
import sys
from pathlib import Path

import loops
import pytest
import torch
import torch.distributed as dist
import torchvision_shim
from cases import WEIGHT, labels, logits
from torch import nn

import mcld_kernels
from mcld_kernels import backends, distributed

ALL = ("reference", "all"), ("torch", "all"), ("torch", "ring")
FAST = ALL[1:]
SIZES = {2: ((5, 5), (7, 2)), 3: ((4, 0, 6),), 4: ((3, 3, 3, 3), (5, 9, 2, 0))}
OPTIONS = {
    "default": {},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "masked": {"mask_same_class": True, "present_only": True},
    "masked-teacher": {"mask_same_class": True, "direction": "teacher", "temperature": (0.1, 0.3, 0.2)},
    "masked-symmetric": {"mask_same_class": True, "direction": "symmetric", "present_only": True},
    "temperatures": {"temperature": (0.1, 0.3, 0.2), "direction": "symmetric"},
    "cold": {"temperature": (0.02, 0.015, 0.02)},
    "cold-symmetric": {"temperature": 0.015, "direction": "symmetric"},
    "mutual": {"teacher_grad": True},
    "mutual-teacher": {"teacher_grad": True, "direction": "teacher", "temperature": (0.1, 0.3, 0.2)},
    "mutual-symmetric": {"teacher_grad": True, "direction": "symmetric"},
    "mutual-masked-cold": {
        "teacher_grad": True, "direction": "symmetric", "mask_same_class": True, "present_only": True,
        "temperature": 0.02,
    },
    "sample alone": {"weight": (0.0, 1.0, 0.0), "direction": "symmetric"},
    "no labels": {"weight": (1.0, 0.0, 0.5), "labels": False},
    "weight tensor": {"weight": torch.tensor(WEIGHT, dtype=torch.float64), "direction": "symmetric"},
    "queue": {"queue": 5},
    "queue-masked": {"queue": 5, "direction": "symmetric", "mask_same_class": True, "temperature": (0.1, 0.3, 0.2)},
    "queue-mutual": {"queue": 9, "direction": "symmetric", "teacher_grad": True},
    "soft": {"soft": True, "direction": "symmetric", "present_only": True},
    "soft-mutual-masked": {"soft": True, "direction": "symmetric", "teacher_grad": True, "mask_same_class": True},
    "soft-queue": {"soft": True, "queue": 5, "teacher_grad": True},
    "a class ignored": {"ignore_index": 3, "mask_same_class": True, "present_only": True, "direction": "symmetric"},
}  # fmt: skip


def part(x, sizes, group):
    """The rows of x that this rank holds."""
    return x.split(sizes)[dist.get_rank(group)]


def mean_over_ranks(x, group):
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x / dist.get_world_size(group)


def over_ranks(group, sizes, student, teacher, target, *, teacher_grad=False, **options):
    """The mean over ranks of loss and terms (4,), this rank's gradients over the ranks' number, and the weight's."""
    student, teacher = (part(x, sizes, group).clone() for x in (student, teacher))
    student.requires_grad_(), teacher.requires_grad_(teacher_grad)
    target = None if target is None else part(target, sizes, group)
    weight = options.get("weight")
    if isinstance(weight, torch.Tensor):
        weight = options["weight"] = weight.detach().to(student.dtype).requires_grad_()
    result = mcld_kernels.mcld_terms(student, teacher, target, process_group=group, **options)
    result.loss.backward()
    count = len(sizes)
    values = mean_over_ranks(torch.stack([x.detach() for x in result]), group)
    found = {"values": values, "student": student.grad / count}
    if teacher_grad:
        found["teacher"] = teacher.grad / count
    if isinstance(weight, torch.Tensor):
        found["weight"] = mean_over_ranks(weight.grad, group)
    return found


def one_process(group, sizes, student, teacher, target, *, teacher_grad=False, **options):
    """The same of the concatenated batch in one process; gradients of this rank's rows."""
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_(teacher_grad)
    weight = options.get("weight")
    if isinstance(weight, torch.Tensor):
        weight = options["weight"] = weight.detach().to(student.dtype).requires_grad_()
    result = mcld_kernels.mcld_terms(student, teacher, target, **options)
    result.loss.backward()
    found = {"values": torch.stack([x.detach() for x in result]), "student": part(student.grad, sizes, group)}
    if teacher_grad:
        found["teacher"] = part(teacher.grad, sizes, group)
    if isinstance(weight, torch.Tensor):
        found["weight"] = weight.grad
    return found


def soft(target, classes):
    return torch.nn.functional.one_hot(target.clamp(min=0), classes).double()


def problem(sizes, classes, options, dtype=torch.float64, kind="random"):
    options = dict(options)
    student, teacher = logits(kind, sum(sizes), classes, dtype)
    target = labels(sum(sizes), classes, ignored=0.2) if options.pop("labels", True) else None
    if target is not None and "ignore_index" in options:
        target[target == -100] = options["ignore_index"]
    if options.pop("soft", False):  # two classes a row; ignored rows are zeros
        target = soft(target, classes) + 0.5 * soft(labels(sum(sizes), classes, seed=1), classes).roll(1, 1)
        target = (target / target.sum(1, keepdim=True)).masked_fill((torch.arange(sum(sizes)) % 4 == 0)[:, None], 0)
        target = target.to(torch.promote_types(dtype, torch.float32))
    if rows := options.pop("queue", 0):  # the same further candidates on every rank
        options["candidates"] = logits("random", rows, classes, dtype, seed=9)[1]
        options["candidate_target"] = labels(rows, classes, seed=0, ignored=0.2)
    return student, teacher, target, options


def arguments(group, rows=4, classes=5, dtype=torch.float32):
    student, teacher = logits("random", rows, classes, dtype, seed=dist.get_rank(group))
    return student.requires_grad_(), teacher, labels(rows, classes)


def relative(got, want):
    assert got.keys() == want.keys()
    errors = {name: (got[name].double() - want[name].double()).abs().max() for name in got if want[name].numel()}
    return {name: float(error / want[name].double().abs().max().clamp(min=1e-3)) for name, error in errors.items()}


def compare(group, sizes, names, dtype, bar):
    for classes in (11, 40):  # fewer and more than rows
        for name in names:
            student, teacher, target, options = problem(sizes, classes, OPTIONS[name], dtype)
            truth = one_process(
                group, sizes, student.double(), teacher.double(), target, backend="reference", **options
            )
            for backend, gather in ALL if dtype == torch.float64 else FAST:
                got = over_ranks(group, sizes, student, teacher, target, backend=backend, gather=gather, **options)
                errors = relative(got, truth)
                assert max(errors.values()) < bar, (name, classes, backend, gather, errors)


@pytest.mark.parametrize(("count", "sizes"), [(n, sizes) for n, several in SIZES.items() for sizes in several], ids=str)
def test_ranks_equal_one_process(pool, count, sizes):
    """Loss, terms and gradients in fp64, every option, unequal and empty ranks, all ways to compute it."""
    pool.run(compare, sizes, tuple(OPTIONS), torch.float64, 1e-10, ranks=count)


@pytest.mark.parametrize(("count", "sizes"), [(2, (7, 2)), (4, (3, 3, 3, 3))], ids=str)
def test_ranks_equal_one_process_in_fp32(pool, count, sizes):
    names = ("default", "masked-symmetric", "mutual-symmetric", "cold", "weight tensor")
    pool.run(compare, sizes, names, torch.float32, 1e-5, ranks=count)


def compare_16_bit(group):
    sizes = (8, 5, 8)
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("default", "masked-symmetric", "mutual"):
            squares = {}
            for seed in range(3):
                options = dict(OPTIONS[name])
                student, teacher = logits("random", sum(sizes), 11, dtype, seed)
                target = labels(sum(sizes), 11, seed, 0.2)
                arguments = group, sizes, student, teacher, target
                wide = student.double(), teacher.double(), target
                truth = one_process(group, sizes, *wide, backend="reference", **options)
                results = [one_process(*arguments, backend="reference", **options)]
                results += [over_ranks(*arguments, backend=b, gather=g, **options) for b, g in FAST]
                for i, result in enumerate(results):
                    for key, want in truth.items():
                        error = (result[key].double() - want).square().sum()
                        dist.all_reduce(error, group=group)
                        squares[key, i] = squares.get((key, i), 0.0) + float(error)
            for key in truth:
                eager = squares[key, 0] ** 0.5
                for i in (1, 2):
                    error = squares[key, i] ** 0.5
                    # Gradients are rounded to the dtype times the ranks' number, once for each contrast.
                    assert error <= 2 * eager + 1e-5, (dtype, name, key, FAST[i - 1], error, eager)


def test_16_bit_logits_are_as_exact_as_eager_in_one_process(pool):
    pool.run(compare_16_bit, ranks=3)


def own_part(group):
    sizes, rank = (3, 0, 5), dist.get_rank(group)
    student, teacher = logits("random", 8, 5)
    first = sum(sizes[:rank])
    rows = slice(first, first + sizes[rank])
    for direction in ("student", "teacher"):
        got = mcld_kernels.mcld_loss(
            student[rows], teacher[rows], weight=(1.0, 0.0, 0.0), direction=direction, process_group=group
        )
        sides = [student.tolist(), teacher.tolist()]
        s, t = ([loops.unit(row, 1e-12) for row in side] for side in sides)
        anchors, candidates = (s, t) if direction == "student" else (t, s)
        mean = loops.instance(anchors[rows], candidates, 0.1, None, None, first, False, -100)
        assert abs(float(got) - 3 * sizes[rank] / 8 * mean) < 1e-12


def test_a_rank_returns_the_part_of_its_anchors(pool):
    """Against the definition in loops: (number of ranks) x (sum of own anchors) / (all rows)."""
    pool.run(own_part, ranks=3)


def chunked(group):
    sizes = (9, 4)
    for name in ("masked-symmetric", "mutual-masked-cold", "default"):
        student, teacher, target, options = problem(sizes, 12, OPTIONS[name])
        truth = one_process(group, sizes, student, teacher, target, backend="reference", **options)
        for rows in (1, 2):
            with backends.tuned(chunk_bytes=rows * 12 * 8):
                for _, gather in FAST:
                    got = over_ranks(group, sizes, student, teacher, target, backend="torch", gather=gather, **options)
                    errors = relative(got, truth)
                    assert max(errors.values()) < 1e-10, (name, gather, rows, errors)


def test_chunks_of_rows_and_columns(pool):
    pool.run(chunked, ranks=2)


def special_logits(group):
    sizes = (4, 5, 3)
    for kind in ("zeros", "converged", "collinear"):
        student, teacher, target, options = problem(sizes, 7, OPTIONS["symmetric"], kind=kind)
        truth = one_process(group, sizes, student, teacher, target, backend="reference", **options)
        for backend, gather in ALL:
            got = over_ranks(group, sizes, student, teacher, target, backend=backend, gather=gather, **options)
            assert all(
                torch.allclose(got[key], truth[key], rtol=1e-9, atol=1e-9 * float(student.norm())) for key in truth
            ), (kind, backend, gather)
    student[1, 2] = torch.nan  # of rank 0: every rank's loss is NaN, since it is a candidate or an anchor of each
    for _, gather in FAST:
        for direction in ("student", "symmetric"):
            rows = [part(x, sizes, group) for x in (student, teacher, target)]
            loss = mcld_kernels.mcld_loss(*rows, process_group=group, gather=gather, direction=direction)
            assert mean_over_ranks(loss, group).isnan()


def test_zero_rows_late_training_and_nan(pool):
    pool.run(special_logits, ranks=3)


def one_row_with_a_gap(group):
    """Rows and labels of one number, whose stride says nothing, as of a column of a wider batch."""
    student, teacher = (torch.ones(1, 1, dtype=torch.float64).as_strided((1, 1), (8, 3)) for _ in range(2))
    leaf, target = student.requires_grad_(), torch.zeros(1, dtype=torch.int64).as_strided((1,), (3,))
    for backend, gather in ALL:
        loss = mcld_kernels.mcld_loss(leaf, teacher, target, process_group=group, backend=backend, gather=gather)
        want = 2 * math.log(2)  # of two equal candidates, by both row terms
        assert abs(float(mean_over_ranks(loss, group)) - want) < 1e-12


def test_the_stride_of_a_single_row_does_not_matter(pool):
    pool.run(one_row_with_a_gap, ranks=2)


def nothing(group):
    for backend, gather in ALL:
        student = torch.zeros(0, 5, requires_grad=True)
        target = torch.zeros(0, dtype=torch.int64)
        loss = mcld_kernels.mcld_loss(
            student, student.detach(), target, process_group=group, backend=backend, gather=gather
        )
        loss.backward()
        assert float(loss) == 0 and student.grad.shape == (0, 5)
    # Labels without a class: the terms that need one have no anchor.
    student, teacher = logits("random", 4, 5)
    terms = mcld_kernels.mcld_terms(student, teacher, torch.full((4,), -100), process_group=group, present_only=True)
    assert float(terms.sample) == 0 and float(terms.category) == 0 and float(terms.instance) > 0


def test_a_global_batch_of_no_rows_or_labels(pool):
    pool.run(nothing, ranks=3)


# What ranks receive, as docs/distributed.md states it.
COMMUNICATION = runpy.run_path(str(Path(__file__).resolve().parents[1] / "docs" / "communication.py"))


def documented(count, rows, classes, options, **rest):
    unpriced = ("weight", "ignore_index", "candidates", "candidate_target")
    options = {key: value for key, value in options.items() if key not in unpriced} | (
        {} if isinstance(options.get("weight", 1), (int, torch.Tensor)) else {"weight": options["weight"]}
    )
    if isinstance(options.get("temperature"), float):
        options["temperature"] = (options["temperature"],) * 3
    return COMMUNICATION["collectives"](count, rows, classes, operand=8, acc=8, **options, **rest)


def count_traffic(group):
    count, rows, classes = dist.get_world_size(group), 4, 6
    sizes = (rows,) * count
    for name in (*OPTIONS, "instance alone", "columns alone", "no gradient"):
        extra = {
            "instance alone": {"weight": (1.0, 0.0, 0.0), "labels": False},
            "columns alone": {"weight": (0.0, 0.0, 1.0), "labels": False},
            "no gradient": {"direction": "symmetric"},
        }
        student, teacher, target, options = problem(sizes, classes, OPTIONS.get(name) or extra.get(name, {}))
        teacher_grad = options.pop("teacher_grad", False)
        student, teacher = (part(x, sizes, group).clone() for x in (student, teacher))
        target = None if target is None else part(target, sizes, group)
        student.requires_grad_(name != "no gradient"), teacher.requires_grad_(teacher_grad)
        for gather in ("all", "ring"):
            for chunk_bytes in (32 << 20, 2 * classes * 8):
                with backends.tuned(chunk_bytes=chunk_bytes), distributed.count_collectives() as counted:
                    loss = mcld_kernels.mcld_loss(
                        student, teacher, target, process_group=group, gather=gather, **options
                    )
                forward = [tuple(collective) for collective in counted]
                want = documented(
                    count, rows, classes, options, gather=gather, teacher_grad=teacher_grad,
                    with_grad=name != "no gradient", chunk=chunk_bytes,
                    soft=target is not None and target.is_floating_point(),
                )  # fmt: skip
                assert forward == want, (name, gather, forward, want)
                if loss.requires_grad:
                    with distributed.count_collectives() as counted:
                        loss.backward()
                    assert counted == [], (name, gather)


@pytest.mark.parametrize("count", [2, 4])
def test_collectives_and_bytes_are_those_documented(pool, count):
    """In order; backward communicates nothing."""
    pool.run(count_traffic, ranks=count)


def test_the_table_of_communication_is_computed():
    kinds = [kind for kind, _ in documented(8, 4, 6, {"weight": (1.0, 0.0, 0.0)})]
    assert kinds == ["exchange", "all-gather"]  # student anchors, no labels
    page = (Path(__file__).resolve().parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    for line in COMMUNICATION["table"]():
        assert "| " + " | ".join(line) + " |" in page
    assert 8 * 8192 * 1000 * 2 == 131_072_000 and COMMUNICATION["held"](8, 8192, 1000, "all") == 7 / 8 * 131_072_000
    assert COMMUNICATION["held"](8, 8192, 1000, "ring") + 8192 * 1000 * 2 <= 4 * 8192 * 1000 * 2


def peak(group):
    """Bytes held at the most beyond one process of the same rows, in local copies of fp32 operands."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
    from harness.memory import peak_extra

    count, rows, classes, found = dist.get_world_size(group), 256, 192, {}
    student, teacher = logits("random", rows, classes, torch.float32)
    student.requires_grad_()
    copy = rows * classes * 4
    options = {"weight": (1.0, 0.0, 0.0), "backend": "torch"}
    chunk = 16 * count * rows * 4  # 16 rows
    # gloo's all-gather holds a copy of its result of its own.
    out, x = torch.empty(count * rows, classes), torch.empty(rows, classes)
    gloo = peak_extra(lambda: distributed._all_gather_single(out, x, group=group), torch.device("cpu"))["allocator"]
    with backends.tuned(chunk_bytes=chunk, compiled=False):
        for gather in (None, "all", "ring"):
            given = {} if gather is None else {"process_group": group, "gather": gather}

            def step(given=given):
                mcld_kernels.mcld_loss(student, teacher, **options, **given)

            step()
            found[gather] = peak_extra(step, torch.device("cpu"))["allocator"] / copy
    return count, chunk / copy, gloo / copy, found


def test_gathered_rows_take_one_copy_and_a_ring_four(pool):
    """At most the operand copy of all ranks beside one process; a ring two blocks and the sums in fp32."""
    for count, chunk, gloo, found in pool.run(peak):
        # One process holds its own rows of the teacher, which are part of the gathered ones, or one of the two blocks.
        assert found["all"] - gloo <= found[None] - 1 + count + chunk + 0.2, found
        assert found["ring"] <= found[None] + 2 + chunk + 0.2, found  # in 16 bits the fp32 sums are two copies: three


# Public implementations, and the other backends.


def against_open_clip(group):
    torchvision_shim.install()
    from open_clip.loss import ClipLoss

    rank, count = dist.get_rank(group), dist.get_world_size(group)
    gather = torch.distributed.nn.all_gather  # ClipLoss gathers over the default group, of four
    torch.distributed.nn.all_gather = functools.partial(gather, group=group)
    sizes, options = (6,) * count, {"weight": (1.0, 0.0, 0.0), "direction": "symmetric"}
    for kind in ("random", "converged"):
        student, teacher = (part(x, sizes, group).requires_grad_() for x in logits(kind, sum(sizes), 9))
        loss = mcld_kernels.mcld_loss(student, teacher, temperature=0.07, process_group=group, **options)
        loss.backward()
        for local in (False, True):
            clip = ClipLoss(local_loss=local, gather_with_grad=True, cache_labels=False, rank=rank, world_size=count)
            a, b = (x.detach().clone().requires_grad_() for x in (student, teacher))
            unit = [nn.functional.normalize(x, dim=1) for x in (a, b)]
            theirs = clip(*unit, torch.tensor(1 / 0.07, dtype=torch.float64))
            theirs.backward()
            torch.testing.assert_close(mean_over_ranks(loss, group), mean_over_ranks(theirs, group), rtol=1e-6, atol=0)
            for ours, reference in ((student, a), (teacher, b)):
                torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-6, atol=1e-9)
    torch.distributed.nn.all_gather = gather


@pytest.mark.parametrize("count", [2, 3])
def test_the_symmetric_instance_term_is_open_clips(pool, count):
    torchvision_shim.install()
    pytest.importorskip("open_clip")
    pool.run(against_open_clip, ranks=count)


def interpreted(group):
    import triton_interpreter

    sizes = (5, 12, 0)
    with triton_interpreter.faithful():
        fused(group, sizes, "triton", {"flash_pitch": 16}, torch.float64, 1e-9)


# Both paths of a contrast, both ways to gather, both directions; an emulated call takes seconds.
FUSED = (
    ("masked", True, "all"),
    ("symmetric", False, "ring"),
    ("cold-symmetric", True, "ring"),
    ("soft", False, "all"),
)


def fused(group, sizes, backend, two_products, dtype, bar):
    for name, is_long, gather in FUSED:
        student, teacher, target, options = problem(sizes, 19, OPTIONS[name], dtype)
        truth = one_process(group, sizes, student.double(), teacher.double(), target, backend="reference", **options)
        with backends.tuned(**two_products if is_long else {}):
            got = over_ranks(group, sizes, student, teacher, target, backend=backend, gather=gather, **options)
        errors = relative(got, truth)
        assert max(errors.values()) < bar, (name, gather, errors)


def test_triton_kernels_under_the_interpreter(pool):
    pool.run(interpreted, ranks=3)


def emulated(group):
    import csrc_host

    from mcld_kernels.backends.cuda import extension

    with extension.use(csrc_host.load()):
        fused(group, (5, 9), "cuda", {"flash_row_bytes": 0}, torch.float32, 2e-5)


def test_cuda_kernels_compiled_for_the_host(pool):
    import csrc_host

    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
    csrc_host.load()
    pool.run(emulated, ranks=2)
