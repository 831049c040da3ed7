"""The portable CUDA kernels, compiled for the host and run through the "cuda" backend, against the fp64 reference.

Covered: the kernels' arithmetic, indices, barriers and asynchronous copies, and the backend's chunks, splits and masks,
at the error bar of every backend, without a data race between threads or blocks (csrc_host/races.h). Not covered: speed
and PTX. tests/test_cuda.py runs the same grid on a GPU.
"""

import ast
import contextlib
import re
from pathlib import Path

import cases
import csrc_host
import pytest
import torch

import mcld_kernels
from mcld_kernels import backends
from mcld_kernels.backends import cuda
from mcld_kernels.backends import torch as torch_backend
from mcld_kernels.backends.cuda import extension, low_latency, tuning
from mcld_kernels.kernels import LossInputs
from mcld_kernels.losses import mcld
from mcld_kernels.reference import mcld as reference

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd, one row, one class, past one tile of 64 or 128 in each direction, rows of more than one slice of shared memory.
SHAPES = ((1, 7), (5, 1), (7, 5), (65, 130), (131, 37), (193, 66), (67, 300))


@pytest.fixture(scope="session")
def module():
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
    return csrc_host.load()


@pytest.fixture(autouse=True)
def emulated(module):
    with extension.use(module):
        yield


PATHS = {"flash": {"low_latency_limit": 0}, "two products": {"low_latency_limit": 0, "flash_row_bytes": 0}}


BY_PATH = {name: name for name in PATHS}
BY_DTYPE = dict(zip(map(cases.short, DTYPES), DTYPES, strict=True))
BY_SHAPE = {f"{batch}-{classes}": (batch, classes) for batch, classes in SHAPES}


@pytest.fixture(params=PATHS)
def path(request):
    with backends.tuned(**PATHS[request.param]):
        yield request.param


@pytest.fixture
def takes_low_latency(monkeypatch):
    """Fails the test unless the low-latency path has run."""
    calls = []
    evaluate = low_latency.evaluate
    monkeypatch.setattr(low_latency, "evaluate", lambda *args, **kwargs: calls.append(1) or evaluate(*args, **kwargs))
    yield
    assert calls


def check(kind, batch, classes, dtype, **options):
    if csrc_host.checks_memory():
        # Values are held to the bar where races are checked. Here accesses count, and one draw makes them all.
        student, teacher = cases.logits(kind, batch, classes, dtype)
        target = cases.labels(batch, classes, ignored=options.pop("ignored", 0.0))
        cases.run("cuda", student, teacher, target, **{"weight": cases.WEIGHT, **options})
        return
    draws = 2 if batch * classes < 3000 else 1
    cases.check("cuda", "cpu", kind, batch, classes, dtype, draws=draws, **options)


@pytest.mark.parametrize(
    ("path", "dtype", "options"),
    cases.alternating(BY_PATH, BY_DTYPE, cases.KERNEL_OPTIONS),
    indirect=["path"],
)
def test_options(path, dtype, options, poison):
    batch, classes = (131, 37) if path == "flash" else (65, 130)
    check("random", batch, classes, dtype, ignored=0.2, **options)


@pytest.mark.parametrize(("path", "dtype", "shape"), cases.alternating(BY_PATH, BY_DTYPE, BY_SHAPE), indirect=["path"])
def test_shapes(path, dtype, shape, poison):
    batch, classes = shape
    check("random", batch, classes, dtype)
    check("random", batch, classes, dtype, direction="symmetric")


@pytest.mark.parametrize(
    ("path", "dtype", "kind"), cases.alternating(BY_PATH, BY_DTYPE, cases.by_name(cases.KINDS[1:])), indirect=["path"]
)
def test_kinds_of_logits(path, kind, dtype, poison):
    check(kind, 67, 41, dtype)
    check(kind, 67, 41, dtype, direction="teacher", mask_same_class=True, ignored=0.1)


