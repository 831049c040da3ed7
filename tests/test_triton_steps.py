"""The steps around the products, interpreted: labels, epilogues and sums, each against the torch kernels."""

import dataclasses
import math

import pytest
import torch
from cases import labels, logits, options_of, short
from launches import Counted

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

import triton_interpreter
from triton.runtime.interpreter import GridExecutor

from mcld_kernels import backends
from mcld_kernels import labels as labelling
from mcld_kernels.backends import triton as backend
from mcld_kernels.backends.triton.configs import Launch
from mcld_kernels.backends.triton.labels import ComparedLabels
from mcld_kernels.kernels import (
    AnchorTerms,
    GradCoefficients,
    GradEpilogueArgs,
    LossInputs,
    NegativeSums,
    TermWeight,
    UnitRows,
)
from mcld_kernels.losses import mcld

pytestmark = pytest.mark.skipif(
    not backend.interpreted(), reason="the kernels are compiled here: test_backends runs them on the GPU"
)

ACC_DTYPES = (torch.float32, torch.float64)
FIELDS = (
    "key", "valid", "class_index", "class_id", "poison", "counts", "order", "starts", "mean_factor", "present"
)  # fmt: skip


def kernels(name):
    """The kernel set of a backend, with the tuning of the moment."""
    return backends.kernel_set(name, torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.fixture(params=[128, 16], ids="blocks of {}".format)
def blocks(request):
    """Vectors of one block, and of several with a ragged last one."""
    with backends.tuned(blocks=Launch(*[request.param] * 3)):
        yield


def expect(got, want, rtol=0.0):
    # assert_close tells NaN from nothing, and -inf from numbers.
    torch.testing.assert_close(got, want, rtol=rtol, atol=0.0, equal_nan=True)


@pytest.mark.usefixtures("poison")
class TestIndexLabels:
    @staticmethod
    def check(target, classes, dtype=torch.float32, ignore_index=-100):
        (got,) = kernels("triton").index_labels((target,), ignore_index, classes, dtype)
        (want,) = labelling.index_labels((target,), ignore_index, classes, dtype)
        assert (got.num_classes_present, got.num_classes) == (want.num_classes_present, want.num_classes)
        for name in FIELDS:
            expect(getattr(got, name), getattr(want, name))
        return got

    @pytest.mark.parametrize("dtype", ACC_DTYPES, ids=short)
    # One row over the classes; a class in the last place of a block and in the first of the next.
    @pytest.mark.parametrize("n, classes", [(2, 1), (37, 36), (61, 15), (64, 16), (101, 40)])
    def test_random(self, n, classes, dtype, blocks):
        target = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(n))
        target[::5] = -100
        assert type(self.check(target, classes, dtype)) is ComparedLabels

    def test_few_of_many_classes(self, blocks):
        self.check(labels(90, 70), 70)

    @pytest.mark.parametrize("kind", ["all ignored", "one class", "last class", "sorted", "reversed"])
    def test_kinds(self, kind, blocks):
        n, classes = 45, 20
        ascending = torch.arange(n) * classes // n
        target = {
            "all ignored": torch.full((n,), -100),
            "one class": torch.zeros(n, dtype=torch.int64),
            "last class": torch.full((n,), classes - 1),
            "sorted": ascending,
            "reversed": ascending.flip(0),
        }[kind]
        self.check(target, classes)

    @pytest.mark.parametrize("bad", [-1, 20, 2**40, -(2**40)])
    def test_a_bad_label_poisons(self, bad, blocks):
        target = torch.arange(45) % 20
        target[44] = bad
        assert self.check(target, 20).poison.isnan()

    @pytest.mark.parametrize("ignore_index", [0, 1, 7, 2**40])
    def test_ignore_index(self, ignore_index):
        target = torch.arange(45) % 20
        target[3] = ignore_index
        self.check(target, 20, ignore_index=ignore_index)

    @pytest.mark.parametrize("stride", [0, 2])
    def test_strided_labels(self, stride):
        self.check((torch.arange(90) % 20).as_strided((45,), (stride,)), 20)

    @pytest.mark.parametrize("n, classes", [(1, 1), (20, 20), (20, 1000)])
    def test_no_fewer_classes_than_rows(self, n, classes):
        self.check(labels(n, classes), classes)

    def test_two_sides(self):
        sides = labels(30, 12, ignored=0.3), labels(50, 12, seed=1)
        indexed = (kernels(name).index_labels(sides, -100, 12, torch.float32) for name in ("triton", "torch"))
        for got, want in zip(*indexed, strict=True):
            for name in FIELDS:
                expect(getattr(got, name), getattr(want, name))

    def test_many_rows_and_classes_are_sorted(self):
        with backends.tuned(max_compared=45 * 21 - 1):
            assert type(self.check(torch.arange(45) % 20, 20)) is labelling.Labels
            assert type(self.check(torch.arange(45) % 19, 19)) is ComparedLabels

    def test_tables_that_are_given_are_not_computed(self):
        (indexed,) = labelling.index_labels((torch.arange(9) % 4,), -100, 4, torch.float32)
        tables = {name: torch.empty(0) for name in ("counts", "order", "starts", "mean_factor")}
        assert labelling.with_tables(indexed, **tables) is indexed
        assert all(getattr(indexed, name) is table for name, table in tables.items())


