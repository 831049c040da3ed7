"""Measure the CUDA backends on this machine's GPU: ``python -m mcld_kernels.calibrate``.

Every candidate of `backends.timings` computes every shape; a result within the error bar is timed, in interleaved
rounds, and the times become the table that ``backend="auto"`` chooses by. The measurement runs in a process of its own,
which is ended if it hangs; what it has measured by then is kept. The Hopper kernels are tried alone first and take part
only if they finish and are right. The time that is left goes to forms of the kernels (`backends.forms`): one that is
right and faster becomes part of the table, as fields of its backend's Tuning. ``--from results.json`` makes the table
of a run of the repository's bench/run.py.
"""

from __future__ import annotations

import argparse
import contextvars
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends, calibrate_forms
from .backends import forms, timings
from .calibrate_plan import Plan
from .console import to_terminal
from .losses.mcld import mcld_loss
from .options import Backend
from .version import __version__

# A result passes within FACTOR times eager's own error. Eager may be exact by luck, hence floors, relative to the loss
# and to the gradient's norm: two to four times the dtype's epsilon, for half precision a quarter of it.
FACTOR = 2.0
LOSS_FLOOR = {"float64": 1e-13, "float32": 5e-7, "float16": 2.5e-4, "bfloat16": 2e-3}
GRADIENT_FLOOR = {"float64": 1e-13, "float32": 2.4e-7, "float16": 2.5e-4, "bfloat16": 2e-3}
# float32 operands as a float32 matmul precision rounds them: tf32 has the mantissa of fp16.
OPERANDS = {"highest": "float32", "high": "float16", "medium": "bfloat16"}

DTYPES = ("bfloat16", "float16", "float32")
PRECISIONS = ("highest", "high", "medium")
TRIAL_S = 180  # at most, for the Hopper kernels alone
TRIAL_SHARE = 0.4  # of all the time, likewise
FORMS_SHARE = 0.35  # of all the time, kept for the forms

# What the times of a table are of.
CLOCKS = {"milliseconds": "a whole call, its launches included", "forms": "the device alone, behind a backlog"}

_RESULTS = ("loss", "gradient")
Result = tuple[Tensor, Tensor]  # loss () and the student's gradient (batch, classes)


class Exit(IntEnum):
    """The exit codes of this program and of those in the repository's bench/ and python/."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_DEVICE = 3
    OUTPUT = 4
    INTERRUPTED = 130


EXIT_CODES = (
    "exit codes: 0 done; 1 a result is wrong or missing; 2 bad arguments; 3 no CUDA device; "
    "4 the output cannot be written; 130 interrupted"
)


def floor_dtype(dtype: str, precision: str) -> str:
    """The dtype whose floors hold for logits of ``dtype`` at a float32 matmul precision."""
    return OPERANDS[precision] if dtype == "float32" else dtype


def hopper_unsupported_reason(student: Tensor, teacher: Tensor) -> str | None:
    """The reason why the Hopper kernels cannot take these logits; None if they can, where the work is large enough."""
    from .backends.cuda import extension, hopper

    module, reason = extension.load()
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    if module is None:
        return reason
    return hopper.unsupported_reason(module, student.device, dtype)


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """The rows of the table, shape by shape; ``rejected`` has the reason of each candidate without a time."""
    torch.set_float32_matmul_precision(plan.precision)
    for shape in plan.shapes():
        milliseconds, rejected = measure_shape(plan, shape.dtype, shape.batch, shape.classes)
        yield asdict(shape) | {"milliseconds": milliseconds, "rejected": rejected}


def measure_shape(plan: Plan, dtype: str, batch: int, classes: int) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of the candidates that are right at one shape, and why the others have none."""
    gate = _Gate(plan, dtype, batch, classes)
    for candidate in plan.candidates:
        gate.admit(candidate)
    return gate.medians(), gate.rejected


