"""The interpreted Triton kernels against the fp64 reference: both paths of a contrast, options and dtypes.

The flash kernel takes short rows and the two-product path long ones; a small limit sends short rows there too.
"""

import pytest
import torch
from cases import alternating, by_name, check, labels, logits, options_of, run, short, truth
from test_backends import OPTIONS, with_bf16_products
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

import triton_interpreter

import mcld_kernels
from mcld_kernels import backends, reference
from mcld_kernels.backends import triton as backend
from mcld_kernels.backends.triton import flash, similarity
from mcld_kernels.backends.triton.configs import Configs, Launch, TritonTuning
from mcld_kernels.backends.triton.product import product_kernel
from mcld_kernels.kernels import ContrastArgs, GradCoefficients, LossInputs, has_fixed_shift
from mcld_kernels.losses import mcld
from mcld_kernels.options import DIRECTIONS

pytestmark = [
    pytest.mark.skipif(
        not backend.interpreted(), reason="the kernels are compiled here: test_backends runs them on the GPU"
    ),
    pytest.mark.usefixtures("faithful", "poison"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BY_DTYPE = by_name(DTYPES, short)
PATHS = {"flash": {}, "products": {"flash_pitch": 16}}
BY_PATH = by_name(list(PATHS))
# Each exercises code that no other does.
SELECTED = ("teacher", "mask-symmetric", "0.01-symmetric")


@pytest.fixture
def faithful():
    with triton_interpreter.faithful():
        yield


@pytest.fixture(params=BY_PATH)
def path(request):
    """Which path a contrast of short rows takes."""
    with backends.tuned(**PATHS[request.param]):
        yield request.param


@pytest.fixture
def small_tiles():
    """Small inputs take several tiles in every direction, and the first product is split in two."""
    with backends.tuned(blocks=Launch(64, 64, 64), whole_row=64, min_span=64):
        yield


def compute(backend_name, student, teacher, target, *, offset=0, teacher_target=None, teacher_grad=False, **options):
    """A call behind the checks of arguments, with the student's gradient: (loss, terms, student_grad, teacher_grad)."""
    options, weight = options_of(**{"temperature": 0.3, "weight": (1.0, 0.7, 0.0), **options})
    inputs = LossInputs(
        student=student,
        teacher=teacher,
        target=target,
        weight=weight,
        options=options,
        student_grad=True,
        teacher_grad=teacher_grad,
        offset=offset,
        teacher_target=teacher_target,
    )
    outputs = mcld.compute(backends.kernel_set(backend_name, student, teacher), inputs)
    return outputs.loss, outputs.terms, outputs.student_grad, outputs.teacher_grad


def same(got, want, rtol):
    assert all((a is None) == (b is None) for a, b in zip(got, want, strict=True))
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().amax()))