def term_weights(terms_taken, n, dtype, weights):
    """The weights of a term or two, as a loss makes them."""
    generator = torch.Generator().manual_seed(n)
    counted = torch.rand(n, generator=generator) < 0.7
    weight = torch.tensor([0.3, 1.7, -0.4], dtype=dtype) if weights else [None] * 3
    factor, nan = torch.tensor(1 / 7, dtype=dtype), torch.tensor(math.nan, dtype=dtype)

    def make(term, constant, term_weight, factor=None, counted=None):
        positives = "label" if term == 1 else "diagonal"
        return TermWeight(
            term=term, positives=positives, constant=constant, factor=factor, counted=counted,
            term_weight=term_weight, weight=weight[term],
        )  # fmt: skip

    made = {
        "instance": make(0, 1 / n, 1.3),
        "masked instance": make(0, 0.5 / n, 1.3, torch.ones((), dtype=dtype)),
        "poisoned": make(0, 1 / n, 1.3, nan),
        "sample": make(1, 0.5, 0.7, factor, counted),
        "category": make(2, 1 / n, 0.4),
        "present": make(2, 1.0, 0.4, factor, counted),
    }
    return tuple(made[kind] for kind in terms_taken.split(" and "))


def anchor_terms(terms_taken, n, dtype, weights=False, temperature=0.3, width=None):
    positive, label_positive = torch.randn(2, n, generator=torch.Generator().manual_seed(7), dtype=dtype).clamp(-1, 1)
    weights = term_weights(terms_taken, n, dtype, weights)
    return AnchorTerms(
        positive=positive,
        label_positive=label_positive,
        temperature=temperature,
        weights=weights,
        per_anchor=torch.zeros(len(weights), width or n, dtype=dtype),
    )


def negative_sums(neg_lse, rows=None, inv_neg_sum=None):
    return NegativeSums(
        rows=slice(0, len(neg_lse)) if rows is None else rows,
        neg_lse=neg_lse,
        inv_neg_sum=(-neg_lse).exp() if inv_neg_sum is None else inv_neg_sum,
        product=None,
    )