class _Gate:
    """The candidates and forms that are right at one shape; ``rejected`` has the reason of each that is not."""

    def __init__(self, plan: Plan, dtype: str, batch: int, classes: int):
        self._rounds = plan.rounds
        self._tensors = _inputs(batch, classes, getattr(torch, dtype), torch.device(plan.device))
        student, teacher, target = self._tensors
        oracle = _oracle(student, teacher)
        self._exact = oracle(student.double(), teacher.double(), target)
        operands = floor_dtype(dtype, plan.precision)
        eager = [_error(oracle(student, teacher, target), self._exact)]
        if operands != dtype:  # operands of fewer bits are allowed, whether eager uses them or not
            rounded_student, rounded_teacher = (x.to(getattr(torch, operands)) for x in (student, teacher))
            eager.append(_error(oracle(rounded_student, rounded_teacher, target), self._exact))
        self._allowed = _allowed(eager, operands)
        self._steps: dict[str, Callable[[], Result]] = {}
        self.rejected: dict[str, str] = {}

    def admit(self, form: str) -> None:
        """Compute once by a candidate or a form."""
        student, teacher, _ = self._tensors
        reason = _unsupported_reason(form.partition(":")[0], student, teacher)
        if reason is None:
            step = _step(form, *self._tensors)
            try:
                error = _error(step(), self._exact)
            except Exception as fault:  # whatever a kernel raises is the reason to show; the others go on
                reason = f"{type(fault).__name__}: {str(fault).partition(chr(10))[0]}"
            else:
                if all(e <= a for e, a in zip(error, self._allowed)):  # False for NaN
                    self._steps[form] = step
                    return
                shown = ", ".join(f"{name} {e:.3g} ({a:.3g})" for name, e, a in zip(_RESULTS, error, self._allowed))
                reason = f"wrong: relative error (allowed) of {shown}"
        self.rejected[form] = reason

    def medians(self, names: Sequence[str] | None = None, backlog: bool = False) -> dict[str, float]:
        """Milliseconds of those that were admitted, or of ``names`` among them; ``backlog``: of the device alone."""
        steps = {name: step for name, step in self._steps.items() if names is None or name in names}
        return _interleaved_medians(steps, self._rounds, self._tensors[0].device, backlog)


