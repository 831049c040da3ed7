"""Every fast backend against the fp64 reference: options, dtypes, shapes, kinds of logits.

On the CPU this is the "torch" backend; the interpreted Triton kernels and the host build of the CUDA kernels have files
of their own. With a GPU the same grid runs every backend there.
"""

import loops
import pytest
import torch
from cases import DTYPES, KINDS, WEIGHT, check, labels, logits, options_of, run, short, truth

import mcld_kernels
from mcld_kernels import backends, reference
from mcld_kernels.backends import chunks, gemm
from mcld_kernels.backends.torch import TorchKernels
from mcld_kernels.kernels import ContrastArgs, LossInputs
from mcld_kernels.losses import mcld
from mcld_kernels.options import DIRECTIONS

GPU = pytest.mark.gpu
RUNS = [
    pytest.param(("torch", "cpu"), id="torch-cpu"),
    pytest.param(("torch", "cpu", False), id="torch-cpu-chunks"),
    *(pytest.param((name, "cuda"), id=f"{name}-cuda", marks=GPU) for name in ("torch", "triton", "cuda")),
]


@pytest.fixture(params=RUNS)
def where(request):
    """(backend, device). Without its low-latency path a backend takes the way of large batches."""
    name, device, *low_latency = request.param
    if (reason := backends.unavailable_reason(name)) is not None:
        pytest.skip(f"backend {name!r}: {reason}")
    with backends.tuned(**({"low_latency": low_latency[0]} if low_latency else {})):
        yield name, device


def skip_if_it_cannot(where, dtype):
    name, device = where
    x = torch.zeros(2, 2, dtype=dtype, device=device)
    if (why := backends.unsupported_reason(name, x, x, False)) is not None:
        pytest.skip(f"backend {name!r}: {why}")


OPTIONS = {
    "default": {},
    "temperatures": {"temperature": (0.07, 0.5, 0.2)},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "mask": {"mask_same_class": True},
    "mask-teacher": {"mask_same_class": True, "direction": "teacher"},
    "mask-symmetric": {"mask_same_class": True, "direction": "symmetric", "temperature": (0.1, 0.2, 0.3)},
    "present": {"present_only": True},
    "ignored": {"ignored": 0.4, "mask_same_class": True, "present_only": True},
    "instance": {"weight": (1.0, 0.0, 0.0)},
    "sample": {"weight": (0.0, 1.0, 0.0), "ignored": 0.3},
    "category": {"weight": (0.0, 0.0, 1.0)},
    "sample-symmetric": {"weight": (0.0, 1.0, 0.0), "direction": "symmetric"},
    # Below 0.023 the shift by 1 / temperature leaves fp32's range and the online maximum takes over.
    "0.02": {"temperature": 0.02},
    "0.01-symmetric": {"temperature": 0.01, "direction": "symmetric"},
    "0.005-mask": {"temperature": 0.005, "mask_same_class": True},
}

# One row or class, fewer than a tile, primes on either side of one, past two tiles, and d on either side of 256, where
# algorithms change.
SHAPES = [(1, 1), (1, 5), (5, 1), (2, 3), (31, 17), (67, 101), (127, 129), (129, 127), (65, 257), (37, 521), (257, 31)]


