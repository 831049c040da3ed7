"""Each method of a kernel set alone, on every backend, against `KernelSet`'s own operations in fp64.

The backends are torch, Triton interpreted and the CUDA kernels compiled for the host; with a GPU, the same there.
Operands are made by the backend itself, in its own padding, and read back for the comparison, so that an error shows in
the method that makes it. The bar is twice the error of the torch kernel set at the same operand dtype, plus the
rounding of the result's own dtype.
"""

import contextlib

import pytest
import torch
from cases import labels, logits, short

from mcld_kernels import backends
from mcld_kernels.kernels import (
    AnchorTerms,
    ContrastArgs,
    GradCoefficients,
    GradEpilogueArgs,
    NegativeSums,
    TermWeight,
    UnitRows,
)

GPU = pytest.mark.gpu
RUNS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("triton", "cpu"), id="triton-interpreted"),
    pytest.param(("cuda", "cpu"), id="cuda-emulated"),
    *(pytest.param((name, "cuda"), id=f"{name}-gpu", marks=GPU) for name in ("torch", "triton", "cuda")),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, M, D, CLASSES = 37, 45, 70, 11

pytestmark = pytest.mark.usefixtures("poison")


class Subject:
    """A backend's kernel set and, for the same operands, the torch kernel sets in fp64 and at the operand dtype."""

    def __init__(self, name, device, dtype):
        x = torch.zeros(1, 1, dtype=dtype, device=device)
        self.device, self.dtype = device, dtype
        self.kernels = backends.kernel_set(name, x, x)
        self.operand_dtype = self.kernels.operand_dtype(dtype)
        fast = {"fast_fp16": True, "fast_bf16": True, "compiled": False}
        with backends.tuned(**fast):
            self.torch = backends.kernel_set("torch", x.cpu(), x.cpu())
            self.exact = backends.kernel_set("torch", x.cpu().double(), x.cpu().double())

    def unit(self, n, seed=0, d=D, kind="random"):
        """Unit rows (n, d) of logits, made by the backend."""
        x, _ = logits(kind, n, d, self.dtype, seed, self.device)
        return self.kernels.l2_normalize(x, self.operand_dtype, 1e-12)

    def both(self, unit):
        """The same unit rows for the fp64 kernel set and for the torch one at the operand dtype."""
        rows, inv_norm = unit.rows[: unit.n, : unit.d].cpu(), unit.inv_norm.cpu()
        return (
            UnitRows(rows=rows.double(), inv_norm=inv_norm.double(), n=unit.n, d=unit.d),
            UnitRows(rows=rows, inv_norm=inv_norm, n=unit.n, d=unit.d),
        )


@pytest.fixture(params=RUNS)
def backend(request):
    name, device = request.param
    with contextlib.ExitStack() as stack:
        if (name, device) == ("cuda", "cpu"):
            import csrc_host

            from mcld_kernels.backends.cuda import extension

            if csrc_host.compiler() is None:
                pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
            stack.enter_context(extension.use(csrc_host.load()))
        if (name, device) == ("triton", "cpu"):
            pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")
            import triton_interpreter

            stack.enter_context(triton_interpreter.faithful())
        x = torch.zeros(1, 1, device=device) if device == "cpu" or torch.cuda.is_available() else torch.zeros(1, 1)
        if (reason := backends.unsupported_reason(name, x, x, False)) is not None:
            pytest.skip(f"backend {name!r}: {reason}")
        yield name, device


@pytest.fixture(params=DTYPES, ids=short)
def subject(request, backend):
    return Subject(*backend, request.param)


@pytest.fixture
def subject32(backend):
    """For methods that see accumulators alone."""
    return Subject(*backend, torch.float32)


def near(got, exact, eager, natural=1.0):
    """Twice the eager error, and the rounding of parts of size ``natural``; NaN fails, infinities must agree."""
    got, exact, eager = got.detach().cpu(), exact.double(), eager.detach().cpu().double()
    assert got.shape == exact.shape
    finite = torch.isfinite(exact)
    assert torch.equal(got[~finite].double(), exact[~finite])
    error, bar = (got.double() - exact)[finite], (eager - exact)[finite]
    size = float(exact[finite].abs().max()) if finite.any() else 0.0
    # fp16 and bf16 results are stored in fp32 accumulators, whose sums come in another order.
    floor = 8 * torch.finfo(torch.float32).eps * max(size, natural) + torch.finfo(got.dtype).eps * size
    assert float(error.abs().max()) <= 2 * float(bar.abs().max()) + floor


