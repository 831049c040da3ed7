"""What is measured: shapes, their flop and byte counts, their inputs, and the grid that suits a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TERMS = ("instance", "sample", "category")
MODES = ("forward", "forward-backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One point of the grid: student and teacher logits (batch, classes) of one dtype, a frozen teacher."""

    batch: int
    classes: int
    dtype: str = "float32"
    terms: tuple[str, ...] = TERMS
    mode: str = "forward-backward"
    temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.classes < 1:
            raise ValueError(f"batch and classes must be positive; got {self.batch} and {self.classes}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        unknown = [term for term in self.terms if term not in TERMS]
        if unknown or not self.terms:
            raise ValueError(f"terms must be some of {', '.join(TERMS)}; got {self.terms!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def weight(self) -> tuple[float, float, float]:
        """1 for every named term, 0 for the others."""
        return tuple(float(term in self.terms) for term in TERMS)  # type: ignore[return-value]

    @property
    def backward(self) -> bool:
        return self.mode == "forward-backward"

    @property
    def row_terms(self) -> bool:
        """Whether a term contrasts rows: a (batch, batch) matrix of contraction length ``classes``."""
        return "instance" in self.terms or "sample" in self.terms

    @property
    def category(self) -> bool:
        """Whether the columns are contrasted: a (classes, classes) matrix of contraction length ``batch``."""
        return "category" in self.terms

    @property
    def flop(self) -> int:
        """The products that no algorithm avoids: 2 n m d for the similarities, 2 n m d for the gradient.

        Instance and sample terms share one matrix. Every provider is credited with this same count, however many it
        spends.
        """
        products = 2 if self.backward else 1
        count = 0
        if self.row_terms:
            count += 2 * products * self.batch**2 * self.classes
        if self.category:
            count += 2 * products * self.classes**2 * self.batch
        return count

    @property
    def bytes(self) -> int:
        """The traffic that no algorithm avoids: read student and teacher, write one gradient (labels left out)."""
        return (3 if self.backward else 2) * self.batch * self.classes * self.torch_dtype.itemsize

    @property
    def group(self) -> tuple[int, str, tuple[str, ...], str]:
        """Cases of one group differ in the batch size alone and share a plot."""
        return self.classes, self.dtype, self.terms, self.mode

    def __str__(self) -> str:
        terms = "all terms" if self.terms == TERMS else " + ".join(self.terms)
        return f"B={self.batch} C={self.classes} {self.dtype}, {terms}, {self.mode}"


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Student (B, C) and teacher (B, C) logits of the case's dtype and labels (B,), as halfway through a training.

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
    return student.to(case.torch_dtype), teacher.to(case.torch_dtype), target


def product(
    batches: Sequence[int],
    classes: Sequence[int],
    dtypes: Sequence[str],
    terms: tuple[str, ...],
    modes: Sequence[str],
    temperature: float = 0.1,
    seed: int = 0,
) -> list[Case]:
    """Every combination, batch sizes ascending within a group so that a plot's line completes early."""
    return [
        Case(batch, width, dtype, terms, mode, temperature, seed)
        for mode in modes
        for dtype in dtypes
        for width in sorted(classes)
        for batch in sorted(batches)
    ]


# The regimes of KERNELS.md's table: what each point is there to show stands beside it.
_CUDA_REGIMES = (
    ((256, 1024), (1000,), "bfloat16", TERMS),  # launch latency
    ((16384, 65536), (100,), "bfloat16", ("instance", "sample")),  # the matrix never leaves the chip
    ((4096, 16384, 65536), (1000,), "bfloat16", ("instance", "sample")),  # two products by row chunk
    ((256, 1024, 4096), (21841,), "bfloat16", ("category",)),  # many classes
    ((4096,), (1000,), "float32", TERMS),  # fp32 accuracy
    ((16384,), (100,), "bfloat16", ("instance",)),  # the public peers know this term alone
)
_CPU_REGIMES = (
    ((256, 1024, 4096), (100,), "float32", TERMS),
    ((256, 1024, 4096), (1000,), "float32", TERMS),
)


def default_grid(device: torch.device, seed: int = 0) -> list[Case]:
    """The grid that suits the machine: the regimes of a large GPU, or what a few CPU cores do in some minutes."""
    regimes = _CUDA_REGIMES if device.type == "cuda" else _CPU_REGIMES
    return [
        case
        for batches, classes, dtype, terms in regimes
        for case in product(batches, classes, [dtype], terms, ["forward-backward"], seed=seed)
    ]


def smoke_grid(seed: int = 0) -> list[Case]:
    """Small enough for any machine; still every term and both modes."""
    return product([64, 256], [100], ["float32"], TERMS, ["forward-backward"], seed=seed) + [
        Case(128, 100, "float32", TERMS, "forward", seed=seed)
    ]