class TestAgainstTheTruth:
    @pytest.mark.parametrize(("path", "dtype", "options"), alternating(BY_PATH, BY_DTYPE, OPTIONS), indirect=["path"])
    def test_options(self, options, dtype, path):
        check("triton", "cpu", "random", 61, 23, dtype, draws=1, **options)

    @pytest.mark.parametrize(
        ("path", "dtype", "name"), alternating(BY_PATH, BY_DTYPE, by_name(SELECTED)), indirect=["path"]
    )
    def test_several_tiles_and_chunks(self, name, dtype, path, small_tiles, small_chunks):
        small_chunks(rows=128, columns=256, itemsize=1)  # chunks of 128 rows, the least there is
        check("triton", "cpu", "random", 149, 70, dtype, draws=1, **OPTIONS[name])

    @pytest.mark.parametrize(
        ("dtype", "name"), [(torch.float32, "mask-symmetric"), (torch.bfloat16, "teacher")], ids=str
    )
    def test_few_anchors_split_the_candidates(self, monkeypatch, dtype, name):
        """5 tiles of each side in 2 unequal parts; the last tile ends in padding."""
        reduced = []
        kernel = flash.reduce_row_sums
        monkeypatch.setattr(flash, "reduce_row_sums", lambda *args: reduced.append(args[0].shape[0]) or kernel(*args))
        with backends.tuned(blocks=Launch(64, 64, 64)):
            check("triton", "cpu", "random", 300, 20, dtype, draws=1, **OPTIONS[name])
        assert set(reduced) == {2}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
    @pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (127, 129), (129, 257), (37, 521)], ids=str)
    def test_shapes(self, shape, dtype):
        check("triton", "cpu", "random", *shape, dtype, draws=1, **OPTIONS["mask-symmetric"])

    @pytest.mark.parametrize(
        ("path_and_dtype", "kind", "name"),
        # fp32 and the 16-bit types round at different places; a kind of logits and an option meet in the epilogues.
        alternating(
            {f"{path}-{short(dtype)}": (path, dtype) for dtype in DTYPES[1:] for path in BY_PATH},
            by_name(["converged", "collinear", "large", "zeros"]),
            by_name(["default", "teacher", "ignored", "0.005-mask"]),
        ),
    )
    def test_kinds(self, kind, name, path_and_dtype):
        path, dtype = path_and_dtype
        with backends.tuned(**PATHS[path]):
            check("triton", "cpu", kind, 47, 35, dtype, draws=2, **OPTIONS[name])

    @pytest.mark.parametrize("batch", [1500, 2500])  # up to 2048 the first product is not split
    def test_long_columns_are_summed_in_parts(self, batch):
        check("triton", "cpu", "random", batch, 3, torch.float32, draws=1, weight=(0.0, 0.0, 1.0))

    def test_rows_longer_than_a_tile(self):
        check("triton", "cpu", "random", 5, 2500, torch.float32, draws=1, weight=(1.0, 1.0, 0.0))

    @pytest.mark.parametrize("name", ["default", "mask-symmetric", "teacher"])
    def test_bf16_products_of_fp32(self, name, path, matmul_precision, monkeypatch):
        matmul_precision("medium")
        monkeypatch.setattr(reference.mcld, "similarities", with_bf16_products)
        check("triton", "cpu", "random", 61, 23, torch.float32, **OPTIONS[name])

    @pytest.mark.parametrize(
        ("path", "kind", "name"),
        alternating(BY_PATH, by_name(["random", "converged"]), by_name(["default", "mask-symmetric", "teacher"])),
        indirect=["path"],
    )
    def test_tf32_products_of_fp32(self, kind, name, path, matmul_precision, monkeypatch):
        matmul_precision("high")
        monkeypatch.setattr(reference.mcld, "similarities", with_tf32_products)
        check("triton", "cpu", kind, 61, 23, torch.float32, **OPTIONS[name])

    @pytest.mark.parametrize("name", ["default", "symmetric"])
    def test_products_of_torch(self, name, monkeypatch):
        """The second product by the library's GEMM, as on a GPU."""
        monkeypatch.setattr(product_kernel, "run", None)
        with backends.tuned(flash_pitch=16, library_product=True):
            check("triton", "cpu", "random", 149, 70, torch.float32, **OPTIONS[name])


class Tf32Product(torch.autograd.Function):
    """a @ b of fp32 matrices with operands rounded to tf32, and the same for its gradient."""

    @staticmethod
    def forward(ctx, a, b):
        a, b = nearest_tf32(a), nearest_tf32(b)
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = nearest_tf32(g)
        return g @ b.T, a.T @ g


def nearest_tf32(x):
    return torch.from_numpy(triton_interpreter.nearest_tf32(x.numpy()))


def with_tf32_products(anchors, candidates, dtype, temperature):
    if dtype == torch.float32:
        return Tf32Product.apply(anchors, candidates.T) / temperature
    return (anchors @ candidates.T) / temperature


