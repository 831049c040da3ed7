"""Unit rows and the gradient's epilogue of the compiled CPU module, against the same steps in torch operations in fp64.

Every instruction set, matrices by rows and by columns with gaps, on either side of a vector and of a strip of four.
"""

import family
import pytest
import torch
from test_low_latency import MODULE, NEEDS_MODULE

from mcld_kernels import backends
from mcld_kernels.kernels import GradCoefficients, GradEpilogueArgs, KernelSet, UnitRows

pytestmark = NEEDS_MODULE
ISAS = MODULE.isas() if MODULE else ["fastest"]
# (rows, numbers): one, below a vector of 4, past vectors of 16 and strips of 64, past the parts of a sum.
SHAPES = [(1, 1), (3, 1), (1, 70), (5, 3), (17, 16), (66, 33), (130, 65), (2, 2500), (70, 300)]
EPS = 1e-12


def matrix(n, d, by_columns, generator, gap=3):
    """Random numbers (n, d) whose runs have a gap of NaN between them."""
    shape = (d, n + gap) if by_columns else (n, d + gap)
    whole = torch.full(shape, torch.nan)
    view = whole[:, :n].T if by_columns else whole[:, :d]
    return view.copy_(torch.randn(n, d, generator=generator))


def kernel_sets(isa):
    x = torch.zeros(1, 1)
    with backends.tuned(isa=isa):
        fast = backends.kernel_set("torch", x, x)
    with backends.tuned(compiled=False):
        return fast, backends.kernel_set("torch", x, x), backends.kernel_set("torch", x.double(), x.double())


def check(got, exact, eager):
    """Twice the error of the torch operations, and one rounding."""
    size = float(exact.abs().max())
    bar = 2 * float((eager.double() - exact).abs().max()) + 4 * torch.finfo(torch.float32).eps * size
    error = float((got.double() - exact).abs().max())
    assert error <= bar, (error, bar)


def double(x):
    if isinstance(x, UnitRows):
        return UnitRows(rows=x.rows.double(), inv_norm=x.inv_norm.double(), n=x.n, d=x.d)
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["rows", "columns"])
def by_columns(request):
    return request.param


@pytest.fixture
def steps(monkeypatch):
    """The names of the steps that fell back to torch operations, of kernel sets that may be compiled."""
    seen = []
    for name in ("l2_normalize", "grad_epilogue"):
        step = getattr(KernelSet, name)

        def record(self, *args, step=step, name=name):
            if self.tuning.compiled:
                seen.append(name)
            return step(self, *args)

        monkeypatch.setattr(KernelSet, name, record)
    return seen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unit_rows(shape, isa, by_columns, steps):
    x = matrix(*shape, by_columns, torch.Generator().manual_seed(0))
    fast, eager, exact = kernel_sets(isa)
    got, eager, exact = (k.l2_normalize(double(x) if k is exact else x, dtype, EPS) for k, dtype in
                         ((fast, torch.float32), (eager, torch.float32), (exact, torch.float64)))  # fmt: skip
    check(got.inv_norm, exact.inv_norm, eager.inv_norm)
    check(got.rows, exact.rows, eager.rows)
    assert not steps


def test_rows_without_direction_and_rows_that_are_not_finite(isa, by_columns):
    x = matrix(70, 9, by_columns, torch.Generator().manual_seed(0))
    x[0], x[1] = 0, 1e-14
    x[2, 3], x[66, 4], x[67, 5], x[68, 0] = torch.nan, 3e38, torch.inf, -torch.inf
    got = kernel_sets(isa)[0].l2_normalize(x, torch.float32, EPS)
    assert got.inv_norm[:2].tolist() == [0, 0] and not got.rows[:2].any()
    assert got.inv_norm[[2, 66, 67, 68]].isnan().all() and got.rows[[2, 66, 67, 68]].isnan().all()
    others = [i for i in range(70) if i not in (0, 1, 2, 66, 67, 68)]
    assert torch.isfinite(got.rows[others]).all()


