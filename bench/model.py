"""Predicted times of the CUDA backend on a GPU, beside measured ones: ``python bench/model.py [RESULTS ...]``.

RESULTS: the results.json of a run, or an archive of bench/gpu_report.py.

Each kernel of a call takes the longest of what its parts need: tensor cores, EX2, instruction issue, device memory;
then what lies between two launches. The counts are the algorithm's and the compiler's; the rates are assumptions or,
where results of a GPU are given, that machine's own ceilings. ``--assumptions`` lists them with their sources.

The model says what to expect and which part binds. A measurement outranks it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.harness import goals, programs  # noqa: E402
from bench.harness.cases import TERMS, Case  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402
from bench.harness.report import seconds  # noqa: E402
from mcld_kernels.backends.chunks import CHUNK_MB, CUDA_WAVE_MB  # noqa: E402
from mcld_kernels.backends.cuda import tuning  # noqa: E402

ROWS = ("instance", "sample")
# The kernels that are not this package's: the library's product, and the multiplication by the upstream gradient.
GEMM, UPSTREAM = "GEMM", "multiplication"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU, in what the model asks of it."""

    name: str = "NVIDIA H200"
    multiprocessors: int = 132
    clock_hz: float = 1.75e9
    gemm_flop_per_s: float = 7.9e14
    copy_bytes_per_s: float = 4.3e12
    tensor_flop_per_clock: int = 4096
    ex2_per_clock: int = 16
    issues_per_clock: int = 4
    launch_s: float = 2.0e-6
    graph_launch_s: float = 1.2e-6
    latency_s: float = 1.5e-6


ASSUMPTIONS = (
    ("multiprocessors", "132: NVIDIA H200 and H100 SXM (torch.cuda.get_device_properties says it)"),
    ("clock_hz", "1.75 GHz under load: assumed; 1.98 GHz is the highest, and tensor cores at full power run below it"),
    ("gemm_flop_per_s", "790 Tflop/s in bf16 on random data: a large square cuBLAS product; 989 by the data sheet"),
    ("copy_bytes_per_s", "4.3 TB/s counting reads and writes: a large device copy; 4.8 by the data sheet"),
    ("tensor_flop_per_clock", "4,096 dense 16-bit flop a clock and multiprocessor: NVIDIA H100 white paper"),
    ("ex2_per_clock", "16 a clock and multiprocessor: CUDA C++ Programming Guide, throughput of native instructions"),
    ("issues_per_clock", "4 warp schedulers of one instruction a clock: the same guide"),
    ("launch_s", "2.0 us between two kernels of a stream that is kept busy: assumed"),
    ("graph_launch_s", "1.2 us between two kernels of a graph: assumed"),
    ("latency_s", "1.5 us that a kernel takes however little it does: assumed"),
    ("instructions", "product 1: 993 a warp and tile after its products; flash: 380 a warp and tile of 128 candidates "
                     "(SASS of nvcc 13.0 for sm_90a; .ci/check_cuda.py asserts at most 1,000 and 384)"),
    ("tiles", "product 1 and the library's GEMM: 128 x 256; flash: 128 anchors, 128 candidates up to a pitch of 128, "
              "else 64 (csrc/constants.h; the library's is assumed)"),
    ("flash_efficiency", "0.9 of a GEMM's speed where products bind: assumed; FlashAttention-3 (Shah et al. 2024, "
                         "arXiv 2407.08608) reports up to 740 Tflop/s forward in fp16 on an H100"),
    ("one block", "reduce_terms, a kernel of one block, reads 32 bytes a clock: assumed"),
    ("traffic", "each kernel reads its operands, and for an anchor a row of class means, and writes its results once, "
                "in device memory; what it reads again comes from a cache"),
    ("overlap", "flash: exponentials and issue beside the products; product 1: its epilogue after them"),
)  # fmt: skip

