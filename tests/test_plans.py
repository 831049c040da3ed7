"""Plans of the "cuda" backend, compiled for the host: a call recorded and run again, and the host's cost of one.

A plan must give what the call without it gives, bit by bit, for other tensors than those it was recorded with.
"""

import random
import sys
import weakref
from pathlib import Path

import cases
import csrc_host
import pytest
import torch

import mcld_kernels
from mcld_kernels import backends
from mcld_kernels.backends import gemm
from mcld_kernels.backends.cuda import extension, plans
from mcld_kernels.kernels import LossInputs, LossOutputs
from mcld_kernels.losses import mcld

pytest.importorskip("rich", reason="rich is not installed: the host's cost is not counted")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from bench.harness import host

PATHS = {
    "low latency": {},
    "flash": {"low_latency_limit": 0},
    "two products": {"low_latency_limit": 0, "flash_row_bytes": 0},
    "library product, chunks": {"low_latency_limit": 0, "flash_row_bytes": 0, "library_product": True},
}
ROWS = {"weight": (1.0, 0.7, 0.0)}
BATCH, CLASSES = 70, 40


@pytest.fixture(scope="module")
def module():
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
    return csrc_host.load()


@pytest.fixture
def kernels(module):
    """A function that gives the kernel set of some tuning, new for each test, and takes it for every call inside."""

    def make(dtype=torch.float32, **tuning):
        x = torch.zeros(1, 1, dtype=dtype)
        with backends.tuned(**tuning):
            return backends.kernel_set("cuda", x, x)

    backends.cuda._kernel_set.cache_clear()
    with extension.use(module):
        yield make
    backends.cuda._kernel_set.cache_clear()


def inputs(seed, dtype=torch.float32, batch=BATCH, classes=CLASSES, ignored=0.2):
    student, teacher = cases.logits("random", batch, classes, dtype, seed)
    return student, teacher, cases.labels(batch, classes, seed, ignored)


def planned(kernel_set):
    return [plan for plan in kernel_set._plans.values() if plan is not None]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, ROWS),
        (torch.float32, ROWS | {"mask_same_class": True}),
        (torch.bfloat16, {"weight": "tensor", "temperature": (0.1, 0.2, 0.3)}),
        (torch.float16, ROWS | {"temperature": 0.02}),
    ],
    ids=["rows", "masked", "all, weight as a tensor", "cold"],
)
def test_a_plan_is_the_call(kernels, path, dtype, options):
    tuning = PATHS[path]
    if path.endswith("chunks"):
        dtype = torch.float32  # the CPU's library sums 16-bit operands into no other dtype
        tuning = tuning | {"chunk_bytes": 128 * 128 * dtype.itemsize}
    batch = 150 if path.endswith("chunks") else BATCH  # two chunks
    kernel_set = kernels(dtype, **tuning)
    for seed in range(4):
        student, teacher, target = inputs(seed, dtype, batch)
        made = options | ({"weight": torch.tensor([1.0, 0.5 + seed, 0.2])} if options["weight"] == "tensor" else {})
        with backends.tuned(**tuning):
            got = cases.run("cuda", student, teacher, target, **made)
            assert backends.kernel_set("cuda", student, teacher) is kernel_set
            with backends.tuned(plans=False):
                want = cases.run("cuda", student, teacher, target, **made)
        for a, b in zip(got, want):
            assert a is b is None or torch.equal(a, b), seed
    assert len(planned(kernel_set)) == 1


def test_what_a_plan_depends_on_makes_another(kernels, matmul_precision):
    kernel_set = kernels(low_latency_limit=0)

    def call(weight=(1.0, 1.0, 0.0), batch=BATCH, forward_only=False, layout=lambda x: x, **options):
        for seed in range(2):
            student, teacher, target = inputs(seed, batch=batch)
            student = layout(student)
            with backends.tuned(low_latency_limit=0), torch.set_grad_enabled(not forward_only):
                leaf = student.requires_grad_(not forward_only)
                mcld_kernels.mcld_loss(leaf, teacher, target, weight=weight, backend="cuda", **options)
        return len(planned(kernel_set))

    assert call() == call() == 1
    assert call(batch=BATCH + 1) == 2
    assert call(temperature=0.2) == 3
    assert call(forward_only=True) == 4
    assert call(weight=torch.ones(3)) == 5
    assert call(layout=lambda x: x.T.contiguous().T) == 6
    matmul_precision("high")
    assert call() == 7


def test_a_call_with_other_operations_has_no_plan(kernels):
    """Teacher anchors end in torch operations there: the call is tried once, and then runs as it is."""
    tuning = PATHS["two products"]
    kernel_set = kernels(**tuning)
    for seed in range(3):
        student, teacher, target = inputs(seed)
        with backends.tuned(**tuning):
            got = cases.run("cuda", student, teacher, target, direction="teacher", **ROWS)
        want = cases.truth(student, teacher, target, direction="teacher", **ROWS)
        assert float((got.student - want.student).norm() / want.student.norm()) < 1e-5
    assert not planned(kernel_set) and len(kernel_set._unplanned) == 1


