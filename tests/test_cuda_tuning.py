"""The choices of backend "cuda" that depend on sizes alone."""

import dataclasses

import pytest

from mcld_kernels.backends.cuda.tuning import CudaTuning, chunk_rows

MIB = 1 << 20
TUNING = CudaTuning(
    chunk_bytes=256 * MIB, wave_bytes=544 * MIB, hopper=True, low_latency_limit=1024, flash_row_bytes=512
)


def rows_of(n, m, pitch, itemsize=2, **fields):
    return chunk_rows(dataclasses.replace(TUNING, **fields), n, m, pitch, itemsize, 128)


def waves_of_product_2(n, step, pitch, multiprocessors=132):
    """Tiles of 128 x 256 by chunk, in whole waves."""
    total = 0
    for start in range(0, n, step):
        tiles = -(-min(step, n - start) // 128) * -(-pitch // 256)
        total += -(-tiles // multiprocessors)
    return total


def test_a_chunk_fills_a_wave_where_a_batch_is_large():
    rows = rows_of(65536, 65536, 1024)
    assert rows == 33 * 128
    assert rows * 65536 * 2 + rows * 1024 * 4 <= 600e6, "E and its product stay within the memory bar"
    assert waves_of_product_2(65536, rows, 1024) == 16
    assert waves_of_product_2(65536, 2048, 1024) == 32, "what 256 MiB would take"


def test_a_chunk_keeps_the_usual_budget_where_more_saves_little():
    assert rows_of(16384, 16384, 1024) * 16384 * 2 <= 256 * MIB
    assert rows_of(4096, 4096, 1024) == 4096, "one chunk"


@pytest.mark.parametrize("n", [1, 128, 129, 5000, 70000])
@pytest.mark.parametrize("m", [128, 1000, 65536, 1 << 20])
def test_chunks_stay_within_their_budget(n, m):
    columns = -(-m // 128) * 128
    for budget, wave in ((1, 0), (8 * MIB, 0), (256 * MIB, 544 * MIB)):
        rows = rows_of(n, columns, 512, chunk_bytes=budget, wave_bytes=wave)
        assert rows % 128 == 0 and rows <= -(-n // 128) * 128
        assert rows == 128 or rows * columns * 2 <= max(budget, wave)


def test_a_budget_given_by_hand_holds():
    assert rows_of(65536, 65536, 1024, wave_bytes=0) * 65536 * 2 <= 256 * MIB
