"""Integer, logic, comparison and floating-point instructions (PTX ISA 8.7, sections 9.7.1 to 9.7.7)."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from tests.kernels.ptxsim.machine import Machine, operation
from tests.kernels.ptxsim.parser import WIDTHS, Instruction, SimulationError, Vector
from tests.kernels.ptxsim.values import SIGNED, UNSIGNED, Array, decode, elements, encode

_FLOATS = ("f16", "bf16", "f32", "tf32", "f64", "f16x2", "bf16x2")
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_FLOAT_OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda a, b, c: a * b + c,
    "mad": lambda a, b, c: a * b + c,
}
_LOGIC: dict[str, Callable[[Array, Array], Array]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def _inputs(machine: Machine, instruction: Instruction, kind: str) -> list[Array]:
    return [machine.read(operand, kind) for operand in instruction.operands[1:]]


@operation("add", "sub", "mul", "mad", "fma", "min", "max", "div", "rem", "neg", "abs")
def arithmetic(machine: Machine, instruction: Instruction) -> None:
    """Integers wrap; floats are computed in float64 and rounded once, which is exact for all but f64 and fma.f64."""
    with np.errstate(all="ignore"):
        if instruction.type in _FLOATS:
            _float_arithmetic(machine, instruction)
        else:
            _integer_arithmetic(machine, instruction)


def _float_arithmetic(machine: Machine, instruction: Instruction) -> None:
    kind = instruction.type
    if kind.endswith("x2"):
        if instruction.opcode in ("abs", "neg"):
            bits, signs = machine.bits(instruction.operands[1], 4), np.uint32(0x80008000)
            machine.write_bits(instruction.operands[0], bits & ~signs if instruction.opcode == "abs" else bits ^ signs)
            return
        words = (machine.bits(operand, 4) for operand in instruction.operands[1:])
        pairs = [elements(each, kind[:-2]).astype(np.float64) for each in words]
        if instruction.opcode not in _FLOAT_OPERATIONS:
            raise SimulationError("of packed halves no such operation is known to the simulator")
        both = encode(_FLOAT_OPERATIONS[instruction.opcode](*pairs), kind[:-2]).astype(np.uint32)
        machine.write_bits(instruction.operands[0], both[..., 1] << 16 | both[..., 0])
        return
    a, *rest = (number.astype(np.float64) for number in _inputs(machine, instruction, kind))
    compute: dict[str, Callable[..., Array]] = {
        **_FLOAT_OPERATIONS,
        "div": np.divide,
        "neg": np.negative,
        "abs": np.abs,
        # one NaN is passed over unless the instruction asks for it
        "min": np.minimum if instruction.has("NaN") else np.fmin,
        "max": np.maximum if instruction.has("NaN") else np.fmax,
    }
    machine.write(instruction.operands[0], compute[instruction.opcode](a, *rest), kind)


def _integer_arithmetic(machine: Machine, instruction: Instruction) -> None:
    kind, opcode = instruction.type, instruction.opcode
    width = WIDTHS[kind]
    double = SIGNED[8] if kind[0] == "s" else UNSIGNED[8]
    if opcode in ("mul", "mad"):
        a, b = (machine.read(operand, kind) for operand in instruction.operands[1:3])
        result, result_kind = _product(instruction, a, b, double, width)
        if opcode == "mad":
            result = result + machine.read(instruction.operands[3], result_kind).astype(result.dtype)
        machine.write(instruction.operands[0], result, result_kind)
        return
    a, *rest = _inputs(machine, instruction, kind)
    compute: dict[str, Callable[..., Array]] = {
        "add": np.add,
        "sub": np.subtract,
        "min": np.minimum,
        "max": np.maximum,
        "neg": np.negative,
        "abs": np.abs,
        "div": lambda a, b: _quotient(a, b),
        "rem": lambda a, b: a - _quotient(a, b) * b,
    }
    if opcode not in compute:
        raise SimulationError("integers have no such operation")
    machine.write(instruction.operands[0], compute[opcode](a, *rest), kind)


def _product(instruction: Instruction, a: Array, b: Array, double: type, width: int) -> tuple[Array, str]:
    """The low half, the high half or the whole product, and its type."""
    sign = instruction.type[0]
    if instruction.has("lo"):
        return a * b, instruction.type
    if width == 8:
        raise SimulationError("128-bit products are not known to the simulator")
    whole = a.astype(double) * b.astype(double)
    if instruction.has("wide"):
        return whole, f"{sign}{16 * width}"
    return whole >> double(8 * width), instruction.type


def _quotient(a: Array, b: Array) -> Array:
    """Integer division that rounds toward zero; what is divided by zero is undefined, here 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, 0, a // safe).astype(a.dtype)
    wide = np.abs(a.astype(np.int64)) // np.abs(safe.astype(np.int64))
    return np.where(b == 0, 0, np.sign(a).astype(np.int64) * np.sign(safe) * wide).astype(a.dtype)