class TestL2Normalize:
    @pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
    @pytest.mark.parametrize("kind", ["random", "zeros", "large"])
    def test_unit_rows_and_their_padding(self, subject, kind, layout):
        x, _ = logits(kind, N, D, subject.dtype, device=subject.device)
        x = {"rows": x, "columns": x.T, "strided": x.repeat(1, 2)[:, ::2]}[layout]
        got = subject.kernels.l2_normalize(x, subject.operand_dtype, 1e-12)
        exact = subject.exact.l2_normalize(x.cpu().double(), torch.float64, 1e-12)
        eager = subject.torch.l2_normalize(x.cpu(), subject.operand_dtype, 1e-12)
        assert (got.n, got.d) == tuple(x.shape) and got.rows.dtype == subject.operand_dtype
        near(got.inv_norm, exact.inv_norm, eager.inv_norm, float(exact.inv_norm.max()))
        near(got.rows[: got.n, : got.d], exact.rows, eager.rows)
        rows, columns = got.rows.shape
        assert not got.rows[got.n :, :].any() and not got.rows[:, got.d :].any()
        assert rows >= got.n and columns >= got.d

    def test_an_overflow_and_a_nan_show(self, subject32):
        x = torch.ones(3, 5, device=subject32.device)
        x[0, 1], x[1, 2] = 3e38, torch.nan
        inv_norm = subject32.kernels.l2_normalize(x, subject32.operand_dtype, 1e-12).inv_norm.cpu()
        assert torch.isnan(inv_norm[:2]).all() and torch.isfinite(inv_norm[2])


class TestLabels:
    @pytest.mark.parametrize("num_classes", [5, 200])
    @pytest.mark.parametrize("sides", [1, 2])
    def test_index_labels(self, subject32, sides, num_classes):
        targets = [labels(n, num_classes, seed, ignored=0.3) for seed, n in enumerate((N, M)[:sides])]
        on_device = tuple(target.to(subject32.device) for target in targets)
        got = subject32.kernels.index_labels(on_device, -100, num_classes, torch.float32)
        want = subject32.torch.index_labels(tuple(targets), -100, num_classes, torch.float32)
        for ours, theirs in zip(got, want, strict=True):
            for name in ("valid", "class_id", "class_index", "counts", "order", "starts", "present", "mean_factor"):
                assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)), name
            equal = ours.key[:, None].cpu() == ours.key.cpu()
            assert torch.equal(equal, theirs.key[:, None] == theirs.key)
            assert float(ours.poison) == 1

    def test_a_label_out_of_range_poisons(self, subject32):
        for bad in (5, -1, 2**40):
            target = torch.tensor([0, bad, 2, 1, 1, 0, 3], device=subject32.device)
            (got,) = subject32.kernels.index_labels((target,), -100, 5, torch.float32)
            assert torch.isnan(got.poison) and torch.isnan(got.mean_factor)
            assert 0 <= int(got.class_index.min()) and int(got.class_index.max()) <= 5


class TestPositives:
    def indexed(self, subject, n, ignored=0.3):
        target = labels(n, CLASSES, ignored=ignored)
        (ours,) = subject.kernels.index_labels((target.to(subject.device),), -100, CLASSES, torch.float32)
        (theirs,) = subject.torch.index_labels((target,), -100, CLASSES, torch.float32)
        return ours, theirs

    def test_class_means(self, subject):
        unit = subject.unit(N)
        ours, theirs = self.indexed(subject, N)
        exact, eager = subject.both(unit)
        got = subject.kernels.class_means(unit, ours, ours.counts)
        want = subject.exact.class_means(exact, theirs, theirs.counts)
        near(got[:, :D], want, subject.torch.class_means(eager, theirs, theirs.counts))

    @pytest.mark.parametrize("offset", [0, 3])
    @pytest.mark.parametrize("with_means", [False, True], ids=["diagonal", "labels"])
    def test_positive_cosines(self, subject, with_means, offset):
        anchors, candidates = subject.unit(N, 0), subject.unit(M, 1)
        ours, theirs = self.indexed(subject, N)
        means = index = None
        if with_means:
            means, index = subject.kernels.class_means(anchors, ours, ours.counts), ours.class_index
        got = subject.kernels.positive_cosines(anchors, candidates, offset, means, index)
        results = []
        for i, kernels in enumerate((subject.exact, subject.torch)):
            a, k = (subject.both(unit)[i] for unit in (anchors, candidates))
            table = None if means is None else means[:, :D].cpu().to(a.inv_norm.dtype)
            results.append(kernels.positive_cosines(a, k, offset, table, None if index is None else index.cpu()))
        for ours_, exact, eager in zip(got, *results, strict=True):
            near(ours_, exact, eager)


