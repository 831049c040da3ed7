"""Errors of the fast backends against fp64 truth, case by case, the most telling first: ``python bench/correct.py``.

Truth, eager's error and the result are computed on the device. float32 at the matmul precision "highest" comes first;
then the shapes at which a kernel changes, odd and misaligned ones, every option, and sizes whose element numbers pass
2^31. A line of JSON is written after every case, so that a kernel that hangs costs the cases behind it alone. Each
result is computed twice, and the two must agree bit by bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import mcld_kernels  # noqa: E402
from bench.harness import cases, gate, mcld_chunks, memory, programs  # noqa: E402
from bench.harness.losses import Result  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402
from bench.harness.providers import backend_unsupported_reason  # noqa: E402
from bench.harness.timing import context_is_lost  # noqa: E402
from mcld_kernels.calibrate import floor_dtype  # noqa: E402

BACKENDS = {"torch": "torch", "triton": "triton", "cuda": "cuda", "hopper": "cuda"}
ROWS = ("instance", "sample")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "mask": {"mask_same_class": True, "present_only": True},
    "mask-symmetric": {"mask_same_class": True, "direction": "symmetric", "temperature": (0.1, 0.2, 0.3)},
    "ignored": {"ignored": 0.3},
    "rows": {"weight": (1.0, 1.0, 0.0)},
    "category": {"weight": (0.0, 0.0, 1.0)},
    "cold": {"temperature": 0.02},  # the online maximum takes over
    "cold-mask": {"temperature": 0.02, "direction": "symmetric", "mask_same_class": True},
}
LAYOUTS = ("contiguous", "misaligned", "transposed")
SMALL = {"low_latency_limit": 100, "min_hopper_similarity_tiles": 1, "min_hopper_flash_tiles": 1}
REFERENCE_SHARE = 8  # the reference in fp64 may take this part of the free memory


@dataclass(frozen=True, kw_only=True)
class Check:
    batch: int
    classes: int
    dtype: str = "bfloat16"
    options: str = "default"
    precision: str = "highest"  # of float32
    layout: str = "contiguous"
    small: bool = False  # take at small shapes what large ones take

    def __str__(self) -> str:
        words = [f"{self.batch} x {self.classes}", self.dtype, self.options]
        words += [self.precision] if self.dtype == "float32" else []
        words += [self.layout] if self.layout != "contiguous" else []
        return ", ".join(words)


def checks(device_type: str) -> Iterator[Check]:
    """All checks, the most telling first; on a CPU a few small ones."""
    if device_type == "cpu":
        for dtype, options, layout in itertools.product(
            ("float32", "bfloat16"), ("default", "mask-symmetric"), LAYOUTS
        ):
            yield Check(batch=61, classes=23, dtype=dtype, options=options, layout=layout)
        return
    for precision in ("highest", "high"):
        for batch, classes in ((4096, 1000), (1024, 1000), (4096, 100), (300, 21841), (257, 4096)):
            yield Check(batch=batch, classes=classes, dtype="float32", precision=precision)
    for dtype in ("bfloat16", "float16"):
        for batch, classes in ((4096, 1000), (4096, 100), (256, 1000), (256, 21841), (1024, 21841), (4099, 997)):
            yield Check(batch=batch, classes=classes, dtype=dtype)
    yield Check(batch=65536, classes=1000, options="rows")
    yield Check(batch=65536, classes=100, options="rows")
    for name, dtype in itertools.product(OPTIONS, ("bfloat16", "float32", "float16")):
        for batch, classes in ((1031, 101), (517, 1000)):
            yield Check(batch=batch, classes=classes, dtype=dtype, options=name, small=True)
    for layout, dtype in itertools.product(LAYOUTS[1:], ("bfloat16", "float32", "float16")):
        for batch, classes in ((1031, 101), (130, 517), (1, 7), (5, 1), (3000, 257)):
            yield Check(batch=batch, classes=classes, dtype=dtype, layout=layout, small=True)
    for batch, classes in ((16384, 1000), (16384, 100), (4096, 21841), (65536, 300)):
        yield Check(batch=batch, classes=classes, options="rows" if classes != 21841 else "category")
    yield Check(batch=16384, classes=1000, dtype="float32", options="rows")


def inputs(check: Check, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher (batch, classes) and labels (batch,), in the layout of the check."""
    case = cases.Case(check.batch, check.classes, check.dtype)
    student, teacher, target = cases.inputs(case, device)
    if check.options in ("mask", "mask-symmetric", "cold-mask"):
        target = target % min(check.classes, 11)  # classes repeat
    share = OPTIONS[check.options].get("ignored", 0.0)
    if share:
        generator = torch.Generator(device).manual_seed(1)
        target[torch.rand(check.batch, generator=generator, device=device) < share] = -100
    return _laid_out(student, check.layout), _laid_out(teacher, check.layout), target


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "misaligned":  # rows that begin one element into storage of another pitch
        wide = x.new_zeros(x.shape[0], x.shape[1] + 3)
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    return x