def test_inputs_that_share_memory_have_no_plan(kernels):
    """A pointer into both would stay with one of them when the next call has two."""
    kernel_set = kernels(low_latency_limit=0)
    student, teacher, target = inputs(0)
    with backends.tuned(low_latency_limit=0):
        for _ in range(3):
            cases.run("cuda", student, student, target, **ROWS)
        got = cases.run("cuda", student, teacher, target, **ROWS)
    want = cases.truth(student, teacher, target, **ROWS)
    assert not planned(kernel_set) and abs(float(got.loss - want.loss)) < 1e-4


def test_a_recorded_call_gives_its_own_result(kernels, poison):
    """With what is made filled with NaN, which is an operation: no plan, and the result is right."""
    kernel_set = kernels(low_latency_limit=0)
    for seed in range(3):
        student, teacher, target = inputs(seed)
        with backends.tuned(low_latency_limit=0):
            got = cases.run("cuda", student, teacher, target, **ROWS)
        assert torch.isfinite(got.loss) and torch.isfinite(got.student).all()
    assert not planned(kernel_set)


def test_blocks_in_use_together_do_not_overlap():
    chance = random.Random(0)
    for _ in range(50):
        blocks = []
        for _ in range(20):
            first = chance.randrange(20)
            blocks.append(
                plans._Block(begin=0, bytes=chance.randrange(1, 5000), first=first, last=first + chance.randrange(6))
            )
        size = plans._place(blocks)
        for a in blocks:
            assert a.offset % plans._ALIGNMENT == 0 and a.offset + a.bytes <= size
            for b in blocks:
                if a is not b and a.first <= b.last and b.first <= a.last:
                    assert a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
        assert size < sum(block.bytes + plans._ALIGNMENT for block in blocks)
    one_after_the_other = [plans._Block(begin=0, bytes=256, first=i, last=i) for i in range(5)]
    assert plans._place(one_after_the_other) == 256


def test_the_workspace_of_chunks_does_not_grow_with_their_number(kernels):
    sizes = []
    for batch in (256, 512):
        tuning = PATHS["two products"] | {"chunk_bytes": 128 * 4 * 128, "wave_bytes": 0}
        kernel_set = kernels(**tuning)
        student, teacher, target = inputs(0, batch=batch)
        call = LossInputs(
            student=student, teacher=teacher, target=target, weight=None, options=cases.options_of(**ROWS)[0],
            student_grad=True, teacher_grad=False,
        )  # fmt: skip
        kernel_set.launch.module.stub_launches(1)
        try:
            for _ in range(2):
                kernel_set.run(mcld.compute, call)
        finally:
            kernel_set.launch.module.stub_launches(0)
        sizes.append(planned(kernel_set)[-1].bytes)
    operands = 2 * 256 * 64 * 4 + 2 * 41 * 64 * 4  # of 256 more rows; a chunk of E is as wide as the batch
    assert sizes[1] - sizes[0] <= operands + 128 * 256 * 4 + 256 * 64


def test_the_module_refuses_a_plan_that_does_not_fit(module):
    plan = module.Plan()
    x, out = torch.ones(128, 64), torch.zeros(128, 64)
    factor = torch.full((128,), 3.0)
    module.scale_rows(
        x=x.data_ptr(), out=out.data_ptr(), factor=factor.data_ptr(), rows=128, padded_rows=128, pitch=64,
        precision=module.constants["precisions"]["tf32"], device=0, stream=0, plan=plan,
    )  # fmt: skip
    assert len(plan) == 1 and plan.pointers(0) == [x.data_ptr(), out.data_ptr(), factor.data_ptr()] and (out == 3).all()
    with pytest.raises(ValueError, match="not placed"):
        plan.run([0, 0, 0], 0, 0, 0, 1)
    ranges = [(tensor.data_ptr(), tensor.nbytes, base, 0) for base, tensor in enumerate((x, out, factor))]
    with pytest.raises(ValueError, match="memory that is not the call's"):
        plan.place(ranges[:2])
    with pytest.raises(TypeError):
        module.scale_rows(plan=plan, device=0, stream=0)


def test_results_are_new_tensors(kernels):
    with backends.tuned(**PATHS["flash"]):
        kernels(**PATHS["flash"])
        kept = [cases.run("cuda", *inputs(seed), **ROWS) for seed in range(4)]
        again = [cases.run("cuda", *inputs(seed), **ROWS) for seed in range(4)]
    for a, b in zip(kept, again):
        assert torch.equal(a.student, b.student) and torch.equal(a.loss, b.loss)


def test_an_output_that_is_a_part_of_another_has_no_plan(kernels):
    kernel_set = kernels()

    def compute(kernel_set, call):
        both = torch.empty(4)
        return LossOutputs(loss=both[0], terms=both[1:], student_grad=None, teacher_grad=None)

    student, teacher, _ = inputs(0)
    call = LossInputs(
        student=student, teacher=teacher, target=None, weight=None, options=(), student_grad=False, teacher_grad=False
    )
    for _ in range(3):
        assert kernel_set.run(compute, call).loss.shape == ()
    assert not planned(kernel_set)


