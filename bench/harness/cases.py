"""The cases that are measured: shapes, flop and byte counts, inputs, and the grid that suits a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness.losses import LOSSES

TERMS = LOSSES["mcld"].terms
MODES = ("forward", "forward-backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One point of the grid: student and teacher logits (batch, classes) of one dtype, a frozen teacher.

    ``terms`` and ``temperature`` default to those of the loss.
    """

    batch: int
    classes: int
    dtype: str = "float32"
    terms: tuple[str, ...] = None  # type: ignore[assignment]
    mode: str = "forward-backward"
    temperature: float = None  # type: ignore[assignment]
    seed: int = 0
    loss: str = "mcld"
    candidates: int = 0  # teacher rows, of a loss that takes more than the batch; 0: as many as the batch

    def __post_init__(self) -> None:
        if self.candidates and not (self.loss in LOSSES and LOSSES[self.loss].is_rectangular):
            raise ValueError(f"candidates are for {', '.join(rectangular())}; got loss {self.loss!r}")
        if self.candidates and self.candidates < self.batch:
            raise ValueError(f"there must be at least as many candidates as rows; got {self.candidates}, {self.batch}")
        if self.batch < 1 or self.classes < 1:
            raise ValueError(f"batch and classes must be positive; got {self.batch} and {self.classes}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")
        loss = LOSSES[self.loss]
        object.__setattr__(self, "terms", loss.terms if self.terms is None else self.terms)
        object.__setattr__(self, "temperature", loss.temperature if self.temperature is None else self.temperature)
        if not self.terms or not set(self.terms) <= set(loss.terms):
            raise ValueError(f"terms must be some of {', '.join(loss.terms)}; got {self.terms!r}")

    @property
    def columns(self) -> int:
        """Rows of the teacher, the columns of the similarity matrix."""
        return self.candidates or self.batch

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def weight(self) -> tuple[float, float, float]:
        """MCLD: 1 for every term of the case, 0 for the others."""
        return tuple(float(term in self.terms) for term in TERMS)  # type: ignore[return-value]

    @property
    def backward(self) -> bool:
        return self.mode == "forward-backward"

    @property
    def row_terms(self) -> bool:
        """True if a term contrasts rows: a (batch, batch) matrix of contraction length ``classes``."""
        return "instance" in self.terms or "sample" in self.terms

    @property
    def category(self) -> bool:
        """True if the columns are contrasted: a (classes, classes) matrix of contraction length ``batch``."""
        return "category" in self.terms

    @property
    def flop(self) -> int:
        """The arithmetic that no algorithm avoids; every provider is credited with it, whatever it spends."""
        return LOSSES[self.loss].flop(self)

    @property
    def bytes(self) -> int:
        """The traffic that no algorithm avoids: read student and teacher, write one gradient (labels left out)."""
        rows = (2 if self.backward else 1) * self.batch + self.columns
        return rows * self.classes * self.torch_dtype.itemsize

    @property
    def is_gemm_bound(self) -> bool:
        return LOSSES[self.loss].is_gemm_bound

    def matrix_bytes(self, row_matrices: float, category_matrices: float) -> int:
        """Bytes of so many fp32 (fp64) matrices of the row and category terms, and four copies of the logits."""
        matrices = (row_matrices * self.batch**2 if self.row_terms else 0) + (
            category_matrices * self.classes**2 if self.category else 0
        )
        return int((8 if self.dtype == "float64" else 4) * (matrices + 4 * self.batch * self.classes))

    def __str__(self) -> str:
        terms = "all terms" if self.terms == LOSSES[self.loss].terms else " + ".join(self.terms)
        what = f"{terms}, " if self.loss == "mcld" else f"{self.loss}, "
        columns = f" m={self.candidates}" if self.candidates else ""
        return f"B={self.batch}{columns} C={self.classes} {self.dtype}, {what}{self.mode}"