def evaluate(backend: str, check: Check, student: Tensor, teacher: Tensor, target: Tensor) -> Result:
    options = {key: value for key, value in OPTIONS[check.options].items() if key != "ignored"}
    leaf = student.detach().requires_grad_()
    loss = mcld_kernels.mcld_loss(leaf, teacher, target, backend=backend, **options)  # type: ignore[arg-type]
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def in_eager(check: Check, student: Tensor, teacher: Tensor, target: Tensor, dtype: torch.dtype) -> Result:
    """Eager arithmetic in a dtype: the reference, or where its matrices do not fit, chunks of anchors."""
    needed = 8 * dtype.itemsize * (check.batch**2 + check.classes**2)
    if needed > memory.available(student.device) / REFERENCE_SHARE:
        weight = OPTIONS[check.options].get("weight", (1.0, 1.0, 1.0))
        terms = tuple(term for term, w in zip(cases.TERMS, weight) if w)
        if check.options not in ("default", "rows", "category"):
            raise ValueError(f"the reference does not fit at {check}")
        case = cases.Case(check.batch, check.classes, check.dtype, terms)
        return mcld_chunks.loss_and_gradient(case, student, teacher, target, dtype)
    return evaluate("reference", check, student.to(dtype), teacher.to(dtype), target)


def run_check(provider: str, check: Check, device: torch.device) -> dict[str, Any]:
    """One check of one provider, as a record."""
    record: dict[str, Any] = {"provider": provider, "check": str(check), **vars(check)}
    torch.set_float32_matmul_precision(check.precision)
    student, teacher, target = inputs(check, device)
    reason = _unsupported_reason(provider, student, teacher)
    if reason is not None:
        return record | {"status": "not run", "reason": reason}
    loss, gradient = in_eager(check, student, teacher, target, torch.float64)
    assert gradient is not None
    sizes = [float(torch.linalg.vector_norm(x)) or 1.0 for x in (loss, gradient)]
    exact = gate.Truth(loss, gradient, *sizes)
    dtype = getattr(torch, check.dtype)
    eager = [gate.error(in_eager(check, student, teacher, target, dtype), exact)]
    operands = floor_dtype(check.dtype, check.precision)
    if operands != check.dtype:
        rounded = [x.to(getattr(torch, operands)) for x in (student, teacher)]
        eager.append(gate.error(in_eager(check, *rounded, target, rounded[0].dtype), exact))
    # A batch of one has a loss and gradient of zero: errors there are relative to a cosine over the temperature.
    if check.batch == 1 or check.classes == 1:
        exact = gate.Truth(loss, gradient, 30.0, max(sizes[1], 30.0 / float(student.double().norm())))
        eager = [gate.Error(0.0, 0.0)]
    allowed = gate.bar(eager, operands)
    try:
        tuning = {"hopper": provider == "hopper"} | (SMALL if check.small else {})
        with mcld_kernels.backends.tuned(**tuning):
            first, second = (evaluate(BACKENDS[provider], check, student, teacher, target) for _ in range(2))
        verdict = gate.judge(gate.error(first, exact), allowed)
        repeats = all(torch.equal(a, b) for a, b in zip(first, second) if a is not None and b is not None)
    except Exception as fault:  # whatever a kernel raises is the row's reason
        return record | {"status": "error", "reason": f"{type(fault).__name__}: {str(fault)[:400]}"}
    status = "ok" if verdict.passed and repeats else "FAILED"
    reason = None if repeats else "two runs differ"
    return record | {"status": status, "reason": reason, "repeats_bitwise": repeats, **verdict.record()}