def test_tf32x3_is_as_accurate_as_fp32():
    """Of unit vectors, as the kernels take it; the plain tf32 product is 500 times worse."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(256, 1000, generator=generator), dim=1) for _ in range(2))
    exact = a.double() @ b.double().T

    def error(product):
        return float((product.double() - exact).norm())

    def tensor_core(precision):
        return torch.from_numpy(triton_interpreter.multiply(a.numpy(), b.T.numpy(), precision, "float32"))

    ir = triton_interpreter.ir.INPUT_PRECISION
    assert error(tensor_core(ir.TF32x3)) <= 2 * error(a @ b.T)
    assert error(tensor_core(ir.TF32)) > 100 * error(a @ b.T)


@pytest.mark.parametrize(
    ("architecture", "highest", "high"),
    [
        ("sm_80", "tf32x3", "tf32"),
        ("sm_100", "tf32x3", "tf32"),
        ("gfx942", "ieee", "tf32"),
        ("gfx950", "ieee", "bf16x3"),
    ],
)
def test_products_of_fp32_take_what_the_architecture_has(architecture, highest, high, matmul_precision):
    launches = Configs(TritonTuning(chunk_bytes=1, architecture=architecture))
    for setting, precision in (("highest", highest), ("high", high)):
        matmul_precision(setting)
        assert launches.precision(torch.float32) == precision
        assert launches.precision(torch.bfloat16) == "ieee"
        assert launches.flash(torch.float32, 32, "online") and launches.product(torch.float32)


def test_three_bf16_products_are_more_accurate_than_tf32():
    """So "high" may take them where there is no tf32: a = a1 + a2, b = b1 + b2 of bf16, and a1 b1 + a1 b2 + a2 b1."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(256, 1000, generator=generator), dim=1) for _ in range(2))
    exact = a.double() @ b.double().T
    (a1, a2), (b1, b2) = ((x.bfloat16().float(), (x - x.bfloat16()).bfloat16().float()) for x in (a, b))
    three = a1 @ b1.T + a1 @ b2.T + a2 @ b1.T
    assert (three - exact).norm() < 0.1 * (nearest_tf32(a) @ nearest_tf32(b).T - exact).norm()


