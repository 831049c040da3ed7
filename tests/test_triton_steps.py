"""The steps between the products, interpreted: labels, factors and totals, each against the torch backend's own."""

import math

import pytest
import torch
from cases import labels, logits, options_of, short
from launches import Counted

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

from triton.runtime.interpreter import GridExecutor

from mcld_kernels import blocked
from mcld_kernels import labels as labelling
from mcld_kernels import triton as backend
from mcld_kernels.pipeline import Anchors, Call, Share
from mcld_kernels.triton import configs
from mcld_kernels.triton.kernels import TritonKernels
from mcld_kernels.triton.labels import ScannedLabels

pytestmark = pytest.mark.skipif(
    not backend.interpreted(), reason="the kernels are compiled here: test_backends runs them on the GPU"
)

STATS = (torch.float32, torch.float64)
FIELDS = ("same", "valid", "rank", "kinds", "poison", "counts", "order", "starts", "share", "present")
TRITON, TORCH = TritonKernels(), blocked.TorchKernels()


@pytest.fixture(params=[128, 16], ids="blocks of {}".format)
def blocks(request, monkeypatch):
    """Vectors of one block, and of several with a ragged last one."""
    monkeypatch.setattr(configs, "INTERPRETED", configs.Launch(*[request.param] * 3))


def expect(got, want, rtol=0.0):
    # assert_close tells NaN from nothing, and -inf from numbers.
    torch.testing.assert_close(got, want, rtol=rtol, atol=0.0, equal_nan=True)


@pytest.mark.usefixtures("poison")
class TestDescribe:
    @staticmethod
    def check(target, classes, dtype=torch.float32, ignore_index=-100):
        (got,) = TRITON.describe((target,), ignore_index, classes, dtype)
        (want,) = labelling.describe((target,), ignore_index, classes, dtype)
        assert (got.ranks, got.classes) == (want.ranks, want.classes)
        for name in FIELDS:
            expect(getattr(got, name), getattr(want, name))
        return got

    @pytest.mark.parametrize("dtype", STATS, ids=short)
    # One row over the classes; a rank in the last place of a block and in the first of the next.
    @pytest.mark.parametrize("n, classes", [(2, 1), (37, 36), (61, 15), (64, 16), (101, 40)])
    def test_random(self, n, classes, dtype, blocks):
        target = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(n))
        target[::5] = -100
        assert type(self.check(target, classes, dtype)) is ScannedLabels

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
        for got, want in zip(*(k.describe(sides, -100, 12, torch.float32) for k in (TRITON, TORCH)), strict=True):
            for name in FIELDS:
                expect(getattr(got, name), getattr(want, name))

    def test_what_is_too_much_for_the_scan_is_sorted(self, monkeypatch):
        monkeypatch.setattr(configs, "_MOST_COMPARED", 45 * 21 - 1)
        assert type(self.check(torch.arange(45) % 20, 20)) is labelling.Labels
        assert type(self.check(torch.arange(45) % 19, 19)) is ScannedLabels

    def test_what_is_ready_is_not_computed(self):
        (described,) = labelling.describe((torch.arange(9) % 4,), -100, 4, torch.float32)
        given = {name: torch.empty(0) for name in ("counts", "order", "starts", "share")}
        assert labelling.ready(described, **given) is described
        assert all(getattr(described, name) is table for name, table in given.items())


def shares(kind, n, dtype, weights):
    """The shares of a term or two, as the pipeline makes them."""
    generator = torch.Generator().manual_seed(n)
    counted = torch.rand(n, generator=generator) < 0.7
    weight = torch.tensor([0.3, 1.7, -0.4], dtype=dtype) if weights else [None] * 3
    factor = torch.tensor(1 / 7, dtype=dtype)
    made = {
        "instance": Share(0, 1 / n, None, None, 1.3, weight[0]),
        "masked instance": Share(0, 0.5 / n, torch.ones((), dtype=dtype), None, 1.3, weight[0]),
        "poisoned": Share(0, 1 / n, torch.tensor(math.nan, dtype=dtype), None, 1.3, weight[0]),
        "sample": Share(1, 0.5, factor, counted, 0.7, weight[1]),
        "category": Share(2, 1 / n, None, None, 0.4, weight[2]),
        "present": Share(2, 1.0, factor, counted, 0.4, weight[2]),
    }
    return tuple(made[part] for part in kind.split(" and "))