@pytest.mark.parametrize(
    ("temperature", "dtype", "direction"),
    cases.alternating(cases.by_name([0.1, 0.02]), BY_DTYPE, cases.by_name(["student", "teacher", "symmetric"])),
)
def test_chunks_and_large_tiles(temperature, dtype, direction, poison):
    # min_large_tiles: tiles of 128 wherever they divide the operand. chunk_bytes: chunks of 128 rows, the fewest.
    with backends.tuned(**PATHS["two products"], min_large_tiles=0, chunk_bytes=1):
        check("random", 260, 130, dtype, direction=direction, temperature=temperature)


def test_fp16_coefficients_of_a_large_batch(path):
    """Coefficients of an anchor are about 1 / (n m), which is below fp16's range long before the gradient is."""
    check("random", 1030, 20, torch.float16, direction="teacher", weight=(1e-3, 0.0, 0.0))


@pytest.mark.parametrize(
    ("temperature", "dtype", "tile"), cases.alternating(cases.by_name([0.1, 0.02]), BY_DTYPE, cases.by_name([128, 64]))
)
def test_a_split_contraction(module, temperature, dtype, tile, poison):
    """Few tiles of long rows, in parts of unequal length: the category-wise term of a large batch."""
    # 384 is the least depth of five parts of whole slices of which some are longer.
    fields = {"min_split_depth": 64, "max_large_tile_splits": 5, "max_small_tile_splits": 5}
    if tile == 128:
        fields["min_large_tiles"] = 0
    options = {"mask_same_class": True, "direction": "symmetric", "ignored": 0.1}
    with backends.tuned(**PATHS["two products"], **fields):
        kernels = default_kernels()
        assert tuning.similarity_tile(kernels.tuning, module.constants, 128, 128, 384) == (tile, 5)
        check("random", 350, 20, dtype, temperature=temperature, weight=(0.0, 0.0, 1.0))
        check("random", 20, 350, dtype, temperature=temperature, **options)


def default_kernels():
    logits = torch.zeros(1, 1)
    return backends.kernel_set("cuda", logits, logits)


def test_splits_by_shape(module):
    """Blocks enough for a large GPU, and no part too short to pay; large work is not split."""
    expected = {
        (1024, 1024, 65536): (128, 4),
        (128, 128, 65536): (64, 32),
        (1024, 1024, 1024): (128, 2),
        (128, 128, 640): (64, 1),
        (4096, 4096, 1024): (128, 1),
    }
    for shape, choice in expected.items():
        assert tuning.similarity_tile(default_kernels().tuning, module.constants, *shape) == choice


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_splits_of_flash(splits, temperature, poison):
    with backends.tuned(**PATHS["flash"], max_flash_splits=splits):
        for direction in ("student", "teacher"):
            # 5 tiles of candidates: parts of 2 and 3, and of one
            check("random", 290, 20, torch.bfloat16, direction=direction, temperature=temperature)


LOW_LATENCY_OPTIONS = {
    "all": {},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "masked teacher": {"direction": "teacher", "mask_same_class": True, "present_only": True},
    "masked symmetric": {"direction": "symmetric", "mask_same_class": True, "temperature": (0.1, 0.2, 0.3)},
    "symmetric sample": {"direction": "symmetric", "weight": (0.0, 1.0, 0.0)},
    "symmetric category": {"direction": "symmetric", "weight": (0.0, 0.0, 1.0)},
    "masked": {"mask_same_class": True, "present_only": True},
    "three temperatures": {"temperature": (0.1, 0.2, 0.3)},
    "instance": {"weight": (1.0, 0.0, 0.0)},
    "sample": {"weight": (0.0, 1.0, 0.0)},
    "category": {"weight": (0.0, 0.0, 1.0), "present_only": True},
    "tensor weight": {"weight": torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)},
}


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    # One tile, and several with a ragged last one.
    cases.alternating({"7-5": (7, 5), "65-130": (65, 130)}, BY_DTYPE, LOW_LATENCY_OPTIONS),
)
def test_low_latency_options(takes_low_latency, shape, dtype, options, poison):
    batch, classes = shape
    if dtype == torch.float16 and options.get("direction", "student") != "student":
        options = options | {"weight": (0.0, 0.0, 1.0)}  # the row terms take another path: the next test
    check("random", batch, classes, dtype, ignored=0.2, **options)


