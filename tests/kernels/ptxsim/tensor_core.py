"""mma and mma.sp of 8-bit, 16-bit and tf32 operands (PTX ISA 8.7, sections 9.7.14.5 and 9.7.14.6).

With g = lane / 4 and t = lane % 4, a register of an operand holds E = 4, 2 or 1 elements of 8, 16 or 32 bits.
Register i: A [16, columns]: row g + 8 (i % 2), columns E (t + 4 (i / 2)) on. B [K, 8]: rows E (t + 4i) on, column g.
C and D [16, 8], fp32 or int32: row g + 8 (i / 2), column 2t + i % 2.
"""

from __future__ import annotations

import re

import numpy as np

from tests.kernels.ptxsim.machine import WARP, Machine, operation, vector
from tests.kernels.ptxsim.parser import WIDTHS, Immediate, Instruction, Operand, SimulationError
from tests.kernels.ptxsim.values import Array, elements

_LANE = np.arange(WARP)
_G, _T = _LANE // 4, _LANE % 4
_SHAPE = re.compile(r"m16n8k(\d+)")
_ACCUMULATORS = {"f16": "f32", "bf16": "f32", "tf32": "f32", "s8": "s32"}
# columns of the largest dense shape; a sparse one has twice as many, the small shapes of both half as many
_DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "s8": 32}


@operation("mma")
def multiply(machine: Machine, instruction: Instruction) -> None:
    """D = A B + C for every whole warp; ``sp`` takes half of A's columns and where in each four they belong."""
    warps = machine.full_warps(instruction.text)
    depth = int(next(found[1] for name in instruction.modifiers if (found := _SHAPE.fullmatch(name))))
    sparse, kind = instruction.has("sp"), instruction.types[-2]
    accumulator = _ACCUMULATORS.get(kind)
    largest = _DEPTH.get(kind, 0) * (2 if sparse else 1)
    # where the metadata of the smaller s8 shape lies is not known here
    shapes = (largest,) if kind == "s8" or not sparse else (largest, largest // 2)
    if depth not in shapes or instruction.types[0] != accumulator:
        raise SimulationError("of mma only some shapes of f16, bf16, tf32 and s8 are known to the simulator")
    target, a, b, c, *metadata = instruction.operands
    left = _a(machine, a, kind, depth // 2 if sparse else depth)
    if sparse:
        words, selector = metadata
        assert isinstance(selector, Immediate)
        nibbles = _nibbles(machine.bits(words, 4).reshape(-1, WARP), selector.bits, depth, kind)
        left = _expand(left, _positions(nibbles, warps, kind, instruction.has("ordered_metadata")))
    with np.errstate(invalid="ignore", over="ignore"):
        exact = np.int64 if accumulator == "s32" else np.float64
        product = left.astype(exact) @ _b(machine, b, kind, depth).astype(exact)
        result = product + _c(machine, c, accumulator, exact)
    for i, register in enumerate(vector(target)):
        machine.write(register, result[:, _G + 8 * (i // 2), 2 * _T + i % 2].reshape(-1), accumulator)


def _registers(machine: Machine, operand: Operand, kind: str) -> list[Array]:
    """Each register of an operand as [warps, lanes, elements] numbers."""
    found = [elements(machine.bits(register, 4).reshape(-1, WARP), kind) for register in vector(operand)]
    if kind == "tf32":
        lanes = machine.active.reshape(-1, WARP, 1)
        for numbers in found:
            fine = np.ascontiguousarray(numbers, np.float32).view(np.uint32) & 0x1FFF != 0
            if (fine & np.isfinite(numbers) & lanes).any():
                raise SimulationError("an operand has bits that tf32 does not have; what becomes of them is undefined")
    return found


def _a(machine: Machine, operand: Operand, kind: str, columns: int) -> Array:
    each = 4 // WIDTHS[kind]
    matrix = np.zeros((machine.total // WARP, 16, columns), np.float32)
    for i, numbers in enumerate(_registers(machine, operand, kind)):
        for e in range(each):
            matrix[:, _G + 8 * (i % 2), each * (_T + 4 * (i // 2)) + e] = numbers[..., e]
    return matrix


def _b(machine: Machine, operand: Operand, kind: str, rows: int) -> Array:
    each = 4 // WIDTHS[kind]
    matrix = np.zeros((machine.total // WARP, rows, 8), np.float32)
    for i, numbers in enumerate(_registers(machine, operand, kind)):
        for e in range(each):
            matrix[:, each * (_T + 4 * i) + e, _G] = numbers[..., e]
    return matrix


def _c(machine: Machine, operand: Operand, kind: str, exact: type) -> Array:
    matrix = np.zeros((machine.total // WARP, 16, 8), exact)
    for i, register in enumerate(vector(operand)):
        matrix[:, _G + 8 * (i // 2), 2 * _T + i % 2] = machine.read(register, kind).reshape(-1, WARP)
    return matrix


def _nibbles(words: Array, selector: int, depth: int, kind: str) -> Array:
    """The 4 bits of metadata of each two kept values, or one of tf32, [warps, 16, groups]; F is the selector.

    Of 8 bits, k64: lane 4g + b + 2h holds row g + 8b, 8 groups from 8h on; F is 0.
    Of 16 bits and tf32: row g is in the low half, row g + 8 in the high half, 4 groups each. In the larger shape lanes
    4g + 2F + c hold the groups from 4c on, in the smaller one lane 4g + F has all four.
    """
    if kind == "s8":
        if selector != 0:
            raise SimulationError("the selector of this shape must be 0")
        lanes = 4 * np.arange(8)[None, :, None] + np.arange(2)[:, None, None] + 2 * np.arange(2)
        rows = words[:, lanes].reshape(-1, 16, 2)  # [warps, b, g, h]
        return ((rows[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).reshape(-1, 16, 16)
    chunks = depth // _DEPTH[kind]
    lanes = 4 * np.arange(8)[:, None] + (2 * selector + np.arange(2) if chunks == 2 else selector + np.arange(1))
    chosen = words[:, lanes]  # [warps, 8, chunks]
    rows = np.concatenate([chosen & 0xFFFF, chosen >> 16], axis=1)  # [warps, 16, chunks]
    nibbles = (rows[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    return nibbles.reshape(*rows.shape[:2], 4 * chunks)


def _positions(nibbles: Array, warps: Array, kind: str, ordered: bool) -> Array:
    """Where the kept values of each group go, [warps, 16, groups, kept]: two of four, or one of two of tf32."""
    if kind == "tf32":
        if not np.isin(nibbles[warps], (0b0100, 0b1110)).all():
            raise SimulationError("metadata of tf32 is neither 0100 nor 1110")
        return (nibbles == 0b1110).astype(np.int64)[..., None]
    positions = np.stack([nibbles & 3, nibbles >> 2], axis=-1).astype(np.int64)
    if ordered and not (positions[..., 0] < positions[..., 1])[warps].all():
        raise SimulationError("metadata does not ascend within a group")
    return positions


def _expand(compressed: Array, positions: Array) -> Array:
    """Kept values [warps, 16, K/2] -> [warps, 16, K] with zeros between."""
    warps, rows, columns = compressed.shape
    groups, kept = positions.shape[2:]
    dense = np.zeros((warps, rows, groups, 2 * kept), np.float32)
    np.put_along_axis(dense, positions, compressed.reshape(warps, rows, groups, kept), axis=3)
    return dense.reshape(warps, rows, 2 * columns)