class Bf16Product(torch.autograd.Function):
    """a @ b of fp32 matrices with operands rounded to bf16, and the same for its gradient."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a.bfloat16().float() @ b.bfloat16().float()

    @staticmethod
    def backward(ctx, g):
        a, b = (x.bfloat16().float() for x in ctx.saved_tensors)
        g = g.bfloat16().float()
        return g @ b.T, a.T @ g


def with_bf16_products(anchors, candidates, dtype, temperature):
    if dtype == torch.float32:
        return Bf16Product.apply(anchors, candidates.T) / temperature
    return (anchors @ candidates.T) / temperature


@pytest.mark.usefixtures("poison")
class TestAgainstTheTruth:
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("shape", [(61, 23), (29, 70)], ids=str)
    def test_options(self, shape, options, dtype, where):
        skip_if_it_cannot(where, dtype)
        check(*where, "random", *shape, dtype, **options)

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize(
        "options", [{}, {"direction": "symmetric", "mask_same_class": True}], ids=["default", "both"]
    )
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, shape, options, dtype, where):
        skip_if_it_cannot(where, dtype)
        check(*where, "random", *shape, dtype, **options)

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize("name", ["default", "mask-symmetric", "ignored", "0.005-mask"])
    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_kinds(self, kind, name, dtype, where):
        skip_if_it_cannot(where, dtype)
        check(*where, kind, 47, 35, dtype, **OPTIONS[name])

    @pytest.mark.parametrize("precision", ["high", "medium"])
    @pytest.mark.parametrize("kind", ["random", "converged"])
    @pytest.mark.parametrize("shape", [(61, 23), (65, 300)], ids=str)
    def test_float32_matmul_precision(self, shape, kind, precision, where, matmul_precision, monkeypatch):
        skip_if_it_cannot(where, torch.float32)
        matmul_precision(precision)
        if precision == "medium":
            # torch.mm takes bf16 operands there only on some machines and for some shapes, so eager is told to.
            monkeypatch.setattr(reference.mcld, "similarities", with_bf16_products)
        check(*where, kind, *shape, torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize("name", ["default", "symmetric", "mask-symmetric", "teacher", "ignored", "0.01-symmetric"])
    def test_teacher_gradient(self, name, dtype):
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            check("torch", device, "random", 31, 23, dtype, teacher_grad=True, **OPTIONS[name])

    @pytest.mark.parametrize("teacher_grad", [False, True], ids=["frozen", "mutual"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=short)
    @pytest.mark.parametrize("name", ["default", "mask-symmetric", "symmetric", "teacher", "ignored", "0.005-mask"])
    def test_several_chunks(self, name, dtype, teacher_grad, small_chunks):
        small_chunks(rows=7, columns=50, itemsize=8)  # 50 rows and 17 columns: neither a multiple of the chunk
        check("torch", "cpu", "random", 50, 17, dtype, teacher_grad=teacher_grad, **OPTIONS[name])

    def test_one_row_a_chunk(self, small_chunks):
        small_chunks(1, 1, 1)
        check("torch", "cpu", "random", 11, 13, torch.float32, teacher_grad=True, direction="symmetric")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
    def test_weight_as_a_tensor(self, dtype, where):
        skip_if_it_cannot(where, dtype)
        check(*where, "random", 31, 23, dtype, weight=torch.tensor(WEIGHT, device=where[1]))

    @pytest.mark.parametrize(
        "name", ["default", "teacher", "symmetric", "mask-symmetric", "0.01-symmetric", "0.005-mask"]
    )
    @pytest.mark.parametrize("kind", ["random", "converged", "zeros"])
    def test_fp16_operands(self, kind, name, monkeypatch):
        """The CPU has no fast fp16 product and takes fp32 operands; this is what other devices compute."""
        monkeypatch.setattr(TorchKernels, "operand_dtype", lambda self, dtype: dtype)
        check("torch", "cpu", kind, 61, 43, torch.float16, teacher_grad=kind == "random", **OPTIONS[name])

    @pytest.mark.parametrize("direction", ["student", "teacher"])
    def test_fp16_operands_of_a_large_batch(self, direction, monkeypatch):
        """Each anchor's weight is 1 / batch: in fp16 that must not go the way of the small numbers."""
        # An fp16 GEMM on a CPU is slow: few classes. The weights depend on the batch alone.
        monkeypatch.setattr(TorchKernels, "operand_dtype", lambda self, dtype: dtype)
        check("torch", "cpu", "random", 3001, 20, torch.float16, draws=1, direction=direction, weight=(1.0, 1.0, 0.0))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("shape", [(4099, 100), (1031, 1000), (300, 4001)], ids=str)
    @pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
    def test_large_shapes_on_a_gpu(self, backend, shape, direction, dtype):
        skip_if_it_cannot((backend, "cuda"), dtype)
        check(backend, "cuda", "random", *shape, dtype, draws=1, direction=direction)

    def test_a_bad_result_fails(self, monkeypatch):
        """The bar is no formality: a temperature off by a thousandth is caught."""
        exact = run

        def off(backend, *tensors, **options):
            if backend == "torch":
                options["temperature"] = 0.1001
            return exact(backend, *tensors, **options)

        monkeypatch.setattr("cases.run", off)
        with pytest.raises(AssertionError, match="error"):
            check("torch", "cpu", "random", 31, 23, torch.float32)


def compute(student, teacher, target, options, student_grad=False, teacher_grad=False):
    """A call of backend "torch" behind the checks of arguments."""
    inputs = LossInputs(
        student=student,
        teacher=teacher,
        target=target,
        weight=None,
        options=options,
        student_grad=student_grad,
        teacher_grad=teacher_grad,
    )
    return mcld.compute(backends.kernel_set("torch", student, teacher), inputs)


