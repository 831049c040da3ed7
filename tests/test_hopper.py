"""The Hopper kernels in host emulation, called as backend "cuda" calls them, and the rule by which it takes them.

The emulation reads tiles through the wgmma descriptors and swizzles that the kernels make, delivers TMA loads and runs
wgmma as late as a GPU may, and stops at a deadlock (tests/csrc_host/emulation_sm90.h). Its model of the instructions is
checked on hardware by the test marked gpu.
"""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import cases
import csrc_host
import pytest
import torch

from mcld_kernels import backends
from mcld_kernels.backends.cuda import extension, hopper, tuning

TEMPERATURE = 0.2
PRECISION = {torch.bfloat16: 0, torch.float16: 1}
# Half an ulp of the type E is rounded to, and a little for fp32 sums and exp2.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
FP32 = 4e-6

# n, m, d, offset of the positive. Tiles are 128 x 256 in product 1 and 128 x 128 or 64 in flash, slices 64 deep.
SIMILARITY_SHAPES = [
    (1, 1, 1, 0),
    (5, 3, 7, 1),
    (128, 256, 64, 0),
    (129, 257, 65, 0),  # one past every tile
    (200, 513, 321, -7),  # more slices than stages, positives before the first candidate
    (70, 300, 100, 290),  # positives past the last candidate
]
# And the slices that the second warpgroup begins behind the first: one, half of the stages, all of them, and more than
# there are. Blocks with several tiles.
SKEWED_SHAPES = [
    (129, 257, 65, 0, 1),
    (200, 513, 321, -7, 2),
    (129, 600, 70, 3, 4),
    (300, 300, 20, 0, 2),
]
FLASH_SHAPES = [
    # splits last
    (1, 1, 1, 0, 1),
    (130, 300, 64, 3, 3),
    (70, 290, 100, -7, 2),
    (130, 1200, 100, 40, 1),  # an even number of tiles, several rounds of the ring
    (130, 900, 105, 20, 2),  # one column too many for the narrow product; an odd number of tiles
    (129, 700, 129, 5, 2),  # several rounds of the ring
    (65, 449, 250, 380, 1),
]


@pytest.fixture(scope="module")
def emulated():
    if csrc_host.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return csrc_host.load()


