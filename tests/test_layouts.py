"""Where the matrix instructions hold their elements, as the PTX ISA documents it, against single launches of each.

The kernels and their host emulation share every belief about fragments, swizzles and descriptors, so that a wrong one
would pass all other tests. Here each instruction runs alone (tests/csrc_host/probes.cu) on registers and shared memory
laid out by the formulas below, which follow the documentation and not the kernels. On a GPU the same launches run on
the hardware: that is the first thing to look at when a kernel is wrong there.

Sections of the PTX ISA: "Matrix Fragments for mma.m16n8k16 with floating point type", "Matrix Fragments for
mma.m16n8k8", "ldmatrix", "Register Fragments for wgmma.mma_async.m64nNk16", "Shared Memory Matrix Layout", "Matrix
Descriptor Format", "Swizzling Modes" of tensor copies. CUTLASS's CuTe defines the same layouts (MMA_Traits,
Copy_Traits, GMMA::Layout_K_SW128_Atom and Layout_MN_SW128_Atom) and has been compared with the emulation element by
element.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import csrc_host
import pytest
import torch

BF16, FP16, TF32 = 0, 1, 2
DTYPE = {BF16: torch.bfloat16, FP16: torch.float16, TF32: torch.float32}
NAMES = {BF16: "bf16", FP16: "fp16", TF32: "tf32"}


class Probes:
    """The functions of probes.cu, on tensors of one device."""

    def __init__(self, library: Path, device: str):
        self.library, self.device = ctypes.CDLL(str(library)), device
        self.library.probe_error.restype = ctypes.c_char_p
        if hasattr(self.library, "probe_descriptor"):
            self.library.probe_descriptor.restype = ctypes.c_uint64

    def __call__(self, name, *arguments):
        converted = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        if getattr(self.library, name)(*converted):
            raise RuntimeError(self.library.probe_error().decode())

    def put(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().to(self.device)


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def probes(request, tmp_path_factory):
    if request.param == "emulated":
        if csrc_host.compiler() is None:
            pytest.skip("needs a C++ compiler")
        return Probes(csrc_host.build(), "cpu")
    nvcc = csrc_host.nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc: set CUDACXX")
    return Probes(compile_for_gpu(nvcc, torch.cuda.get_device_capability(), tmp_path_factory.mktemp("probes")), "cuda")


def compile_for_gpu(nvcc: str, capability: tuple[int, int], folder: Path) -> Path:
    hopper = capability == (9, 0)
    arch = f"{capability[0]}{capability[1]}{'a' if hopper else ''}"
    (folder / "build_config.h").write_text(f'#define MCLD_CUDA_ARCHS "{arch}"\n#define MCLD_CUDA_VERSION "of {nvcc}"\n')
    csrc, library = csrc_host.CSRC, folder / "probes.so"
    sources = [csrc_host.HERE / "probes.cu", csrc / "checks.cu"] + [csrc / "hopper" / "tensor_map.cu"] * hopper
    flags = ["-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC", f"-DMCLD_HAS_HOPPER={int(hopper)}"]
    flags += [f"-I{csrc}", f"-I{folder}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run([nvcc, *flags, *map(str, sources), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def test_the_probes_compile_for_a_gpu(tmp_path):
    """Without one they would otherwise be found broken only where they are needed."""
    nvcc = csrc_host.nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc: set CUDACXX")
    compile_for_gpu(nvcc, (9, 0), tmp_path)


@pytest.fixture
def hopper(probes):
    if probes.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return probes


def integers(*shape) -> torch.Tensor:
    """Small whole numbers: exact in every type and in every order of summation."""
    return torch.randint(-8, 9, shape).float()


def words(x: torch.Tensor) -> torch.Tensor:
    """The values of a register side by side in the last dimension, the first in the low half."""
    return x.contiguous().view(torch.int32)


def lanes(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(count, 1) warp, groupID and threadID_in_group of each thread."""
    thread = torch.arange(count)[:, None]
    return thread // 32, thread % 32 // 4, thread % 4


