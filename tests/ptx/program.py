"""PTX text as nvcc and Triton write it, taken apart: kernels, their registers, and basic blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{", re.DOTALL)
_STATEMENT = re.compile(
    r"""
    \s*(?:
      (?P<label>\$?\w+):
    | (?P<scope>[{}])
    | (?P<directive>\.[^;]*);
    | (?:@(?P<negated>!?)(?P<predicate>%?\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>[^;]*);
    )""",
    re.VERBOSE,
)
_PARAMETER = re.compile(r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\b[^\[]*?(\w+)(?:\[(\d+)\])?\s*")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
# Instructions that a whole warp, or a warpgroup of four, executes together.
_OF_WARP = (
    "shfl.sync",
    "vote.sync",
    "match.",
    "mma.sync",
    "ldmatrix.sync",
    "stmatrix.sync",
    "redux.",
    "setmaxnreg",
    "bar.sync",
)
_OF_WARPGROUP = ("wgmma.",)
# Instructions at which a thread may have to wait: each begins a block.
_WAITS = ("bar.sync", "mbarrier.try_wait", "barrier.cluster.wait")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction; a vector operand or an address is one operand, with its brackets."""

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None  # it is executed where this is true, or false if ``negated``
    negated: bool

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass(slots=True, kw_only=True)
class Block:
    """Instructions in a row; a branch or a return is the last, a label or a wait the first."""

    instructions: list[Instruction] = field(default_factory=list)
    lanes_together: int = 1  # 32 or 128 where an instruction needs a whole warp or warpgroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An entry."""

    name: str  # mangled
    parameters: dict[str, int]  # offset of each
    parameter_bytes: int
    registers: dict[str, str]  # type of each register: "pred", "b16", "b32", "b64", "f32"
    shared: dict[str, int]  # offset of each array in shared memory
    blocks: list[Block]
    labels: dict[str, int]  # the block that a label begins
    cluster: int  # thread blocks of a cluster


def names(text: str) -> list[str]:
    """The mangled names of a file's kernels."""
    return [match[1] for match in _ENTRY.finditer(text)]


def kernels(text: str) -> dict[str, Kernel]:
    """The kernels of a file, by mangled name."""
    text = re.sub(r"//[^\n]*|^\s*\.loc\b[^\n]*", "", text, flags=re.MULTILINE)
    shared = dict.fromkeys(re.findall(r"\.extern \.shared [^;]*?(\w+)\[\];", text), 0)
    found = {}
    for match in _ENTRY.finditer(text):
        name, parameters, directives = match.groups()
        end = _end_of_scope(text, match.end())
        cluster = re.search(r"\.reqnctapercluster\s+(\d+)(?:,\s*1)*", directives)
        blocks = int(cluster[1]) if cluster else 1
        found[name] = _kernel(name, parameters, text[match.end() : end], dict(shared), blocks)
    return found


def _parameters(text: str) -> tuple[dict[str, int], int]:
    """The offset of each parameter, and the bytes of all."""
    offsets, end = {}, 0
    for parameter in text.split(","):
        match = _PARAMETER.fullmatch(parameter)
        if match is None:
            raise ValueError(f"not understood: {parameter}")
        align, bits, name, count = match.groups()
        size = int(bits) // 8
        alignment = int(align or size)
        offsets[name] = (end + alignment - 1) // alignment * alignment
        end = offsets[name] + size * int(count or 1)
    return offsets, end


def _kernel(name: str, parameters: str, body: str, shared: dict[str, int], cluster: int) -> Kernel:
    offsets, parameter_bytes = _parameters(parameters)
    registers: dict[str, str] = {}
    labels: dict[str, int] = {}
    blocks = [Block()]

    def begin_block() -> None:
        if blocks[-1].instructions:
            blocks.append(Block())

    position = 0
    while match := _STATEMENT.match(body, position):
        position = match.end()
        if label := match["label"]:
            begin_block()
            labels[label] = len(blocks) - 1
        elif directive := match["directive"]:
            _declare(directive, registers)
        elif opcode := match["opcode"]:
            if opcode.startswith(_WAITS):
                begin_block()
            instruction = Instruction(
                opcode=opcode,
                operands=tuple(_OPERAND.findall(match["operands"])),
                predicate=match["predicate"],
                negated=bool(match["negated"]),
            )
            block = blocks[-1]
            block.instructions.append(instruction)
            if opcode.startswith(_OF_WARP):
                block.lanes_together = max(block.lanes_together, 32)
            if opcode.startswith(_OF_WARPGROUP):
                block.lanes_together = 128
            if opcode.startswith("bra") or opcode == "ret":
                begin_block()
    if body[position:].strip():
        raise ValueError(f"{name}: not understood: {body[position : position + 80]!r}")
    return Kernel(
        name=name,
        parameters=offsets,
        parameter_bytes=parameter_bytes,
        registers=registers,
        shared=shared,
        blocks=blocks,
        labels=labels,
        cluster=cluster,
    )


def _end_of_scope(text: str, position: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("a scope without end")


def _declare(directive: str, registers: dict[str, str]) -> None:
    words = directive.split()
    if words[0] == ".pragma":
        return
    if words[0] != ".reg":
        raise ValueError(f"not understood: {directive}")
    kind = words[1][1:]
    for name in "".join(words[2:]).split(","):
        if match := re.fullmatch(r"(%\w+)<(\d+)>", name):
            registers.update((f"{match[1]}{i}", kind) for i in range(int(match[2])))
        elif registers.setdefault(name, kind) != kind:  # of an inner scope; the same name has the same type in all
            raise ValueError(f"{name} is {registers[name]} and {kind}")