def test_the_library_allocates_the_result_of_a_gemm(kernels, monkeypatch):
    """One for each chunk, and the one before is no longer there: the plan's workspace has no place for it."""
    tuning = PATHS["library product, chunks"] | {"chunk_bytes": 128 * 128 * 4}
    kernel_set = kernels(**tuning)
    product, made, alive = gemm.product, [], []

    def counted(*args):
        alive.append(sum(ref() is not None for ref in made))
        result = product(*args)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(gemm, "product", counted)
    kernel_set.launch.module.stub_launches(1)
    try:
        with backends.tuned(**tuning):
            for seed in range(3):
                cases.run("cuda", *inputs(seed, batch=150), **ROWS)
    finally:
        kernel_set.launch.module.stub_launches(0)
    (plan,) = planned(kernel_set)
    assert [step[0] for step in plan.steps] == ["launch", "gemm", "launch", "gemm", "launch"]
    assert alive == [0, 0] and not any(ref() is not None for ref in made)


@pytest.mark.parametrize(
    ("use", "count"),
    [
        ("usual", 1),
        ("added to", 0),
        ("a part", 0),
        ("an operand", 0),
        ("written before", 0),
        ("read after the next", 0),
    ],
)
def test_gemms_that_a_plan_can_have(kernels, use, count):
    kernel_set = kernels()

    def compute(kernel_set, call):
        launch = kernel_set.launch
        a, b, first, second = torch.zeros(128, 64), torch.zeros(64, 64), launch.empty(128, 64), launch.empty(128, 64)

        def scale(x, out):
            launch(
                "scale_rows",
                x=x, out=out, factor=launch.empty(128), rows=128, padded_rows=128, pitch=64,
                precision=launch.precision(torch.float32),
            )  # fmt: skip

        if use == "written before":
            scale(a, first)
        launch.gemm(a, b, launch.empty(256, 64)[:128] if use == "a part" else first, use == "added to")
        launch.gemm(first if use == "an operand" else a, b, second, False)
        scale(first if use == "read after the next" else second, launch.empty(128, 64))
        return LossOutputs(loss=launch.empty(), terms=launch.empty(3), student_grad=None, teacher_grad=None)

    student, teacher, _ = inputs(0)
    call = LossInputs(
        student=student, teacher=teacher, target=None, weight=None, options=(), student_grad=False, teacher_grad=False
    )
    for _ in range(3):
        assert kernel_set.run(compute, call).loss.shape == ()
    assert (len(planned(kernel_set)), len(kernel_set._unplanned)) == (count, 1 - count)


# launches, allocations and operations of a step, forward and backward: an operation is the multiplication by the
# upstream gradient, the GEMM, and a view of the workspace for each of its operands
@pytest.mark.parametrize(
    ("case", "launches", "allocations", "operations"),
    [(host.CASES[0], 8, 3, 8), (host.CASES[1], 5, 3, 5), (host.CASES[2], 8, 3, 5)],
    ids=lambda value: value.name if isinstance(value, host.HostCase) else None,
)
def test_what_a_step_asks_of_the_host(module, case, launches, allocations, operations):
    backends.cuda._kernel_set.cache_clear()
    cost = host.measure(case, rounds=4, bindings="-O0")
    assert (cost.launches, cost.allocations) == (launches, allocations) and cost.operations <= operations
    assert 0 < cost.forward_us < cost.step_us and case.name in host.table([cost])


@pytest.mark.parametrize(
    ("call", "launches", "allocations", "operations"),
    [
        ("mcld_loss", 5, 3, 5),
        ("MCLDLoss", 5, 3, 5),
        ("mcld_loss, no gradient", 4, 2, 2),  # no launch for the gradient, no tensor of it
        ("mcld_terms", 5, 4, 9),  # checked, two dtypes promoted, and the terms are a tensor, unbound
        ("mcld_loss, weight as a tensor", 5, 4, 9),  # checked; the terms are cloned for the weight
    ],
)
def test_launches_allocations_and_operations_of_a_step(call, launches, allocations, operations):
    backends.cuda._kernel_set.cache_clear()
    options = {"weight": torch.ones(3)} if "weight" in call else {}
    criterion = mcld_kernels.MCLDLoss(backend="cuda")
    losses = {"MCLDLoss": criterion, "mcld_terms": lambda *x: mcld_kernels.mcld_terms(*x, backend="cuda").loss}
    loss_of = losses.get(call, lambda *x: mcld_kernels.mcld_loss(*x, backend="cuda", **options))
    student, teacher, target = inputs(0)
    student.requires_grad_("no gradient" not in call)

    def step():
        loss = loss_of(student, teacher, target)
        if loss.requires_grad:
            torch.autograd.grad(loss, student)

    with host.stubbed("-O0") as module:
        for _ in range(3):
            step()
        before = module.stub_launches(1)
        counts = host.count(step)
        assert (module.stub_launches(1) - before) // 2 == launches
    assert (counts["allocations"], counts["operations"]) == (allocations, operations)
