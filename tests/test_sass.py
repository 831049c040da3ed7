"""The reading of machine code in .ci/sass.py, on listings in cuobjdump's form."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / ".ci"))

import sass


def code(*lines):
    """A kernel of these instructions, at addresses 0x0000, 0x0010, ..; 'BRA n' branches to the n-th."""
    text = ["\t\tFunction : kernel"]
    for i, line in enumerate(lines):
        if "BRA " in line:
            head, target = line.split("BRA ")
            line = f"{head}BRA 0x{16 * int(target):x}"
        text.append(f"        /*{16 * i:04x}*/                   {line} ;    /* 0x0000000000000000 */")
        text.append("                                                     /* 0x000fc800078e00ff */")
    return sass.kernels(text)["kernel"]


QK, PV = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, gsb0", "HGMMA.64x64x16.F32.BF16 R88, R4, gdesc[UR8], R88, gsb0"
EX2 = "MUFU.EX2 R1, R1"


def wait(groups):
    return f"WARPGROUP.DEPBAR.LE gsb0, 0x{groups:x}"


def test_exponentials_after_the_last_wait_stand_beside_no_product():
    body = [QK, PV, wait(1), EX2, EX2, wait(0), EX2, "@P0 BRA 0"]
    assert sass.exponentials_beside_products(code(*body, "EXIT")) == (2, 3)


def test_a_product_under_way_at_the_end_of_a_round_counts_in_the_next():
    body = [EX2, QK, PV, wait(1), EX2, "@!P0 BRA 0"]
    assert sass.exponentials_beside_products(code(*body)) == (2, 2)


def test_the_innermost_loop_with_products_is_read():
    lines = [EX2, EX2, QK, wait(0), EX2, "@P0 BRA 2", EX2, "@P1 BRA 0"]
    assert sass.exponentials_beside_products(code(*lines)) == (0, 1)


def test_a_usual_round_leaves_out_masks_and_counts_products_by_shape():
    wide = "HGMMA.64x104x16.F32 R88, R4, gdesc[UR8], R88, gsb0"
    lines = [EX2, QK, wide, "@!P1 BRA 6", "FSEL R1, R1, R2, P1", "FSEL R2, R1, R2, P1", EX2, "@!P2 BRA 9", EX2, wide,
             "@P0 BRA 1", "EXIT"]  # fmt: skip
    # Of the ten of the loop, the two selections; what holds an exponential is never left out.
    assert sass.instructions_of_usual_round(code(*lines)) == 8
    assert sass.products(code(*lines)) == {"64x64x16": 1, "64x104x16": 2}


def test_instructions_after_products_skip_the_mask_of_rare_tiles():
    lines = [QK, wait(0), "FADD R1, R1, R1", "@P0 BRA 6", "FSEL R1, R1, R2, P1", "FSEL R2, R1, R2, P1", EX2,
             "STG.E.128 desc[UR4][R2.64], R4", "@P1 BRA 0", "EXIT"]  # fmt: skip
    # The wait, the sum, the branch, the exponential, the store and the branch back.
    assert sass.instructions_after_products(code(*lines)) == 6
