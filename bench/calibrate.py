"""Measure the CUDA backends on this machine's GPU and write the table that ``backend="auto"`` chooses by.

    python bench/calibrate.py

runs the benchmark on a grid of shapes, each row past the correctness gate, and writes the times to the cache folder of
the user, where `mcld_kernels.measured` finds them (``--output``, or MCLD_TABLE: elsewhere). The Hopper kernels are
first tried alone, in a process that is ended if it hangs, and take part only if they were right. ``--from
results.json`` makes the table of a recorded run instead. No GPU has run this program yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from mcld_kernels import measured  # noqa: E402

TRIAL_S = 180  # for the Hopper kernels alone; the fp64 truth takes most of it


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--from", dest="recorded", type=Path, metavar="JSON", help="a recorded run instead of a new one")
    found.add_argument("--output", type=Path, metavar="FILE", help="default: where mcld_kernels looks for it")
    found.add_argument("--batch", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    found.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    found.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32"])
    found.add_argument("--matmul-precision", nargs="+", default=["highest", "high"], help="of float32")
    found.add_argument("--repeats", type=int, default=20)
    found.add_argument("--seconds", type=float, default=900, help="after which a run is ended (default: 900)")
    return found


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's rows of one recorded run: of all terms with their gradient, what passed the gate."""
    precision = found["machine"]["float32_matmul_precision"]
    shapes: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in found["rows"]:
        whole = len(row["terms"]) == 3 and row["mode"] == "forward-backward"
        if whole and row["status"] == "ok" and row["provider"] in measured.CANDIDATES:
            shape = row["dtype"], row["batch"], row["classes"]
            shapes.setdefault(shape, {})[row["provider"]] = 1e3 * row["time"]["median_s"]
    return [
        {"dtype": dtype, "precision": precision, "batch": batch, "classes": classes, "milliseconds": milliseconds}
        for (dtype, batch, classes), milliseconds in shapes.items()
    ]


def table(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table of recorded runs on one GPU. Raises ValueError where there is nothing to choose by."""
    first = runs[0]
    gpus = {run["machine"].get("gpu") for run in runs}
    if None in gpus or len(gpus) != 1:
        raise ValueError(f"the runs must be of one GPU; they are of {', '.join(map(str, gpus))}")
    found = [row for run in runs for row in rows(run)]
    if not any(len(row["milliseconds"]) > 1 for row in found):
        raise ValueError(
            f"no shape has two of {', '.join(measured.CANDIDATES)} measured and right, of all terms with their gradient"
        )
    return {
        "schema": measured.SCHEMA,
        "package": first["versions"]["mcld_kernels"],
        "gpu": gpus.pop(),
        "date": first["started"][:10],
        "versions": first["versions"],
        "commit": first["commit"],
        "dirty": first["dirty"],
        "rows": found,
    }


def bench(folder: Path, providers: str, shapes: Sequence[str], seconds: float) -> dict[str, Any] | None:
    """What bench/run.py records in a process of its own, as far as it came; None where it left nothing."""
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--device", "cuda", "--output", str(folder)]
    try:
        code = subprocess.run([*command, "--providers", providers, *shapes], timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"calibrate: {providers} took longer than {seconds:.0f} s and was ended", file=sys.stderr)
        code = 0
    if code != 0:
        # A failed row is left out of the table; the others are as good as ever.
        print(f"calibrate: the run of {providers} ended with {code}: a row failed or was cut short", file=sys.stderr)
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def hopper_is_right(folder: Path, options: argparse.Namespace) -> bool:
    """Whether the Hopper kernels run here to their end and pass the gate, at shapes at which they are taken."""
    dtypes = [dtype for dtype in options.dtype if dtype != "float32"]
    if not dtypes:
        return False
    shapes = ["--batch", "4096", "--classes", "100", "1000", "--dtype", *dtypes, "--repeats", "3"]
    found = bench(folder, "hopper", shapes, min(TRIAL_S, options.seconds))
    found = found or {"rows": [], "complete": False}
    said = [row for row in found["rows"] if row["provider"] == "hopper"]
    right = bool(said) and found["complete"] and all(row["status"] == "ok" for row in said)
    why = next((f": {row['reason']}" for row in said if row["status"] != "ok"), "")
    print("The Hopper kernels take part." if right else f"The Hopper kernels are left out{why}.")
    return right


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A recorded run for each float32 matmul precision, the 16-bit types in the first."""
    providers = "triton,cuda,hopper" if hopper_is_right(folder / "hopper", options) else "triton,cuda"
    shared = ["--repeats", str(options.repeats)]
    for name in ("batch", "classes"):
        shared += [f"--{name}", *map(str, getattr(options, name))]
    found = []
    for number, precision in enumerate(options.matmul_precision):
        dtypes = [dtype for dtype in options.dtype if dtype == "float32" or number == 0]
        if dtypes:
            shapes = [*shared, "--dtype", *dtypes, "--matmul-precision", precision]
            found.append(bench(folder / precision, providers, shapes, options.seconds))
    return [run for run in found if run]


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where nothing could be measured; 3 without a GPU."""
    options = parser().parse_args(arguments)
    if options.recorded is not None:
        runs = [json.loads(options.recorded.read_text())]
    else:
        import torch

        if not torch.cuda.is_available():
            print(
                "calibrate: this machine, or this build of torch, has no CUDA device. On a CPU 'auto' takes 'torch', "
                "and there is nothing to choose; --from makes the table of a recorded run.",
                file=sys.stderr,
            )
            return 3
        folder = Path(tempfile.mkdtemp(prefix=time.strftime("calibrate-%Y%m%d-%H%M%S-"), dir=_out()))
        runs = measure(folder, options)
    try:
        if not runs:
            raise ValueError("no run came to its end")
        found = table(runs)
    except ValueError as fault:
        print(f"calibrate: no table: {fault}", file=sys.stderr)
        return 1
    path = options.output or measured.user_path(found["gpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        kind = f"{row['dtype']} ({row['precision']})" if row["dtype"] == "float32" else row["dtype"]
        times = ", ".join(f"{name} {value:.3f} ms" for name, value in sorted(row["milliseconds"].items(), key=_value))
        print(f"B = {row['batch']:<6} C = {row['classes']:<6} {kind:<19} {times}")
    print(f"{found['gpu']}: {len(found['rows'])} shapes written to {path}")
    return 0


def _value(item: tuple[str, float]) -> float:
    return item[1]


def _out() -> Path:
    folder = ROOT / "bench" / "out"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