@operation("and", "or", "xor", "not", "cnot")
def logic(machine: Machine, instruction: Instruction) -> None:
    """Bitwise, or on predicates."""
    if instruction.type == "pred":
        inputs = [machine.predicate(operand) for operand in instruction.operands[1:]]
    else:
        inputs = _inputs(machine, instruction, instruction.type)
    if instruction.opcode == "not":
        result = ~inputs[0]
    elif instruction.opcode == "cnot":
        result = (inputs[0] == 0).astype(inputs[0].dtype)
    else:
        result = _LOGIC[instruction.opcode](*inputs)
    machine.write_bits(instruction.operands[0], result)


@operation("shl", "shr")
def shift(machine: Machine, instruction: Instruction) -> None:
    """Amounts beyond the width shift everything out."""
    kind = instruction.type
    width = 8 * WIDTHS[kind]
    a = machine.read(instruction.operands[1], kind)
    amount = machine.read(instruction.operands[2], "u32").astype(np.uint64)
    inside = np.minimum(amount, width - 1).astype(a.dtype)
    if instruction.opcode == "shl":
        result = np.where(amount >= width, 0, a << inside)
    elif kind[0] == "s":
        result = a >> inside
    else:
        result = np.where(amount >= width, 0, a >> inside)
    machine.write(instruction.operands[0], result.astype(a.dtype), kind)


@operation("bfe", "bfi")
def bit_field(machine: Machine, instruction: Instruction) -> None:
    """Extract or insert a field of bits."""
    kind = instruction.type
    width = 8 * WIDTHS[kind]
    unsigned = f"u{width}"
    *values, start, length = _inputs(machine, instruction, unsigned)
    start, length = (each.astype(np.uint64) & np.uint64(0xFF) for each in (start, length))
    start, length = np.minimum(start, 63), np.minimum(length, 63 if width == 64 else width)
    mask = (np.uint64(1) << length) - np.uint64(1)
    wide = [value.astype(np.uint64) for value in values]
    if instruction.opcode == "bfi":
        field, base = wide
        result = base & ~(mask << start) | (field & mask) << start
    else:
        result = (wide[0] >> start) & mask
        if kind[0] == "s":
            top = np.minimum(start + length - (length > 0), width - 1).astype(np.uint64)
            negative = (wide[0] >> top) & np.uint64(1) == 1
            result = np.where(negative & (length > 0), result | ~mask, result)
    machine.write(instruction.operands[0], result, unsigned)


@operation("popc")
def count_bits(machine: Machine, instruction: Instruction) -> None:
    """``popc``: the number of bits that are set."""
    width = WIDTHS[instruction.type]
    (value,) = _inputs(machine, instruction, f"u{8 * width}")
    octets = np.ascontiguousarray(value).view(np.uint8).reshape(-1, width)
    machine.write(instruction.operands[0], np.unpackbits(octets, axis=1).sum(axis=1, dtype=np.uint32), "u32")


