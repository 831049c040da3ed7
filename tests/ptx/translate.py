"""PTX instructions as NumPy code: each register an array with an element a thread of the block.

`compile_block` gives a function of the running block (`machine.ThreadBlock`), its registers and the lanes that are at
this place. What an instruction does follows the PTX ISA, release 9.0, section "Instructions"; what nvcc does not write
for these kernels is not here, and raises.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic, matrix
from .program import Instruction, Kernel

_STORED = {"pred": "bool", "b16": "uint16", "b32": "uint32", "b64": "uint64", "f32": "float32"}
_TYPES = {
    "pred": "bool", "b16": "uint16", "b32": "uint32", "b64": "uint64", "f32": "float32", "f16": "float16",
    "b8": "uint8", "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64",
    "s16": "int16", "s32": "int32", "s64": "int64",
}  # fmt: skip
_SPECIAL = {
    "%tid.x": "tid", "%laneid": "laneid", "%ctaid.x": "ctaid_x", "%ctaid.y": "ctaid_y", "%nctaid.x": "nctaid_x",
    "%nctaid.y": "nctaid_y",
}  # fmt: skip
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BINARY = {"add": "+", "sub": "-", "mul": "*", "mul.lo": "*", "and": "&", "or": "|", "xor": "^"}
_IGNORED = ("setmaxnreg.", "fence.", "griddepcontrol.", "wgmma.fence", "bar.sync")
_PROGRAM_COUNTER = {"bra", "bra.uni", "ret"}
_BULK = r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.tile\.mbarrier::complete_tx::bytes"

Step = Callable[[Any, list, np.ndarray], tuple[int, "np.ndarray | None"]]


def _size(type_name: str) -> int:
    return np.dtype(_TYPES[type_name]).itemsize


class _Code:
    """The Python source of a block, for all lanes of the thread block or for some."""

    def __init__(self, kernel: Kernel, constants: dict[str, Any]):
        self.kernel, self.constants = kernel, constants
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.lines: list[str] = []
        self.lanes: str | None = None  # the variable with the lanes; None: all
        self.indent = "    "

    def line(self, text: str) -> None:
        self.lines.append(self.indent + text)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def kind(self, register: str) -> str:
        return self.kernel.registers[register]

    def is_register(self, operand: str) -> bool:
        return operand in self.index

    def raw(self, register: str) -> str:
        """The array of a register at the lanes."""
        return f"r[{self.index[register]}]" + (f"[{self.lanes}]" if self.lanes else "")

    def read(self, operand: str, type_name: str) -> str:
        """An operand as a type: an array, or a scalar for what is the same in all threads."""
        dtype = _TYPES[type_name]
        if operand in self.index:
            stored = _STORED[self.kind(operand)]
            if stored == dtype:
                return self.raw(operand)
            if np.dtype(stored).itemsize > np.dtype(dtype).itemsize:
                return f"{self.raw(operand)}.astype(np.uint{8 * np.dtype(dtype).itemsize}).view(np.{dtype})"
            return f"{self.raw(operand)}.view(np.{dtype})"
        if operand in _SPECIAL:
            name = _SPECIAL[operand]
            is_by_lane = name in ("tid", "laneid") and self.lanes
            return f"m.{name}" + (f"[{self.lanes}]" if is_by_lane else "")
        if operand in self.kernel.shared:
            return f"np.uint{8 * _size(type_name)}(m.shared_base + {self.kernel.shared[operand]})"
        if operand in self.kernel.parameters:
            return self.constant(np.uint64(self.kernel.parameters[operand]))
        return self.constant(_immediate(operand, dtype))

    def write(self, register: str, expression: str, type_name: str) -> None:
        """Assign an expression of a type, an array or a scalar, to a register."""
        if register == "_":
            return
        dtype, stored = np.dtype(_TYPES[type_name]), np.dtype(_STORED[self.kind(register)])
        if dtype != stored:
            same = dtype.itemsize == stored.itemsize
            expression = f"({expression}).{'view' if same else 'astype'}(np.{stored.name})"
        at = self.index[register]
        if self.lanes:
            self.line(f"r[{at}] = put(r[{at}], {self.lanes}, {expression})")
        else:
            self.line(f"r[{at}] = {expression}")

    def write_scalar(self, register: str, expression: str, type_name: str) -> None:
        """The same for a value that may be a scalar: every thread gets its element."""
        self.write(register, f"m.spread({expression}, {self.lanes})", type_name)

    def address(self, operand: str, type_name: str) -> str:
        """The address of ``[register+offset]`` or ``[symbol+offset]``."""
        match = re.fullmatch(r"\[\s*([%$\w]+)(?:\s*\+\s*(-?\d+))?\s*\]", operand)
        if match is None:
            raise NotImplementedError(operand)
        base, offset = self.read(match[1], type_name), int(match[2] or 0)
        if not self.is_register(match[1]):
            base = f"m.spread({base}, {self.lanes})"
        return f"({base} + {self.constant(_immediate(str(offset), _TYPES[type_name]))})" if offset else base


def _immediate(text: str, dtype: str) -> Any:
    kind = np.dtype(dtype)
    if text.startswith("0f"):
        return np.frombuffer(struct.pack("<I", int(text[2:], 16)), np.float32)[0]
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        raise NotImplementedError(f"operand {text}")
    value = int(text.rstrip("U"), 0)
    if kind.kind == "b":
        return np.bool_(value)
    if kind.kind == "f":
        raise NotImplementedError(f"{text} as {dtype}")
    return np.array(value & ((1 << 8 * kind.itemsize) - 1), f"uint{8 * kind.itemsize}").view(kind)[()]


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand[1:-1].split(",")]


def compile_block(kernel: Kernel, number: int, all_lanes: bool) -> Step:
    """The function that runs a block of ``kernel``: it returns the next block, and where only some lanes go there,
    whether each does; the others go on with the block after this.
    """
    constants: dict[str, Any] = {}
    code = _Code(kernel, constants)
    code.lanes = None if all_lanes else "L"
    block = kernel.blocks[number]
    for instruction in block.instructions[:-1]:
        _emit_guarded(code, instruction)
    last = block.instructions[-1] if block.instructions else None
    if last is not None and last.opcode in _PROGRAM_COUNTER:
        target = -1 if last.opcode == "ret" else kernel.labels[last.operands[0]]
        taken = "None"
        if last.predicate:
            taken = f"{'~' if last.negated else ''}{code.raw(last.predicate)}"
        code.line(f"return {target}, {taken}")
    else:
        if last is not None:
            _emit_guarded(code, last)
        code.line(f"return {number + 1}, None")
    source = "def run(m, r, L):\n" + "\n".join(code.lines)
    scope: dict[str, Any] = {"np": np, "put": arithmetic.put, "a": arithmetic, "matrix": matrix, **constants}
    exec(compile(source, f"<{kernel.name}, block {number}>", "exec"), scope)
    return scope["run"]  # type: ignore[no-any-return]


def _emit_guarded(code: _Code, instruction: Instruction) -> None:
    if instruction.opcode.startswith(_IGNORED):
        return
    if instruction.predicate is None:
        return _emit(code, instruction)
    outer, outer_indent = code.lanes, code.indent
    condition = f"{'~' if instruction.negated else ''}{code.raw(instruction.predicate)}"
    code.line(f"M = {f'L[{condition}]' if outer else f'np.flatnonzero({condition})'}")
    code.line("if M.size:")
    code.lanes, code.indent = "M", outer_indent + "    "
    _emit(code, instruction)
    code.lanes, code.indent = outer, outer_indent


def _emit(code: _Code, instruction: Instruction) -> None:
    family = instruction.opcode.split(".")[0]
    emit = _FAMILIES.get(family)
    if emit is None:
        raise NotImplementedError(str(instruction))
    emit(code, instruction.opcode, list(instruction.operands))


def _binary(code: _Code, opcode: str, operands: list[str]) -> None:
    *name, type_name = opcode.split(".")
    out, x, y = operands
    if name[-1] in ("rn", "rz"):
        rounding = name.pop()
        if rounding == "rz":
            expression = f"a.{name[0]}_rz({code.read(x, type_name)}, {code.read(y, type_name)})"
            return code.write(out, expression, type_name)
    if ".".join(name) == "mul.wide":
        wide = {"s32": "s64", "u32": "u64"}[type_name]
        parts = [f"{code.read(part, type_name)}.astype(np.{_TYPES[wide]})" for part in (x, y)]
        return code.write(out, " * ".join(parts), wide)
    operator = _BINARY[".".join(name)]
    code.write(out, f"{code.read(x, type_name)} {operator} {code.read(y, type_name)}", type_name)


def _function(name: str) -> Callable[[_Code, str, list[str]], None]:
    """A function of `arithmetic` or NumPy of all operands, of the type that the opcode ends with."""

    def emit(code: _Code, opcode: str, operands: list[str]) -> None:
        type_name = opcode.split(".")[-1]
        function = name
        if name in ("a.minimum", "a.maximum") and type_name[0] != "f":
            function = name.replace("a.", "np.")
        arguments = ", ".join(code.read(operand, type_name) for operand in operands[1:])
        code.write(operands[0], f"{function}({arguments})", type_name)

    return emit


def _div(code: _Code, opcode: str, operands: list[str]) -> None:
    type_name = opcode.split(".")[-1]
    x, y = (code.read(operand, type_name) for operand in operands[1:])
    expression = f"{x} / {y}" if type_name == "f32" else f"a.{opcode.split('.')[0]}({x}, {y})"
    code.write(operands[0], expression, type_name)


def _shift(code: _Code, opcode: str, operands: list[str]) -> None:
    name, type_name = opcode.split(".")
    x, amount = code.read(operands[1], type_name), operands[2]
    bits = 8 * _size(type_name)
    if code.is_register(amount):
        return code.write(operands[0], f"a.{name}({x}, {code.read(amount, 'u32')})", type_name)
    count = int(amount, 0)
    if count >= bits:
        raise NotImplementedError(f"{opcode} by {amount}")
    by = code.constant(np.dtype(_TYPES[type_name]).type(count))
    code.write(operands[0], f"{x} {'<<' if name == 'shl' else '>>'} {by}", type_name)


def _mad(code: _Code, opcode: str, operands: list[str]) -> None:
    _, width, type_name = opcode.split(".")
    x, y = (code.read(operand, type_name) for operand in operands[1:3])
    if width == "wide":
        type_name = type_name[0] + "64"
        x, y = (f"{part}.astype(np.{_TYPES[type_name]})" for part in (x, y))
    code.write(operands[0], f"{x} * {y} + {code.read(operands[3], type_name)}", type_name)


def _bfe(code: _Code, opcode: str, operands: list[str]) -> None:
    type_name = opcode.split(".")[1]
    start, length = (int(operand, 0) for operand in operands[2:])
    bits = 8 * _size(type_name)
    if not 0 < length <= bits - start:
        raise NotImplementedError(f"{opcode} of bits {start} to {start + length}")
    kind = np.dtype(_TYPES[type_name]).type
    left, right = code.constant(kind(bits - start - length)), code.constant(kind(bits - length))
    code.write(operands[0], f"({code.read(operands[1], type_name)} << {left}) >> {right}", type_name)


def _redux(code: _Code, opcode: str, operands: list[str]) -> None:
    name, type_name = opcode.split(".")[2:]
    function = {"add": "add", "min": "minimum", "max": "maximum"}[name]
    code.write(operands[0], f"a.reduce_warp(np.{function}, {code.read(operands[1], type_name)})", type_name)


def _fma(code: _Code, opcode: str, operands: list[str]) -> None:
    rounding = opcode.split(".")[1]
    arguments = ", ".join(code.read(operand, "f32") for operand in operands[1:])
    code.write(operands[0], f"a.fma_{rounding}({arguments})", "f32")


def _mov(code: _Code, opcode: str, operands: list[str]) -> None:
    type_name = opcode.split(".")[1]
    out, value = operands
    if out.startswith("{"):
        parts = _vector(out)
        whole = code.read(value, type_name)
        code.line(f"parts = ({whole}).view(np.uint{8 * _size(type_name) // len(parts)}).reshape(-1, {len(parts)})")
        for i, part in enumerate(parts):
            if part != "_":
                code.write(part, f"parts[:, {i}].copy()", f"b{8 * _size(type_name) // len(parts)}")
    elif value.startswith("{"):
        parts = _vector(value)
        part_type = f"b{8 * _size(type_name) // len(parts)}"
        arguments = ", ".join(code.read(part, part_type) for part in parts)
        code.write(out, f"a.join(({arguments},), np.{_TYPES[type_name]})", type_name)
    elif code.is_register(value):
        code.write(out, code.read(value, type_name), type_name)
    else:
        code.write_scalar(out, code.read(value, type_name), type_name)


def _setp(code: _Code, opcode: str, operands: list[str]) -> None:
    _, comparison, type_name = opcode.split(".")
    x, y = (code.read(operand, type_name) for operand in operands[1:])
    if comparison in ("nan", "num"):
        expression = f"{'~' if comparison == 'num' else ''}(np.isnan({x}) | np.isnan({y}))"
    elif type_name == "f32" and comparison == "ne":
        raise NotImplementedError(opcode)  # false for NaN, unlike NumPy's
    elif comparison in _COMPARED:
        expression = f"{x} {_COMPARED[comparison]} {y}"
    else:  # "leu" and its kin are true for NaN
        opposite = {"leu": ">", "ltu": ">=", "geu": "<", "gtu": "<=", "neu": "=="}[comparison]
        expression = f"~({x} {opposite} {y})"
    code.write(operands[0], expression, "pred")


def _selp(code: _Code, opcode: str, operands: list[str]) -> None:
    type_name = opcode.split(".")[1]
    x, y = (code.read(operand, type_name) for operand in operands[1:3])
    code.write(operands[0], f"np.where({code.read(operands[3], 'pred')}, {x}, {y})", type_name)


def _cvt(code: _Code, opcode: str, operands: list[str]) -> None:
    _, *modifiers, to, source = opcode.split(".")
    out, *values = operands
    special = {
        ("rna", "tf32"): ("tf32", "b32"),
        ("rpi", "f32"): ("np.ceil", "f32"),
        ("sat", "f32"): ("a.saturate", "f32"),
        ("rn", "bf16"): ("a.bf16", "b16"),
        ("rn", "f16"): ("a.f16", "b16"),
    }
    if to in ("bf16x2", "f16x2"):  # the first value goes into the upper half
        high, low = (f"a.{to[:-2]}({code.read(value, 'f32')})" for value in values)
        code.write(out, f"a.join(({low}, {high}), np.uint32)", "b32")
    elif (key := (modifiers[0] if modifiers else "", to)) in special and source == "f32":
        function, result = special[key]
        function = "a.tf32" if function == "tf32" else function
        code.write(out, f"{function}({code.read(values[0], 'f32')})", result)
    elif (source, to) == ("bf16", "f32"):
        code.write(out, f"a.join((np.uint16(0), {code.read(values[0], 'b16')}), np.float32)", "f32")
    elif modifiers in ([], ["rn"]) and source in _TYPES and to in _TYPES:
        code.write(out, f"{code.read(values[0], source)}.astype(np.{_TYPES[to]})", to)
    else:
        raise NotImplementedError(opcode)


def _cvta(code: _Code, opcode: str, operands: list[str]) -> None:
    value = code.read(operands[1], "u64")
    if opcode == "cvta.param.u64":
        value = f"({value} + m.parameter_address)"
    elif opcode != "cvta.to.global.u64":
        raise NotImplementedError(opcode)
    code.write(operands[0], value, "u64")


def _ld(code: _Code, opcode: str, operands: list[str]) -> None:
    _, space, *_, type_name = opcode.split(".")
    outs = _vector(operands[0]) if operands[0].startswith("{") else [operands[0]]
    address = code.address(operands[1], "u32" if space == "shared" else "u64")
    code.line(f"values = m.load_{space}({address}, np.{_TYPES[type_name]}, {len(outs)}, {code.lanes})")
    for i, out in enumerate(outs):
        code.write(out, f"values[{i}]", type_name)


def _st(code: _Code, opcode: str, operands: list[str]) -> None:
    _, space, *_, type_name = opcode.split(".")
    values = _vector(operands[1]) if operands[1].startswith("{") else [operands[1]]
    address = code.address(operands[0], "u32" if space == "shared" else "u64")
    parts = ", ".join(code.read(value, type_name) for value in values)
    code.line(f"m.store_{space}({address}, ({parts},), np.{_TYPES[type_name]}, {code.lanes})")


def _shfl(code: _Code, opcode: str, operands: list[str]) -> None:
    mode = opcode.split(".")[2]
    outs = operands[0].split("|")
    by, clamp = (code.read(operand, "u32") for operand in operands[2:4])
    code.line(f"values, inside = a.shuffle('{mode}', {code.read(operands[1], 'b32')}, {by}, {clamp})")
    code.write(outs[0], "values", "b32")
    if len(outs) == 2:
        code.write(outs[1], "inside", "pred")


def _vote(code: _Code, opcode: str, operands: list[str]) -> None:
    if opcode != "vote.sync.ballot.b32":
        raise NotImplementedError(opcode)
    code.write(operands[0], f"a.ballot({code.read(operands[1], 'pred')})", "b32")


def _match(code: _Code, opcode: str, operands: list[str]) -> None:
    if opcode != "match.any.sync.b32":
        raise NotImplementedError(opcode)
    code.write(operands[0], f"a.match_any({code.read(operands[1], 'b32')})", "b32")


def _registers(code: _Code, operand: str) -> list[int]:
    return [code.index[register] for register in _vector(operand)]


def _mma(code: _Code, opcode: str, operands: list[str]) -> None:
    *_, shape, row, col, out, left, right, added = opcode.split(".")
    if (row, col, out, added) != ("row", "col", "f32", "f32") or left != right:
        raise NotImplementedError(opcode)
    outs, a_registers, b_registers, c_registers = map(_vector, operands)
    arguments = ", ".join(
        "(" + ", ".join(code.read(register, type_name) for register in registers) + ",)"
        for registers, type_name in ((a_registers, "b32"), (b_registers, "b32"), (c_registers, "f32"))
    )
    code.line(f"values = matrix.mma('{shape}', '{left}', {arguments})")
    for i, register in enumerate(outs):
        code.write(register, f"values[{i}]", "f32")


def _ldmatrix(code: _Code, opcode: str, operands: list[str]) -> None:
    outs = _vector(operands[0])
    if f".m8n8.x{len(outs)}." not in opcode:
        raise NotImplementedError(opcode)
    address = code.address(operands[1], "u32")
    code.line(f"values = matrix.ldmatrix(m, {address}, {len(outs)}, {'.trans.' in opcode})")
    for i, register in enumerate(outs):
        code.write(register, f"values[{i}]", "b32")


def _cp(code: _Code, opcode: str, operands: list[str]) -> None:
    lanes = code.lanes
    if opcode in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        shared, source = code.address(operands[0], "u32"), code.address(operands[1], "u64")
        size = int(operands[2], 0)
        read = code.read(operands[3], "u32") if len(operands) > 3 else code.constant(np.uint32(size))
        code.line(f"m.copy_async({shared}, {source}, {size}, {read}, {lanes})")
    elif opcode == "cp.async.commit_group":
        code.line(f"m.commit_copies({lanes})")
    elif opcode == "cp.async.wait_group":
        code.line(f"m.wait_copies({int(operands[0])}, {lanes})")
    elif match := re.fullmatch(_BULK + r"(\.multicast::cluster)?", opcode):
        multicast = match[1]
        match = re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{\s*(%\w+)\s*,\s*(%\w+)\s*\}\s*\]", operands[1])
        if match is None:
            raise NotImplementedError(operands[1])
        shared, barrier = code.address(operands[0], "u32"), code.address(operands[2], "u32")
        column, row = code.read(match[2], "s32"), code.read(match[3], "s32")
        blocks = code.read(operands[3], "u16") if multicast else "None"
        code.line(f"m.load_box({shared}, {code.read(match[1], 'u64')}, {column}, {row}, {barrier}, {blocks})")
    else:
        raise NotImplementedError(opcode)


def _mbarrier(code: _Code, opcode: str, operands: list[str]) -> None:
    name = opcode.split(".shared")[0]
    if name == "mbarrier.init":
        code.line(f"m.barrier_init({code.address(operands[0], 'u32')}, {code.read(operands[1], 'u32')})")
    elif name == "mbarrier.arrive":
        code.line(f"m.barrier_arrive({code.address(operands[1], 'u32')}, 0)")
    elif name == "mbarrier.arrive.expect_tx":
        code.line(f"m.barrier_arrive({code.address(operands[1], 'u32')}, {code.read(operands[2], 'u32')})")
    elif name == "mbarrier.try_wait.parity":  # the block begins only where the phase has ended
        code.write_scalar(operands[0], code.constant(np.bool_(True)), "pred")
    else:
        raise NotImplementedError(opcode)


def _mapa(code: _Code, opcode: str, operands: list[str]) -> None:
    if opcode != "mapa.shared::cluster.u32":
        raise NotImplementedError(opcode)
    address, rank = (code.read(operand, "u32") for operand in operands[1:])
    code.write_scalar(operands[0], f"m.address_in_cluster({address}, {rank})", "u32")


def _barrier(code: _Code, opcode: str, operands: list[str]) -> None:
    if opcode.startswith("barrier.cluster.arrive"):
        code.line(f"m.arrive_at_cluster({code.lanes})")
    elif not opcode.startswith("barrier.cluster.wait"):  # the block begins only where all have arrived
        raise NotImplementedError(opcode)


def _wgmma(code: _Code, opcode: str, operands: list[str]) -> None:
    if opcode == "wgmma.commit_group.sync.aligned":
        return code.line(f"m.commit_products({code.lanes})")
    if opcode == "wgmma.wait_group.sync.aligned":
        return code.line(f"m.wait_products({int(operands[0])}, {code.lanes}, r)")
    match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(?:16|8)\.f32\.(bf16|f16|tf32)\.\2", opcode)
    if match is None:
        raise NotImplementedError(opcode)
    outs, left, right, add, *flags = operands
    if flags[:2] != ["1", "1"]:
        raise NotImplementedError(f"{opcode} with a negated operand")
    across = [flag == "1" for flag in flags[2:]]  # of 16-bit operands in shared memory
    if left.startswith("{"):
        a = "(" + ", ".join(code.read(register, "b32") for register in _vector(left)) + ",)"
    else:
        a = code.read(left, "u64")
    across = [False] * (2 - len(across)) + across
    accumulate = f"m.spread({code.read(add, 'pred')}, {code.lanes})"
    code.line(
        f"m.issue_product({_registers(code, outs)}, {a}, {code.read(right, 'u64')}, {accumulate}, "
        f"{tuple(across)}, '{match[2]}', {code.lanes})"
    )


def _stmatrix(code: _Code, opcode: str, operands: list[str]) -> None:
    values = _vector(operands[1])
    if f".m8n8.x{len(values)}." not in opcode:
        raise NotImplementedError(opcode)
    parts = ", ".join(code.read(value, "b32") for value in values)
    code.line(f"matrix.stmatrix(m, {code.address(operands[0], 'u32')}, ({parts},), {'.trans.' in opcode})")


_FAMILIES: dict[str, Callable[[_Code, str, list[str]], None]] = {
    **dict.fromkeys(("add", "sub", "mul", "and", "or", "xor"), _binary),
    **dict.fromkeys(("div", "rem"), _div),
    **dict.fromkeys(("shl", "shr"), _shift),
    "min": _function("a.minimum"),
    "max": _function("a.maximum"),
    "abs": _function("np.abs"),
    "neg": _function("np.negative"),
    "not": _function("np.invert"),
    "sqrt": _function("np.sqrt"),
    "rcp": _function("a.reciprocal"),
    "ex2": _function("a.exp2"),
    "popc": _function("a.popc"),
    "clz": _function("a.clz"),
    "mad": _mad, "bfe": _bfe, "redux": _redux, "fma": _fma, "mov": _mov, "setp": _setp, "selp": _selp,
    "cvt": _cvt, "cvta": _cvta,
    "ld": _ld, "st": _st, "shfl": _shfl, "vote": _vote, "match": _match, "mma": _mma,
    "ldmatrix": _ldmatrix, "stmatrix": _stmatrix,
    "cp": _cp, "mbarrier": _mbarrier, "mapa": _mapa, "barrier": _barrier, "wgmma": _wgmma,
}  # fmt: skip