def _unsupported_reason(provider: str, student: Tensor, teacher: Tensor) -> str | None:
    if student.device.type == "cpu":  # interpreted or emulated kernels are slow, and right or wrong all the same
        return mcld_kernels.backends.unsupported_reason(BACKENDS[provider], student, teacher, False)
    return backend_unsupported_reason(BACKENDS[provider], provider == "hopper", student, teacher)


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each provider and dtype, and one for each failure."""
    lines = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["provider"], row["dtype"]), []).append(row)
    for (provider, dtype), members in groups.items():
        ratios = [row["ratio"] for row in members if row.get("ratio") is not None and math.isfinite(row["ratio"])]
        counts = {status: sum(row["status"] == status for row in members) for status in ("ok", "FAILED", "error")}
        text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        worst = f"; the largest error is {max(ratios):.2f} of what is allowed" if ratios else ""
        lines.append(f"{provider} {dtype}: {text or 'not run: ' + str(members[0]['reason'])}{worst}")
    for row in rows:
        if row["status"] in ("FAILED", "error"):
            detail = row["reason"] or f"error {row['ratio']:.3g} times what is allowed"
            lines.append(f"  {row['provider']}: {row['check']}: {row['status']}: {detail}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(
        description="Errors of the backends against fp64 truth.", epilog=programs.EXIT_CODES
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--providers", nargs="+", choices=list(BACKENDS), metavar="P", default=list(BACKENDS),
        help=f"of {', '.join(BACKENDS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        nargs="+",
        metavar="D",
        choices=("float32", "bfloat16", "float16"),
        help="float32, bfloat16 or float16",
    )
    parser.add_argument("--seconds", type=float, default=600, help="after which no check is begun")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a line of JSON for each check")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("correct: this machine, or this build of torch, has no CUDA device", file=sys.stderr)
        return Exit.NO_DEVICE
    deadline = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    chosen = [check for check in checks(device.type) if options.dtype is None or check.dtype in options.dtype]
    for check, provider in itertools.product(chosen, options.providers):
        if time.monotonic() > deadline:
            break
        if options.output:
            with options.output.open("a") as file:
                print(json.dumps({"begun": f"{provider}: {check}"}), file=file)
        try:
            with memory.released(device):  # others measure on the device at the same time
                row = run_check(provider, check, device)
        except RuntimeError as fault:  # of the reference: no memory, say. It costs its own check.
            row = {"provider": provider, "check": str(check), **vars(check), "status": "error"}
            row["reason"] = f"the reference: {type(fault).__name__}: {str(fault)[:400]}"
        rows.append(row)
        if options.output:
            with options.output.open("a") as file:
                print(json.dumps(row), file=file)
        if row["status"] == "error" and context_is_lost(device):
            print(f"the CUDA context is lost after {provider}: {check}", file=sys.stderr)
            if options.output:
                with options.output.open("a") as file:
                    print(json.dumps({"context_lost": f"{provider}: {check}"}), file=file)
            break
    print(summary(rows))
    ran = len(rows) // max(1, len(options.providers))
    print(f"{ran} of {len(chosen)} checks")
    failed = any(row["status"] in ("FAILED", "error") for row in rows)
    return Exit.FAILED if failed or not any(row["status"] == "ok" for row in rows) else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