@pytest.mark.usefixtures("poison")
class TestLossEpilogue:
    @staticmethod
    def check(terms, sums):
        """Coefficients and per-anchor parts of both backends; parts outside the rows stay as they are."""
        rtol = 8 * torch.finfo(sums.neg_lse.dtype).eps
        other = dataclasses.replace(terms, per_anchor=terms.per_anchor.clone())
        got = kernels("triton").loss_epilogue(terms, sums)
        want = kernels("torch").loss_epilogue(other, sums)
        assert (got.class_mean is None) == (want.class_mean is None)
        pairs = [(getattr(got, name), getattr(want, name)) for name in ("partner", "product", "class_mean")]
        for a, b in [*pairs, (terms.per_anchor, other.per_anchor)]:
            if b is not None:
                assert a.is_contiguous()
                # A difference of cosines near 0 has the rounding of the cosines.
                torch.testing.assert_close(
                    a, b, rtol=rtol, atol=float(rtol * b.nan_to_num(0, 0, 0).abs().amax()), equal_nan=True
                )
        return got

    @pytest.mark.parametrize("weights", [False, True], ids=["numbers", "tensor"])
    @pytest.mark.parametrize("dtype", ACC_DTYPES, ids=short)
    @pytest.mark.parametrize(
        "terms_taken",
        ["instance", "masked instance", "sample", "category", "present", "instance and sample", "sample and instance"],
    )
    def test_terms(self, terms_taken, dtype, weights, blocks):
        n = 61
        neg_lse = 3 * torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(1))
        self.check(anchor_terms(terms_taken, n, dtype, weights), negative_sums(neg_lse))

    @pytest.mark.parametrize("terms_taken", ["instance", "sample", "instance and sample"])
    @pytest.mark.parametrize("rows", [slice(0, 16), slice(16, 47), slice(60, 61)], ids=str)
    def test_a_chunk_of_rows(self, rows, terms_taken, blocks):
        neg_lse = torch.linspace(-2, 2, rows.stop - rows.start)
        self.check(anchor_terms(terms_taken, 61, torch.float32, width=75), negative_sums(neg_lse, rows, neg_lse.exp()))

    @pytest.mark.parametrize("terms_taken", ["instance", "instance and sample"])
    @pytest.mark.parametrize("dtype", ACC_DTYPES, ids=short)
    def test_one_row(self, terms_taken, dtype):
        one = torch.ones(1, dtype=dtype)
        self.check(anchor_terms(terms_taken, 1, dtype), negative_sums(-one, inv_neg_sum=one))

    @pytest.mark.parametrize("dtype", ACC_DTYPES, ids=short)
    def test_extremes(self, dtype):
        """No negatives, a failed row, both tails, and where 1 + exp(x) is 1 or all but 1."""
        middle = torch.linspace(-40, 40, 81, dtype=dtype)
        tails = torch.tensor([-math.inf, math.nan, -1e30, -700.0, -100.0, 0.0, 100.0, 700.0, 1e30], dtype=dtype)
        neg_lse = torch.cat([tails, middle])
        zeros = torch.zeros_like(neg_lse)
        terms = dataclasses.replace(
            anchor_terms("instance", len(neg_lse), dtype, temperature=1.0), positive=zeros, label_positive=zeros
        )
        inv_neg_sum = torch.where(neg_lse == -math.inf, 0.0, torch.ones_like(neg_lse))
        got = kernels("triton").loss_epilogue(terms, negative_sums(neg_lse, inv_neg_sum=inv_neg_sum))
        # Relative errors, so that a small loss counts as much as a large one.
        part = 1 / len(neg_lse)
        bar = {"rtol": 16 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny, "equal_nan": True}
        exact = neg_lse.double()
        softplus = exact.clamp(min=0) + (-exact.abs()).exp().log1p()
        torch.testing.assert_close(terms.per_anchor[0].double(), softplus * part, **bar)
        torch.testing.assert_close(got.partner.double(), exact.sigmoid() * part * 1.3, **bar)
        torch.testing.assert_close(got.product, got.partner * inv_neg_sum, **bar)
        assert got.partner[0] == got.product[0] == terms.per_anchor[0, 0] == 0
        assert got.partner[1].isnan() and terms.per_anchor[0, 1].isnan()

    @pytest.mark.parametrize("terms_taken", ["poisoned", "poisoned and sample"])
    def test_poison_shows_in_every_row(self, terms_taken):
        neg_lse = torch.linspace(-2, 2, 33)
        terms = anchor_terms(terms_taken, 33, torch.float32)
        got = self.check(terms, negative_sums(neg_lse, inv_neg_sum=neg_lse.exp()))
        assert got.partner.isnan().all() and terms.per_anchor[0].isnan().all()

    def test_a_failed_row_shows_where_it_does_not_count(self):
        neg_lse = torch.zeros(40)
        terms = anchor_terms("sample", 40, torch.float32)
        row = int((~terms.weights[0].counted).nonzero()[0])
        neg_lse[row] = math.nan
        self.check(terms, negative_sums(neg_lse))
        assert terms.per_anchor[0, row].isnan() and int(terms.per_anchor.isnan().sum()) == 1