class TestContrast:
    OPTIONS = {
        "fixed shift": {},
        "own maxima": {"temperature": 0.01},
        "mask": {"mask": True},
        "own maxima, mask": {"temperature": 0.01, "mask": True},
        "reverse": {"reverse": True},
        "reverse, mask": {"reverse": True, "mask": True},
    }

    def results(self, subject, kernels, anchors, candidates, mask, temperature, offset, grads, reverse, weight):
        """Sums over all chunks: neg_lse, normalized product, candidate product, and those of the reverse."""
        args = ContrastArgs(
            anchors=anchors,
            candidates=candidates,
            temperature=temperature,
            offset=offset,
            mask=mask,
            anchor_grad=grads[0],
            candidate_grad=grads[1],
            reverse=reverse,
        )
        contrast = kernels.contrast(args)
        neg_lse, product, covered = [], [], 0
        for chunk in contrast.chunks():
            assert chunk.rows.start == covered, "the chunks cover the anchors in order"
            covered = chunk.rows.stop
            neg_lse.append(chunk.neg_lse.clone())
            if grads[0]:
                product.append((chunk.product * chunk.inv_neg_sum[:, None])[:, :D].clone())
            else:
                assert chunk.product is None
            if grads[1]:
                partner = weight[chunk.rows].to(chunk.neg_lse)
                coefficients = GradCoefficients(partner=partner, product=partner * chunk.inv_neg_sum, class_mean=None)
                contrast.add_candidates(chunk, coefficients)
        assert covered == anchors.n
        found = {"neg_lse": torch.cat(neg_lse)}
        sums = contrast.sums()
        if grads[0]:
            found["product"] = torch.cat(product)
        if grads[1]:
            found["candidates"] = sums.candidate_product[: candidates.n, :D]
        if reverse:
            found["reverse neg_lse"] = sums.reverse.neg_lse
            if grads[1]:
                back = sums.reverse
                found["reverse product"] = (back.product * back.inv_neg_sum[:, None])[: candidates.n, :D]
        return found

    @pytest.mark.parametrize("chunk_rows", [1000, 16], ids=["whole", "chunks"])
    @pytest.mark.parametrize("grads", [(False, False), (True, False), (True, True)], ids=["none", "anchors", "both"])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("sizes", [(N, N, 0), (N, M, 5)], ids=str)
    def test_sums_over_the_negatives(self, backend, sizes, options, grads, chunk_rows):
        n, m, offset = sizes
        for dtype in DTYPES if grads == (True, False) else DTYPES[:1]:
            with backends.tuned(chunk_bytes=chunk_rows * m * 4):
                subject = Subject(*backend, dtype)
            temperature, reverse = options.get("temperature", 0.1), options.get("reverse", False)
            if reverse and not subject.kernels.can_reverse(subject.operand_dtype, temperature):
                continue
            anchors, candidates = subject.unit(n, 0), subject.unit(m, 1)
            keys = [labels(size, CLASSES, seed) for seed, size in enumerate((n, m))]
            weight = torch.rand(n, generator=torch.Generator().manual_seed(0)) / n
            found = []
            for i, kernels in enumerate((subject.kernels, subject.exact, subject.torch)):
                sides = (anchors, candidates) if i == 0 else [subject.both(u)[i - 1] for u in (anchors, candidates)]
                mask = tuple(k.to(sides[0].rows.device) for k in keys) if options.get("mask") else None
                found.append(
                    self.results(
                        subject, kernels, *sides, mask, temperature, offset, grads, reverse,
                        weight.to(sides[0].rows.device),
                    )
                )  # fmt: skip
            for name, got in found[0].items():
                natural = 1 / temperature if "lse" in name else 0.0
                near(got, found[1][name], found[2][name], natural)

    def test_one_candidate_has_no_negative(self, subject):
        anchors, candidates = subject.unit(1, 0), subject.unit(1, 1)
        args = ContrastArgs(anchors=anchors, candidates=candidates, temperature=0.1, offset=0, anchor_grad=True)
        (chunk,) = subject.kernels.contrast(args).chunks()
        assert float(chunk.neg_lse) == -torch.inf and float(chunk.inv_neg_sum) == 0
        assert not (chunk.product * chunk.inv_neg_sum[:, None]).any()