def epilogue_args(shape, by_columns, partner_rows, offset, means, accumulate, start):
    """Arguments for rows start to start + n of unit rows, of which some have a partner."""
    g = torch.Generator().manual_seed(1)
    (n, d), total = shape, start + shape[0] + 2
    unit = UnitRows(rows=matrix(total, d, by_columns, g), inv_norm=torch.rand(total, generator=g) + 0.5, n=total, d=d)
    unit.rows[start] = 0  # a row without direction
    partner = UnitRows(
        rows=matrix(partner_rows, d, by_columns, g), inv_norm=torch.ones(partner_rows), n=partner_rows, d=d
    )
    coefficients = GradCoefficients(
        partner=torch.rand(n, generator=g),
        product=torch.rand(n, generator=g),
        class_mean=torch.rand(n, generator=g) if means else None,
    )
    return GradEpilogueArgs(
        out=matrix(total, d, by_columns, g),
        unit=unit,
        rows=slice(start, start + n),
        product=matrix(n, d + 2, by_columns, g),
        coefficients=coefficients,
        partner=partner,
        offset=offset,
        class_means=matrix(4, d, False, g) if means else None,
        class_index=torch.randint(4, (total,), generator=g) if means else None,
        accumulate=accumulate,
    )


def apply(kernels, args, dtype):
    """The gradient that a kernel set writes for copies of the arguments."""

    def copy(x):
        if isinstance(x, UnitRows):
            return UnitRows(rows=copy(x.rows), inv_norm=copy(x.inv_norm), n=x.n, d=x.d)
        if isinstance(x, GradCoefficients):
            return GradCoefficients(partner=copy(x.partner), product=copy(x.product), class_mean=copy(x.class_mean))
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    # In the same layout.
    out, product = (torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) for x in (args.out, args.product))
    fields = {name: copy(getattr(args, name)) for name in args.__dataclass_fields__} | {"out": out, "product": product}
    kernels.grad_epilogue(GradEpilogueArgs(**fields))
    return out


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("partners", ["all", "some", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_by_rows(shape, partners, accumulate, isa, by_columns, steps):
    n = shape[0]
    start = 2
    count, offset = {"all": (n + 9, 3), "some": (max(1, n // 2), -start - 1), "none": (4, -(n + 50))}[partners]
    # Some rows by columns without a partner, and class means by columns: torch operations.
    means = partners != "none" and not by_columns
    args = epilogue_args(shape, by_columns, count, offset, means, accumulate, start)
    fast, eager, exact = kernel_sets(isa)
    got, eager, exact = (
        apply(kernels, args, dtype)
        for kernels, dtype in ((fast, torch.float32), (eager, torch.float32), (exact, torch.float64))
    )
    rows = slice(start, start + n)
    check(got[rows], exact[rows], eager[rows])
    untouched = [i for i in range(args.out.shape[0]) if not start <= i < start + n]
    assert torch.equal(got[untouched], args.out[untouched])
    assert not steps or (by_columns and partners == "some")


@pytest.mark.parametrize("class_mean", [False, True], ids=["without", "with"])
def test_the_gradient_is_orthogonal_to_its_row(class_mean, isa, by_columns):
    args = epilogue_args((70, 300), by_columns, 90, 1, class_mean and not by_columns, False, 0)
    out = apply(kernel_sets(isa)[0], args, torch.float32).double()[:70]
    x = args.unit.rows.double()[:70]
    assert float((out * x).sum(1).abs().max()) < 1e-4 * float(out.norm(dim=1).max() * x.norm(dim=1).max())


def test_the_number_of_threads_changes_nothing(isa, by_columns):
    kernels = kernel_sets(isa)[0]
    x = matrix(700, 301, by_columns, torch.Generator().manual_seed(0))
    args = epilogue_args((700, 301), by_columns, 720, 1, not by_columns, True, 0)

    def evaluate():
        unit = kernels.l2_normalize(x, torch.float32, EPS)
        return unit.rows, unit.inv_norm, apply(kernels, args, torch.float32)[:700]

    first, *others = family.by_threads(evaluate, (1, 2, 3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_other_memory_takes_torch_operations(isa, steps):
    kernels, eager, _ = kernel_sets(isa)
    for x in (torch.randn(6, 10)[:, ::2], torch.randn(5, 8).double(), torch.randn(5, 8).half(), torch.randn(0, 3)):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        assert torch.equal(kernels.l2_normalize(x, dtype, EPS).rows, eager.l2_normalize(x, dtype, EPS).rows)
    assert steps == ["l2_normalize"] * 4


def test_an_unknown_instruction_set_is_an_error():
    with pytest.raises(ValueError, match="instruction set"):
        MODULE.normalize(99, 1, 0, 0, 0, 0, 0, 0, 0, 0.0, False)
    with pytest.raises(ValueError, match="instruction set"):
        MODULE.grad_epilogue(-1, 1, *[0] * 19, False, False)
