"""The interpreted Triton kernels against the fp64 reference: both algorithms for the row products, options and dtypes.

The flash kernel takes short rows and the two products long ones; a small limit sends small inputs through those too.
"""

import sys

import pytest
import torch
from cases import check, labels, logits, options_of, run, short, truth
from test_backends import OPTIONS, with_bf16_products

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

import triton_interpreter

import mcld_kernels
from mcld_kernels import arguments, backends, blocked, pipeline, reference
from mcld_kernels import triton as backend
from mcld_kernels.triton import configs, matmul, similarity, tuning
from mcld_kernels.triton.kernels import TritonKernels

pytestmark = [
    pytest.mark.skipif(
        not backend.interpreted(), reason="the kernels are compiled here: test_backends runs them on the GPU"
    ),
    pytest.mark.usefixtures("faithful", "poison"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Each exercises code that no other does.
CHOSEN = ("teacher", "mask-symmetric", "0.01-symmetric")


@pytest.fixture
def faithful():
    with triton_interpreter.faithful():
        yield


@pytest.fixture(params=["flash", "products"])
def algorithm(request, monkeypatch):
    """Which algorithm takes the row products."""
    if request.param == "products":
        monkeypatch.setattr(configs, "FLASH_DEPTH", dict.fromkeys(configs.FLASH_DEPTH, 16))
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Small inputs take several tiles in every direction."""
    monkeypatch.setattr(configs, "INTERPRETED", configs.Launch(64, 64, 64))
    monkeypatch.setattr(configs, "_WHOLE_ROW", 64)
    monkeypatch.setattr(configs, "_LEAST_SPAN", 64)  # and the first product is split in two


def evaluate(kernels, student, teacher, target, **options):
    """`pipeline.evaluate` with the student's gradient; ``offset`` and ``teacher_target`` go to it."""
    rectangular = {name: options.pop(name) for name in ("offset", "teacher_target") if name in options}
    chosen, weight = options_of(**{"temperature": 0.3, "weight": (1.0, 0.7, 0.0), **options})
    call = pipeline.Call(student, teacher, target, weight, chosen, True, False, **rectangular)
    return pipeline.evaluate(kernels, call)


def same(got, want, rtol):
    assert all((a is None) == (b is None) for a, b in zip(got, want, strict=True))
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().amax()))


class TestAgainstTheTruth:
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_options(self, options, dtype, algorithm):
        check("triton", "cpu", "random", 61, 23, dtype, draws=2, **options)

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize("name", CHOSEN)
    def test_several_tiles_and_chunks(self, name, dtype, algorithm, small_tiles, small_chunks):
        small_chunks(rows=128, columns=256, itemsize=1)  # chunks of 128 rows, the least there is
        check("triton", "cpu", "random", 149, 70, dtype, draws=1, **OPTIONS[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
    @pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (127, 129), (129, 257), (37, 521)], ids=str)
    def test_shapes(self, shape, dtype):
        check("triton", "cpu", "random", *shape, dtype, draws=1, **OPTIONS["mask-symmetric"])

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=short)
    @pytest.mark.parametrize("name", ["default", "teacher", "ignored", "0.005-mask"])
    @pytest.mark.parametrize("kind", ["converged", "collinear", "large", "zeros"])
    def test_kinds(self, kind, name, dtype, algorithm):
        check("triton", "cpu", kind, 47, 35, dtype, draws=2, **OPTIONS[name])

    @pytest.mark.parametrize("batch", [1500, 2500])  # up to 2048 the first product is not split
    def test_long_columns_are_summed_in_parts(self, batch):
        check("triton", "cpu", "random", batch, 3, torch.float32, draws=1, weight=(0.0, 0.0, 1.0))

    def test_rows_longer_than_a_tile(self):
        check("triton", "cpu", "random", 5, 2500, torch.float32, draws=1, weight=(1.0, 1.0, 0.0))

    @pytest.mark.parametrize("name", ["default", "mask-symmetric", "teacher"])
    def test_bf16_products_of_fp32(self, name, algorithm, matmul_precision, monkeypatch):
        matmul_precision("medium")
        monkeypatch.setattr(reference.mcld, "similarities", with_bf16_products)
        check("triton", "cpu", "random", 61, 23, torch.float32, **OPTIONS[name])

    @pytest.mark.parametrize("name", ["default", "mask-symmetric", "teacher"])
    @pytest.mark.parametrize("kind", ["random", "converged"])
    def test_tf32_products_of_fp32(self, kind, name, algorithm, matmul_precision, monkeypatch):
        matmul_precision("high")
        monkeypatch.setattr(reference.mcld, "similarities", with_tf32_products)
        check("triton", "cpu", kind, 61, 23, torch.float32, **OPTIONS[name])

    @pytest.mark.parametrize("name", ["default", "symmetric"])
    def test_products_of_torch(self, name, monkeypatch):
        """The second product through torch.mm, as on a GPU."""
        monkeypatch.setattr(configs, "FLASH_DEPTH", dict.fromkeys(configs.FLASH_DEPTH, 16))
        monkeypatch.setattr(configs, "library_product", lambda dtype, precision, device: True)
        monkeypatch.setattr(matmul.matmul_kernel, "run", None)
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