@pytest.mark.parametrize("direction", ["student", "symmetric"])
def test_low_latency_launches_await_the_one_before(takes_low_latency, direction, poison):
    """The emulation stops where a dependent launch touches global memory before it has awaited the one before."""
    with backends.tuned(dependent_launches=True):
        check("random", 65, 130, torch.bfloat16, direction=direction, ignored=0.2)


def test_teacher_anchors_in_fp16_do_not_take_the_low_latency_path(monkeypatch):
    """Their coefficients have no range in fp16."""
    monkeypatch.setattr(low_latency, "evaluate", None)
    check("random", 65, 130, torch.float16, direction="teacher")
    check("random", 65, 130, torch.float16, direction="symmetric")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.short)
@pytest.mark.parametrize("kind", cases.KINDS[1:])
def test_low_latency_kinds_of_logits(takes_low_latency, kind, dtype, poison):
    check(kind, 7, 5, dtype, weight=(0.0, 1.0, 0.0))
    check(kind, 67, 41, dtype, mask_same_class=True, present_only=True, ignored=0.1)
    if dtype != torch.float16:
        check(kind, 67, 41, dtype, direction="teacher", ignored=0.1)
        check(kind, 67, 41, dtype, direction="symmetric", mask_same_class=True, ignored=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.short)
def test_low_latency_edges(takes_low_latency, dtype, poison):
    check("random", 1, 7, dtype)
    check("random", 5, 1, dtype, ignored=1.0)
    if dtype != torch.float16:
        for direction in ("teacher", "symmetric"):
            check("random", 1, 7, dtype, direction=direction)
            check("random", 5, 1, dtype, ignored=1.0, direction=direction)
    student, teacher = cases.logits("random", 33, 21, dtype)
    target = cases.labels(33, 21)
    want = cases.run("cuda", student, teacher, target)
    got = cases.run("cuda", torch.stack([student, -student], 2)[:, :, 0], teacher.T.contiguous().T, target)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.student, want.student)
    assert torch.equal(mcld_kernels.mcld_loss(student, teacher, target, backend="cuda"), want.loss)
    student[3, 4] = torch.nan
    assert mcld_kernels.mcld_loss(student, teacher, target, backend="cuda").isnan()


def test_low_latency_bad_labels_make_their_terms_nan(takes_low_latency):
    """As on a GPU, where no check of a label's value may synchronize: no read out of bounds, and NaN."""
    student, teacher = cases.logits("random", 33, 21, torch.float32)
    target = cases.labels(33, 21)
    target[5] = 21
    outputs = mcld.compute(backends.kernel_set("cuda", student, teacher), inputs_of(student, teacher, target))
    assert outputs.terms.isnan().tolist() == [False, True, False]
    assert outputs.loss.isnan()


def inputs_of(student, teacher, target, **fields):
    options, _ = cases.options_of(**fields.pop("options", {}))
    defaults = {"weight": None, "student_grad": True, "teacher_grad": False}
    return LossInputs(student=student, teacher=teacher, target=target, options=options, **defaults | fields)


def round_tf32(x):
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Rounded(torch.autograd.Function):
    """a b^T with the operands of this product and of both of its backward's rounded, as a matmul precision does."""

    @staticmethod
    def forward(ctx, a, b, rounding):
        ctx.save_for_backward(a, b)
        ctx.rounding = rounding
        return rounding(a) @ rounding(b).T

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        r = ctx.rounding
        return r(g) @ r(b), r(g.T) @ r(a), None


@pytest.mark.parametrize(
    ("precision", "rounding"),
    [("highest", lambda x: x), ("high", round_tf32), ("medium", lambda x: x.bfloat16().float())],
    ids=["highest", "high", "medium"],
)
def test_float32_matmul_precision(path, precision, rounding, matmul_precision, monkeypatch):
    """The bar is eager's error with operands rounded as that precision rounds them; a CPU's own products do not."""
    # symmetric runs the student's kernels too.
    plain = reference.similarities

    def similarities(anchors, candidates, dtype, temperature):
        if dtype != torch.float32:
            return plain(anchors, candidates, dtype, temperature)
        return Rounded.apply(anchors, candidates, rounding) / temperature

    matmul_precision(precision)
    monkeypatch.setattr(reference, "similarities", similarities)
    check("random", 67, 130, torch.float32, direction="symmetric")


