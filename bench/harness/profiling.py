"""The profile of one step: a chrome trace and a table of its kernels (operators on the CPU)."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerActivity, profile

STEPS = 3
ROWS = 15
NAME_WIDTH = 45  # of a kernel's name on the screen: the numbers beside it are never cut


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Drop the lines on stderr by which the profiler's library notes its start and stop; others come at the end.

    Its own KINETO_LOG_LEVEL would drop errors too, whose level is lower.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            written.seek(0)
            for line in written:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)


def profile_step(step: Callable[[], object], device: torch.device, folder: Path, name: str) -> Table:
    """Write ``trace_<name>.json.gz`` and ``kernels_<name>.txt`` into the folder; return the table of the screen."""
    activities = [ProfilerActivity.CPU]
    sort = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        sort = "self_cuda_time_total"
    step()
    with without_notes(), profile(activities=activities, record_shapes=True, profile_memory=True) as recorded:
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    recorded.export_chrome_trace(str(folder / f"trace_{name}.json.gz"))
    averages = recorded.key_averages(group_by_input_shape=True)
    table = averages.table(sort_by=sort, row_limit=ROWS, max_name_column_width=40, max_shapes_column_width=50)
    (folder / f"kernels_{name}.txt").write_text(f"{STEPS} steps of {name}\n{table}\n")
    return _short_table(recorded.key_averages(), sort.replace("cuda", "device"))


def _short_table(averages: Iterable[Any], key: str) -> Table:
    """The columns of PyTorch's table that fit on a screen; the file has all of them."""
    rows = sorted(averages, key=lambda row: getattr(row, key), reverse=True)
    total = sum(getattr(row, key) for row in rows) or 1
    made = Table(box=box.SIMPLE_HEAD, header_style="bold")
    made.add_column("name", no_wrap=True, max_width=NAME_WIDTH)
    for title in ("calls", "self time\na step", "of all"):
        made.add_column(title, justify="right", no_wrap=True)
    for row in rows[:ROWS]:
        own = getattr(row, key)
        made.add_row(Text(row.key), str(row.count), f"{own / STEPS:,.1f} µs", f"{100 * own / total:.0f}%")
    return made
