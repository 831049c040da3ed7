"""The CUDA kernels as nvcc compiles them: their PTX, run by the interpreter of tests/ptx, against the fp64 reference.

Covered beside what test_csrc_host.py covers: inline assembly, vector accesses and their alignment, CUB's sums, the
exponentials and logarithms of CUDA's library, the layout of parameters, descriptors and barriers as compiled. Not
covered: ptxas, the order of memory accesses, speed.
"""

import os
import subprocess
import sys
from pathlib import Path

import cases
import csrc_host
import pytest
import torch
from test_csrc_host import Rounded, round_tf32
from test_hopper import FLASH_SHAPES, PRECISION, SIMILARITY_SHAPES, check_flash, check_similarity

from mcld_kernels import backends
from mcld_kernels.backends.cuda import extension
from mcld_kernels.reference import mcld as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATHS = {
    "low latency": {},
    "flash": {"low_latency_limit": 0},
    "two products": {"low_latency_limit": 0, "flash_row_bytes": 0},
}
BY_DTYPE = dict(zip(map(cases.short, DTYPES), DTYPES, strict=True))
OPTIONS = {
    "student": {},
    "symmetric": {"direction": "symmetric", "mask_same_class": True, "present_only": True},
    "cold": {"direction": "teacher", "temperature": 0.015},
}
_SPLIT = {"min_split_depth": 64, "max_large_tile_splits": 5, "max_small_tile_splits": 5}
_CATEGORY = {"weight": (0.0, 0.0, 1.0), "direction": "symmetric"}
FORMS = {
    "large tiles": ((140, 130), {"direction": "teacher"}, {"min_large_tiles": 0, "chunk_bytes": 1}),
    "large tiles, cold": ((130, 130), {"temperature": 0.02}, {"min_large_tiles": 0, "chunk_bytes": 1}),
    "large tiles, split": ((350, 20), _CATEGORY, {**_SPLIT, "min_large_tiles": 0}),
    "split, cold": ((350, 20), {**_CATEGORY, "temperature": 0.02}, _SPLIT),
}


@pytest.fixture(scope="module")
def module():
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the launchers cannot be compiled for the host")
    return csrc_host.load()


@pytest.fixture(scope="module")
def kernels(module):
    ptx = pytest.importorskip("ptx")
    if csrc_host.nvcc() is None:
        pytest.skip("needs nvcc: set CUDACXX")
    return ptx.Kernels(module)


@pytest.fixture
def compiled(kernels, module):
    """The "cuda" backend launches the compiled kernels."""
    with extension.use(module), kernels.take_launches():
        yield


@pytest.mark.parametrize(
    ("options", "path", "dtype"), cases.alternating({n: n for n in OPTIONS}, {n: n for n in PATHS}, BY_DTYPE)
)
def test_mcld(compiled, path, dtype, options, poison):
    batch, classes = (37, 9) if path == "low latency" else (65, 70)
    with backends.tuned(**PATHS[path]):
        cases.check("cuda", "cpu", "random", batch, classes, dtype, draws=1, ignored=0.2, **OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.short)
@pytest.mark.parametrize("form", FORMS)
def test_tiles_and_splits(compiled, form, dtype, poison):
    """Tiles of 128, chunks, and contractions in parts; the online maximum where the temperature is low."""
    shape, options, tuning = FORMS[form]
    with backends.tuned(**PATHS["two products"], **tuning):
        cases.check("cuda", "cpu", "random", *shape, dtype, draws=1, **options)


@pytest.fixture
def rounds_products(matmul_precision, monkeypatch):
    """A setter of the float32 matmul precision, by which the reference rounds the operands of its products too."""
    plain = reference.similarities

    def set_precision(precision):
        matmul_precision(precision)
        rounding = round_tf32 if precision == "high" else lambda x: x.bfloat16().float()

        def similarities(anchors, candidates, dtype, temperature):
            if dtype != torch.float32:
                return plain(anchors, candidates, dtype, temperature)
            return Rounded.apply(anchors, candidates, rounding) / temperature

        if precision != "highest":
            monkeypatch.setattr(reference, "similarities", similarities)

    return set_precision


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("path", ["flash", "two products"])
def test_float32_matmul_precision(compiled, path, precision, rounds_products):
    rounds_products(precision)
    with backends.tuned(**PATHS[path], min_large_tiles=0):
        cases.check("cuda", "cpu", "random", 67, 130, torch.float32, draws=1, direction="symmetric")