def padded(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit


def operand(n: int, d: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Unit rows (n, d) as the kernels take them: zeros up to 128 rows and a pitch of 64."""
    x = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.double))
    out = torch.zeros(padded(n, 128), padded(d, 64), dtype=dtype)
    out[:n, :d] = x.to(dtype)
    return out.to(device)


def exponentials(a, k, n, m, offset, scale, shift):
    """E (n, m) in fp64, from the rounded operands."""
    e = torch.exp2(a[:n].double() @ k[:m].double().T * scale - shift)
    e[torch.arange(m, device=e.device) == torch.arange(n, device=e.device)[:, None] + offset] = 0
    return e


def scale_and_shift(dtype: torch.dtype) -> tuple[float, float]:
    scale = math.log2(math.e) / TEMPERATURE
    return scale, scale - (3 if dtype == torch.float16 else 0)


def check_similarity(module, shape, dtype, device="cpu", stream=0, skew=0, cluster=1):
    torch.manual_seed(0)
    n, m, d, offset = shape
    a, k = operand(n, d, dtype, device), operand(m, d, dtype, device)
    rows, columns = padded(n, 128), padded(m, 128)
    scale, shift = scale_and_shift(dtype)
    e = torch.full((rows, columns), torch.nan, dtype=dtype, device=device)
    sums = torch.full((padded(columns, 256) // 256, rows), torch.nan, device=device)
    module.hopper_similarity(
        anchors=a.data_ptr(), candidates=k.data_ptr(), exponentials=e.data_ptr(), row_sums=sums.data_ptr(),
        row_maxima=0, column_sums=0, anchor_keys=0, candidate_keys=0, split_products=0, splits=1, rows=n, m=m,
        pitch=a.shape[1], exp_pitch=columns, padded_rows=rows, offset=offset, scale_log2=scale, shift=shift,
        precision=PRECISION[dtype], skew=skew, cluster=cluster, device=0, stream=stream,
    )  # fmt: skip
    want = torch.zeros(rows, columns, dtype=torch.double, device=device)
    want[:n, :m] = exponentials(a, k, n, m, offset, scale, shift)
    error = (e.double() - want).abs()
    # Subnormal fp16 numbers are evenly spaced.
    assert (error <= want * (ROUNDING[dtype] + FP32) + 2**-25).all()
    total = want.sum(1)
    assert ((sums.double().sum(0) - total).abs() <= total * FP32).all()


def check_form_of_similarity(module, shape, dtype, device="cpu", stream=0):
    *shape, skew, cluster = shape
    check_similarity(module, shape, dtype, device, stream, skew, cluster)


def check_flash(module, shape, dtype, device="cpu", stream=0):
    torch.manual_seed(0)
    n, m, d, offset, splits = shape
    a, k = operand(n, d, dtype, device), operand(m, d, dtype, device)
    rows, pitch = padded(n, 128), a.shape[1]
    scale, shift = scale_and_shift(dtype)
    out = torch.full((splits, rows, pitch), torch.nan, device=device)
    sums = torch.full((splits, rows), torch.nan, device=device)
    module.hopper_flash(
        anchors=a.data_ptr(), candidates=k.data_ptr(), product=out.data_ptr(), row_sums=sums.data_ptr(), row_maxima=0,
        candidate_factor=0, candidate_shift=0, anchor_keys=0, candidate_keys=0, n=n, m=m, d=d, pitch=pitch,
        padded_rows=rows, offset=offset, splits=splits, scale_log2=scale, shift=shift, precision=PRECISION[dtype],
        device=0, stream=stream,
    )  # fmt: skip
    e = exponentials(a, k, n, m, offset, scale, shift)
    total = e.sum(1)
    assert ((sums.double().sum(0)[:n] - total).abs() <= total * FP32).all()
    error = (out.double().sum(0)[:n] - e @ k[:m].double()).abs()
    # Each exponential is rounded once; sums over the candidates cancel, so the bound is on the sum of magnitudes.
    assert (error <= (e @ k[:m].double().abs() + 2**-25 * m) * (ROUNDING[dtype] + FP32) + 2**-25).all()
    assert out.isfinite().all(), "padding rows are written, and hold no NaN"


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("shape", SIMILARITY_SHAPES, ids=str)
@pytest.mark.parametrize("cluster", [1, 2])
def test_similarity(emulated, cluster, shape, dtype):
    check_similarity(emulated, shape, dtype, cluster=cluster)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("shape", FLASH_SHAPES, ids=str)
def test_flash(emulated, shape, dtype):
    check_flash(emulated, shape, dtype)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("shape", SKEWED_SHAPES, ids=str)
@pytest.mark.parametrize("cluster", [1, 2])
def test_similarity_with_a_skew(emulated, cluster, shape, dtype):
    check_form_of_similarity(emulated, (*shape, cluster), dtype)


@pytest.mark.parametrize("cluster", [1, 2])
def test_similarity_takes_every_tile_once(emulated, cluster):
    """33 rows of tiles: bands of 16 and one row more, of tiles or of clusters, whose last has one tile.

    NaN in E or in a sum would be a tile nobody took.
    """
    check_similarity(emulated, (4160, 260, 20, 0), torch.bfloat16, cluster=cluster)


def test_a_cluster_of_another_size_is_refused(emulated):
    with pytest.raises(ValueError, match="a cluster has 1 or 2 blocks; got 3"):
        check_similarity(emulated, (5, 3, 7, 1), torch.bfloat16, cluster=3)


@pytest.mark.parametrize("kernel", ["hopper_similarity", "hopper_flash"])
def test_operands_that_no_tensor_map_is_of(emulated, kernel):
    """The driver refuses the map of a matrix that does not begin at a multiple of 16 bytes."""
    names = re.search(r"Keyword arguments: (.*)", getattr(emulated, kernel).__doc__)[1].split(", ")
    sizes = {"rows": 1, "n": 1, "m": 1, "d": 64, "pitch": 64, "exp_pitch": 128, "padded_rows": 128, "splits": 1}
    fields = dict.fromkeys(names, 0) | {name: size for name, size in sizes.items() if name in names}
    fields |= {"product": 16} if kernel == "hopper_flash" else {"cluster": 1}
    emulated.stub_launches(1)
    try:
        getattr(emulated, kernel)(**fields | {"anchors": 16, "candidates": 32})
        for addresses in ({"anchors": 16, "candidates": 34}, {"anchors": 18, "candidates": 32}):
            with pytest.raises(RuntimeError, match="no tensor map"):
                getattr(emulated, kernel)(**fields | addresses)
    finally:
        emulated.stub_launches(0)


def test_sums_alone(emulated):
    """Without E, as when the student needs no gradient."""
    a, k = operand(130, 40, torch.bfloat16, "cpu"), operand(300, 40, torch.bfloat16, "cpu")
    scale, shift = scale_and_shift(torch.bfloat16)
    sums = torch.full((2, 256), torch.nan)
    emulated.hopper_similarity(
        anchors=a.data_ptr(), candidates=k.data_ptr(), exponentials=0, row_sums=sums.data_ptr(), row_maxima=0,
        column_sums=0, anchor_keys=0, candidate_keys=0, rows=130, m=300, pitch=64, exp_pitch=384, padded_rows=256,
        split_products=0, splits=1, offset=0, scale_log2=scale, shift=shift, precision=0, skew=0, cluster=1,
        device=0, stream=0,
    )  # fmt: skip
    total = exponentials(a, k, 130, 300, 0, scale, shift).sum(1)
    assert ((sums.double().sum(0)[:130] - total).abs() <= total * FP32).all()


# Off and unmeasured take the portable kernels, whose values other tests hold to the bar: one dtype shows the choice.
TAKEN = [*(("1", dtype) for dtype in PRECISION), ("0", torch.bfloat16), (None, torch.bfloat16)]


@pytest.mark.parametrize(
    ("kernel", "classes", "cluster"),
    [("hopper_flash", 100, 1), ("hopper_similarity", 300, 1), ("hopper_similarity", 300, 2)],
)
@pytest.mark.parametrize(("setting", "dtype"), TAKEN, ids=str)
def test_the_backend_with_them_stays_right(emulated, monkeypatch, poison, setting, kernel, classes, cluster, dtype):
    """The whole loss and gradient, with the kernels taken at the small shapes that an emulation can do."""
    monkeypatch.delenv("MCLD_HOPPER", raising=False)
    if setting is not None:
        monkeypatch.setenv("MCLD_HOPPER", setting)
    called, clusters = set(), set()

    class Spy:
        def __getattr__(self, name):
            called.add(name)
            return self.on_hopper if name == "hopper_similarity" else getattr(emulated, name)

        def on_hopper(self, **arguments):
            clusters.add(arguments["cluster"])
            emulated.hopper_similarity(**arguments)

    fields = {"low_latency_limit": 0, "min_hopper_similarity_tiles": 1, "min_hopper_flash_tiles": 1}
    fields["hopper_cluster"] = cluster
    with extension.use(Spy()), backends.tuned(**fields):
        cases.check("cuda", "cpu", "random", 150, classes, dtype, draws=1, temperature=0.2)
    assert (kernel in called) == (setting == "1")
    assert clusters <= {cluster} and bool(clusters) == (setting == "1" and kernel == "hopper_similarity")


# On hardware each shape is a test of its own: what is wrong shows by the shapes that fail. 512 tiles, and 632, are more
# than there are blocks; 1 to 3 are the skews that calibration tries.
LARGE_SHAPES = [(4096, 4096, 1000, 0), (1000, 20000, 300, 17)]
ON_HOPPER = [
    *((check_similarity, shape) for shape in [*SIMILARITY_SHAPES, *LARGE_SHAPES]),
    *((check_flash, shape) for shape in [*FLASH_SHAPES, (4096, 4096, 100, 0, 4), (1000, 20000, 250, 17, 16)]),
]
FORMS_ON_HOPPER = [
    *((*shape, cluster) for shape in SKEWED_SHAPES for cluster in (1, 2)),
    *((*shape, 0, 2) for shape in [*SIMILARITY_SHAPES, *LARGE_SHAPES]),
    *((*shape, skew, 1) for shape in LARGE_SHAPES for skew in (1, 2, 3)),
    *((*shape, 2, 2) for shape in LARGE_SHAPES),
]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize(("check", "shape"), ON_HOPPER, ids=lambda x: x.__name__ if callable(x) else str(x))
def test_on_hopper(check, shape, dtype):
    module, reason = extension.load()
    if not hasattr(module, "hopper_similarity"):
        pytest.skip(reason or "the compiled module holds no Hopper kernels")
    check(module, shape, dtype, device="cuda", stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


# A test of its own, which the GPU report runs in a phase of its own: a form that hangs is off by default, and must not
# cost the measurements of the kernels as they are.
@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("shape", FORMS_ON_HOPPER, ids=str)
def test_form_on_hopper(shape, dtype):
    test_on_hopper(check_form_of_similarity, shape, dtype)


def test_taken_only_where_they_can_run(monkeypatch):
    module, without = SimpleNamespace(hopper_similarity=None), SimpleNamespace()
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert hopper.unsupported_reason(module, cpu, bf16) is None
    assert "90a" in hopper.unsupported_reason(without, cpu, bf16)
    assert "16-bit" in hopper.unsupported_reason(module, cpu, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "9.0" in hopper.unsupported_reason(module, torch.device("cuda"), bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert hopper.unsupported_reason(module, torch.device("cuda"), bf16) is None


@pytest.fixture
def chosen(emulated):
    """The tuning and constants of a kernel set."""
    logits = torch.zeros(1, 1)
    with extension.use(emulated):
        return backends.kernel_set("cuda", logits, logits).tuning, emulated.constants


def test_small_work_stays_with_the_portable_kernels(chosen):
    assert tuning.takes_hopper_similarity(*chosen, 4096, 4096)
    assert not tuning.takes_hopper_similarity(*chosen, 1024, 1024)
    assert tuning.hopper_flash_splits(*chosen, 256, 256, 128) == 0
    assert tuning.hopper_flash_splits(*chosen, 4096, 4096, 320) == 0, "no kernel for this pitch"


def test_candidates_are_split_over_a_second_round(chosen):
    """The category-wise term of ImageNet-21k at B = 256: 171 tiles of anchors for 132 blocks."""
    assert tuning.hopper_flash_splits(*chosen, 21841, 21841, 256) == 3
    assert tuning.flash_splits(*chosen, 21841, 21841) == 3
    assert tuning.hopper_flash_splits(*chosen, 65536, 65536, 128) == 1, "full rounds"
    assert tuning.hopper_flash_splits(*chosen, 65536, 300, 256) == 1, "few candidates"


@pytest.mark.parametrize(
    "shape", [(4096, 4096, 128), (100, 200_000, 64), (65536, 300, 256), (21841, 21841, 256)], ids=str
)
def test_splits_leave_no_part_without_candidates(chosen, shape):
    anchors, candidates, pitch = shape
    fields, constants = chosen
    splits = tuning.hopper_flash_splits(fields, constants, anchors, candidates, pitch)
    tiles = math.ceil(candidates / constants["hopper_flash_columns"][pitch])
    assert 1 <= splits <= tiles
    # No more rounds of blocks than without splits take for as many tiles of candidates each.
    rows = math.ceil(anchors / constants["hopper_flash_rows"])
    rounds, alone = math.ceil(rows * splits / fields.hopper_blocks), math.ceil(rows / fields.hopper_blocks)
    assert rounds * math.ceil(tiles / splits) <= alone * tiles
    assert rounds == 1 or splits == 1 or shape == (21841, 21841, 256)