class TestResult:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
    @pytest.mark.parametrize("direction", arguments.DIRECTIONS)
    def test_repeats_bitwise(self, direction, dtype, algorithm, small_tiles):
        student, teacher = logits("random", 150, 33, dtype)
        options = {"direction": direction, "mask_same_class": True, "present_only": True}
        first, second = (run("triton", student, teacher, labels(150, 33), **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))

    @pytest.mark.parametrize("direction", ["student", "teacher"])
    def test_fp16_holds_small_exponentials(self, direction, algorithm):
        """All cosines are near -0.9, where exp((cosine - 1) / temperature) is below fp16's range."""
        generator = torch.Generator().manual_seed(0)
        towards = torch.randn(1, 30, generator=generator)
        student, teacher = (sign * towards + 0.3 * torch.randn(40, 30, generator=generator) for sign in (-1, 1))
        student, teacher = student.half(), teacher.half()
        options = {"direction": direction, "weight": (1.0, 0.0, 0.0), "upstream": 1024.0}
        got, want = run("triton", student, teacher, **options), truth(student, teacher, **options)
        assert float((got.student.double() - want.student).norm() / want.student.norm()) < 2e-3

    def test_chunks_do_not_change_it(self, monkeypatch, small_chunks):
        student, teacher = logits("random", 300, 20, torch.float64)
        kernels = TritonKernels(flash_depth=16)
        options = {"direction": "teacher", "temperature": 0.01}
        whole = evaluate(kernels, student, teacher, labels(300, 20), **options)
        small_chunks(rows=128, columns=384, itemsize=8)
        chunks = []
        chunk_run = similarity._Chunk.run
        monkeypatch.setattr(
            similarity._Chunk, "run", lambda self, rows, *args: (chunks.append(rows), chunk_run(self, rows, *args))
        )
        same(evaluate(kernels, student, teacher, labels(300, 20), **options), whole, 1e-12)
        assert chunks == [slice(0, 128), slice(128, 256), slice(256, 300)]

    @pytest.mark.parametrize("direction", arguments.DIRECTIONS)
    def test_agrees_with_the_blocked_kernels(self, direction, algorithm, small_tiles):
        student, teacher = logits("random", 70, 40, torch.float64)
        target = labels(70, 40, ignored=0.2)
        options = {"direction": direction, "weight": (1.0, 0.7, 0.4), "mask_same_class": True, "present_only": True}
        want = evaluate(blocked.TorchKernels(), student, teacher, target, **options)
        same(evaluate(TritonKernels(), student, teacher, target, **options), want, 1e-12)

    @pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=short)
    @pytest.mark.parametrize("sizes", [(40, 90, 0), (40, 90, 33), (30, 130, 100), (1, 6, 5)], ids=str)
    def test_more_candidates_than_anchors(self, sizes, dtype, mask, algorithm, small_tiles):
        n, m, offset = sizes
        student, teacher = logits("random", m, 13, dtype)
        target = labels(m, 13, ignored=0.2)
        options = {"offset": offset, "teacher_target": target, "mask_same_class": mask, "temperature": (0.3, 0.4, 0.3)}
        tensors = student[:n], teacher, target[offset : offset + n]
        want = evaluate(blocked.TorchKernels(), *tensors[:2], tensors[2], **options)
        same(evaluate(TritonKernels(), *tensors, **options), want, 1e-12 if dtype == torch.float64 else 4e-3)

    @pytest.mark.parametrize("part", ["student", "teacher"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
    @pytest.mark.parametrize("temperature", [0.1, 0.01])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_nan_shows(self, part, value, dtype, temperature, algorithm):
        tensors = dict(zip(("student", "teacher"), logits("random", 40, 20, dtype)))
        tensors[part][33, 7] = value
        for weight in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
            got = run("triton", **tensors, target=labels(40, 20), weight=weight, temperature=temperature)
            assert got.loss.isnan()

    @pytest.mark.parametrize("layout", ["transposed", "strided", "misaligned", "expanded"])
    def test_memory_layouts(self, layout, algorithm):
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
    def test_mixed_dtypes(self, pair, algorithm):
        student, teacher = logits("random", 21, 17, torch.float64)
        student, teacher = student.to(pair[0]), teacher.to(pair[1])
        got = run("triton", student, teacher, labels(21, 17))
        want = run("torch", student, teacher, labels(21, 17))
        assert got.loss.dtype == want.loss.dtype and got.student.dtype == pair[0]
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12 if pair[1] == torch.float64 else 2e-6, atol=0)
        torch.testing.assert_close(
            got.student, want.student, rtol=2e-2 if pair[0] == torch.bfloat16 else 1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("direction", ["student", "teacher"])
    def test_gradcheck(self, direction, algorithm):
        student, teacher = logits("converged", 3, 2)
        teacher[1] = 0
        options = {"direction": direction, "mask_same_class": True, "temperature": (0.5, 0.7, 0.4)}

        def loss(x):
            return mcld_kernels.mcld_loss(x, teacher, torch.tensor([0, 1, 0]), backend="triton", **options)

        assert torch.autograd.gradcheck(loss, student.requires_grad_(), rtol=1e-5, atol=1e-7)


class TestReasons:
    def test_bf16_needs_a_patched_interpreter(self, faithful):
        x = torch.zeros(2, 2, dtype=torch.bfloat16)
        assert backends.reason("triton", x, x, False) is None
        create_dot = triton_interpreter.InterpreterBuilder.create_dot
        try:
            triton_interpreter.InterpreterBuilder.create_dot = create_dot.__wrapped__
            assert "bf16" in backends.reason("triton", x, x, False)
        finally:
            triton_interpreter.InterpreterBuilder.create_dot = create_dot

    def test_cpu_tensors_without_the_interpreter(self, monkeypatch):
        monkeypatch.setattr(backend, "interpreted", lambda: False)
        assert "CUDA" in backends.reason("triton", torch.zeros(2, 2), torch.zeros(2, 2), False)

    def test_no_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert backends.unavailable("triton") == "triton is not installed"

    def test_an_old_triton(self, monkeypatch):
        monkeypatch.setattr("triton.__version__", "3.2.0")
        assert "3.2.0" in backends.unavailable("triton")

    @pytest.mark.parametrize("setting, want", [("tf32", "high"), ("ieee", "highest")])
    def test_newer_precision_settings(self, setting, want, monkeypatch):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            pytest.skip(f"torch {torch.__version__} has no torch.backends.cuda.matmul.fp32_precision")

        def mixed():
            raise RuntimeError("mix of the legacy and new APIs")

        monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            torch.backends.cuda.matmul.fp32_precision = setting
            assert backend.float32_precision() == want
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def test_chunk_budget(self, monkeypatch):
        assert configs.chunk_rows(4096, 2 * 4096, 1 << 20, 128) == 128
        assert configs.chunk_rows(4096, 2 * 4096, 1 << 30, 128) == 4096
        assert configs.chunk_rows(4096, 2 * 4096, 1, 128) == 128


class TestTuning:
    """Timing needs a GPU; which launch is taken does not."""

    launches = configs.Launch(64, 64, 64, warps=8), configs.Launch(32, 32, 32), configs.Launch(64, 32, 32)

    @pytest.fixture
    def bench(self, monkeypatch):
        """do_bench that launches once and gives the second launch the least time and the third none."""
        seen = []

        def do_bench(trial, **options):
            trial()
            seen.append(len(seen))
            if seen[-1] % 3 == 2:
                raise tuning.OutOfResources(1, 0, "shared memory")
            return 1.0 - seen[-1] % 3

        monkeypatch.setattr("triton.testing.do_bench", do_bench)
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(configs, "FLASH_ALTERNATIVES", self.launches[1:])
        monkeypatch.setattr(configs, "PRODUCT_ALTERNATIVES", self.launches[1:])
        monkeypatch.setattr(configs, "_of", lambda table, device, *key: self.launches[0])
        return seen

    def test_it_is_off(self, bench, algorithm):
        check("triton", "cpu", "random", 70, 40, torch.float32, draws=1)
        assert not bench

    def test_the_fastest_is_kept(self, bench, algorithm, monkeypatch):
        monkeypatch.setenv("MCLD_AUTOTUNE", "1")
        check("triton", "cpu", "random", 70, 40, torch.float32, draws=2)
        assert len(bench) == 3 * len(tuning._chosen) > 0
        assert set(tuning._chosen.values()) == {self.launches[1]}