# By float32 matmul precision: path, shape, options, tuning. Flash with pitches of 64 and 128, with the fixed shift and
# the online maximum; contractions in parts; rows by vectors from fp32 to bf16.
PRECISIONS = {
    "high, flash": ("flash", (100, 60), {"temperature": (0.1, 0.02, 0.02)}, {}),
    "high, split": ("two products", (140, 20), _CATEGORY, _SPLIT),
    "high, large tiles, split": ("two products", (140, 20), _CATEGORY, {**_SPLIT, "min_large_tiles": 0}),
    "medium, low latency": ("low latency", (24, 40), {}, {}),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_kernels_of_one_precision(compiled, name, rounds_products, poison):
    path, shape, options, tuning = PRECISIONS[name]
    rounds_products(name.split(",")[0])
    with backends.tuned(**PATHS[path], **tuning):
        cases.check("cuda", "cpu", "random", *shape, torch.float32, draws=1, **options)


@pytest.mark.parametrize(
    ("student", "precision"),
    [(torch.bfloat16, "highest"), (torch.float16, "highest"), (torch.float16, "medium")],
    ids=["bfloat16-highest", "float16-highest", "float16-medium"],
)
def test_half_logits_with_float32_of_the_teacher(compiled, student, precision, rounds_products, poison):
    rounds_products(precision)
    cases.check("cuda", "cpu", "random", 37, 20, student, teacher_dtype=torch.float32, draws=1, ignored=0.2)


@pytest.mark.parametrize(("classes", "dtype"), [(250, torch.bfloat16), (250, torch.float16), (120, torch.float32)])
def test_the_largest_rows_of_flash(compiled, classes, dtype, poison):
    with backends.tuned(**PATHS["flash"]):
        cases.check("cuda", "cpu", "random", 70, classes, dtype, draws=1, temperature=0.02, direction="teacher")


@pytest.mark.parametrize("dtype", PRECISION, ids=cases.short)
@pytest.mark.parametrize("shape", SIMILARITY_SHAPES, ids=str)
@pytest.mark.parametrize("cluster", [1, 2])
def test_hopper_similarity(kernels, module, cluster, shape, dtype):
    with kernels.take_launches():
        check_similarity(module, shape, dtype, cluster=cluster)


@pytest.mark.parametrize("dtype", PRECISION, ids=cases.short)
@pytest.mark.parametrize("shape", FLASH_SHAPES, ids=str)
def test_hopper_flash(kernels, module, shape, dtype):
    with kernels.take_launches():
        check_flash(module, shape, dtype)


# The tests that launch kernels, in emulation or compiled, and hold their values to a bar. Of the views of
# test_csrc_rows.py these two reach every instance.
LAUNCHING = ("test_csrc_host.py", "test_csrc_rows.py", "test_csrc_steps.py", "test_hopper.py", Path(__file__).name)
SELECTED = "(contiguous or transposed or not test_csrc_rows) and not test_every_compiled_kernel"


def test_every_compiled_kernel_is_launched_by_a_test(kernels, tmp_path):
    """Every instance; a kernel that no call reaches is not to be compiled.

    The tests run again in a process of their own, without the kernels, so that no order of tests and no worker matters.
    """
    listed = tmp_path / "launches"
    # Not a worker of pytest-xdist, whatever this process is.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-p", "ptx.recorder", "-p", "no:cacheprovider", "-q", "--tb=no", "-m", "not gpu", "-k", SELECTED]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *LAUNCHING],
        env={**inherited, "MCLD_TEST_LAUNCHES": str(listed), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    # 1: there are failures, of what the kernels have not written.
    assert done.returncode in (0, 1) and listed.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    launched, compiled = set(listed.read_text().splitlines()), kernels.compiled()
    assert sorted(compiled - launched) == [], "compiled, and launched by no test"
    assert sorted(launched - compiled) == [], "launched, and not compiled"


def run_text(body: str, out: torch.Tensor, threads: int = 64, source: torch.Tensor | None = None) -> torch.Tensor:
    """``out`` after a kernel of one block; %rd1 is its address, %rd2 that of ``source``, %r1 the thread."""
    from ptx import machine, program

    text = f""".extern .shared .align 128 .b8 memory[];
.visible .entry probe(
	.param .u64 probe_param_0,
	.param .u64 probe_param_1
)
{{
	.reg .pred %p<9>;
	.reg .b32 %r<9>;
	.reg .f32 %f<9>;
	.reg .b64 %rd<9>;
	ld.param.u64 %rd1, [probe_param_0];
	ld.param.u64 %rd2, [probe_param_1];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, memory;
{body}
	ret;
}}
"""
    address = 0 if source is None else source.data_ptr()
    parameters = out.data_ptr().to_bytes(8, "little") + address.to_bytes(8, "little")
    machine.Program(program.kernels(text)["probe"]).run((1, 1), threads, 1024, parameters)
    return out


# Each thread copies four numbers, of which it then stores the first.
COPY = """
	mul.wide.s32 %rd3, %r1, 16;
	add.s64 %rd4, %rd2, %rd3;
	shl.b32 %r3, %r1, 4;
	add.s32 %r4, %r2, %r3;
	cp.async.cg.shared.global [%r4], [%rd4], 16;
	cp.async.commit_group;
	{wait}
	ld.shared.f32 %f1, [%r4];
	mul.wide.s32 %rd5, %r1, 4;
	add.s64 %rd6, %rd1, %rd5;
	st.global.f32 [%rd6], %f1;
"""


class TestMachine:
    """The interpreter stops where a GPU would go wrong."""

    @pytest.fixture(autouse=True)
    def machine(self):
        self.fault = pytest.importorskip("ptx.machine").Fault

    def test_a_copy_is_there_when_it_is_waited_for(self):
        source = torch.arange(256.0)
        waited = run_text(COPY.format(wait="cp.async.wait_group 0;"), torch.zeros(64), source=source)
        assert torch.equal(waited, source[::4])
        assert run_text(COPY.format(wait="cp.async.wait_group 1;"), torch.zeros(64), source=source).isnan().all()

    def test_a_misaligned_copy_is_a_fault(self):
        with pytest.raises(self.fault, match="misaligned"):
            run_text(COPY.format(wait=""), torch.zeros(64), source=torch.zeros(260)[1:])

    def test_an_address_outside_shared_memory_is_a_fault(self):
        with pytest.raises(self.fault, match="outside shared memory"):
            run_text(COPY.format(wait=""), torch.zeros(96), threads=96, source=torch.zeros(384))

    def test_a_barrier_that_a_thread_does_not_reach_is_a_fault(self):
        body = "setp.eq.s32 %p1, %r1, 3;\n@%p1 bra $END;\nbar.sync 0;\n$END:\nmov.u32 %r3, 0;"
        with pytest.raises(self.fault, match="deadlock: threads wait at 63 before bar.sync"):
            run_text(body, torch.zeros(1))

    def test_threads_that_went_different_ways_meet_again(self):
        """Odd threads take another way; then each adds its neighbour's number, for which the warp must be whole."""
        body = """
	and.b32 %r3, %r1, 1;
	setp.eq.s32 %p1, %r3, 1;
	mov.u32 %r4, 100;
	@%p1 bra $ODD;
	mov.u32 %r4, 7;
	bra.uni $BOTH;
$ODD:
	add.s32 %r4, %r4, %r1;
$BOTH:
	shfl.sync.bfly.b32 %r5|%p2, %r4, 1, 31, -1;
	add.s32 %r6, %r4, %r5;
	mul.wide.s32 %rd5, %r1, 4;
	add.s64 %rd6, %rd1, %rd5;
	st.global.u32 [%rd6], %r6;
"""
        odd = torch.arange(64) | 1
        assert torch.equal(run_text(body, torch.zeros(64, dtype=torch.int32)), (107 + odd).int())

    def test_an_unknown_instruction_is_refused(self):
        with pytest.raises(NotImplementedError, match="sin.approx"):
            run_text("sin.approx.f32 %f1, %f2;", torch.zeros(1))
