"""Negative controls of the emulation's race and synchronization checks, and the memory check of the kernels.

Races and synchronization are checked in every test that runs the emulated kernels (tests/test_csrc_host.py,
tests/test_hopper.py); here the check must report kernels with one mistake each and pass them without it. Memory is
checked in processes of their own, under AddressSanitizer and UndefinedBehaviorSanitizer: a selection of those tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import csrc_host
import pytest
from csrc_host import controls

TESTS = Path(__file__).resolve().parent

# Which of the two accesses is found second changes with the order in which the emulation runs threads.
RACES = {
    "missing_barrier": "thread .* is not ordered with the .* by thread",
    "shuffle_as_barrier": "thread .* is not ordered with the .* by thread",
    "missing_second_barrier": "thread .* is not ordered with the .* by thread",
    "two_threads_write": "a write .* by thread .* is not ordered with the write by thread",
    "two_blocks_write": "a write .* global memory .* is not ordered with the write by .* of another block",
    "a_block_reads_what_another_writes": "global memory .* is not ordered with the .* of another block",
    "halves_of_a_word": "a write of 2 bytes .* is not ordered with the write",
    "stage_overwritten": "asynchronous copy",
    "copy_not_waited_for": "a read .* is not ordered with the write by an asynchronous copy",
    "copies_of_others": "asynchronous copy",
    "source_overwritten": "a write .* global memory .* is not ordered with the read by an asynchronous copy",
    "ldmatrix_before_barrier": "16 bytes|a write of",
    "barrier_used_before_its_initialisation": "a write of 8 bytes|a barrier that was not initialised",
    # Whichever comes first.
    "load_not_waited_for": "by wgmma .* the write by a TMA load|by a TMA load .* the read by wgmma",
    "stage_loaded_before_it_is_free": "by a TMA load .* is not ordered with the read by wgmma",
    "stage_freed_before_wgmma_is_done": "by a TMA load .* is not ordered with the read by wgmma",
    # The block that is ahead finds no barrier, or one whose initialisation it does not wait for.
    "cluster_used_before_its_initialisation": "a barrier that was not initialised|of 8 bytes .* by thread",
    "stage_of_a_cluster_never_waited_for": "by a TMA load .* is not ordered with the read by wgmma",
    "stage_freed_by_one_block_alone": "by a TMA load .* is not ordered with the (read by wgmma|write by a TMA load)",
}
SYNCHRONIZATION = {
    "barrier_not_all_reach": "deadlock",
    "lanes_missing_from_a_shuffle": "deadlock",
    "lanes_in_different_operations": "different operations",
    "copies_in_flight_at_the_end": "ended with asynchronous copies in flight",
    "wgmma_in_flight_at_the_end": "ended with wgmma in flight",
    "mbarrier_never_completed": "deadlock",
    "more_arrivals_than_expected": "more arrivals",
    "arrival_at_a_block_that_has_ended": "a barrier of a block that has ended",
    "memory_touched_before_the_launch_before_ended": "global memory touched before await_launch_before",
    "launch_before_not_awaited": "did not await the one before",
}
MEMORY = {
    "read_past_the_end": "heap-buffer-overflow",
    "write_past_the_end": "heap-buffer-overflow",
    "read_before_the_beginning": "heap-buffer-overflow",
    "copy_past_the_end": "heap-buffer-overflow",
    "load_past_the_end": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
    "shared_read_past_the_end": "use-after-poison",
    "shared_write_past_the_end": "use-after-poison",
    "index_past_an_array": "insufficient space|out of bounds|stack-buffer-overflow",
    "overflow_of_an_index": "signed integer overflow",
    "shift_of_all_bits": "shift exponent 32 is too large",
}

# Tests of these files, as -k selects them: every kernel in every precision, sizes that no tile divides, and the options
# that change what is read. Two halves, since a process takes seconds to start. CONTRIBUTING.md has the command for all.
FILES = "test_csrc_host.py", "test_hopper.py", "test_csrc_rows.py", "test_csrc_steps.py"
KERNELS = {
    "flash and small": "(test_splits_of_flash and (0.1-5 or 0.02-2)) or test_the_largest_rows_of_flash or test_flash"
    " or (test_shapes and flash and (1-7 or 7-5 or 65-130))"
    " or (test_options and flash and (masked-symmetric or masked-teacher or cold-symmetric))"
    " or (test_float32_matmul_precision and flash)"
    " or test_labels_are_indexed or test_loss_epilogue or test_reduce_terms or test_grad_epilogue"
    " or test_normalize"
    " or test_low_latency_edges or test_low_latency_bad_labels or (test_low_latency_options and 7-5)"
    " or test_precisions_differ or test_mixed_dtypes or test_strides_and_alignment"
    " or test_anchors_against_more_candidates",
    "two products": "test_similarity or test_sums_alone or test_the_backend_takes_them"
    " or (test_shapes and two and (1-7 or 7-5 or 65-130))"
    " or (test_options and two and (masked-teacher or cold-symmetric))"
    " or (test_chunks_and_large_tiles and symmetric) or test_a_split_contraction"
    " or (test_float32_matmul_precision and two)",
}


@pytest.fixture(autouse=True)
def compiler():
    if csrc_host.compiler() is None:
        pytest.skip("no C++ compiler: the kernels cannot be compiled for the host")


@pytest.fixture(scope="module")
def under_check():
    """A function that runs Python with these arguments, in a process with the memory check."""
    try:
        before, own = csrc_host.memory_command(), csrc_host.memory_environment()
    except RuntimeError as error:
        pytest.skip(f"no memory check: {error}")
    # Not a worker of pytest-xdist, whatever this process is.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, **own, "OMP_NUM_THREADS": "1"}

    def run(*arguments, **variables):
        command = [*before, sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment | variables, cwd=TESTS, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(("name", "report"), {**RACES, **SYNCHRONIZATION}.items(), ids=[*RACES, *SYNCHRONIZATION])
def test_races_and_synchronization_are_reported(name, report):
    library = str(csrc_host.build(controls=True))
    assert controls.run(library, name, False) is None
    found = controls.run(library, name, True)
    assert found is not None and re.search(report, found)
    if name in RACES:
        # Where the accesses are in the source, both of them.
        assert "not initialised" in found or len(re.findall(r"\(controls\.cu:\d+", found)) == 2, found


@pytest.mark.parametrize(("name", "report"), MEMORY.items(), ids=MEMORY)
def test_memory_errors_are_reported(name, report, under_check):
    library = csrc_host.build("memory", controls=True)
    sound, broken = (under_check("-I", "-S", controls.__file__, library, name, kind) for kind in ("sound", "broken"))
    assert sound.returncode == 0, sound.stderr
    assert broken.returncode == csrc_host.REPORTED and re.search(report, broken.stderr), broken.stderr


def test_every_control_is_tested():
    named = re.findall(r"MCLD_ENTRY\w*\((\w+)\)[,}]", csrc_host.CONTROLS[0].read_text().split("kEntries")[1])
    assert sorted(named) == sorted([*RACES, *SYNCHRONIZATION, *MEMORY])


def report_of(done) -> str:
    """The report of a check with the innermost functions, or else the end of the output."""
    text = done.stdout + done.stderr
    found = re.search("runtime error|ERROR: AddressSanitizer", text)
    return text[max(0, found.start() - 300) :][:3000] if found else text[-6000:]


@pytest.mark.parametrize("selection", KERNELS.values(), ids=KERNELS)
def test_memory_of_the_kernels(selection, under_check):
    csrc_host.build("memory")
    options = ["-q", "--capture=no", "-p", "no:cacheprovider", "-k", selection]
    done = under_check("-m", "pytest", *options, *FILES)
    assert done.returncode == 0, report_of(done)
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


def test_memory_of_the_cpu_kernels(under_check):
    """Each instruction set that this machine runs, on the workspace and the logits of every test of those paths."""
    options = [
        "-q",
        "--capture=no",
        "-p",
        "no:cacheprovider",
        "-k",
        "compiled or threads or instruction or plain or cpu_rows or cpu_contrast or cpu_teacher",
    ]
    library = str(csrc_host.build_cpu())
    done = under_check(
        *("-m", "pytest", *options),
        *(
            "test_low_latency.py",
            "test_plain_call.py",
            "test_cpu_rows.py",
            "test_cpu_contrast.py",
            "test_cpu_mlkd.py",
            "test_kd.py",
        ),
        MCLD_TEST_CPU_MODULE=library,
    )
    assert done.returncode == 0, report_of(done)
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout
