"""Machine code of sm_90a kernels, as cuobjdump prints it: what runs beside a product, and what follows one.

A product (wgmma) appears as HGMMA instructions, the last of a group marked ``gsb0``; ``WARPGROUP.DEPBAR.LE gsb0, n``
waits until at most n groups run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_COMMIT = re.compile(r"HGMMA.*gsb0")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_BRANCH = re.compile(r"BRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)")
# A branch that a warp takes or not as a whole, over what a rare tile needs.
_SKIP = re.compile(r"@!?U?P\d+ BRA")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str


def kernels(lines: Iterable[str]) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in the output of ``cuobjdump -sass``."""
    functions: dict[str, list[Instruction]] = {}
    name = "?"
    for line in lines:
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            functions[name] = []
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            functions.setdefault(name, []).append(Instruction(int(match[1], 16), match[2].strip()))
    return functions


def _target(instruction: Instruction) -> int | None:
    match = _BRANCH.search(instruction.text)
    return int(match[1], 16) if match else None


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The bodies of loops, by their backward branches; an outer loop holds its inner ones."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    for i, instruction in enumerate(code):
        target = _target(instruction)
        if target is not None and target <= instruction.address and target in index:
            yield code[index[target] : i + 1]


def _skipped(code: list[Instruction]) -> list[Instruction]:
    """What the first instruction leaves out, if it is a branch that a warp takes as a whole."""
    branch, *rest = code
    target = _target(branch)
    if target is None or target <= branch.address or not _SKIP.match(branch.text):
        return []
    return [x for x in rest if x.address < target]


def product_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with products."""
    return min((body for body in loops(code) if any("HGMMA" in x.text for x in body)), key=len)


def products(code: list[Instruction]) -> dict[str, int]:
    """How many products of each shape, as 64x104x16, the innermost loop with products has."""
    shapes = (re.search(r"HGMMA\.(\d+x\d+x\d+)", x.text) for x in product_loop(code))
    return dict(Counter(match[1] for match in shapes if match))


def instructions_of_usual_round(code: list[Instruction]) -> int:
    """Instructions of the innermost loop with products on the way of a usual tile.

    Each branch over masks alone, neither products nor exponentials, is taken.
    """
    body = product_loop(code)
    skipped, end = 0, -1
    for i, instruction in enumerate(body):
        if instruction.address < end:
            continue
        over = _skipped(body[i:])
        if over and not any(re.search(r"MUFU\.EX2|HGMMA|STG|SYNCS", x.text) for x in over):
            skipped += len(over)
            end = over[-1].address + 1
    return len(body) - skipped


def exponentials_beside_products(code: list[Instruction]) -> tuple[int, int]:
    """(EX2 that are issued while a product runs, EX2) of the innermost loop with products, once it is under way."""
    body = product_loop(code)
    running = beside = total = 0
    for _ in range(2):  # what runs at the end of a round runs at the beginning of the next
        beside = total = 0
        for instruction in body:
            running += bool(_COMMIT.search(instruction.text))
            if match := _WAIT.search(instruction.text):
                running = min(running, int(match[1], 16))
            if "MUFU.EX2" in instruction.text:
                total += 1
                beside += running > 0
    return beside, total


def instructions_after_products(code: list[Instruction]) -> int:
    """Instructions from the last wait for products to the end of the loop over tiles, on the way of a usual tile.

    A branch over the longest stretch without an EX2, the mask of an edge or a diagonal, is taken.
    """
    first = next(i for i, x in enumerate(code) if (match := _WAIT.search(x.text)) and int(match[1], 16) == 0)
    body = min((body for body in loops(code) if code[first] in body), key=len)
    rest = body[body.index(code[first]) :]
    skipped = 0
    for i in range(len(rest)):
        over = _skipped(rest[i:])
        if not any(re.search(r"MUFU\.EX2|STG", x.text) for x in over):
            skipped = max(skipped, len(over))
    return len(rest) - skipped