class TestLossEpilogue:
    OPTIONS = {
        "one term": ("diagonal",),
        "label positives": ("label",),
        "two terms": ("diagonal", "label"),
    }

    @pytest.mark.parametrize("first", [0, 8])
    @pytest.mark.parametrize("weighted", [False, True], ids=["numbers", "tensors"])
    @pytest.mark.parametrize("positives", OPTIONS.values(), ids=OPTIONS)
    def test_coefficients_and_parts(self, subject32, positives, weighted, first):
        rows, acc = slice(first, N), torch.float64
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape):
            return torch.rand(shape, generator=generator, dtype=acc)

        neg_lse, inv_neg_sum = 20 * uniform(N) - 10, uniform(N)
        neg_lse[-1], inv_neg_sum[-1] = -torch.inf, 0
        cosines = 2 * uniform(2, N) - 1
        factor, weight, counted = uniform(), uniform(2), uniform(N) > 0.3
        results = []
        for kernels, dtype, device in (
            (subject32.kernels, torch.float32, subject32.device),
            (subject32.exact, acc, "cpu"),
            (subject32.torch, torch.float32, "cpu"),
        ):

            def there(x, dtype=dtype, device=device):
                return x.to(device=device, dtype=dtype if x.is_floating_point() else x.dtype)

            weights = tuple(
                TermWeight(
                    term=i,
                    positives=kind,
                    constant=0.7,
                    factor=there(factor) if kind == "label" else None,
                    counted=there(counted) if kind == "label" else None,
                    term_weight=1.5 - i,
                    weight=there(weight)[i] if weighted else None,
                )
                for i, kind in enumerate(positives)
            )
            per_anchor = torch.zeros(len(positives), N + 5, dtype=dtype, device=device)
            terms = AnchorTerms(
                positive=there(cosines[0]),
                label_positive=there(cosines[1]),
                temperature=0.1,
                weights=weights,
                per_anchor=per_anchor,
            )
            sums = NegativeSums(
                rows=rows, neg_lse=there(neg_lse[rows]), inv_neg_sum=there(inv_neg_sum[rows]), product=None
            )
            c = kernels.loss_epilogue(terms, sums)
            assert (c.class_mean is None) == ("label" not in positives)
            parts = (c.partner, c.product, c.partner if c.class_mean is None else c.class_mean)
            results.append((per_anchor, *parts))
        for got, exact, eager in zip(*results, strict=True):
            near(got, exact, eager)

    @pytest.mark.parametrize("weighted", [False, True], ids=["numbers", "tensors"])
    @pytest.mark.parametrize("terms", [(2,), (0, 1), (2, 0, 1, 0, 1)], ids=str)
    def test_reduce_terms(self, subject32, terms, weighted):
        per_anchor = torch.randn(len(terms), 333, generator=torch.Generator().manual_seed(0))
        weight = torch.tensor([0.5, 2.0, 3.0]) if weighted else None
        term_weight = tuple(float(term in terms) * (term + 1) for term in range(3))
        got = subject32.kernels.reduce_terms(
            per_anchor.to(subject32.device), terms, term_weight, None if weight is None else weight.to(subject32.device)
        )
        wide = None if weight is None else weight.double()
        want = subject32.exact.reduce_terms(per_anchor.double(), terms, term_weight, wide)
        eager = subject32.torch.reduce_terms(per_anchor, terms, term_weight, weight)
        for ours, exact, theirs in zip(got, want, eager, strict=True):
            near(ours, exact, theirs, natural=20.0)