def rectangular() -> list[str]:
    """The losses whose teacher may have more rows than the batch."""
    return [name for name, loss in LOSSES.items() if loss.is_rectangular]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Student (B, C) and teacher (m, C) logits of the case's dtype and labels (B,), as halfway through a training.

    The teacher favours the label; the student has half of the teacher's signal and noise of its own, so that
    neither the positives nor the other similarities are trivial.
    """
    generator = torch.Generator(device).manual_seed(case.seed)

    def normal() -> Tensor:
        return torch.randn(case.batch, case.classes, generator=generator, device=device)

    target = torch.randint(case.classes, (case.batch,), generator=generator, device=device)
    teacher = normal()
    teacher[torch.arange(case.batch, device=device), target] += 6.0
    student = 0.5 * teacher + normal()
    if case.candidates:
        further = torch.randn(case.candidates - case.batch, case.classes, generator=generator, device=device)
        teacher = torch.cat((teacher, further))
    return student.to(case.torch_dtype), teacher.to(case.torch_dtype), target


def product(
    batches: Sequence[int],
    classes: Sequence[int],
    dtypes: Sequence[str],
    terms: tuple[str, ...] | None,
    modes: Sequence[str],
    temperature: float | None = None,
    seed: int = 0,
    loss: str = "mcld",
    candidates: int = 0,
) -> list[Case]:
    """Every combination, batch sizes ascending within a group so that a plot's line completes early."""
    return [
        Case(batch, width, dtype, terms, mode, temperature, seed, loss, candidates)  # type: ignore[arg-type]
        for mode in modes
        for dtype in dtypes
        for width in sorted(set(classes))
        for batch in sorted(set(batches))
    ]


# The purpose of each point stands beside it.
_CUDA_REGIMES = (
    ((256, 1024), (1000,), "bfloat16", TERMS),  # launch latency
    ((16384, 65536), (100,), "bfloat16", ("instance", "sample")),  # the matrix never leaves the chip
    ((4096, 16384, 65536), (1000,), "bfloat16", ("instance", "sample")),  # two products by row chunk
    ((256, 1024, 4096), (21841,), "bfloat16", ("category",)),  # many classes
    ((4096,), (1000,), "float32", TERMS),  # fp32 accuracy
    ((16384,), (100,), "bfloat16", ("instance",)),  # the public peers know this term alone
)
# In minutes: a case of each regime, those that say the most first.
_SHORT = (
    (4096, 1000, "bfloat16", ("instance", "sample")),
    (16384, 100, "bfloat16", ("instance", "sample")),
    (16384, 1000, "bfloat16", ("instance", "sample")),
    (256, 1000, "bfloat16", TERMS),
    (1024, 21841, "bfloat16", ("category",)),
    (4096, 1000, "float32", ("instance", "sample")),
    (65536, 1000, "bfloat16", ("instance", "sample")),
    (256, 100, "bfloat16", ("instance",)),
)
_CPU_REGIMES = (
    ((256, 1024, 4096), (100,), "float32", TERMS),
    ((256, 1024, 4096), (1000,), "float32", TERMS),
)


def default_grid(
    device: torch.device, seed: int = 0, temperature: float | None = None, loss: str = "mcld"
) -> list[Case]:
    """The grid that suits the machine: the regimes of a large GPU, or some minutes on a few CPU cores."""
    if loss != "mcld":
        dtype, batches = ("bfloat16", (1024, 16384)) if device.type == "cuda" else ("float32", (256, 1024, 4096))
        return product(batches, (1000,), [dtype], None, ["forward-backward"], temperature, seed, loss)
    regimes = _CUDA_REGIMES if device.type == "cuda" else _CPU_REGIMES
    return [
        case
        for batches, classes, dtype, terms in regimes
        for case in product(batches, classes, [dtype], terms, ["forward-backward"], temperature, seed)
    ]


def short_grid(device: torch.device, seed: int = 0, temperature: float | None = None) -> list[Case]:
    """A case of each regime of a GPU, the most telling first; on a CPU the same at a toy size."""
    least = 1 if device.type == "cuda" else 128
    return [
        Case(max(16, batch // least), max(10, classes // least), dtype, terms, temperature=temperature, seed=seed)  # type: ignore[arg-type]
        for batch, classes, dtype, terms in _SHORT
    ]


def smoke_grid(seed: int = 0, temperature: float | None = None, loss: str = "mcld") -> list[Case]:
    """Small enough for any machine; every term and both modes."""
    both = product([64, 256], [100], ["float32"], None, ["forward-backward"], temperature, seed, loss)
    return both + product([128], [100], ["float32"], None, ["forward"], temperature, seed, loss)