def relative(got, want):
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("distance", [1e-2, 1e-3])
def test_a_converged_student_keeps_its_gradient(distance, where):
    """Close to the teacher loss and gradient are small differences of nearly equal numbers; eager loses them."""
    skip_if_it_cannot(where, torch.float32)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 128, generator=generator).to(where[1])
    student = teacher + distance * torch.randn(64, 128, generator=generator).to(where[1])
    options = {"weight": (1.0, 0.0, 0.0), "temperature": 0.05}
    want = truth(student, teacher, **options)
    got, eager = run(where[0], student, teacher, **options), run("reference", student, teacher, **options)
    assert relative(got.loss, want.loss) < 1e-4
    assert relative(got.student, want.student) < 1e-4
    assert relative(got.loss, want.loss) < 0.1 * relative(eager.loss, want.loss)


def test_a_bf16_gradient_is_orthogonal_to_its_row(where):
    """Late in training, too: the projection divides by x . x, since a rounded operand has |x| != 1.

    What remains is the rounding of the gradient itself, an independent one in each of C elements.
    """
    skip_if_it_cannot(where, torch.bfloat16)
    student, teacher = (x.to(torch.bfloat16) for x in logits("converged", 128, 100, device=where[1]))
    gradient = run(where[0], student, teacher, weight=(1.0, 0.0, 0.0)).student.double().cpu()
    x = student.double().cpu()
    radial = (gradient * x).sum(1) / (gradient.norm(dim=1) * x.norm(dim=1))
    assert float(radial.square().mean().sqrt()) < torch.finfo(torch.bfloat16).eps / 100**0.5