def anchors(kind, n, dtype, weights=False, temperature=0.3, width=None):
    positive, by_label = torch.randn(2, n, generator=torch.Generator().manual_seed(7), dtype=dtype).clamp(-1, 1)
    chosen = shares(kind, n, dtype, weights)
    values = torch.zeros(len(chosen), width or n, dtype=dtype)
    return Anchors(positive, by_label, temperature, chosen, values)


@pytest.mark.usefixtures("poison")
class TestFactors:
    @staticmethod
    def check(request, rows, log_off, scale, rtol=None):
        """Factors and values of both backends; values outside the rows stay as they are."""
        rtol = rtol or 8 * torch.finfo(log_off.dtype).eps
        other = request._replace(values=request.values.clone())
        got = TRITON.factors(request, rows, log_off, scale)
        want = TORCH.factors(other, rows, log_off, scale)
        assert (got.z is None) == (want.z is None)
        for a, b in zip((*got, request.values), (*want, other.values), strict=True):
            if b is not None:
                assert a.is_contiguous()
                # A difference of cosines near 0 has the rounding of the cosines.
                torch.testing.assert_close(
                    a, b, rtol=rtol, atol=float(rtol * b.nan_to_num(0, 0, 0).abs().amax()), equal_nan=True
                )
        return got

    @pytest.mark.parametrize("weights", [False, True], ids=["numbers", "tensor"])
    @pytest.mark.parametrize("dtype", STATS, ids=short)
    @pytest.mark.parametrize(
        "kind",
        ["instance", "masked instance", "sample", "category", "present", "instance and sample", "sample and instance"],
    )
    def test_shares(self, kind, dtype, weights, blocks):
        n = 61
        log_off = 3 * torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(1))
        self.check(anchors(kind, n, dtype, weights), slice(0, n), log_off, (-log_off).exp())

    @pytest.mark.parametrize("kind", ["instance", "sample", "instance and sample"])
    @pytest.mark.parametrize("rows", [slice(0, 16), slice(16, 47), slice(60, 61)], ids=str)
    def test_a_chunk_of_rows(self, rows, kind, blocks):
        log_off = torch.linspace(-2, 2, rows.stop - rows.start)
        self.check(anchors(kind, 61, torch.float32, width=75), rows, log_off, log_off.exp())

    @pytest.mark.parametrize("kind", ["instance", "instance and sample"])
    @pytest.mark.parametrize("dtype", STATS, ids=short)
    def test_one_row(self, kind, dtype):
        one = torch.ones(1, dtype=dtype)
        self.check(anchors(kind, 1, dtype), slice(0, 1), -one, one)

    @pytest.mark.parametrize("dtype", STATS, ids=short)
    def test_extremes(self, dtype):
        """No negatives, a failed row, both tails, and where 1 + exp(x) is 1 or all but 1."""
        middle = torch.linspace(-40, 40, 81, dtype=dtype)
        tails = torch.tensor([-math.inf, math.nan, -1e30, -700.0, -100.0, 0.0, 100.0, 700.0, 1e30], dtype=dtype)
        log_off = torch.cat([tails, middle])
        request = anchors("instance", len(log_off), dtype, temperature=1.0)._replace(
            positive=torch.zeros_like(log_off), by_label=torch.zeros_like(log_off)
        )
        scale = torch.where(log_off == -math.inf, 0.0, torch.ones_like(log_off))
        got = TRITON.factors(request, slice(0, len(log_off)), log_off, scale)
        # Relative errors, so that a small loss counts as much as a large one.
        part = 1 / len(log_off)
        bar = {"rtol": 16 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny, "equal_nan": True}
        exact = log_off.double()
        softplus = exact.clamp(min=0) + (-exact.abs()).exp().log1p()
        torch.testing.assert_close(request.values[0].double(), softplus * part, **bar)
        torch.testing.assert_close(got.u.double(), exact.sigmoid() * part * 1.3, **bar)
        torch.testing.assert_close(got.s, got.u * scale, **bar)
        assert got.u[0] == got.s[0] == request.values[0, 0] == 0
        assert got.u[1].isnan() and request.values[0, 1].isnan()

    @pytest.mark.parametrize("kind", ["poisoned", "poisoned and sample"])
    def test_poison_shows_in_every_row(self, kind):
        log_off = torch.linspace(-2, 2, 33)
        request = anchors(kind, 33, torch.float32)
        got = self.check(request, slice(0, 33), log_off, log_off.exp())
        assert got.u.isnan().all() and request.values[0].isnan().all()

    def test_a_failed_row_shows_where_it_does_not_count(self):
        log_off = torch.zeros(40)
        request = anchors("sample", 40, torch.float32)
        row = int((~request.shares[0].counted).nonzero()[0])
        log_off[row] = math.nan
        self.check(request, slice(0, 40), log_off, log_off.exp())
        assert request.values[0, row].isnan() and int(request.values.isnan().sum()) == 1


