"""PTX text -> a Program: parameters, register widths and a list of instructions (PTX ISA 8.7, chapters 4 and 5)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

WIDTHS = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "f32": 4,
    "tf32": 4,
    "f64": 8,
    "pred": 1,
}
"""Bytes of a value of each type; a predicate is a bool."""


class SimulationError(Exception):
    """The program does what it must not, or what the simulator does not know."""


@dataclass(frozen=True)
class Register:
    """A register, special ones such as %tid.x included."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant, as the bits it stands for: two's complement, or those of a float written 0f or 0d."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A label, or the name of a parameter or of the block's shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}."""

    parts: tuple[Register | Immediate | Symbol, ...]


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """``guard`` is (predicate register, whether it is negated). ``type`` is the last modifier that names one."""

    text: str
    line: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None

    def __post_init__(self) -> None:
        """Look the type up once: it is asked at every execution."""
        types = [modifier for modifier in self.modifiers if modifier in WIDTHS]
        object.__setattr__(self, "types", tuple(types))
        object.__setattr__(self, "type", types[-1] if types else "b32")

    types: tuple[str, ...] = ()
    type: str = "b32"

    def has(self, *names: str) -> bool:
        """Whether any of these modifiers is there."""
        return any(name in self.modifiers for name in names)


@dataclass(frozen=True)
class Program:
    """One kernel. ``parameters`` are (name, bytes) in order, ``widths`` the bytes of registers by prefix (%r, ...)."""

    name: str
    parameters: tuple[tuple[str, int], ...]
    widths: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    threads: int

    def __post_init__(self) -> None:
        """Find the registers of asynchronous products once: each write asks for them."""
        vectors = [
            operand.parts
            for instruction in self.instructions
            if instruction.opcode == "wgmma"
            for operand in instruction.operands
            if isinstance(operand, Vector)
        ]
        names = {part.name for parts in vectors for part in parts if isinstance(part, Register)}
        object.__setattr__(self, "asynchronous", frozenset(names))

    asynchronous: frozenset[str] = frozenset()


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((?P<parameters>.*?)\)(?P<directives>[^{]*)\{(?P<body>.*)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?\s+\.align\s+\d+)?\s+(\w+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[A-Za-z_]+)<\d+>")
# of a scope, as inline PTX has them: without the percent sign, and the same names again in the next one
_SCOPED = re.compile(r"(\.reg\s+\.\w+\s+)([A-Za-z]+)(<\d+>)")
_STATEMENT = re.compile(r"(?:@(?P<not>!?)(?P<guard>%\w+)\s+)?(?P<operation>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]+)")
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")


def parse(ptx: str) -> Program:
    """The first kernel of a PTX module. Raises SimulationError for text that is none or is not understood."""
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), ptx, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    entry = _ENTRY.search(text)
    if entry is None:
        raise SimulationError("the text holds no .entry")
    threads = re.search(r"\.reqntid\s+(\d+)", entry["directives"])
    body = _named_alike(entry["body"])
    widths = {prefix: WIDTHS[kind] for kind, prefix in _REGISTERS.findall(body)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line, statement in _statements(body, text[: entry.start("body")].count("\n") + 1):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif not statement.startswith("."):
            instructions.append(_instruction(statement, line))
    parameters = tuple((name, WIDTHS[kind]) for kind, name in _PARAMETER.findall(entry["parameters"]))
    return Program(entry[1], parameters, widths, tuple(instructions), labels, int(threads[1]) if threads else 0)


def _named_alike(body: str) -> str:
    """The text with registers of scopes named as the others are: f0 becomes %scoped_f0."""
    for prefix in {found[2] for found in _SCOPED.finditer(body)}:
        if len({found[1].split()[1] for found in _SCOPED.finditer(body) if found[2] == prefix}) > 1:
            raise SimulationError(f"registers {prefix}<> of two scopes have two types")
        body = re.sub(rf"(?<![\w.%$]){prefix}(?=\d+\b|<\d+>)", f"%scoped_{prefix}", body)
    return body


def _statements(body: str, line: int) -> Iterator[tuple[int, str]]:
    """(line, statement) up to the brace that closes the kernel; a label keeps its colon."""
    depth, start, text = 1, line, ""
    for character in body:
        begins = not text.strip()
        if begins:
            start = line
        line += character == "\n"
        if begins and character in "{}":  # a scope, not a vector operand
            depth += 1 if character == "{" else -1
            if depth == 0:
                return
        elif character == ";":
            yield start, text.strip()
            text = ""
        elif character == ":" and re.fullmatch(r"[$\w]+", text.strip()):
            yield start, text.strip() + ":"
            text = ""
        else:
            text += character
    raise SimulationError("the kernel is not closed by a brace")


def _instruction(statement: str, line: int) -> Instruction:
    found = _STATEMENT.fullmatch(statement)
    if found is None:
        raise SimulationError(f"line {line}: {statement} is no instruction")
    opcode, *modifiers = re.split(r"\.|::", found["operation"])
    operands = tuple(_operand(text.strip()) for text in _OPERAND.findall(found["operands"]))
    guard = (found["guard"], bool(found["not"])) if found["guard"] else None
    return Instruction(statement, line, opcode, tuple(filter(None, modifiers)), operands, guard)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_scalar(part.strip()) for part in text[1:-1].split(",")))
    if text.startswith("["):
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise SimulationError(f"{text} is no address")
        base = Register(found[1]) if found[1].startswith("%") else Symbol(found[1])
        return Address(base, int(found[2], 0) if found[2] else 0)
    return _scalar(text)


def _scalar(text: str) -> Register | Immediate | Symbol:
    if text.startswith("%") or text == "_":
        return Register(text)
    if found := _FLOAT.fullmatch(text):
        return Immediate(int(found[1], 16))
    if _NUMBER.fullmatch(text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