class TestGradEpilogue:
    def args(self, subject, kernels, i, unit, partner, means, transposed, accumulate, offset, rows):
        """The same arguments for the backend (i = 0), in fp64 (1) and for the torch kernels (2)."""
        generator = torch.Generator().manual_seed(0)
        device = subject.device if i == 0 else "cpu"
        acc = torch.float64 if i == 1 else torch.float32
        out_dtype = torch.float64 if i == 1 else torch.float32 if subject.dtype == torch.float16 else subject.dtype

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        count = rows.stop - rows.start
        columns = unit.rows.shape[1] if i == 0 else D
        product = torch.zeros(count, columns, dtype=acc, device=device)
        product[:, :D] = normal(count, D)
        coefficients = [normal(count).to(device=device, dtype=acc) for _ in range(3)]
        out = normal(N, D).to(device=device, dtype=out_dtype)
        out = out.T.contiguous().T if transposed else out
        table = None if means is None else torch.zeros(CLASSES, columns, dtype=acc, device=device)
        if table is not None:
            table[:, :D] = means
        sides = (unit, partner) if i == 0 else [subject.both(u)[i - 1] for u in (unit, partner)]
        return GradEpilogueArgs(
            out=out,
            unit=sides[0],
            rows=rows,
            product=product,
            coefficients=GradCoefficients(
                partner=coefficients[0],
                product=coefficients[1],
                class_mean=None if means is None else coefficients[2],
            ),
            partner=sides[1],
            offset=offset,
            class_means=table,
            class_index=None if means is None else (torch.arange(N) % CLASSES).to(device),
            accumulate=accumulate,
        )

    @pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
    @pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
    @pytest.mark.parametrize("with_means", [False, True], ids=["diagonal", "labels"])
    @pytest.mark.parametrize("place", [(0, N, 0), (16, 30, 5), (0, N, -6)], ids=str)
    def test_gradient(self, subject, place, with_means, transposed, accumulate):
        first, last, offset = place
        unit, partner = subject.unit(N, 0, kind="zeros"), subject.unit(N, 1)
        means = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(1)) if with_means else None
        found = []
        for i, kernels in enumerate((subject.kernels, subject.exact, subject.torch)):
            args = self.args(
                subject, kernels, i, unit, partner, means, transposed, accumulate, offset, slice(first, last)
            )
            kernels.grad_epilogue(args)
            found.append(args.out)
        near(found[0][first:last], found[1][first:last], found[2][first:last])

    def test_is_orthogonal_to_its_row(self, subject):
        """A step along the gradient leaves the norm, also where the operand's rounding leaves |x| != 1."""
        unit, partner = subject.unit(N, 0), subject.unit(N, 1)
        args = self.args(subject, subject.kernels, 0, unit, partner, None, False, False, 0, slice(0, N))
        args.out = torch.empty(N, D, dtype=torch.float32, device=subject.device)
        subject.kernels.grad_epilogue(args)
        x, g = unit.rows[:N, :D].double().cpu(), args.out.double().cpu()
        radial = (g * x).sum(1).abs() / (g.norm(dim=1) * x.norm(dim=1))
        assert float(radial.max()) < 3e-6


def test_the_fixed_shift_has_one_limit(backend):
    """Exponentials stay normal numbers at the coldest temperature with one shift for all rows, and above it."""
    for dtype, temperature in ((torch.float32, 2 / 80), (torch.bfloat16, 2 / 80), (torch.float16, 2 / 20)):
        subject = Subject(*backend, dtype)
        for t in (temperature, 0.99 * temperature):
            anchors, candidates = subject.unit(N, 0, kind="collinear"), subject.unit(N, 1, kind="collinear")
            args = ContrastArgs(anchors=anchors, candidates=candidates, temperature=t, offset=0, anchor_grad=True)
            neg_lse = [torch.cat([chunk.neg_lse for chunk in subject.kernels.contrast(args).chunks()])]
            for i, kernels in enumerate((subject.exact, subject.torch)):
                args.anchors, args.candidates = (subject.both(unit)[i] for unit in (anchors, candidates))
                neg_lse.append(torch.cat([chunk.neg_lse for chunk in kernels.contrast(args).chunks()]))
            assert torch.isfinite(neg_lse[0]).all()
            near(*neg_lse, natural=1 / t)