class TestResult:
    @pytest.mark.parametrize(
        ("path", "dtype", "direction"),
        alternating(BY_PATH, by_name([torch.float32, torch.float16], short), by_name(DIRECTIONS)),
        indirect=["path"],
    )
    def test_repeats_bitwise(self, direction, dtype, path, small_tiles):
        student, teacher = logits("random", 100, 33, dtype)
        options = {"direction": direction, "mask_same_class": True, "present_only": True}
        first, second = (run("triton", student, teacher, labels(100, 33), **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))

    @pytest.mark.parametrize("direction", ["student", "teacher"])
    def test_fp16_holds_small_exponentials(self, direction, path):
        """All cosines are near -0.9, where exp((cosine - 1) / temperature) is below fp16's range."""
        generator = torch.Generator().manual_seed(0)
        towards = torch.randn(1, 30, generator=generator)
        student, teacher = (sign * towards + 0.3 * torch.randn(40, 30, generator=generator) for sign in (-1, 1))
        student, teacher = student.half(), teacher.half()
        options = {"direction": direction, "weight": (1.0, 0.0, 0.0), "upstream": 1024.0}
        got, want = run("triton", student, teacher, **options), truth(student, teacher, **options)
        assert float((got.student.double() - want.student).norm() / want.student.norm()) < 2e-3

    @pytest.mark.parametrize("teacher_grad", [False, True], ids=["frozen", "mutual"])
    @pytest.mark.parametrize("direction", ["student", "teacher"])
    def test_chunks_do_not_change_it(self, direction, teacher_grad, monkeypatch):
        student, teacher = logits("random", 300, 20, torch.float64)
        options = {"direction": direction, "temperature": 0.01, "teacher_grad": teacher_grad}
        rows = []
        chunks = similarity.TwoProductContrast.chunks

        def recorded(contrast):
            for sums in chunks(contrast):
                rows.append(sums.rows)
                yield sums

        monkeypatch.setattr(similarity.TwoProductContrast, "chunks", recorded)
        with backends.tuned(flash_pitch=16):
            whole = compute("triton", student, teacher, labels(300, 20), **options)
            assert rows == [slice(0, 300)]
            rows.clear()
            with backends.tuned(chunk_bytes=128 * 384 * 8):
                same(compute("triton", student, teacher, labels(300, 20), **options), whole, 1e-12)
        assert rows == [slice(0, 128), slice(128, 256), slice(256, 300)]

    @pytest.mark.parametrize(
        ("path", "teacher_grad", "direction"),
        alternating(BY_PATH, {"frozen": False, "mutual": True}, by_name(DIRECTIONS)),
        indirect=["path"],
    )
    def test_agrees_with_the_torch_kernels(self, direction, teacher_grad, path, small_tiles):
        student, teacher = logits("random", 70, 40, torch.float64)
        options = {"direction": direction, "weight": (1.0, 0.7, 0.4), "mask_same_class": True, "present_only": True}
        arguments = student, teacher, labels(70, 40, ignored=0.2)
        want = compute("torch", *arguments, teacher_grad=teacher_grad, **options)
        same(compute("triton", *arguments, teacher_grad=teacher_grad, **options), want, 1e-12)

    @pytest.mark.parametrize(
        ("mask", "dtype", "sizes"),
        alternating(
            {"all": False, "masked": True},
            by_name([torch.float64, torch.float16], short),
            by_name([(40, 90, 0), (40, 90, 33), (30, 130, 100), (1, 6, 5)]),
        ),
    )
    def test_more_candidates_than_anchors(self, sizes, dtype, mask, path, small_tiles):
        n, m, offset = sizes
        student, teacher = logits("random", m, 13, dtype)
        target = labels(m, 13, ignored=0.2)
        options = {"offset": offset, "teacher_target": target, "mask_same_class": mask, "temperature": (0.3, 0.4, 0.3)}
        tensors = student[:n], teacher, target[offset : offset + n]
        want = compute("torch", *tensors, **options)
        same(compute("triton", *tensors, **options), want, 1e-12 if dtype == torch.float64 else 4e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
    @pytest.mark.parametrize(
        ("value", "part", "temperature"),
        alternating(by_name([float("nan"), float("inf")]), by_name(["student", "teacher"]), by_name([0.1, 0.01])),
    )
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_nan_shows(self, part, value, dtype, temperature, path):
        tensors = dict(zip(("student", "teacher"), logits("random", 40, 20, dtype)))
        tensors[part][33, 7] = value
        for weight in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
            got = run("triton", **tensors, target=labels(40, 20), weight=weight, temperature=temperature)
            assert got.loss.isnan()

    @pytest.mark.parametrize("layout", ["transposed", "strided", "misaligned", "expanded"])
    def test_memory_layouts(self, layout, path):
        student, teacher = logits("random", 45, 26, torch.float32)
        want = run("triton", student, teacher, labels(45, 26))
        before = student.clone(), teacher.clone()

        def laid_out(x):
            if layout == "transposed":
                return x.T.contiguous().T
            if layout == "strided":
                return torch.stack([x, -x], 2).repeat_interleave(2, 0)[::2, :, 0]
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)

        if layout == "expanded":
            got = run("triton", student[:1].expand(45, 26), teacher[:1].expand(45, 26), labels(45, 26))
            want = truth(student[:1].expand(45, 26), teacher[:1].expand(45, 26), labels(45, 26))
            torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0)
            return
        got = run("triton", laid_out(student), laid_out(teacher), labels(45, 26))
        same(got[:3], want[:3], 1e-6)
        assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])

    @pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
    def test_mixed_dtypes(self, pair, path):
        student, teacher = logits("random", 21, 17, torch.float64)
        student, teacher = student.to(pair[0]), teacher.to(pair[1])
        got = run("triton", student, teacher, labels(21, 17))
        want = run("torch", student, teacher, labels(21, 17))
        assert got.loss.dtype == want.loss.dtype and got.student.dtype == pair[0]
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12 if pair[1] == torch.float64 else 2e-6, atol=0)
        torch.testing.assert_close(
            got.student, want.student, rtol=2e-2 if pair[0] == torch.bfloat16 else 1e-4, atol=1e-4
        )

    @pytest.mark.parametrize(("path", "direction"), [("flash", "teacher"), ("products", "student")], indirect=["path"])
    def test_gradcheck(self, direction, path):
        student, teacher = logits("converged", 3, 2)
        teacher[1] = 0
        options = {"direction": direction, "mask_same_class": True, "temperature": (0.5, 0.7, 0.4)}

        def loss(x):
            return mcld_kernels.mcld_loss(x, teacher, torch.tensor([0, 1, 0]), backend="triton", **options)

        assert torch.autograd.gradcheck(loss, student.requires_grad_(), rtol=1e-5, atol=1e-7)


