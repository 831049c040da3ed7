"""One forced fault: ``python bench/faults.py {launch,memory,hang}``. It must leave a message and what was measured.

launch: a kernel reads an address that is not mapped. memory: more than the device has is asked for. hang: a kernel that
does not end; whoever started this program ends it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

import mcld_kernels  # noqa: E402
from bench.harness import programs  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402
from mcld_kernels import backends  # noqa: E402

FAULTS = ("launch", "memory", "hang")
HUNG_S = 3600


def measured(device: torch.device) -> float:
    student, teacher = (torch.randn(64, 100, device=device) for _ in range(2))
    return float(mcld_kernels.mcld_loss(student, teacher, weight=(1.0, 0.0, 1.0)))


def wrong_launch(device: torch.device) -> None:
    """The CUDA backend's kernel on an operand that is not there; without that backend, a copy of PyTorch's."""
    student = torch.randn(4096, 100, device=device, dtype=torch.bfloat16)
    if backends.unsupported_reason("cuda", student, student, False) is None:
        kernels = backends.kernel_set("cuda", student, student)
        unit = kernels.l2_normalize(student, torch.bfloat16, 1e-12)
        kernels.launch(  # type: ignore[attr-defined]
            "scale_rows", x=1 << 20, out=unit.rows, factor=unit.inv_norm, rows=4096, padded_rows=4096,
            pitch=unit.rows.shape[1], precision=kernels.launch.precision(torch.bfloat16),  # type: ignore[attr-defined]
        )  # fmt: skip
    else:
        torch.gather(student, 0, torch.full((1, 1), 1 << 40, device=device))
    torch.cuda.synchronize(device)


def no_memory(device: torch.device) -> None:
    """A loss on a device whose memory is taken."""
    student = torch.randn(16384, 1000, device=device).requires_grad_()
    free, _ = torch.cuda.mem_get_info(device)
    taken = torch.empty(free - (200 << 20), dtype=torch.uint8, device=device)
    mcld_kernels.mcld_loss(student, torch.randn_like(student), weight=(1.0, 0.0, 1.0)).backward()
    del taken


def hang(device: torch.device) -> None:
    print("a kernel that does not end is launched", flush=True)
    rate = 1000 * (getattr(torch.cuda.get_device_properties(device), "clock_rate", 0) or 1_800_000)
    for _ in range(HUNG_S):
        torch.cuda._sleep(int(rate))
    torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> int:
    """Provoke a fault; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(description="One forced fault on a GPU.", epilog=programs.EXIT_CODES)
    parser.add_argument("fault", choices=FAULTS)
    fault = parser.parse_args(arguments).fault
    if not torch.cuda.is_available():
        print("faults: this machine, or this build of torch, has no CUDA device", file=sys.stderr)
        return Exit.NO_DEVICE
    device = torch.device("cuda")
    print(json.dumps({"measured_before": measured(device)}), flush=True)
    try:
        {"launch": wrong_launch, "memory": no_memory, "hang": hang}[fault](device)
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
