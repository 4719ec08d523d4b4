"""mma and mma.sp of 16-bit operands with fp32 accumulators (PTX ISA 8.7, sections 9.7.14.5 and 9.7.14.6).

With g = lane / 4 and t = lane % 4, register i of an operand holds two elements of a 16-bit operand or one of fp32:
A [16, columns]: row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next. B [K, 8]: rows 2t + 8i and the next, column g.
C and D [16, 8]: row g + 8 (i / 2), column 2t + i % 2.
"""

from __future__ import annotations

import re

import numpy as np

from ptxsim.machine import WARP, Machine, operation, vector
from ptxsim.parser import Immediate, Instruction, Operand, SimulationError
from ptxsim.values import Array, halves

_LANE = np.arange(WARP)
_G, _T = _LANE // 4, _LANE % 4
_SHAPE = re.compile(r"m16n8k(\d+)")


@operation("mma")
def multiply(machine: Machine, instruction: Instruction) -> None:
    """D = A B + C for every whole warp; ``sp`` takes half of A's columns and where in each four they belong."""
    warps = machine.full_warps(instruction.text)
    depth = int(next(found[1] for name in instruction.modifiers if (found := _SHAPE.fullmatch(name))))
    sparse, kind = instruction.has("sp"), instruction.types[-2]
    if kind not in ("f16", "bf16") or instruction.types[0] != "f32" or depth not in (16, 32):
        raise SimulationError("of mma only 16-bit operands with fp32 accumulators are known to the simulator")
    target, a, b, c, *metadata = instruction.operands
    left = _a(machine, a, kind, depth // 2 if sparse else depth)
    if sparse:
        words, selector = metadata
        assert isinstance(selector, Immediate)
        positions = _positions(machine.bits(words, 4).reshape(-1, WARP), selector.bits, depth)
        if instruction.has("ordered_metadata") and not (positions[..., 0] < positions[..., 1])[warps].all():
            raise SimulationError("metadata does not ascend within a group")
        left = _expand(left, positions)
    with np.errstate(invalid="ignore", over="ignore"):
        product = left.astype(np.float64) @ _b(machine, b, kind, depth).astype(np.float64)
        result = (product + _c(machine, c)).astype(np.float32)
    for i, register in enumerate(vector(target)):
        machine.write(register, result[:, _G + 8 * (i // 2), 2 * _T + i % 2].reshape(-1), "f32")


def _pairs(machine: Machine, operand: Operand, kind: str) -> list[Array]:
    """Each register of a 16-bit operand as [warps, lanes, 2] numbers."""
    return [halves(machine.bits(register, 4).reshape(-1, WARP), kind) for register in vector(operand)]


def _a(machine: Machine, operand: Operand, kind: str, columns: int) -> Array:
    matrix = np.zeros((machine.total // WARP, 16, columns), np.float32)
    for i, pairs in enumerate(_pairs(machine, operand, kind)):
        for half in range(2):
            matrix[:, _G + 8 * (i % 2), 2 * _T + half + 8 * (i // 2)] = pairs[..., half]
    return matrix


def _b(machine: Machine, operand: Operand, kind: str, rows: int) -> Array:
    matrix = np.zeros((machine.total // WARP, rows, 8), np.float32)
    for i, pairs in enumerate(_pairs(machine, operand, kind)):
        for half in range(2):
            matrix[:, 2 * _T + half + 8 * i, _G] = pairs[..., half]
    return matrix


def _c(machine: Machine, operand: Operand) -> Array:
    matrix = np.zeros((machine.total // WARP, 16, 8), np.float32)
    for i, register in enumerate(vector(operand)):
        matrix[:, _G + 8 * (i // 2), 2 * _T + i % 2] = machine.read(register, "f32").reshape(-1, WARP)
    return matrix


def _positions(words: Array, selector: int, depth: int) -> Array:
    """Where the two kept values of each group of four go, [warps, 16, groups, 2].

    The 32-bit words of some lanes count: for k32 lanes 4g + 2F + c hold columns 16c to 16c + 15, for k16 lane 4g + F
    all 16, F being the selector; row g is in the low half, row g + 8 in the high half, 4 bits for a group.
    """
    chunks = depth // 16
    lanes = 4 * np.arange(8)[:, None] + (2 * selector + np.arange(2) if depth == 32 else selector + np.arange(1))
    chosen = words[:, lanes]  # [warps, 8, chunks]
    rows = np.concatenate([chosen & 0xFFFF, chosen >> 16], axis=1)  # [warps, 16, chunks]
    nibbles = (rows[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    nibbles = nibbles.reshape(*rows.shape[:2], 4 * chunks)
    return np.stack([nibbles & 3, nibbles >> 2], axis=-1).astype(np.int64)


def _expand(compressed: Array, positions: Array) -> Array:
    """Kept values [warps, 16, K/2] -> [warps, 16, K] with zeros between."""
    warps, rows, columns = compressed.shape
    dense = np.zeros((warps, rows, columns // 2, 4), np.float32)
    np.put_along_axis(dense, positions, compressed.reshape(warps, rows, columns // 2, 2), axis=3)
    return dense.reshape(warps, rows, 2 * columns)