def accumulators(count: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of d[i] of each thread: m16n8 for a warp, m64nN for a warpgroup."""
    warp, group, of_group = lanes(count)
    i = torch.arange(columns // 2)
    return 16 * warp + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * of_group + i % 2


def left_fragments(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and k of the 8 values of 16 bits of A, k16: the same for mma and wgmma."""
    warp, group, of_group = lanes(count)
    i = torch.arange(8)
    return 16 * warp + group + 8 * (i // 2 % 2), 2 * of_group + i % 2 + 8 * (i // 4)


def swizzled(byte: torch.Tensor) -> torch.Tensor:
    """128-byte swizzle of an address: its 16-byte chunk by exclusive or with its 128-byte row, in eights."""
    return byte ^ ((byte // 128 % 8) * 16)


def panel(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x (rows, 64) of 16 bits as it lies in shared memory in rows of 128 bytes, swizzled; NaN in the rows past x."""
    out = torch.full((rows * 64,), torch.nan, dtype=x.dtype)
    row, column = torch.meshgrid(torch.arange(x.shape[0]), torch.arange(64), indexing="ij")
    out[swizzled(128 * row + 2 * column) // 2] = x
    return out


@pytest.mark.parametrize("precision", NAMES, ids=NAMES.get)
def test_mma(probes, precision):
    """m16n8k16 and m16n8k8."""
    torch.manual_seed(0)
    depth = 8 if precision == TF32 else 16
    a, b, d = integers(16, depth), integers(depth, 8), integers(16, 8)
    _, group, of_group = lanes(32)
    if precision == TF32:
        i = torch.arange(4)
        row, k = group + 8 * (i % 2), of_group + 4 * (i // 2)
        b_k = of_group + 4 * torch.arange(2)
    else:
        row, k = left_fragments(32)
        i = torch.arange(4)
        b_k = 2 * of_group + i % 2 + 8 * (i // 2)
    d_row, d_column = accumulators(32, 8)
    registers = [words(x.to(DTYPE[precision])) for x in (a[row, k], b[b_k, group])]
    out = probes.put(d[d_row, d_column])
    probes("probe_mma", precision, *(probes.put(x) for x in registers), out)
    assert torch.equal(out.cpu(), (d + a @ b)[d_row, d_column])


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix(probes, transposed):
    """Lane l gives row l % 8 of matrix l / 8; register i is of matrix i: row groupID, two columns, or the transpose."""
    torch.manual_seed(0)
    shared = torch.arange(256, dtype=torch.int16)
    place = torch.randperm(32)  # of each lane's row among the 32 of shared memory
    out = probes.put(torch.zeros(32, 4, dtype=torch.int32))
    probes("probe_ldmatrix", transposed, probes.put(shared), probes.put((16 * place).int()), out)
    _, group, of_group = lanes(32)
    matrices = shared.view(32, 8)[place].view(4, 8, 8)
    if transposed:
        matrices = matrices.mT
    want = matrices[torch.arange(4)[None, :, None], group[..., None], (2 * of_group + torch.arange(2))[:, None, :]]
    assert torch.equal(out.cpu(), words(want)[..., 0])


@pytest.mark.parametrize(("along_rows", "step"), [(1, 0), (1, 1), (1, 3), (0, 0), (0, 1), (0, 7)])
def test_descriptor(hopper, along_rows, step):
    """Bits 0-13 address, 16-29 leading and 32-45 stride offset, all in 16 bytes; 49-51 base offset; 62-63 swizzle.

    The stride is between groups of 8 rows of 128 bytes: along M or N where the contraction runs along the rows, along
    K where it runs across. There the leading offset is the one between panels of 64 columns.
    """
    address = 0x2F400
    first = address + (32 * step if along_rows else 16 * 128 * step)
    bits = hopper.library.probe_descriptor(along_rows, address, step, 16384)
    assert bits & 0x3FFF == first >> 4
    assert bits >> 32 & 0x3FFF == 1024 >> 4
    assert bits >> 49 & 7 == 0
    assert bits >> 62 == 1
    # Along the rows it is not used, but 1 as in CuTe's make_gmma_desc.
    assert bits >> 16 & 0x3FFF == (1 if along_rows else 16384 >> 4)
    assert bits & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62) == 0


@pytest.mark.parametrize(
    ("rows", "pitch", "box_rows", "column", "row"),
    [
        (300, 128, 256, 64, 0),
        (300, 128, 256, 64, 256),
        (5, 64, 128, 0, 0),
        (64, 192, 64, 128, 0),
        (200, 64, 128, 0, 128),
    ],
)
def test_tma(hopper, rows, pitch, box_rows, column, row):
    """A box lies swizzled, zeros past the last row; all its bytes count for the barrier, also those of the zeros."""
    matrix = torch.arange(1, rows * pitch + 1).to(torch.int16).view(rows, pitch)
    out = hopper.put(torch.full((box_rows * 64,), -1, dtype=torch.int16))
    hopper(
        "probe_tma", BF16, hopper.put(matrix), ctypes.c_int64(rows), ctypes.c_int64(pitch), box_rows, column, row, out
    )
    box = torch.zeros(box_rows, 64, dtype=torch.int16)
    inside = matrix[row : row + box_rows, column : column + 64]
    box[: inside.shape[0]] = inside
    at, of = torch.meshgrid(torch.arange(box_rows), torch.arange(64), indexing="ij")
    assert torch.equal(out.cpu()[swizzled(128 * at + 2 * of) // 2], box)


@pytest.mark.parametrize("add", [0, 1])
@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize("precision", [BF16, FP16], ids=NAMES.get)
def test_wgmma_from_shared_memory(hopper, precision, columns, add):
    """A (64, 16) and B (N, 16): a quarter of their panels, contraction along the rows."""
    torch.manual_seed(0)
    a, b = integers(64, 64), integers(columns, 64)
    row, column = accumulators(128, columns)
    for step in range(4):
        d = integers(64, columns) if add else torch.full((64, columns), torch.nan)
        out = hopper.put(d[row, column])
        panels = [hopper.put(panel(x.to(DTYPE[precision]), n)) for x, n in ((a, 64), (b, 256))]
        hopper("probe_wgmma", precision, columns, panels[0], None, panels[1], out, step, add)
        k = slice(16 * step, 16 * step + 16)
        want = a[:, k] @ b[:, k].T + (d if add else 0)
        assert torch.equal(out.cpu(), want[row, column]), step


@pytest.mark.parametrize("add", [0, 1])
@pytest.mark.parametrize("columns", [64, 104, 128, 192, 256])
@pytest.mark.parametrize("precision", [BF16, FP16], ids=NAMES.get)
def test_wgmma_from_registers(hopper, precision, columns, add):
    """A (64, 16) in registers, B (16, N): 16 rows of panels (64, 64), contraction across them."""
    torch.manual_seed(0)
    a, b = integers(64, 16), integers(64, 256)
    panels = torch.cat([panel(x.to(DTYPE[precision]), 64) for x in b.split(64, 1)])
    row, column = accumulators(128, columns)
    a_row, a_k = left_fragments(128)
    registers = hopper.put(words(a[a_row, a_k].to(DTYPE[precision])))
    unused = hopper.put(torch.zeros(64 * 64, dtype=DTYPE[precision]))
    for step in (0, 1, 3):
        d = integers(64, columns) if add else torch.full((64, columns), torch.nan)
        out = hopper.put(d[row, column])
        hopper("probe_wgmma", precision, columns, unused, registers, hopper.put(panels), out, step, add)
        want = a @ b[16 * step : 16 * step + 16, :columns] + (d if add else 0)
        assert torch.equal(out.cpu(), want[row, column]), step