class TestContrast:
    """The object that a contrast returns, by itself."""

    @staticmethod
    def begin(dtype=torch.float64, n=150, m=200, offset=20, temperature=0.3, **needed):
        kernels = backends.kernel_set("triton", torch.zeros(1, 1), torch.zeros(1, 1))
        x, y = logits("random", m, 20, dtype)
        anchors, candidates = (kernels.l2_normalize(rows, dtype, 1e-12) for rows in (x[:n], y))
        args = ContrastArgs(anchors=anchors, candidates=candidates, temperature=temperature, offset=offset, **needed)
        return args, kernels.contrast(args)

    @staticmethod
    def negatives(args):
        """a_ij of the negatives; -inf for the positives."""
        anchors, candidates = (unit.rows[: unit.n, : unit.d] for unit in (args.anchors, args.candidates))
        a = anchors @ candidates.T / args.temperature
        a.diagonal(args.offset).fill_(-torch.inf)
        return a

    def test_without_a_gradient_one_chunk_has_all_rows_and_no_product(self, path, small_chunks):
        small_chunks(rows=128, columns=256, itemsize=8)
        args, contrast = self.begin()
        a = self.negatives(args)
        (sums,) = contrast.chunks()
        assert sums.rows == slice(0, 150) and sums.product is None
        torch.testing.assert_close(sums.neg_lse, a.logsumexp(1), rtol=1e-12, atol=0)
        assert contrast.sums().candidate_product is None and contrast.sums().reverse is None

    def test_without_a_gradient_no_exponential_is_written(self, small_chunks):
        class Sizes(TorchDispatchMode):
            largest = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                # The interpreter copies storages as bytes.
                if isinstance(result, torch.Tensor) and result.is_floating_point():
                    self.largest = max(self.largest, result.numel())
                return result

        with backends.tuned(flash_pitch=16), Sizes() as sizes:
            _, contrast = self.begin(n=1000, m=1000, offset=0)
            list(contrast.chunks())
        assert sizes.largest < 1000 * 1000

    @pytest.mark.parametrize("temperature", [0.3, 0.01], ids=["fixed", "online"])
    def test_with_a_gradient_the_chunks_cover_all_rows(self, temperature, path, small_chunks):
        small_chunks(rows=128, columns=256, itemsize=8)
        args, contrast = self.begin(anchor_grad=True, candidate_grad=True, temperature=temperature)
        a = self.negatives(args)
        partner = torch.rand(150, dtype=torch.float64)
        rows = []
        for sums in contrast.chunks():
            rows.append(sums.rows)
            product = sums.inv_neg_sum[:, None] * sums.product[:, :20]
            want = a[sums.rows].softmax(1) @ args.candidates.rows[:200, :20]
            torch.testing.assert_close(product, want, rtol=1e-10, atol=1e-12)
            part = partner[sums.rows]
            contrast.add_candidates(sums, GradCoefficients(partner=part, product=part, class_mean=None))
        assert rows == ([slice(0, 150)] if path == "flash" else [slice(0, 128), slice(128, 150)])
        want = (a.softmax(1) * partner[:, None]).T @ args.anchors.rows[:150, :20]
        torch.testing.assert_close(contrast.sums().candidate_product[:, :20], want, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("candidate_grad", [False, True])
    def test_reverse(self, candidate_grad, path, small_chunks):
        small_chunks(rows=128, columns=256, itemsize=8)
        args, contrast = self.begin(candidate_grad=candidate_grad, reverse=True)
        a = self.negatives(args)
        for sums in contrast.chunks():
            if candidate_grad:
                coefficients = GradCoefficients(partner=sums.neg_lse, product=sums.neg_lse, class_mean=None)
                contrast.add_candidates(sums, coefficients)
        reverse = contrast.sums().reverse
        assert reverse.rows == slice(0, 200) and (reverse.product is not None) == candidate_grad
        torch.testing.assert_close(reverse.neg_lse, a.T.logsumexp(1), rtol=1e-12, atol=0)
        if candidate_grad:
            product = reverse.inv_neg_sum[:, None] * reverse.product[:, :20]
            torch.testing.assert_close(product, a.T.softmax(1) @ args.anchors.rows[:150, :20], rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("limit, dtype", [(80, torch.float32), (80, torch.bfloat16), (20, torch.float16)], ids=str)
    def test_both_sides_of_the_fixed_shift(self, limit, dtype, path):
        for temperature, fixed in ((2 / limit, True), (1.999 / limit, False)):
            assert has_fixed_shift(dtype, temperature) == fixed
            check("triton", "cpu", "collinear", 33, 20, dtype, draws=2, temperature=temperature)