class TestResult:
    @pytest.mark.parametrize("teacher_grad", [False, True], ids=["frozen", "mutual"])
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_repeats_bitwise(self, direction, teacher_grad, where, small_chunks):
        if teacher_grad and where[0] != "torch":
            pytest.skip(f"backend {where[0]!r} gives no teacher gradient")
        small_chunks(10, 64)
        student, teacher = logits("random", 64, 33, torch.float32, device=where[1])
        target = labels(64, 33, device=where[1])
        options = {"direction": direction, "teacher_grad": teacher_grad, "mask_same_class": True, "present_only": True}
        first = run(where[0], student, teacher, target, **options)
        for _ in range(3):
            for a, b in zip(first, run(where[0], student, teacher, target, **options), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)

    def test_terms_do_not_carry_a_gradient(self, where):
        student, teacher = logits("random", 9, 7, torch.float32, device=where[1])
        student.requires_grad_()
        result = mcld_kernels.mcld_terms(student, teacher, labels(9, 7, device=where[1]), backend=where[0])
        assert result.loss.requires_grad
        assert not any(term.requires_grad for term in result[1:])
        assert all(x.shape == () and x.dtype == torch.float32 and x.device.type == where[1] for x in result)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_terms_are_the_same_without_a_gradient(self, backend):
        student, teacher = logits("random", 9, 7, torch.float32)
        target = labels(9, 7)
        without = mcld_kernels.mcld_terms(student, teacher, target, backend=backend)
        with_gradient = mcld_kernels.mcld_terms(student.requires_grad_(), teacher, target, backend=backend)
        torch.testing.assert_close(list(without), [x.detach() for x in with_gradient], rtol=1e-6, atol=0)
        assert not without.loss.requires_grad

    @pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
    def test_mixed_dtypes_are_computed_in_the_wider(self, pair, where):
        student, teacher = logits("random", 21, 17, torch.float64, device=where[1])
        student, teacher = student.to(pair[0]), teacher.to(pair[1])
        target = labels(21, 17, device=where[1])
        got = run(where[0], student, teacher, target)
        want = run(where[0], student.float(), teacher.float(), target)
        assert got.loss.dtype == torch.float32 and got.student.dtype == pair[0]
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
        assert relative(got.student, want.student.double().cpu()) < torch.finfo(pair[0]).eps + 1e-6

    @pytest.mark.parametrize("pair", [(torch.float16, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_mixed_dtypes_on_cpu(self, pair, backend):
        student, teacher = logits("random", 21, 17, torch.float64)
        student, teacher = student.to(pair[0]), teacher.to(pair[1])
        wide = torch.promote_types(*pair)
        got = run(backend, student, teacher, labels(21, 17), teacher_grad=True)
        want = run(backend, student.to(wide), teacher.to(wide), labels(21, 17), teacher_grad=True)
        assert (got.student.dtype, got.teacher.dtype) == pair
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12 if wide == torch.float64 else 1e-6, atol=0)
        # Three terms are added in the narrower dtype here, in the wider one there.
        assert relative(got.student, want.student.double()) < max(2 * torch.finfo(pair[0]).eps, 1e-12)
        assert relative(got.teacher, want.teacher.double()) < max(2 * torch.finfo(pair[1]).eps, 1e-12)

    def test_fp16_gradients_survive_until_they_are_scaled(self):
        """The gradient of a mean is below fp16's range at large batch; a GradScaler's factor must still find it."""
        student, teacher = logits("large", 64, 16, torch.float16)
        got = run("torch", student, teacher, labels(64, 16), upstream=2.0**20)
        want = truth(student, teacher, labels(64, 16), upstream=2.0**20)
        assert relative(got.student, want.student) < 5e-3


class TestWeights:
    @pytest.fixture
    def contrasts(self, monkeypatch):
        """Temperatures of the contrasts that are computed."""
        seen = []
        contrast = TorchKernels.contrast

        def counted(self, args):
            seen.append(args.temperature)
            return contrast(self, args)

        monkeypatch.setattr(TorchKernels, "contrast", counted)
        with backends.tuned(low_latency=False, compiled_contrast=False):
            yield seen

    @pytest.mark.parametrize("term", range(3))
    def test_weight_0_removes_a_term(self, term, contrasts):
        student, teacher = logits("random", 9, 7, torch.float32)
        temperature = (0.1, 0.2, 0.3)
        weight = [1.0, 1.0, 1.0]
        weight[term] = 0.0
        result = mcld_kernels.mcld_terms(student, teacher, labels(9, 7), temperature=temperature, weight=weight)
        assert sorted(contrasts) == [t for i, t in enumerate(temperature) if i != term]
        assert float(result[1 + term]) == 0
        assert all(float(result[1 + i]) > 0 for i in range(3) if i != term)

    @pytest.mark.parametrize("term", range(3))
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_a_removed_term_cannot_do_harm(self, term, backend):
        """0 times a NaN or an error would be one: at this temperature the term overflows."""
        student, teacher = logits("random", 9, 7, torch.float32)
        temperature, weight = [0.1, 0.1, 0.1], [1.0, 1.0, 1.0]
        temperature[term], weight[term] = 1e-45, 0.0
        got = run(backend, student, teacher, labels(9, 7), temperature=tuple(temperature), weight=weight)
        want = run(backend, student, teacher, labels(9, 7), weight=weight)
        assert torch.isfinite(got.loss)
        for a, b in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    def test_row_terms_share_one_contrast(self, contrasts):
        student, teacher = logits("random", 9, 7, torch.float32)
        mcld_kernels.mcld_loss(student, teacher, labels(9, 7), weight=(1.0, 1.0, 0.0))
        assert contrasts == [0.1]

    def test_no_terms(self, where):
        student, teacher = logits("random", 9, 7, torch.float32, device=where[1])
        got = run(where[0], student, teacher, weight=(0.0, 0.0, 0.0))
        assert float(got.loss) == 0 and not got.terms.any() and not got.student.any()

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_a_tensor_computes_all_terms(self, backend):
        student, teacher = logits("random", 9, 7, torch.float32)
        weight = torch.tensor([1.0, 0.0, 0.0])
        got = run(backend, student, teacher, labels(9, 7), weight=weight)
        want = run(backend, student, teacher, labels(9, 7))
        torch.testing.assert_close(got.terms, want.terms, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.loss, want.terms[0], rtol=1e-6, atol=0)


class TestRectangular:
    """n anchors against m candidates, the positives at an offset: what a global batch or a queue will use."""

    @pytest.mark.parametrize("rows_of_chunk", [100, 2])
    @pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
    @pytest.mark.parametrize("weight", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.7, 0.0)], ids=str)
    @pytest.mark.parametrize("sizes", [(4, 9, 0), (4, 9, 3), (3, 4, 1), (1, 6, 5)], ids=str)
    def test_against_the_loops(self, sizes, weight, mask, rows_of_chunk, small_chunks):
        n, m, offset = sizes
        small_chunks(rows_of_chunk, m, 8)
        temperature = (0.3, 0.3, 0.3) if not mask else (0.3, 0.4, 0.3)
        student, teacher = logits("random", m, 3)
        student = student[:n]
        theirs = torch.tensor([0, 2, 1, 0, 2, -100, 0, 1, 2])[:m]
        target = theirs[offset : offset + n]
        got = mcld.compute(
            backends.kernel_set("torch", student, teacher),
            LossInputs(
                student=student,
                teacher=teacher,
                target=target,
                weight=None,
                options=options_of(temperature=temperature, weight=weight, mask_same_class=mask)[0],
                student_grad=True,
                teacher_grad=True,
                offset=offset,
                teacher_target=theirs,
            ),
        )
        options = {
            "labels": target.tolist(),
            "teacher_labels": theirs.tolist(),
            "offset": offset,
            "temperature": temperature,
            "mask_same_class": mask,
            "weight": weight,
        }
        s, t = student.tolist(), teacher.tolist()
        assert float(got.loss) == pytest.approx(loops.loss(s, t, **options), rel=1e-11)
        by_student = torch.tensor(loops.slopes(lambda rows: loops.loss(rows, t, **options), s), dtype=torch.float64)
        by_teacher = torch.tensor(loops.slopes(lambda rows: loops.loss(s, rows, **options), t), dtype=torch.float64)
        torch.testing.assert_close(got.student_grad, by_student, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.teacher_grad, by_teacher, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("changed", [{"direction": "symmetric"}, {"weight": (1.0, 0.0, 1.0)}], ids=str)
    def test_what_is_not_defined_is_refused(self, changed):
        options, _ = options_of(**{"weight": (1.0, 0.0, 0.0), **changed})
        student, teacher = torch.randn(3, 4), torch.randn(5, 4)
        with pytest.raises(ValueError, match="3 student rows against 5 teacher rows"):
            compute(student, teacher, None, options)


class TestColdTemperatures:
    @pytest.mark.parametrize("temperature", [0.0105, 0.002])
    def test_no_exponential_is_subnormal(self, temperature):
        """CPUs multiply subnormal numbers at a tenth of the speed; below 1e-35 of a row's largest they add nothing."""
        student, teacher = logits("collinear", 40, 30, torch.float32)
        kernels = backends.kernel_set("torch", student, teacher)
        anchors, candidates = (kernels.l2_normalize(x, torch.float32, 1e-12) for x in (student, teacher))
        args = ContrastArgs(anchors=anchors, candidates=candidates, temperature=temperature, offset=0, anchor_grad=True)
        contrast = kernels.contrast(args)
        for _ in contrast.chunks():
            e = contrast.exponentials
            assert (e == 0).sum() > e.shape[0] and float(e[e > 0].min()) > 1e-35


class TestMemory:
    def test_chunk_follows_the_variable(self, monkeypatch):
        monkeypatch.setenv("MCLD_CHUNK_MB", "3")
        assert chunks.chunk_bytes(torch.device("cpu")) == 3 << 20
        monkeypatch.delenv("MCLD_CHUNK_MB")
        assert chunks.chunk_bytes(torch.device("cpu")) == chunks.CHUNK_MB["cpu"] << 20
        assert chunks.chunk_bytes(torch.device("meta")) > 0

    @pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
    def test_a_bad_variable_says_so(self, monkeypatch, text):
        monkeypatch.setenv("MCLD_CHUNK_MB", text)
        with pytest.raises(ValueError, match="MCLD_CHUNK_MB must be a positive whole number of MiB"):
            mcld_kernels.mcld_loss(torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))

    def test_no_similarity_matrix_is_held_whole(self, small_chunks):
        """No tensor of batch x batch or classes x classes is ever made; the reference makes them."""
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        class Largest(TorchDispatchMode):
            numel = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                made = function(*args, **(kwargs or {}))
                self.numel = max([self.numel, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
                return made

        small_chunks(8, 400)
        largest = {}
        student, teacher = logits("random", 400, 31, torch.float32)
        options, _ = options_of(weight=WEIGHT, direction="symmetric", mask_same_class=True, present_only=True)
        target = labels(400, 31)
        with Largest() as seen:
            compute(student, teacher, target, options, student_grad=True, teacher_grad=True)
            largest["torch"] = seen.numel
        with Largest() as seen:
            mcld_kernels.reference.mcld_loss(student, teacher, target)
            largest["reference"] = seen.numel
        assert largest["torch"] <= 400 * 31
        assert largest["reference"] >= 400 * 400


@pytest.mark.parametrize(
    ("hip", "version", "keeps"),
    [(None, "2.8.0+cu128", True), ("7.0", "2.9.1+rocm7.0", False), ("7.0", "2.10.0+rocm7.0", True)],
)
def test_sums_of_16_bit_products_are_kept_where_the_librarys_gemm_can(hip, version, keeps, monkeypatch):
    """For AMD's GPUs torch.mm(out_dtype=...) of torch 2.8 and 2.9 raises; without it the sums are rounded."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "__version__", version)
    gemm.keeps_sums.cache_clear()
    assert gemm.keeps_sums() == keeps
    gemm.keeps_sums.cache_clear()
