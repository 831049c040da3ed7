"""Each method of a kernel set timed alone, with its flop and byte counts beside the call.

The operands are those of the rows of a case: anchors and candidates (n, d) with n = B and d = C. A kernel is compared
with the torch kernel set in fp64 on the same operands; one that is wrong gets no time. The counts are what no
implementation avoids: every operand is read once and every result written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import memory, timing
from bench.harness.cases import Case, inputs
from bench.harness.measure import ERROR, FAILED, NOT_RUN, OK, Announce, Plan
from bench.harness.providers import backend_unsupported_reason
from mcld_kernels import backends
from mcld_kernels.calibrate import floor_dtype
from mcld_kernels.infonce import grad_dtype
from mcld_kernels.kernels import (
    AnchorTerms,
    ContrastArgs,
    GradCoefficients,
    GradEpilogueArgs,
    KernelSet,
    NegativeSums,
    TermWeight,
    UnitRows,
)
from mcld_kernels.labels import Labels
from mcld_kernels.options import acc_dtype, float32_precision

BACKENDS = {"torch": "torch", "triton": "triton", "cuda": "cuda", "hopper": "cuda"}  # provider -> backend
EPS = 1e-12
# Relative to the norm of a result: some thirty epsilons of sums in fp32 and fp64, four of operands in half precision.
ALLOWED = {"float64": 1e-12, "float32": 4e-6, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The operands of the kernels of one set; ``exact`` is the same in fp64."""

    student: Tensor  # (n, d)
    target: Tensor  # (n,)
    operand_dtype: torch.dtype
    anchors: UnitRows
    candidates: UnitRows
    labels: Labels
    means: Tensor  # (classes present, d)
    positive: Tensor  # (n,)
    label_positive: Tensor  # (n,)
    neg_lse: Tensor  # (n,)
    weights: Tensor  # (n,) stand-ins for coefficients, of the size of a mean over n
    product: Tensor  # (n, d)
    temperature: float

    def exact(self) -> Operands:
        n, d = self.anchors.n, self.anchors.d
        return Operands(
            student=self.student.double(),
            target=self.target,
            operand_dtype=torch.float64,
            anchors=_exact(self.anchors),
            candidates=_exact(self.candidates),
            labels=self.labels,
            means=self.means[:, :d].double(),
            positive=self.positive.double(),
            label_positive=self.label_positive.double(),
            neg_lse=self.neg_lse.double(),
            weights=self.weights.double(),
            product=self.product[:n, :d].double(),
            temperature=self.temperature,
        )


def _exact(unit: UnitRows) -> UnitRows:
    rows = unit.rows[: unit.n, : unit.d].double()
    return UnitRows(rows=rows, inv_norm=unit.inv_norm[: unit.n].double(), n=unit.n, d=unit.d)


def operands(kernels: KernelSet, case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Operands:
    """Operands in the layouts of ``kernels``, by its own first steps."""
    acc = acc_dtype(student.dtype)
    operand_dtype = kernels.operand_dtype(student.dtype)
    anchors, candidates = (kernels.l2_normalize(x, operand_dtype, EPS) for x in (student, teacher))
    (labels,) = kernels.index_labels((target,), -100, case.classes, acc)
    means = kernels.class_means(candidates, labels, labels.counts)
    positive, label_positive = kernels.positive_cosines(anchors, candidates, 0, means, labels.class_index)
    generator = torch.Generator(student.device).manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=student.device, dtype=acc)

    return Operands(
        student=student,
        target=target,
        operand_dtype=operand_dtype,
        anchors=anchors,
        candidates=candidates,
        labels=labels,
        means=means,
        positive=positive,
        label_positive=label_positive,
        neg_lse=random(case.batch) / case.temperature,
        weights=random(case.batch) / case.batch,
        product=torch.empty_like(candidates.rows, dtype=acc).copy_(candidates.rows),
        temperature=case.temperature,
    )