def test_precisions_differ(matmul_precision):
    """Errors fall from bf16 ("medium") to tf32 ("high") to fp32 ("highest")."""
    student, teacher = cases.logits("random", 67, 41, torch.float32)
    target = cases.labels(67, 41)
    want = cases.truth(student, teacher, target)
    errors = []
    for precision in ("medium", "high", "highest"):
        matmul_precision(precision)
        got = cases.run("cuda", student, teacher, target)
        errors.append(float((got.student.double() - want.student).norm() / want.student.norm()))
    assert errors[0] > 3 * errors[1] > 30 * errors[2]


@pytest.mark.parametrize(
    ("name", "batch", "classes"),
    [("low latency", 33, 1000), ("flash", 600, 100), ("two products", 33, 1000), ("two products", 600, 66)],
)
@pytest.mark.parametrize("kind", ["random", "collinear"])
def test_fp32_accuracy_of_long_contractions(name, batch, classes, kind, matmul_precision):
    """Tensor cores truncate their sums: at 1000 elements 16 times the error of fp32, and a bias where cosines are 1."""
    matmul_precision("highest")
    with backends.tuned(**PATHS.get(name, {})):
        check(kind, batch, classes, torch.float32)


def test_mixed_dtypes(path):
    student, teacher = cases.logits("random", 33, 70, torch.float32)
    got = cases.run("cuda", student.bfloat16(), teacher, cases.labels(33, 70))
    want = cases.truth(student.bfloat16(), teacher, cases.labels(33, 70))
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0)
    assert float((got.student.double() - want.student).norm()) <= 2**-8 * float(want.student.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.short)
def test_strides_and_alignment(path, dtype):
    """Views that are strided or begin at an odd element give bitwise what their contiguous copies give.

    So it is with 21 columns, which no row takes by vectors; tests/test_csrc_rows.py has those that are.
    """
    student, teacher = cases.logits("random", 37, 21, dtype)
    target = cases.labels(37, 21)

    def odd(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    def strided(x):
        return torch.stack([x, -x], 2)[:, :, 0]

    want = cases.run("cuda", student, teacher, target)
    for view in (odd, strided):
        got = cases.run("cuda", view(student), view(teacher), target)
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.student, want.student)
    # Column-major logits are normalized in another order of sums.
    got = cases.run("cuda", student.T.contiguous().T, teacher.T.contiguous().T, target)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-3 if dtype != torch.float32 else 1e-6, atol=0)
    error = (got.student.double() - want.student.double()).norm()
    assert float(error) <= 4 * torch.finfo(dtype).eps * float(want.student.norm())