PRODUCT_TILE = 128, 256
PRODUCT_EPILOGUE, PRODUCT_WARPS = 993, 8
FLASH_ANCHORS, FLASH_INSTRUCTIONS, FLASH_WARPS, FLASH_EXTRA_TILES = 128, 380, 8, 2
FLASH_COLUMNS = {64: 128, 128: 128, 256: 64}  # candidates of a tile by pitch
FLASH_PITCH, LOW_LATENCY = 256, 1024  # up to here flash, and the low-latency path, are taken
FLASH_EFFICIENCY = 0.9
ONE_BLOCK_BYTES_PER_CLOCK = 32
TUNING = tuning.CudaTuning(
    chunk_bytes=CHUNK_MB["cuda"] << 20,
    wave_bytes=CUDA_WAVE_MB << 20,
    hopper=True,
    low_latency_limit=LOW_LATENCY,
    flash_row_bytes=2 * FLASH_PITCH,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A kernel of a call and the seconds that each of its parts needs; the longest is its time."""

    name: str
    tensor: float = 0.0
    ex2: float = 0.0
    issue: float = 0.0
    memory: float = 0.0
    serial: float = 0.0  # after the others: an epilogue that nothing overlaps
    latency: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.tensor, self.ex2, self.issue, self.memory, self.latency) + self.serial

    @property
    def binds(self) -> str:
        parts = ("tensor", "ex2", "issue", "memory", "latency")
        return max(parts, key=lambda part: getattr(self, part))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    case: Case
    steps: tuple[Step, ...]
    launch_s: float

    @property
    def seconds(self) -> float:
        """The time of the kernels, one after the other."""
        return sum(step.seconds + self.launch_s for step in self.steps)

    @property
    def binds(self) -> str:
        """The part that takes the most time."""
        share: dict[str, float] = {"launches": self.launch_s * len(self.steps)}
        for step in self.steps:
            share[step.binds] = share.get(step.binds, 0.0) + step.seconds - step.serial
            share["epilogue"] = share.get("epilogue", 0.0) + step.serial
        return max(share, key=lambda part: share[part])

    def fraction(self, machine: Machine) -> float:
        return self.case.flop / self.seconds / machine.gemm_flop_per_s


def _pitch(d: int) -> int:
    return 64 if d <= 64 else math.ceil(d / 128) * 128


def _memory(machine: Machine, name: str, bytes_moved: float) -> Step:
    return Step(name=name, memory=bytes_moved / machine.copy_bytes_per_s, latency=machine.latency_s)


def _small(machine: Machine, name: str) -> Step:
    """A kernel that reads and writes next to nothing."""
    return Step(name=name, latency=machine.latency_s)


def _slowdown(machine: Machine) -> float:
    """A GEMM's best over the tensor cores' peak at the clock: what no kernel gets past."""
    return machine.multiprocessors * machine.tensor_flop_per_clock * machine.clock_hz / machine.gemm_flop_per_s


def _product_1(machine: Machine, n: int, m: int, pitch: int) -> Step:
    """E = exp(A K^T) for n anchors: waves of tiles, each followed by an epilogue of its own."""
    rows, columns = PRODUCT_TILE
    waves = math.ceil(math.ceil(n / rows) * math.ceil(m / columns) / machine.multiprocessors)
    products = 2 * rows * columns * pitch / machine.tensor_flop_per_clock
    epilogue = max(PRODUCT_EPILOGUE * PRODUCT_WARPS / machine.issues_per_clock, rows * columns / machine.ex2_per_clock)
    return Step(
        name="hopper_similarity",
        tensor=waves * products / machine.clock_hz * _slowdown(machine),
        memory=2 * n * m / machine.copy_bytes_per_s,
        serial=waves * epilogue / machine.clock_hz,
    )


def _product_2(machine: Machine, n: int, m: int, pitch: int) -> Step:
    rows, columns = PRODUCT_TILE
    tiles = math.ceil(n / rows) * math.ceil(pitch / columns)
    waves = math.ceil(tiles / machine.multiprocessors)
    whole = waves * machine.multiprocessors * rows * columns * m * 2
    return Step(
        name=GEMM,
        tensor=whole / machine.gemm_flop_per_s,
        memory=(2 * n * m + 4 * n * pitch) / machine.copy_bytes_per_s,
        latency=machine.latency_s,
    )


def _flash(machine: Machine, n: int, m: int, d: int) -> tuple[Step, int]:
    """Both products and the exponentials of a tile side by side; and the splits of the candidates."""
    pitch = _pitch(d)
    width = math.ceil(d / 16) * 16 if pitch == 128 and d <= 104 else pitch
    columns = FLASH_COLUMNS[pitch]
    blocks, tiles = math.ceil(n / FLASH_ANCHORS), math.ceil(m / columns)
    constants: Any = {"hopper_flash_rows": FLASH_ANCHORS, "hopper_flash_columns": FLASH_COLUMNS}
    tuned = replace(TUNING, hopper_blocks=machine.multiprocessors)
    splits = max(1, tuning.hopper_flash_splits(tuned, constants, n, m, pitch))
    rounds = math.ceil(blocks * splits / machine.multiprocessors)
    clocks = rounds * (math.ceil(tiles / splits) + FLASH_EXTRA_TILES) / machine.clock_hz / FLASH_EFFICIENCY
    step = Step(
        name="hopper_flash",
        tensor=clocks * 4 * FLASH_ANCHORS * columns * width / machine.tensor_flop_per_clock * _slowdown(machine),
        ex2=clocks * FLASH_ANCHORS * columns / machine.ex2_per_clock,
        issue=clocks * FLASH_INSTRUCTIONS * FLASH_WARPS * columns / 128 / machine.issues_per_clock,
        memory=4 * splits * n * pitch / machine.copy_bytes_per_s,
        latency=machine.latency_s,
    )
    return step, splits


def _chunks(machine: Machine, n: int, m: int, d: int) -> list[tuple[int, int, int, list[Step]]]:
    """The products of each chunk of a contrast: its anchors, its splits of products, its tiles of sums, its kernels."""
    pitch = _pitch(d)
    if pitch <= FLASH_PITCH:
        step, splits = _flash(machine, n, m, d)
        return [(n, splits, splits, [step])]
    tuned = replace(TUNING, multiprocessors=machine.multiprocessors)
    rows, tiles = tuning.chunk_rows(tuned, n, math.ceil(m / 128) * 128, pitch, 2, 128), math.ceil(m / PRODUCT_TILE[1])
    counts = [min(rows, n - start) for start in range(0, n, rows)]
    return [
        (count, 1, tiles, [_product_1(machine, count, m, pitch), _product_2(machine, count, m, pitch)])
        for count in counts
    ]


def _rows(machine: Machine, case: Case) -> list[Step]:
    """Instance- and sample-wise term: one launch, `anchor_epilogue`, does all that follows the products of a chunk."""
    batch, classes, pitch = case.batch, case.classes, _pitch(case.classes)
    logits, operand, labelled = 2 * batch * classes, 2 * batch * pitch, "sample" in case.terms
    steps = [_small(machine, name) for name in ("index_labels", "sort_labels")] if labelled else []
    steps += 2 * [_memory(machine, "normalize_rows", logits + operand)]
    if labelled:
        steps.append(_memory(machine, "class_means", operand + 4 * classes * pitch))
    for count, splits, tiles, products in _chunks(machine, batch, batch, classes):
        # Product, operand and partner, a class mean, sums; the gradient is written.
        read = count * (pitch * (4 * splits + 2 * 2 + (4 if labelled else 0)) + 4 * tiles)
        steps += [*products, _memory(machine, "anchor_epilogue", read + 2 * count * classes)]
    return steps


def _columns(machine: Machine, case: Case) -> list[Step]:
    """The category-wise term: the logits' columns are the anchors, and the gradient's columns lie apart in memory."""
    n, d, pitch = case.classes, case.batch, _pitch(case.batch)
    logits, operand = 2 * n * d, 2 * n * pitch
    steps = 2 * [
        _memory(machine, "column_squares", logits),
        _memory(machine, "normalize_columns", logits + operand),
    ]
    steps.append(_memory(machine, "positive_cosines", 2 * operand))
    for count, splits, tiles, products in _chunks(machine, n, n, d):
        steps += [products[0], _memory(machine, "row_sums", 4 * count * tiles), *products[1:]]
        if splits > 1:
            steps.append(_memory(machine, "combine_splits", 4 * count * pitch * (splits + 1)))
        steps.append(_small(machine, "loss_epilogue"))
        read = count * pitch * (4 + 2 * 2)  # the product, operand and partner
        steps.append(_memory(machine, "grad_epilogue_projection", read))
        steps.append(_memory(machine, "grad_epilogue_transposed", read + 2 * count * d))
    return steps


def predict(case: Case, machine: Machine | None = None, graph: bool = False) -> Prediction:
    """The kernels of loss and gradient for student anchors in 16 bits; ``graph``: their launches are a graph's."""
    machine = machine or Machine()
    launch = machine.graph_launch_s if graph else machine.launch_s
    batch, classes = case.batch, case.classes
    if max(batch, classes) <= LOW_LATENCY:
        steps = _low_latency(machine, case)
    else:
        steps = _columns(machine, case) if case.category else []
        steps += _rows(machine, case) if case.row_terms else []
        parts = sum((term in case.terms) * (classes if term == "category" else batch) for term in TERMS)
        one_block = 4 * parts / ONE_BLOCK_BYTES_PER_CLOCK / machine.clock_hz
        steps.append(Step(name="reduce_terms", latency=machine.latency_s + one_block))
    # By the gradient of the loss: PyTorch's part of every backward.
    steps.append(_memory(machine, UPSTREAM, 2 * 2 * batch * classes))
    return Prediction(case=case, steps=tuple(steps), launch_s=launch)


def _low_latency(machine: Machine, case: Case) -> list[Step]:
    """Five launches, each of the work of all terms; a block of a launch goes through a whole contraction."""
    flop = 0.0
    if case.row_terms:
        flop += 2.0 * case.batch**2 * _pitch(case.classes)
    if case.category:
        flop += 2.0 * case.classes**2 * _pitch(case.batch)
    peak = machine.multiprocessors * machine.tensor_flop_per_clock * machine.clock_hz
    moved = 2 * case.batch * case.classes * 2 / machine.copy_bytes_per_s
    depth = max(_pitch(case.classes), _pitch(case.batch)) / 32  # k-steps of a tile, one after the other
    chain = depth * 100 / machine.clock_hz  # a load, a product and a barrier: assumed to take some 100 clocks
    steps = [Step(name="low_latency_normalize", memory=moved, latency=machine.latency_s)]
    for name in ("low_latency_similarity", "low_latency_product"):
        steps.append(Step(name=name, tensor=4 * flop / peak, latency=machine.latency_s + chain))
    for name in ("low_latency_loss", "low_latency_outputs"):
        steps.append(Step(name=name, memory=moved, latency=machine.latency_s))
    return steps


# The regimes of harness/goals.py; the last column: a graph's replay.
REGIMES: tuple[tuple[Case, bool], ...] = (
    *((Case(batch, 1000, "bfloat16", ROWS), False) for batch in (4096, 16384, 65536)),
    *((Case(batch, 100, "bfloat16", ROWS), False) for batch in (16384, 65536)),
    *((Case(batch, 21841, "bfloat16", ("category",)), False) for batch in (256, 1024, 4096)),
    (Case(256, 1000, "bfloat16", TERMS), True),
)


def machine_of(run: dict[str, Any]) -> Machine:
    """The machine of a recorded run, its own ceilings in place of the assumed ones. ValueError for a CPU's."""
    device, ceilings = run["machine"], run["ceilings"]
    if "gpu" not in device:
        raise ValueError("the recorded run is not of a GPU")
    made = Machine(name=device["gpu"], multiprocessors=device["multiprocessors"])
    gemm = ceilings.get("gemm_bfloat16_flop_per_s", made.gemm_flop_per_s)
    return replace(made, gemm_flop_per_s=gemm, copy_bytes_per_s=ceilings["copy_bytes_per_s"])


def results_of(path: Path) -> dict[str, Any]:
    """The results of bench/run.py in a file, or in an archive of gpu_report.py. ValueError where there are none."""
    if not path.name.endswith(".tar.gz"):
        run: dict[str, Any] = json.loads(path.read_text())
        return run
    from bench import publish

    try:
        of_archive = publish.load(path).run
    except publish.Unpublishable as fault:
        raise ValueError(str(fault)) from None
    if of_archive is None:
        raise ValueError("no benchmark of the archive has results")
    return of_archive


def measured(case: Case, graph: bool, rows: Sequence[dict[str, Any]]) -> tuple[str, float] | None:
    """The fastest of this package's CUDA kernels at a case by their own time, or by a graph's replay; None of none."""
    best: tuple[str, float] | None = None
    for row in rows:
        same = (row["batch"], row["classes"], row["dtype"], tuple(row["terms"])) == (
            case.batch, case.classes, case.dtype, case.terms,
        )  # fmt: skip
        of_case = same and row["status"] == "ok" and row["mode"] == case.mode and row.get("loss", "mcld") == "mcld"
        if of_case and row["provider"] in ("cuda", "hopper"):
            replay = (row.get("graph_time") or {}).get("median_s")
            time = replay if graph else goals.best_time(row)
            if time and (best is None or time < best[1]):
                best = row["provider"], time
    return best


def table(machine: Machine, rows: Sequence[dict[str, Any]] = ()) -> str:
    """A line for each regime: the prediction, what binds, and the measurement where there is one."""
    title = f"{'case, bfloat16':<34}{'predicted':>10}{'of GEMM':>9}"
    title += f"{'measured':>11}{'m / p':>7}  by" if rows else f"  {'binds':<10}{'launches':>8}"
    lines = [title]
    for case, graph in REGIMES:
        predicted = predict(case, machine, graph)
        measurement = measured(case, graph, rows)
        name = str(case).removesuffix(", forward-backward").replace(" bfloat16,", ",")
        line = f"{name:<34}{seconds(predicted.seconds):>10}{predicted.fraction(machine):>9.0%}"
        if not rows:
            line += f"  {predicted.binds:<10}{len(predicted.steps):>8}"
        elif measurement is not None:
            line += f"{seconds(measurement[1]):>11}{measurement[1] / predicted.seconds:>7.2f}  {measurement[0]}"
        lines.append(line)
    source = "its own ceilings" if rows else "assumed"
    lines.append(
        f"{machine.name}: GEMM {machine.gemm_flop_per_s / 1e12:.0f} Tflop/s, "
        f"copy {machine.copy_bytes_per_s / 1e12:.1f} TB/s ({source})"
    )
    lines.append("a model, not a measurement")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(description="Predicted times beside measured ones.", epilog=programs.EXIT_CODES)
    parser.add_argument(
        "results", type=Path, nargs="*", help="results.json of bench/run.py on a GPU, or an archive of gpu_report.py"
    )
    parser.add_argument("--assumptions", action="store_true", help="list what the model assumes, with the sources")
    parser.add_argument("--steps", action="store_true", help="each kernel of each regime, with what its parts need")
    options = parser.parse_args(arguments)
    programs.make_output_printable()
    machine, rows = Machine(), []
    for path in options.results:
        try:
            run = results_of(path)
            machine = machine_of(run)
            rows += run["rows"]
        except (OSError, ValueError, KeyError, TypeError) as fault:
            print(f"model: {path} holds no results of a GPU: {type(fault).__name__}: {fault}", file=sys.stderr)
            return Exit.USAGE
    if options.assumptions:
        for name, text in ASSUMPTIONS:
            print(programs.to_terminal(f"{name}: {text}"))
        return Exit.OK
    print(table(machine, rows))
    for case, graph in REGIMES if options.steps else ():
        print(f"\n{case}")
        steps = predict(case, machine, graph).steps
        for step in dict.fromkeys(steps):
            needs = {part: value for part, value in vars(step).items() if part != "name" and value}
            first = sorted(needs, key=lambda part: part != step.binds)  # that which binds
            parts = [f"{part} {seconds(needs[part])}" for part in first]
            times = f"{steps.count(step)} x " if steps.count(step) > 1 else ""
            line = f"  {times + step.name:<29}{seconds(step.seconds):>8}  {', '.join(parts)}"
            print(programs.to_terminal(line))
    return Exit.OK


if __name__ == "__main__":
    programs.end_with_pipe()
    sys.exit(main())