@pytest.mark.usefixtures("poison")
class TestTotals:
    @pytest.mark.parametrize("weights", [None, 1, 2], ids=["numbers", "tensor", "strided"])
    @pytest.mark.parametrize("dtype", STATS, ids=short)
    @pytest.mark.parametrize("terms", [(0,), (1,), (2,), (0, 1), (2, 0, 1), (0, 0), (2, 0, 1, 0, 1)], ids=str)
    @pytest.mark.parametrize("width", [1, 131])
    def test_against_torch(self, width, terms, dtype, weights, blocks):
        generator = torch.Generator().manual_seed(width)
        values = torch.randn(len(terms), width, dtype=dtype, generator=generator)
        scale = tuple(float(term in terms) * (term + 0.3) for term in range(3))
        weight = None if weights is None else torch.randn(6, dtype=dtype, generator=generator)[: 3 * weights : weights]
        got = TRITON.totals(values, terms, scale, weight)
        want = TORCH.totals(values, terms, scale, weight)
        bar = 8 * torch.finfo(dtype).eps * float(values.abs().sum())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=bar)
        assert got[1].tolist().count(0.0) == 3 - len(set(terms))

    def test_nan_shows_in_its_term(self):
        values = torch.ones(2, 40)
        values[1, 33] = math.nan
        loss, terms = TRITON.totals(values, (2, 0), (1.0, 0.0, 1.0), None)
        assert loss.isnan() and terms.isnan().tolist() == [True, False, False]

    def test_the_weight_of_a_term_without_parts_is_not_read(self):
        weight = torch.tensor([2.0, math.nan, math.nan])
        loss, _ = TRITON.totals(torch.ones(1, 5), (0,), (1.0, 0.0, 0.0), weight)
        assert loss == 10


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
    def forward(counted, **options):
        student, teacher = logits("random", 40, 20, torch.float32)
        chosen, weight = options_of(**{"weight": (1.0, 1.0, 0.0), **options})
        target = labels(40, 20)
        with counted:
            backend.forward(Call(student, teacher, target, weight, chosen, True, False))

    def test_row_terms(self, counted):
        self.forward(counted)
        assert counted.launches == [
            "describe_kernel",
            "normalise_rows_kernel",
            "normalise_rows_kernel",
            "scan_kernel",
            "class_means_kernel",
            "positives_kernel",
            "flash_kernel",
            "factors_kernel",
            "finish_kernel",
            "totals_kernel",
        ]
        assert counted.operations == ["aten.new_zeros.default"]  # the values, which no term need fill

    # Bounds are what there is: each may fall, none may rise.
    @pytest.mark.parametrize(
        "options, launches, operations",
        [
            ({"mask_same_class": True}, 14, 1),
            ({"weight": (1.0, 1.0, 1.0)}, 19, 1),
            ({"direction": "teacher"}, 12, 17),
            ({"direction": "symmetric"}, 16, 22),
        ],
        ids=["masked", "all terms", "teacher", "symmetric"],
    )
    def test_other_options(self, options, launches, operations, counted):
        self.forward(counted, **options)
        assert len(counted.launches) <= launches
        assert len(counted.operations) <= operations

    def test_the_order_is_not_computed_unasked(self, counted):
        self.forward(counted, weight=(1.0, 0.0, 0.0), mask_same_class=True)
        assert "describe_kernel" in counted.launches and "scan_kernel" not in counted.launches