@pytest.mark.usefixtures("poison")
class TestReduceTerms:
    @pytest.mark.parametrize("weights", [None, 1, 2], ids=["numbers", "tensor", "strided"])
    @pytest.mark.parametrize("dtype", ACC_DTYPES, ids=short)
    @pytest.mark.parametrize("terms", [(0,), (1,), (2,), (0, 1), (2, 0, 1), (0, 0), (2, 0, 1, 0, 1)], ids=str)
    @pytest.mark.parametrize("width", [1, 131])
    def test_against_torch(self, width, terms, dtype, weights, blocks):
        got = self.check(width, terms, 3, dtype, weights)
        assert got[1].tolist().count(0.0) == 3 - len(set(terms))

    # Past three terms the operations of the base class take over.
    @pytest.mark.parametrize("terms", [(0,), (0, 1), (1, 0, 1), (3, 0, 4)], ids=str)
    def test_losses_of_other_numbers_of_terms(self, terms, blocks):
        self.check(131, terms, max(terms) + 1, torch.float64, None)
        self.check(131, terms, max(terms) + 1, torch.float64, 2)

    @staticmethod
    def check(width, terms, number, dtype, weights):
        generator = torch.Generator().manual_seed(width)
        per_anchor = torch.randn(len(terms), width, dtype=dtype, generator=generator)
        term_weight = tuple(float(term in terms) * (term + 0.3) for term in range(number))
        weight = None
        if weights is not None:
            weight = torch.randn(number * weights, dtype=dtype, generator=generator)[::weights]
        got = kernels("triton").reduce_terms(per_anchor, terms, term_weight, weight)
        want = kernels("torch").reduce_terms(per_anchor, terms, term_weight, weight)
        bar = 8 * torch.finfo(dtype).eps * float(per_anchor.abs().sum())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=bar)
        return got

    def test_nan_shows_in_its_term(self):
        per_anchor = torch.ones(2, 40)
        per_anchor[1, 33] = math.nan
        loss, terms = kernels("triton").reduce_terms(per_anchor, (2, 0), (1.0, 0.0, 1.0), None)
        assert loss.isnan() and terms.isnan().tolist() == [True, False, False]

    def test_the_weight_of_a_term_without_rows_is_not_read(self):
        weight = torch.tensor([2.0, math.nan, math.nan])
        loss, _ = kernels("triton").reduce_terms(torch.ones(1, 5), (0,), (1.0, 0.0, 0.0), weight)
        assert loss == 10