Result = tuple[Tensor, ...]
Step = Callable[[], Result]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel: its counts, a step of it, and its result where that is not what the step returns."""

    name: str
    shape: str
    flop: int
    bytes: int
    step: Callable[[KernelSet, Operands], Step]
    result: Callable[[KernelSet, Operands], Result] | None = None


def all_kernels(case: Case, operand_size: int, acc_size: int) -> list[Kernel]:
    """The kernels of a case with operands and accumulators of so many bytes an element."""
    n, d, x, o, w = case.batch, case.classes, case.torch_dtype.itemsize, operand_size, acc_size
    present = min(n, d + 1)
    gradient_size = grad_dtype(case.torch_dtype).itemsize
    rows, matrix = f"{n} x {d}", f"{n} x {n} x {d}"
    return [
        Kernel(
            name="l2_normalize rows",
            shape=rows,
            flop=3 * n * d,
            bytes=n * d * (x + o) + n * w,
            step=lambda kernels, ops: lambda: _unit(kernels.l2_normalize(ops.student, ops.operand_dtype, EPS)),
        ),
        Kernel(
            name="l2_normalize columns",
            shape=f"{d} x {n}",
            flop=3 * n * d,
            bytes=n * d * (x + o) + d * w,
            step=lambda kernels, ops: lambda: _unit(kernels.l2_normalize(ops.student.T, ops.operand_dtype, EPS)),
        ),
        Kernel(
            name="index_labels",
            shape=f"{n}",
            flop=0,
            bytes=n * (8 + 8 + 1 + 8 + 8),  # target; key, valid, class_index, class_id
            step=_index_labels,
        ),
        Kernel(
            name="class_means",
            shape=rows,
            flop=n * d,
            bytes=n * (d * o + 8) + present * d * w,
            step=lambda kernels, ops: lambda: (kernels.class_means(ops.candidates, ops.labels, ops.labels.counts),),
        ),
        Kernel(
            name="positive_cosines",
            shape=rows,
            flop=4 * n * d,
            bytes=n * (2 * d * o + 8 + 2 * w) + present * d * w,
            step=lambda kernels, ops: (
                lambda: kernels.positive_cosines(ops.anchors, ops.candidates, 0, ops.means, ops.labels.class_index)
            ),
        ),
        Kernel(
            name="contrast",
            shape=matrix,
            flop=2 * n * n * d,
            bytes=2 * n * d * o + 2 * n * w,
            step=lambda kernels, ops: _contrast(kernels, ops),
            result=lambda kernels, ops: _contrast(kernels, ops, collect=True)(),
        ),
        Kernel(
            name="contrast, gradient",
            shape=matrix,
            flop=4 * n * n * d,
            bytes=2 * n * d * o + 2 * n * w + n * d * w,
            step=lambda kernels, ops: _contrast(kernels, ops, anchor_grad=True),
            result=lambda kernels, ops: _contrast(kernels, ops, anchor_grad=True, collect=True)(),
        ),
        Kernel(
            name="contrast, candidates",
            shape=matrix,
            flop=6 * n * n * d,
            bytes=2 * n * d * o + 3 * n * w + 2 * n * d * w,
            step=lambda kernels, ops: _contrast(kernels, ops, anchor_grad=True, candidate_grad=True),
            result=lambda kernels, ops: _contrast(kernels, ops, anchor_grad=True, candidate_grad=True, collect=True)(),
        ),
        Kernel(
            name="loss_epilogue",
            shape=f"{n} x 2",
            flop=30 * n,
            bytes=n * (4 * w + 1 + 5 * w),  # sums, cosines, counted; two terms and three coefficients
            step=_loss_epilogue,
        ),
        Kernel(
            name="grad_epilogue",
            shape=rows,
            flop=10 * n * d,
            bytes=n * d * (w + 2 * o + gradient_size) + present * d * w + n * (4 * w + 8),
            step=lambda kernels, ops: _grad_epilogue(kernels, ops, ops.product.clone()),
        ),
        Kernel(
            name="reduce_terms",
            shape=f"2 x {n}",
            flop=2 * n,
            bytes=2 * n * w,
            step=_reduce_terms,
        ),
    ]


def _unit(unit: UnitRows) -> Result:
    return unit.rows[: unit.n, : unit.d], unit.inv_norm[: unit.n]


def _index_labels(kernels: KernelSet, ops: Operands) -> Step:
    acc = acc_dtype(ops.student.dtype)
    classes = ops.student.shape[1]

    def step() -> Result:
        (labels,) = kernels.index_labels((ops.target,), -100, classes, acc)
        return labels.key, labels.valid, labels.class_id

    return step


def _contrast(
    kernels: KernelSet,
    ops: Operands,
    anchor_grad: bool = False,
    candidate_grad: bool = False,
    collect: bool = False,
) -> Step:
    """A contrast to its end; with ``collect``, its results copied from every chunk."""
    args = ContrastArgs(
        anchors=ops.anchors,
        candidates=ops.candidates,
        temperature=ops.temperature,
        offset=0,
        anchor_grad=anchor_grad,
        candidate_grad=candidate_grad,
    )

    def step() -> Result:
        contrast = kernels.contrast(args)
        lse, products = [], []
        for chunk in contrast.chunks():
            if candidate_grad:
                partner = ops.weights[chunk.rows]
                product = partner * chunk.inv_neg_sum
                contrast.add_candidates(chunk, GradCoefficients(partner=partner, product=product, class_mean=None))
            if collect:
                lse.append(chunk.neg_lse.clone())
                if chunk.product is not None:
                    products.append(chunk.product[:, : ops.anchors.d] * chunk.inv_neg_sum[:, None])
        sums = contrast.sums()
        if not collect:
            return ()
        parts = [torch.cat(lse), *([torch.cat(products)] if products else [])]
        if sums.candidate_product is not None:
            parts.append(sums.candidate_product[:, : ops.anchors.d])
        return tuple(parts)

    return step


def _terms(ops: Operands) -> tuple[TermWeight, ...]:
    """The instance- and the sample-wise term."""
    factor = ops.labels.mean_factor.to(ops.positive.dtype)
    return (
        TermWeight(term=0, positives="diagonal", constant=1 / ops.anchors.n),
        TermWeight(term=1, positives="label", constant=1.0, factor=factor, counted=ops.labels.valid),
    )


def _loss_epilogue(kernels: KernelSet, ops: Operands) -> Step:
    n = ops.anchors.n
    terms = AnchorTerms(
        positive=ops.positive,
        label_positive=ops.label_positive,
        temperature=ops.temperature,
        weights=_terms(ops),
        per_anchor=ops.positive.new_empty(2, n),
    )
    sums = NegativeSums(rows=slice(0, n), neg_lse=ops.neg_lse, inv_neg_sum=torch.exp(-ops.neg_lse), product=None)

    def step() -> Result:
        coefficients = kernels.loss_epilogue(terms, sums)
        assert coefficients.class_mean is not None
        return terms.per_anchor, coefficients.partner, coefficients.product, coefficients.class_mean

    return step


def _grad_epilogue(kernels: KernelSet, ops: Operands, product: Tensor) -> Step:
    """The epilogue may overwrite ``product``; with coefficients of 1 it stays in range however often it runs."""
    n, d = ops.student.shape
    coefficients = GradCoefficients(
        partner=ops.weights, product=torch.ones_like(ops.weights), class_mean=0.5 * ops.weights
    )
    args = GradEpilogueArgs(
        out=torch.empty(n, d, dtype=grad_dtype(ops.student.dtype), device=ops.student.device),
        unit=ops.anchors,
        rows=slice(0, n),
        product=product[:n],
        coefficients=coefficients,
        partner=ops.candidates,
        offset=0,
        class_means=ops.means,
        class_index=ops.labels.class_index,
        accumulate=False,
    )

    def step() -> Result:
        kernels.grad_epilogue(args)
        return (args.out,)

    return step


def _reduce_terms(kernels: KernelSet, ops: Operands) -> Step:
    per_anchor = torch.stack([ops.weights, ops.weights.flip(0)])
    return lambda: kernels.reduce_terms(per_anchor, (0, 1), (1.0, 1.0, 0.0), None)


@dataclass
class KernelRow:
    """One kernel of one backend. Without a status of ``ok`` it has a reason and no speed."""

    kernel: str
    backend: str
    shape: str
    flop: int
    bytes: int
    gemm: float  # flop/s
    copy: float  # bytes/s
    status: str = NOT_RUN
    reason: str | None = None
    note: str | None = None
    ratio: float | None = None  # error over what is allowed
    times: timing.Times | None = None

    @property
    def flops(self) -> float | None:
        return None if self.times is None or not self.flop else self.flop / self.times.median

    @property
    def bytes_per_s(self) -> float | None:
        return None if self.times is None else self.bytes / self.times.median

    @property
    def of_ceiling(self) -> float | None:
        """The time at the GEMM or the copy speed, whichever is longer, over the measured one."""
        return None if self.times is None else max(self.flop / self.gemm, self.bytes / self.copy) / self.times.median

    def record(self, case: Case) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "batch": case.batch,
            "classes": case.classes,
            "dtype": case.dtype,
            "kernel": self.kernel,
            "backend": self.backend,
            "shape": self.shape,
            "flop": self.flop,
            "bytes": self.bytes,
            "status": self.status,
            "reason": self.reason,
            "error_ratio": self.ratio,
            "time": None if self.times is None else self.times.record(),
            "flop_per_s": self.flops,
            "bytes_per_s": self.bytes_per_s,
            "fraction_of_ceiling": self.of_ceiling,
        }


class KernelRun:
    """The measurement of the kernels of one case."""

    def __init__(
        self,
        case: Case,
        providers: Sequence[str],
        plan: Plan,
        ceilings: dict[str, float],
        announce: Announce = lambda text: None,
    ):
        self.case, self.plan, self.announce = case, plan, announce
        self.providers = [name for name in providers if name in BACKENDS]
        self.gemm, self.copy = ceilings[f"gemm_{case.dtype}_flop_per_s"], ceilings["copy_bytes_per_s"]
        self.allowed = ALLOWED[floor_dtype(case.dtype, float32_precision())]
        self.rows: dict[str, list[KernelRow]] = {}  # by kernel
        self.steps: dict[str, dict[str, Step]] = {}  # by kernel and provider

    def run(self) -> list[KernelRow]:
        """The rows, kernel by kernel. A fault of one is its reason; the others go on.

        A backend that cannot run has one row, without a kernel's name.
        """
        device = self.plan.device
        needed = 30 * 8 * self.case.batch * self.case.classes + (2 << 30)  # fp64 copies of every operand
        shortage = memory.shortage(needed, device)
        student, teacher, target = inputs(self.case, device) if shortage is None else (None, None, None)
        exact_kernels = None
        for provider in self.providers:
            reason = shortage
            if student is not None:
                reason = backend_unsupported_reason(BACKENDS[provider], provider == "hopper", student, teacher)
            if reason is not None or student is None:
                self._row(Kernel(name="", shape="", flop=0, bytes=0, step=_reduce_terms), provider, reason)
                continue
            exact_kernels = exact_kernels or backends.kernel_set("torch", student.double(), teacher.double())
            with backends.tuned(hopper=provider == "hopper"):
                kernels = backends.kernel_set(BACKENDS[provider], student, teacher)
            with memory.released(device):
                self._gate(provider, kernels, exact_kernels, operands(kernels, self.case, student, teacher, target))
        self._time()
        return [row for rows in self.rows.values() for row in rows]

    def _row(self, kernel: Kernel, provider: str, reason: str | None = None) -> KernelRow:
        row = KernelRow(
            kernel.name, provider, kernel.shape, kernel.flop, kernel.bytes, self.gemm, self.copy, reason=reason
        )
        self.rows.setdefault(kernel.name, []).append(row)
        return row

    def _gate(self, provider: str, kernels: KernelSet, exact_kernels: KernelSet, ops: Operands) -> None:
        exact_ops = ops.exact()
        for kernel in all_kernels(self.case, ops.operand_dtype.itemsize, ops.positive.dtype.itemsize):
            self.announce(f"gate {provider} {kernel.name}")
            row = self._row(kernel, provider)
            try:
                row.ratio = _error(_result(kernel, kernels, ops), _result(kernel, exact_kernels, exact_ops)) / (
                    self.allowed
                )
                step = kernel.step(kernels, ops)
                step()
            except NotImplementedError as fault:
                row.reason = str(fault) or "this kernel set does not have it"
            except Exception as fault:  # a kernel may raise anything; the row shows it and the run goes on
                row.status, row.reason = ERROR, f"{type(fault).__name__}: {str(fault).partition(chr(10))[0][:200]}"
            else:
                row.status = OK if row.ratio <= 1 else FAILED
                if row.status == OK:
                    self.steps.setdefault(kernel.name, {})[provider] = step
                else:
                    row.reason = f"error {row.ratio:.3g} times what is allowed"

    def _time(self) -> None:
        clock = timing.CudaClock(self.plan.device, self.plan.cold) if self.plan.device.type == "cuda" else None
        for name, steps in self.steps.items():
            self.announce(f"timing {name}")
            samples = {
                provider: timing.cpu_sample(step) if clock is None else clock.sample(step, backlog=True)
                for provider, step in steps.items()
            }
            times = timing.interleave(samples, self.plan.rounds, self.plan.seconds / 4, self.case.seed)
            for row in self.rows[name]:
                row.times = times.get(row.backend)


def _result(kernel: Kernel, kernels: KernelSet, ops: Operands) -> Result:
    if kernel.result is not None:
        return kernel.result(kernels, ops)
    return tuple(value.clone() for value in kernel.step(kernels, ops)())


def _error(result: Result, exact: Result) -> float:
    """The largest relative error (Frobenius) of the parts of a result; infinity where one is not finite."""
    errors = []
    for value, expected in zip(result, exact, strict=True):
        expected = expected.double()
        value = value[tuple(slice(0, size) for size in expected.shape)].double()
        difference = torch.linalg.vector_norm(value - expected).item()
        size = torch.linalg.vector_norm(expected).item()
        error = difference / size if size > 0 else difference
        errors.append(error if error == error else float("inf"))
    return max(errors)
