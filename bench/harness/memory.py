"""Peak extra memory of one step, and how much the machine has left.

CUDA: the allocator's own peak. CPU: the running sum of every allocation and release that PyTorch's allocator makes
during the step, as the profiler records it, so the figure repeats to the byte; the peak of the process's resident
memory is read beside it as a check, since libraries may allocate on their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from . import profiling


def peak_extra(step: Callable[[], object], device: torch.device) -> dict[str, int | None]:
    """Bytes that ``step`` takes beyond those held before it, results included: by the allocator, and resident."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return {"allocator": torch.cuda.max_memory_allocated(device) - before, "resident": None}
    resident: list[int | None] = []
    changes = _allocations(lambda: resident.append(_resident_peak(step)))
    return {"allocator": max(itertools.accumulate(changes, initial=0)), "resident": resident[0]}


def _allocations(step: Callable[[], object]) -> list[int]:
    """Allocations (bytes) and releases (minus bytes) of PyTorch's CPU allocator during the step, in order."""
    with (
        profiling.without_notes(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"].get("Ev Idx", 0), event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    return [change for _, _, change in changes]


def _resident_peak(step: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at its highest; None where the kernel cannot say (it needs Linux)."""
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc retains would hide the growth of a step
    try:
        reset.write_text("5")  # the high-water mark restarts at the present size
    except OSError:
        return None
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


SHORTAGE = "would take about"


def available(device: torch.device) -> int:
    """Free bytes: on the device, or in the machine and the control group of this process."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # "max" where the group has no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(0, free)


def shortage(predicted: int, device: torch.device, fraction: float = 0.8) -> str | None:
    """The reason why a step of ``predicted`` bytes is not tried; None if it fits. Linux kills a process out of memory.

    The message begins with `SHORTAGE`.
    """
    limit = int(fraction * available(device))
    if predicted <= limit:
        return None
    return f"{SHORTAGE} {predicted / 2**30:.1f} GiB, {limit / 2**30:.1f} GiB may be used"


@contextlib.contextmanager
def released(device: torch.device) -> Iterator[None]:
    """Release cached memory before and after, so that one provider's blocks do not fill another's memory."""
    _release(device)
    try:
        yield
    finally:
        _release(device)


def _release(device: torch.device) -> None:
    if device.type == "cuda":  # the CPU's allocator caches nothing
        gc.collect()
        torch.cuda.empty_cache()