@pytest.mark.usefixtures("poison")
class TestGradEpilogue:
    """Rows that fit one tile, longer ones, and the transposed view of the category-wise term."""

    @pytest.fixture(params=["whole rows", "split rows", "transposed"])
    def layout(self, request):
        with backends.tuned(
            blocks=Launch(16, 32, 32), whole_row=16 if request.param == "split rows" else 2048, min_span=32
        ):
            yield request.param

    @staticmethod
    def arguments(operand_dtype, acc_dtype, layout, *, n=45, m=50, d=70, rows=slice(0, 45), offset=3, means=True):
        generator = torch.Generator().manual_seed(d)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=acc_dtype)

        logits = [randn(count, d) for count in (n, m)]
        logits[0][5] = 0  # a zero row has no direction
        unit, partner = (kernels("triton").l2_normalize(x, operand_dtype, 1e-12) for x in logits)
        count = rows.stop - rows.start
        coefficients = GradCoefficients(
            partner=randn(count), product=randn(count), class_mean=randn(count) if means else None
        )
        pitch = unit.rows.shape[1]
        return GradEpilogueArgs(
            out=randn(d, n).T if layout == "transposed" else randn(n, d),
            unit=unit,
            rows=rows,
            product=torch.nn.functional.pad(randn(count, d), (0, pitch - d)),
            coefficients=coefficients,
            partner=partner,
            offset=offset,
            class_means=randn(7, pitch) if means else None,
            class_index=torch.arange(n) % 7 if means else None,
            accumulate=False,
        )

    @pytest.mark.parametrize("accumulate", [False, True])
    @pytest.mark.parametrize("means", [False, True])
    @pytest.mark.parametrize("rows, offset", [((0, 45), 3), ((16, 32), 0), ((40, 45), 8), ((0, 20), -4)], ids=str)
    def test_against_torch(self, rows, offset, means, accumulate, layout):
        args = self.arguments(torch.float64, torch.float64, layout, rows=slice(*rows), offset=offset, means=means)
        args.accumulate = accumulate
        d = args.unit.d
        want = dataclasses.replace(
            args,
            out=args.out.T.clone().T,
            unit=dataclasses.replace(args.unit, rows=args.unit.rows[:, :d]),
            product=args.product.clone(),
            partner=dataclasses.replace(args.partner, rows=args.partner.rows[:, :d]),
            class_means=args.class_means[:, :d] if means else None,
        )
        kernels("triton").grad_epilogue(args)
        kernels("torch").grad_epilogue(want)
        torch.testing.assert_close(args.out, want.out, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("operand_dtype", [torch.bfloat16, torch.float16], ids=short)
    def test_the_gradient_is_orthogonal_to_its_row(self, operand_dtype, layout):
        """Though the operands are rounded: |x| differs from 1 by up to 2^-9 in bf16."""
        with triton_interpreter.faithful():
            args = self.arguments(operand_dtype, torch.float32, layout)
            kernels("triton").grad_epilogue(args)
        x, g = args.unit.rows[:45, :70].double(), args.out.double()
        radial = torch.linalg.vecdot(x, g) / g.norm(dim=1).clamp(min=1e-30)
        assert float(radial.abs().max()) < 4 * torch.finfo(torch.float32).eps
        assert float((x.norm(dim=1) - 1).abs()[x.norm(dim=1) > 0].max()) > torch.finfo(operand_dtype).eps / 64
        assert g[5].eq(0).all()


class TestLaunches:
    @pytest.fixture
    def counted(self, monkeypatch):
        mode, call = Counted(), GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            mode.launches.append(executor.fn.__name__)
            mode.inside = True  # the interpreter's copies are its own
            try:
                return call(executor, *args, **kwargs)
            finally:
                mode.inside = False

        monkeypatch.setattr(GridExecutor, "__call__", launch)
        return mode

    @staticmethod
    def compute(counted, student_grad=True, **options):
        student, teacher = logits("random", 40, 20, torch.float32)
        options, weight = options_of(**{"weight": (1.0, 1.0, 0.0), **options})
        inputs = LossInputs(
            student=student,
            teacher=teacher,
            target=labels(40, 20),
            weight=weight,
            options=options,
            student_grad=student_grad,
            teacher_grad=False,
        )
        triton_kernels = kernels("triton")
        with counted:
            mcld.compute(triton_kernels, inputs)

    def test_row_terms(self, counted):
        self.compute(counted)
        assert counted.launches == [
            "index_labels_kernel",
            "l2_normalize_rows_kernel",
            "l2_normalize_rows_kernel",
            "class_order_kernel",
            "class_means_kernel",
            "positive_cosines_kernel",
            "flash_kernel",
            "loss_epilogue_kernel",
            "grad_epilogue_kernel",
            "reduce_terms_kernel",
        ]
        assert counted.operations == []

    # Bounds are the present numbers: each may fall, none may rise.
    @pytest.mark.parametrize(
        "options, launches, operations",
        [
            ({"mask_same_class": True}, 14, 0),
            ({"weight": (1.0, 1.0, 1.0)}, 19, 1),
            ({"direction": "teacher"}, 12, 15),
            ({"direction": "symmetric"}, 16, 18),
            ({"student_grad": False}, 9, 0),
        ],
        ids=["masked", "all terms", "teacher", "symmetric", "no gradient"],
    )
    def test_other_options(self, options, launches, operations, counted):
        self.compute(counted, **options)
        assert len(counted.launches) <= launches
        assert len(counted.operations) <= operations

    def test_the_order_is_not_computed_unasked(self, counted):
        self.compute(counted, weight=(1.0, 0.0, 0.0), mask_same_class=True)
        assert "index_labels_kernel" in counted.launches and "class_order_kernel" not in counted.launches


class TestGrids:
    """Of matrices with more rows than a grid has tiles in its second dimension, 65,535."""

    @pytest.fixture
    def grids(self, monkeypatch):
        """The grids of the launches, of which none happens."""
        taken = []
        monkeypatch.setattr(GridExecutor, "__call__", lambda executor, *args, **kwargs: taken.append(executor.grid))
        with backends.tuned(blocks=None):
            yield taken

    def test_columns(self, grids):
        logits = torch.empty(64, 5_000_000, device="meta")
        kernels("triton").l2_normalize(logits.T, torch.bfloat16, 1e-12)
        assert len(grids) == 2 and all(grid[1:] <= (65_535,) for grid in grids)

    @pytest.mark.parametrize(("shape", "transposed"), [((300_000, 3000), False), ((5_000_000, 64), True)], ids=str)
    def test_gradient(self, grids, shape, transposed):
        n, d = shape

        def empty(*size, dtype=torch.float32):
            return torch.empty(size, dtype=dtype, device="meta")

        unit = UnitRows(rows=empty(n, d, dtype=torch.bfloat16), inv_norm=empty(n), n=n, d=d)
        kernels("triton").grad_epilogue(
            GradEpilogueArgs(
                out=empty(d, n).T if transposed else empty(n, d),
                unit=unit,
                rows=slice(0, n),
                product=empty(n, d),
                coefficients=GradCoefficients(partner=empty(n), product=empty(n), class_mean=None),
                partner=unit,
                offset=0,
                class_means=None,
                class_index=None,
                accumulate=False,
            )
        )
        assert len(grids) == 2 and all(grid[1:] <= (65_535,) for grid in grids)
