"""Kernels with one mistake each (controls.cu), run by name: here, or in a process of its own where a report ends it.

    python controls.py LIBRARY NAME {sound,broken}

exits with 0 where nothing is reported.
"""

from __future__ import annotations

import ctypes
import sys

SIZE = 4096


def run(library: str, name: str, broken: bool) -> str | None:
    """The emulation's report of the kernel, or None. Its data is as large as the allocation."""
    controls, libc = ctypes.CDLL(library), ctypes.CDLL(None)
    controls.run_control.restype = ctypes.c_char_p
    libc.malloc.restype = ctypes.c_void_p
    data = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(4 * SIZE)))
    ctypes.memset(data, 0, 4 * SIZE)
    report = controls.run_control(name.encode(), ctypes.c_bool(broken), data, ctypes.c_int64(SIZE))
    libc.free(data)
    return None if report is None else report.decode()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3] == "broken"))