def _inputs(batch: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as halfway through a training: the teacher favours the label, the student has half of its signal."""
    generator = torch.Generator(device).manual_seed(0)
    noise = [torch.randn(batch, classes, generator=generator, device=device) for _ in range(2)]
    target = torch.randint(classes, (batch,), generator=generator, device=device)
    teacher = noise[0]
    teacher[torch.arange(batch, device=device), target] += 6.0
    return (0.5 * teacher + noise[1]).to(dtype), teacher.to(dtype), target


def _oracle(student: Tensor, teacher: Tensor) -> Callable[[Tensor, Tensor, Tensor], Result]:
    """The reference or, where its fp64 matrices do not fit into half of the memory, backend "torch", in chunks."""
    batch, classes = student.shape
    needed = 8 * 8 * (batch**2 + classes**2)
    device = student.device
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2 << 30
    name: Backend = "reference" if needed <= available / 2 else "torch"
    return lambda s, t, y: _loss_and_gradient(name, s, t, y)


def _loss_and_gradient(backend: Backend, student: Tensor, teacher: Tensor, target: Tensor) -> Result:
    leaf = student.detach().requires_grad_()
    loss = mcld_loss(leaf, teacher, target, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _step(form: str, student: Tensor, teacher: Tensor, target: Tensor) -> Callable[[], Result]:
    candidate, fields = forms.parse(form)
    backend: Any = timings.CANDIDATES.get(candidate, candidate)

    # One tuning for all calls, so that they are replayed as a user's are: a replay is of one `tuned` alone.
    with backends.tuned(hopper=candidate == "hopper", **fields):
        context = contextvars.copy_context()
    return lambda: context.run(_loss_and_gradient, backend, student, teacher, target)


def _unsupported_reason(candidate: str, student: Tensor, teacher: Tensor) -> str | None:
    reason = backends.unsupported_reason(timings.CANDIDATES.get(candidate, candidate), student, teacher, False)
    if reason is None and candidate == "hopper":
        return hopper_unsupported_reason(student, teacher)
    return reason


def _error(result: Result, exact: Result) -> tuple[float, float]:
    """Relative errors of the loss and of the gradient (Frobenius norm)."""
    loss, gradient = (
        (torch.linalg.vector_norm(x.double() - y) / torch.linalg.vector_norm(y)).item() for x, y in zip(result, exact)
    )
    return loss, gradient


def _allowed(eager: Sequence[tuple[float, float]], operands: str) -> tuple[float, float]:
    """Twice eager's largest error; errors that are not finite do not count, and the floor always applies."""
    loss, gradient = (
        max([FACTOR * error for error in errors if math.isfinite(error)] + [floor[operands]])
        for errors, floor in zip(zip(*eager), (LOSS_FLOOR, GRADIENT_FLOOR))
    )
    return loss, gradient


def _interleaved_medians(
    steps: dict[str, Callable[[], Result]], rounds: int, device: torch.device, backlog: bool = False
) -> dict[str, float]:
    """Median milliseconds of each step. Rounds are interleaved in changing order, because clocks drift."""
    order = list(steps)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    cycles = {name: cycles_to_enqueue(step, device) if backlog else 0 for name, step in steps.items()}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(_milliseconds(steps[name], device, cycles[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def cycles_to_enqueue(step: Callable[[], object], device: torch.device) -> int:
    """The device's cycles within which the host has surely enqueued the call: twice its time, at most 50 ms."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    host = time.perf_counter() - begin
    kilohertz = getattr(torch.cuda.get_device_properties(device), "clock_rate", 0) or 1_800_000
    return int(min(2 * host + 20e-6, 50e-3) * 1e3 * kilohertz)


def _milliseconds(step: Callable[[], Result], device: torch.device, backlog: int = 0) -> float:
    """Of one call; after ``backlog`` cycles in which the device does nothing and the host can enqueue the call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if backlog:
        torch.cuda._sleep(backlog)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))


def measure_into(path: Path, plan: Plan) -> None:
    """Append a line of JSON to ``path`` after every shape."""
    calibrate_forms.write_lines(path, measure(plan))


def measure_forms_into(path: Path, plan: Plan) -> None:
    """Append a line of JSON to ``path`` before every form and after every shape."""
    torch.set_float32_matmul_precision(plan.precision)
    gates = partial(_Gate, plan)
    calibrate_forms.write_lines(path, calibrate_forms.measure(plan, gates))


def run_in_process(
    plan: Plan,
    seconds: float,
    target: Callable[[Path, Plan], None] = measure_into,
    stall: float = math.inf,
) -> tuple[list, bool]:
    """The rows that a process of its own has measured within ``seconds``, and whether it came to its end.

    It is ended as well where it writes no line for ``stall`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="mcld-calibrate-") as folder:
        path = Path(folder, "rows")
        path.touch()
        process = multiprocessing.get_context("spawn").Process(target=target, args=(path, plan))
        process.start()
        try:
            limit = calibrate_forms.join(process, path, seconds, stall)
            complete = process.exitcode == 0
            if process.exitcode is None:
                _say(f"{', '.join(plan.candidates)} took longer than {limit:.0f} s and was ended")
            elif not complete:
                _say(f"the process of {', '.join(plan.candidates)} ended with {process.exitcode}")
        finally:
            process.kill()
            process.join()
        lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")], complete


def run_forms(plan: Plan, seconds: float) -> list[dict[str, Any]]:
    """The rows of the shapes whose forms were compared within ``seconds``."""

    def run(plan: Plan, seconds: float) -> tuple[list, bool]:
        return run_in_process(plan, seconds, measure_forms_into, calibrate_forms.STALL_S)

    return calibrate_forms.run(plan, seconds, run)


def hopper_passes(plan: Plan, seconds: float) -> bool:
    """True if the Hopper kernels run to their end and are right, at shapes at which they are taken."""
    dtypes = tuple(dtype for dtype in plan.dtypes if dtype != "float32")
    if not dtypes:
        return False
    trial = replace(plan, candidates=("hopper",), dtypes=dtypes, batches=(4096,), classes=(100, 1000), rounds=1)
    rows, complete = run_in_process(trial, min(TRIAL_S, seconds))
    reason = next((f": {row['rejected']['hopper']}" for row in rows if row["rejected"]), "")
    passes = complete and bool(rows) and not reason
    print("The Hopper kernels take part." if passes else f"The Hopper kernels are left out{reason}.")
    return passes


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of every float32 matmul precision, those of the 16-bit dtypes at the first."""
    plan = Plan(
        candidates=("triton", "cuda"),
        dtypes=tuple(options.dtype),
        batches=tuple(options.batch),
        classes=tuple(options.classes),
        rounds=options.repeats,
    )
    deadline = time.monotonic() + options.seconds
    if hopper_passes(plan, TRIAL_SHARE * options.seconds):
        plan = replace(plan, candidates=("triton", "cuda", "hopper"))
    parts = []
    for number, precision in enumerate(options.matmul_precision):
        dtypes = tuple(dtype for dtype in plan.dtypes if dtype == "float32" or number == 0)
        if dtypes:
            parts.append(replace(plan, dtypes=dtypes, precision=precision))
    kept = FORMS_SHARE * options.seconds if options.forms else 0.0
    rows: list[dict[str, Any]] = []
    for part in parts:
        rows += run_in_process(part, deadline - time.monotonic() - kept)[0]
    if not options.forms or not rows:
        return rows
    tuned: list[dict[str, Any]] = []
    for part in parts:
        tuned += run_forms(part, deadline - time.monotonic())
    return calibrate_forms.merge(rows, tuned)


def table(rows: Sequence[dict[str, Any]], gpu: str, date: str, **header: Any) -> dict[str, Any]:
    """The content of a table. Raises ValueError where no shape has two candidates to choose between."""
    keys = ("dtype", "precision", "batch", "classes", "milliseconds", "tuning", "forms")
    kept = [{key: row[key] for key in keys if row.get(key)} for row in rows if row["milliseconds"]]
    if not any(len(row["milliseconds"]) > 1 for row in kept):
        names = ", ".join(timings.CANDIDATES)
        raise ValueError(f"no shape has two of {names} measured and right, of all terms with their gradient")
    return {"schema": timings.SCHEMA, "package": __version__, "gpu": gpu, "date": date, **header, "rows": kept}


def recorded_table(run: dict[str, Any]) -> dict[str, Any]:
    """The table of a run of bench/run.py: MCLD, all terms with their gradient, each row past the gate."""
    gpu = run["machine"].get("gpu")
    if gpu is None:
        raise ValueError("the recorded run is not of a GPU")
    precision = run["machine"]["float32_matmul_precision"]
    shapes: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in run["rows"]:
        complete = len(row["terms"]) == 3 and row["mode"] == "forward-backward" and row.get("loss", "mcld") == "mcld"
        if complete and row["status"] == "ok" and row["provider"] in timings.CANDIDATES:
            shape = row["dtype"], row["batch"], row["classes"]
            shapes.setdefault(shape, {})[row["provider"]] = 1e3 * row["time"]["median_s"]
    rows = [
        {"dtype": dtype, "precision": precision, "batch": batch, "classes": classes, "milliseconds": milliseconds}
        for (dtype, batch, classes), milliseconds in shapes.items()
    ]
    made = table(rows, gpu, run["started"][:10], commit=run["commit"], dirty=run["dirty"], versions=run["versions"])
    made["package"] = run["versions"]["mcld_kernels"]
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m mcld_kernels.calibrate",
        description="Measure the CUDA backends on this machine's GPU and write the table that 'auto' chooses by.",
        epilog=EXIT_CODES,
    )
    made.add_argument("--from", dest="recorded", type=Path, metavar="JSON", help="a recorded run instead of a new one")
    made.add_argument("--output", type=Path, metavar="FILE", help="default: where mcld_kernels looks for it")
    made.add_argument("--batch", type=_positive, nargs="+", default=[256, 1024, 4096, 16384, 65536])
    made.add_argument("--classes", type=_positive, nargs="+", default=[100, 1000])
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        metavar="D",
        default=list(DTYPES),
        help=f"of {', '.join(DTYPES)} (default: all)",
    )
    made.add_argument(
        "--matmul-precision", choices=PRECISIONS, nargs="+", metavar="P", default=["highest", "high"],
        help=f"of fp32, of {', '.join(PRECISIONS)} (default: highest high)",
    )  # fmt: skip
    made.add_argument("--repeats", type=_positive, default=20, help="interleaved rounds (default: 20)")
    made.add_argument("--seconds", type=float, default=900, help="in all; what is measured by then is kept")
    made.add_argument(
        "--no-forms", dest="forms", action="store_false", help="compare the backends alone, not forms of their kernels"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; returns one of the exit codes of ``--help``."""
    options = parser().parse_args(arguments)
    try:
        return _main(options)
    except KeyboardInterrupt:
        _say("interrupted; no table is written")
        return Exit.INTERRUPTED


def _main(options: argparse.Namespace) -> int:
    if options.recorded is None and not torch.cuda.is_available():
        _say(
            "this machine, or this build of torch, has no CUDA device. On a CPU 'auto' takes 'torch', and there is "
            "nothing to choose; --from makes the table of a recorded run."
        )
        return Exit.NO_DEVICE
    try:
        if options.recorded is not None:
            made = recorded_table(_load(options.recorded))
        else:
            made = table(measure_all(options), torch.cuda.get_device_name(), time.strftime("%Y-%m-%d", time.gmtime()))
            made["versions"] = {"torch": torch.__version__}
            made["clocks"] = CLOCKS
    except _Unreadable as fault:
        _say(str(fault))
        return Exit.USAGE
    except ValueError as fault:
        _say(f"no table: {fault}")
        return Exit.FAILED
    try:
        path = options.output or timings.user_path(made["gpu"])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(made, indent=1) + "\n")
        partial.replace(path)
    except (OSError, RuntimeError) as fault:
        _say(f"the table cannot be written ({fault}); --output FILE writes it elsewhere, MCLD_TABLE names it then")
        return Exit.OUTPUT
    for row in made["rows"]:
        dtype = f"{row['dtype']} ({row['precision']})" if row["dtype"] == "float32" else row["dtype"]
        by_time = sorted(row["milliseconds"].items(), key=lambda item: item[1])
        tuned = {
            candidate: f" ({forms.name(candidate, fields).partition(':')[2]})"
            for candidate, fields in row.get("tuning", {}).items()
        }
        times = ", ".join(f"{name} {value:.3f} ms{tuned.get(name, '')}" for name, value in by_time)
        print(f"B = {row['batch']:<6} C = {row['classes']:<6} {dtype:<19} {times}")
    print(f"{made['gpu']}: {len(made['rows'])} shapes written to {path}")
    return Exit.OK


class _Unreadable(Exception):
    """A file given by --from is no recorded run."""


def _load(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_bytes())
        if not isinstance(run, dict) or not {"machine", "rows", "started", "versions"} <= run.keys():
            raise ValueError("keys are missing")
        return run
    except (OSError, ValueError, RecursionError) as fault:
        raise _Unreadable(f"{path} is no results.json of bench/run.py: {fault}") from None


def _say(text: str) -> None:
    print(to_terminal(f"calibrate: {text}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