def test_repeats_bitwise_and_leaves_inputs_alone(path):
    """The emulation runs threads in another order every time, so a race or an atomic sum would show."""
    student, teacher = cases.logits("random", 131, 70, torch.bfloat16)
    target = cases.labels(131, 70, ignored=0.1)
    before = student.clone(), teacher.clone(), target.clone()
    first, *others = (cases.run("cuda", student, teacher, target, direction="symmetric") for _ in range(3))
    for other in others:
        assert torch.equal(first.loss, other.loss) and torch.equal(first.student, other.student)
    assert all(map(torch.equal, before, (student, teacher, target)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_nan_and_inf_spread(path, bad, temperature):
    student, teacher = cases.logits("random", 70, 33, torch.float32)
    for side in (student, teacher):
        changed = side.clone()
        changed[3, 4] = bad
        pair = (changed, teacher) if side is student else (student, changed)
        for direction in ("student", "teacher", "symmetric"):
            options = {"direction": direction, "temperature": temperature, "weight": (1.0, 0.0, 0.0)}
            got = mcld_kernels.mcld_loss(*pair, backend="cuda", **options)
            assert got.isnan(), (direction, side is student)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.short)
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_anchors_against_more_candidates(path, dtype, temperature, poison):
    """Rectangular, the positive at an offset: the rows of one process against those of all."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(70, 45, generator=generator).to(dtype)
    teacher = torch.randn(200, 45, generator=generator).to(dtype)
    labels = torch.randint(0, 45, (200,), generator=generator)
    fields = {
        "options": {"temperature": temperature, "weight": (1.0, 0.5, 0.0)},
        "teacher_grad": True,
        "offset": 90,
        "teacher_target": labels,
    }

    def outputs_of(backend, student, teacher):
        inputs = inputs_of(student, teacher, labels[90:160], **fields)
        return mcld.compute(backend.kernel_set(student, teacher, **PATHS[path] if backend is cuda else {}), inputs)

    got = outputs_of(cuda, student, teacher)
    want = outputs_of(torch_backend, student.double(), teacher.double())
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for name in ("loss", "terms", "student_grad", "teacher_grad"):
        a, b = getattr(got, name).double(), getattr(want, name)
        assert float((a - b).norm()) <= tolerance * float(b.norm()), name


def test_the_largest_rows_of_flash(poison):
    """256 classes in half precision, 128 in fp32: the accumulator of a whole row in registers."""
    with backends.tuned(**PATHS["flash"]):
        for classes, dtype in ((250, torch.bfloat16), (250, torch.float16), (120, torch.float32)):
            check("random", 70, classes, dtype)
            check("random", 70, classes, dtype, temperature=0.02, direction="teacher")


def test_loss_alone(path, poison):
    student, teacher = cases.logits("random", 67, 41, torch.float32)
    target = cases.labels(67, 41)
    for direction in ("student", "symmetric"):
        got = mcld_kernels.mcld_loss(student, teacher, target, backend="cuda", direction=direction)
        want = mcld_kernels.mcld_loss(
            student.double(), teacher.double(), target, backend="reference", direction=direction
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_the_bindings_name_a_wrong_argument(module):
    with pytest.raises(TypeError, match="missing argument x"):
        module.normalize_rows(device=0, stream=0)
    names = "products", "split_maxima", "row_maxima", "out", "rows", "padded_rows", "pitch", "splits"
    with pytest.raises(TypeError, match="unknown arguments.*spare"):
        module.combine_splits(**dict.fromkeys(names, 0), device=0, stream=0, spare=1)


@pytest.mark.parametrize(("count", "raises"), [(0, True), (1, False), (8, False), (9, True)])
def test_a_list_of_the_bindings_has_a_length(module, count, raises):
    """reduce_terms takes 1 to 8 weights."""
    per_anchor, loss, terms = torch.zeros(1, 1), torch.empty(()), torch.empty(9)
    expected = pytest.raises(ValueError, match="term_weight takes 1 to 8") if raises else contextlib.nullcontext()
    with expected:
        module.reduce_terms(
            per_anchor=per_anchor.data_ptr(), width=1, parts=[0], term_weight=[1.0] * count, weight=0,
            loss=loss.data_ptr(), terms=terms.data_ptr(), device=0, stream=0,
        )  # fmt: skip


def test_the_stub_has_every_binding(module):
    """mcld_kernels/_C.pyi against the module: launchers with their keyword arguments, constants, lists' structures."""
    stub = ast.parse((Path(mcld_kernels.__file__).parent / "_C.pyi").read_text())
    functions = {
        node.name: [a.arg for a in node.args.kwonlyargs] for node in stub.body if isinstance(node, ast.FunctionDef)
    }
    structures = {
        node.name: [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
        for node in stub.body
        if isinstance(node, ast.ClassDef)
    }
    assert not functions.pop("info") and not functions.pop("driver_version")
    bound = {}
    for name in dir(module):
        arguments = re.search(r"Keyword arguments: (.*)", getattr(module, name).__doc__ or "")
        if arguments:
            bound[name] = arguments[1].split(", ")
    assert bound == functions
    assert list(module.info()) == structures["Info"]
    assert list(module.constants) == structures["Constants"]
    for name in ("types", "precisions"):
        assert list(module.constants[name]) == structures[name.capitalize()]
