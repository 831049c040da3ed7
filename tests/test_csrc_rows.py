"""Rows by vectors: l2_normalize and grad_epilogue access 16 bytes a lane where addresses allow it.

Run in host emulation, where a misaligned vector access is an error and each access is counted, so that a test sees
which path ran: 16 or 8 bytes or single elements, a row held in registers or read twice.
"""

from __future__ import annotations

import re

import cases
import csrc_host
import pytest
import torch
from torch import Tensor

from mcld_kernels.backends.cuda import extension

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TYPE = {FP32: 0, FP16: 1, BF16: 2}
PRECISION = {BF16: 0, FP16: 1, FP32: 3}
SHORT_ROW = 1024  # a row of at most so many elements is held in registers

# A short row, the longest of them, the shortest of the others, 8 bytes in 16-bit types, 4 bytes there, odd.
SIZES = (1000, 1024, 1032, 100, 130, 37)


@pytest.fixture(scope="module")
def module():
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")
    return csrc_host.load()


@pytest.fixture
def emulated(module):
    with extension.use(module):
        yield


def padded(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit


def pitch_of(d: int) -> int:
    return 64 if d <= 64 else padded(d, 128)


def part(rows: int, columns: int, before: int, after: int):
    """A maker of (base, view): the view's rows are ``before`` elements into those of the base."""

    def make(x: Tensor) -> tuple[Tensor, Tensor]:
        n, d = x.shape
        base = x.new_full((rows * n, (before + d + after) * columns), 7)
        view = base[::rows, before : before + d * columns : columns]
        view.copy_(x)
        return base, view

    return make


def odd_element(x: Tensor) -> tuple[Tensor, Tensor]:
    base = x.new_full((x.numel() + 1,), 7)
    view = base[1:].view(x.shape)
    view.copy_(x)
    return base, view


def transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    base = x.T.contiguous()
    return base, base.T


VIEWS = {
    "contiguous": part(1, 1, 0, 0),
    "every second row": part(2, 1, 0, 0),
    "from column 8": part(1, 1, 8, 8),
    "pitch of 4": part(1, 1, 0, 4),
    "from column 1": part(1, 1, 1, 7),
    "odd pitch": part(1, 1, 0, 1),
    "odd element": odd_element,
    "strided": part(1, 2, 0, 0),
}


def width_of(x: Tensor, *dtypes: torch.dtype) -> int:
    """The elements that are to be taken at once of rows x, with other matrices of ``dtypes`` that are aligned."""
    widest = 16 // max(dtype.itemsize for dtype in (x.dtype, *dtypes))
    for width in (8, 4):
        size = min(16, width * x.element_size())
        aligned = x.data_ptr() % size == 0 and x.stride(0) * x.element_size() % size == 0
        if width <= widest and x.stride(1) == 1 and x.shape[1] % width == 0 and aligned:
            return width
    return 1


class Accesses:
    """Vector accesses by size: those expected, and those made since this was made."""

    def __init__(self, module):
        self._module, self._expected = module, {8: 0, 16: 0}
        self._before = self._now()

    def _now(self) -> dict[int, int]:
        return {size: self._module.vector_accesses(size) for size in (8, 16)}

    def expect(self, count: int, width: int, dtype: torch.dtype) -> None:
        if width > 1:
            self._expected[min(16, width * dtype.itemsize)] += count

    def check(self) -> None:
        assert {size: now - self._before[size] for size, now in self._now().items()} == self._expected


def rows_to_normalize(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (n, d) of which some rows are special, and norms (n,): inf for one below eps, NaN for one not finite."""
    generator = torch.Generator().manual_seed(d)
    x = (torch.randn(n, d, generator=generator) * torch.linspace(0.5, 40, n)[:, None]).to(dtype)
    x[1] = 0
    x[3, d // 2], x[4, d - 1] = torch.inf, torch.nan
    if dtype != FP16:
        x[5], x[6] = 1e-18, 1e30  # a norm below eps, and one whose square overflows
    norms = x.double().norm(dim=1)
    norms[3] = torch.nan
    norms[norms.square() > 3.4e38] = torch.nan
    norms[norms <= 1e-12] = torch.inf
    return x, norms


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize(
    ("logits", "operand"),
    [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (BF16, FP32), (FP16, FP32), (FP16, BF16)],
    ids=lambda dtype: cases.short(dtype),
)
def test_normalize(module, logits, operand, d, view):
    n, pitch = 9, pitch_of(d)
    x, norms = rows_to_normalize(n, d, logits)
    _, x = VIEWS[view](x)
    out = torch.full((128, pitch), torch.nan, dtype=operand)
    inv_norm = torch.full((n,), 5.0)
    accesses = Accesses(module)
    module.normalize_rows(
        x=x.data_ptr(), row_stride=x.stride(0), column_stride=x.stride(1), out=out.data_ptr(),
        inv_norm=inv_norm.data_ptr(), square_sums=0, n=n, d=d, padded_rows=128, pitch=pitch, splits=0, eps=1e-12,
        type=TYPE[logits], precision=PRECISION[operand], device=0, stream=0,
    )  # fmt: skip
    width = width_of(x, operand)
    accesses.expect(n * d // width * (1 if pitch <= SHORT_ROW else 2), width, logits)
    accesses.expect(128 * pitch // width, width, operand)
    accesses.check()

    torch.testing.assert_close(inv_norm.double(), 1 / norms, rtol=1e-6, atol=0, equal_nan=True)
    want = torch.where(norms.isinf(), 0.0, 1.0)[:, None] * x.double() / norms[:, None]
    want[norms.isnan()] = torch.nan
    rounding = max(torch.finfo(operand).eps / 2, 1e-6)
    torch.testing.assert_close(out[:n, :d].double(), want, rtol=rounding * 1.01, atol=1e-7, equal_nan=True)
    assert not out[n:].any()
    assert not out[:, d:].any()


def unit_rows(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """An operand (128, pitch)."""
    out = torch.zeros(128, pitch_of(d), dtype=dtype)
    out[:n, :d] = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1).to(dtype)
    return out


@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("view", [*VIEWS, "transposed"])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize(
    ("operand", "gradient"),
    [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, BF16)],
    ids=lambda dtype: cases.short(dtype),
)
def test_grad_epilogue(module, operand, gradient, d, view, add):
    n, others, num_classes, offset, pitch = 9, 7, 3, -1, pitch_of(d)
    generator = torch.Generator().manual_seed(d)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    unit, partner = unit_rows(n, d, operand, generator), unit_rows(others, d, operand, generator)
    product, means = torch.zeros(n, pitch), torch.zeros(num_classes, pitch)
    product[:, :d], means[:, :d] = normal(n, d), normal(num_classes, d)
    product_coef, partner_coef, class_mean_coef, inv_norm = normal(n), normal(n), normal(n), normal(n).abs()
    class_index = torch.tensor([0, 1, -1, 2, 2, -1, 0, 1, 1])
    class_mean_coef[class_index < 0] = 0
    unit[1], inv_norm[1] = 0, 0  # a row without direction
    product[3, d // 2] = torch.inf
    inv_norm[4] = torch.nan
    make = transposed if view == "transposed" else VIEWS[view]
    base, out = make(normal(n, d).to(gradient))
    before, base_before = out.double(), base.clone()
    projection = torch.full((n,), torch.nan) if view == "transposed" else None
    accesses = Accesses(module)
    module.grad_epilogue(
        out=out.data_ptr(), row_stride=out.stride(0), column_stride=out.stride(1), unit=unit.data_ptr(),
        partner=partner.data_ptr(), class_means=means.data_ptr(), inv_norm=inv_norm.data_ptr(),
        product=product.data_ptr(), product_coef=product_coef.data_ptr(), partner_coef=partner_coef.data_ptr(),
        class_mean_coef=class_mean_coef.data_ptr(), class_index=class_index.data_ptr(),
        projection=0 if projection is None else projection.data_ptr(), rows=n, d=d, pitch=pitch, product_pitch=pitch,
        offset=offset, partner_rows=others, accumulate=add, type=TYPE[gradient],
        precision=PRECISION[operand], device=0, stream=0,
    )  # fmt: skip

    rows = torch.arange(n)
    paired = (rows + offset >= 0) & (rows + offset < others)
    # Of the transposed gradient the operands alone are taken by vectors, for the dot products, also where d is odd.
    width = width_of(out, operand) if projection is None else 16 // operand.itemsize
    steps = -(-d // width) * (1 if d <= SHORT_ROW or projection is not None else 2)
    accesses.expect(steps * n, width, FP32)
    accesses.expect(steps * (n + int(paired.sum())), width, operand)
    accesses.expect(steps * int((class_index >= 0).sum()), width, FP32)
    if projection is None:
        accesses.expect(d // width * n * (2 if add else 1), width, gradient)
    accesses.check()

    x, p, m = unit[:n, :d].double(), torch.zeros(n, d).double(), torch.zeros(n, d).double()
    p[paired] = partner[(rows + offset)[paired], :d].double()
    m[class_index >= 0] = means[class_index[class_index >= 0], :d].double()
    g = product_coef[:, None] * product[:, :d].double() - partner_coef[:, None] * p + class_mean_coef[:, None] * (p - m)
    along = (g * x).sum(1) / x.square().sum(1).clamp(min=1e-30)
    along[1] = 0
    want = (g - along[:, None] * x) * inv_norm[:, None].double() + (before if add else 0)
    want[3] = torch.nan
    error = (out.double() - want).norm(dim=1)
    bound = max(torch.finfo(gradient).eps, 1e-6) * (g.norm(dim=1) * inv_norm + want.norm(dim=1))
    regular = ~torch.isin(rows, torch.tensor([3, 4]))
    assert (error <= bound)[regular].all()
    assert not out[3].isfinite().any()
    assert out[4].isnan().all()
    # Nothing beside the view is touched.
    out.fill_(0)
    torch.as_strided(base_before, out.shape, out.stride(), out.storage_offset()).fill_(0)
    assert torch.equal(base, base_before)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=cases.short)
@pytest.mark.parametrize(("batch", "classes"), [(24, 40), (9, 1000)])
def test_low_latency(module, emulated, batch, classes, dtype, poison):
    """The five launches take rows by vectors too, and where they cannot the error is the same."""
    weight = (1.0, 0.7, 0.4 if classes < 100 else 0.0)
    cases.check("cuda", "cpu", "random", batch, classes, dtype, draws=1, ignored=0.2, weight=weight)
    student, teacher = cases.logits("random", batch, classes, dtype)
    target = cases.labels(batch, classes)
    made, losses = [], []
    for view in ("contiguous", "odd element"):
        before = module.vector_accesses(16)
        _, a = VIEWS[view](student)
        _, k = VIEWS[view](teacher)
        losses.append(cases.run("cuda", a, k, target, weight=weight).loss)
        made.append(module.vector_accesses(16) - before)
    # Of two logits read and two operands written, by vectors or not.
    padded_batch, width = 128, 16 // dtype.itemsize
    assert made[0] - made[1] == 2 * (batch * classes + padded_batch * pitch_of(classes)) // width
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6 if dtype == FP32 else 1e-3, atol=0)


def test_a_misaligned_vector_access_is_an_error(module):
    """On a GPU it is a fault."""
    x, factor = torch.ones(129, 64), torch.ones(128)
    for side in ("x", "out"):
        pointers = {"x": x.data_ptr(), "out": torch.empty(129, 64).data_ptr()}
        pointers[side] += 4
        with pytest.raises(RuntimeError, match="misaligned access of 16 bytes"):
            module.scale_rows(
                **pointers, factor=factor.data_ptr(), rows=128, padded_rows=128, pitch=64, precision=PRECISION[FP32],
                device=0, stream=0,
            )  # fmt: skip


def arguments_of(launcher) -> dict[str, float]:
    """Zeros for all arguments."""
    names = re.search(r"Keyword arguments: (.*)", launcher.__doc__)
    return dict.fromkeys(names[1].split(", "), 0)


def test_pairs_of_types_that_no_kernel_is_for(module):
    fields = {**arguments_of(module.normalize_rows), "type": TYPE[BF16], "precision": PRECISION[FP16]}
    with pytest.raises(ValueError, match="operands of fp16 are made of logits of fp16"):
        module.normalize_rows(**fields)
    fields = {**arguments_of(module.grad_epilogue), "precision": PRECISION[FP16]}
    for dtype in (BF16, FP16):
        with pytest.raises(ValueError, match="a gradient of fp16 logits is held in fp32"):
            module.grad_epilogue(**fields | {"type": TYPE[dtype]})


def test_a_gradient_by_columns_takes_padded_operands_alone(module):
    fields = {**arguments_of(module.grad_epilogue), "projection": torch.empty(1).data_ptr(), "rows": 1, "d": 5}
    for pitches in ({"pitch": 64, "product_pitch": 5}, {"pitch": 5, "product_pitch": 64}):
        with pytest.raises(ValueError, match="aligned to 16 bytes"):
            module.grad_epilogue(**fields | pitches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": PRECISION[FP16]}, "teacher anchors have no range in fp16"),
        ({"gradient_type": TYPE[BF16]}, "held in bf16 for bf16 logits, else in fp32"),
        ({"type": TYPE[BF16]}, "held in bf16 for bf16 logits, else in fp32"),
    ],
    ids=["fp16 teacher anchors", "gradient", "logits"],
)
def test_low_latency_calls_that_no_kernel_is_for(module, changes, message):
    class Changed:
        def __getattr__(self, name):
            launcher = getattr(module, name)
            return (lambda **fields: launcher(**fields | changes)) if name == "low_latency" else launcher

    student, teacher = cases.logits("random", 7, 5, FP32)
    with extension.use(Changed()), pytest.raises(ValueError, match=message):
        cases.run("cuda", student, teacher, cases.labels(7, 5), direction="teacher")