@operation("setp")
def compare(machine: Machine, instruction: Instruction) -> None:
    """A predicate; "u" after the relation makes it true for a NaN."""
    relation, kind = instruction.modifiers[0], instruction.type
    if instruction.has("and", "or", "xor") or len(instruction.operands) != 3:
        raise SimulationError("a comparison combined with a predicate is not known to the simulator")
    a, b = _inputs(machine, instruction, kind)
    if kind in _FLOATS and relation in ("num", "nan"):
        missing = np.isnan(a) | np.isnan(b)
        result = missing if relation == "nan" else ~missing
    elif kind in _FLOATS and relation.endswith("u") and relation[:-1] in _COMPARE:
        result = _COMPARE[relation[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    else:
        result = _COMPARE[relation](a, b)
        if kind in _FLOATS and relation == "ne":
            result &= ~(np.isnan(a) | np.isnan(b))
    machine.write_bits(instruction.operands[0], result)


@operation("selp")
def select(machine: Machine, instruction: Instruction) -> None:
    """One of two values by a predicate."""
    width = WIDTHS[instruction.type]
    a, b = (machine.bits(operand, width) for operand in instruction.operands[1:3])
    machine.write_bits(instruction.operands[0], np.where(machine.predicate(instruction.operands[3]), a, b))


@operation("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "copysign")
def function(machine: Machine, instruction: Instruction) -> None:
    """Approximate instructions are computed exactly and rounded; they differ from hardware in the last bits."""
    inputs = [number.astype(np.float64) for number in _inputs(machine, instruction, instruction.type)]
    compute: dict[str, Callable[..., Array]] = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": np.reciprocal,
        "sqrt": np.sqrt,
        "rsqrt": lambda a: 1 / np.sqrt(a),
        "tanh": np.tanh,
        "copysign": lambda sign, a: np.copysign(a, sign),
    }
    with np.errstate(all="ignore"):
        result = compute[instruction.opcode](*inputs)
    machine.write(instruction.operands[0], result, instruction.type)


@operation("cvt")
def convert(machine: Machine, instruction: Instruction) -> None:
    """Between number types; to a pair of halves the first source is the high half."""
    target, source = instruction.types[-2:]
    if target.endswith("x2"):
        high, low = _inputs(machine, instruction, source)
        words = encode(high, target[:-2]).astype(np.uint32) << 16 | encode(low, target[:-2])
        machine.write_bits(instruction.operands[0], words)
        return
    numbers = machine.read(instruction.operands[1], source)
    if target not in _FLOATS and source in _FLOATS:
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        how = next((name for name in rounding if instruction.has(name)), "rzi")
        limits = np.iinfo(decode(np.zeros(1, UNSIGNED[WIDTHS[target]]), target).dtype)
        numbers = np.clip(rounding[how](np.nan_to_num(numbers.astype(np.float64))), limits.min, limits.max)
    if target.startswith("s"):
        # a register wider than the type holds the sign on
        numbers, target = decode(encode(numbers, target), target).astype(np.int64), "s64"
    machine.write(instruction.operands[0], numbers, target)


@operation("prmt")
def permute_bytes(machine: Machine, instruction: Instruction) -> None:
    """Pick four of eight bytes; bit 3 of a selector spreads the byte's sign instead."""
    low, high, selectors = (machine.read(operand, "u32").astype(np.uint64) for operand in instruction.operands[1:4])
    source, result = low | high << np.uint64(32), np.zeros(machine.total, np.uint64)
    for i in range(4):
        selector = selectors >> np.uint64(4 * i)
        byte = source >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result |= np.where(selector & np.uint64(8), sign, byte) << np.uint64(8 * i)
    machine.write(instruction.operands[0], result, "u32")


@operation("mov")
def move(machine: Machine, instruction: Instruction) -> None:
    """Copy, pack {a, b} into a register, or unpack one."""
    target, source = instruction.operands
    if instruction.type == "pred":
        machine.write_bits(target, machine.predicate(source))
        return
    width = WIDTHS[instruction.type]
    if isinstance(source, Vector):
        part = width // len(source.parts)
        word = np.zeros(machine.total, UNSIGNED[width])
        for i, each in enumerate(source.parts):
            word |= machine.bits(each, part).astype(UNSIGNED[width]) << UNSIGNED[width](8 * part * i)
        machine.write_bits(target, word)
    elif isinstance(target, Vector):
        part, word = width // len(target.parts), machine.bits(source, width)
        for i, each in enumerate(target.parts):
            machine.write_bits(each, (word >> UNSIGNED[width](8 * part * i)).astype(UNSIGNED[part]))
    else:
        machine.write_bits(target, machine.bits(source, width))


@operation("cvta")
def convert_address(machine: Machine, instruction: Instruction) -> None:
    """Address spaces do not overlap here, so an address stays as it is."""
    machine.write_bits(instruction.operands[0], machine.bits(instruction.operands[1], 8))
