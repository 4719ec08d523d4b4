"""wgmma.mma_async.sp with the weight in registers, and stmatrix (PTX ISA 8.7, sections 9.7.15 and 9.7.14.5.16).

Importing this module makes them known. Products are done when they are issued: a wait that is missing goes unnoticed,
and so does a fence between what cp.async wrote and what wgmma reads. Where weights and metadata lie follows the PTX
manual and agrees with CUTLASS's traits of the instruction (tests/pack/test_wgmma_registers.py).
"""

from __future__ import annotations

import re

import numpy as np

from ptxsim.machine import WARP, Machine, operation, vector
from ptxsim.parser import Immediate, Instruction, SimulationError
from ptxsim.values import Array, decode

_LANE = np.arange(WARP)
_G, _T = _LANE // 4, _LANE % 4
_GROUP = 4  # warps
_SHAPE = re.compile(r"m64n(\d+)k32")
_SWIZZLE_128 = 1


@operation("wgmma")
def multiply(machine: Machine, instruction: Instruction) -> None:
    """D [64, N] += A [64, 32] B [32, N] for each four warps, A in registers and sparse, B in shared memory."""
    if not instruction.has("mma_async"):
        return
    machine.full_warps(instruction.text)
    shape = next((found for name in instruction.modifiers if (found := _SHAPE.fullmatch(name))), None)
    kind = instruction.types[-1]
    if shape is None or not instruction.has("sp") or kind not in ("f16", "bf16") or instruction.types[0] != "f32":
        raise SimulationError("of wgmma only the sparse shapes of f16 and bf16 are known to the simulator")
    if not machine.all_active:
        raise SimulationError("not every warp reaches a wgmma")
    target, a, descriptor, metadata, selector, accumulate = instruction.operands[:6]
    assert isinstance(selector, Immediate)
    columns = int(shape[1])
    left = _dense(machine, a, metadata, selector.bits, kind)
    right = _rows(machine, machine.bits(descriptor, 8), columns, kind, f"{instruction.text} (line {instruction.line})")
    result = np.repeat(right, _GROUP, axis=0).transpose(0, 2, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        result = left.astype(np.float64) @ result.astype(np.float64)
    kept = machine.predicate(accumulate).reshape(-1, WARP)
    for i, register in enumerate(vector(target)):
        # register 4j + 2h + l: row g + 8h of the warp's 16, column 8j + 2t + l
        product = result[:, _G + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * _T + i % 2]
        before = machine.read(register, "f32").reshape(-1, WARP)
        machine.write(register, (product + np.where(kept, before, 0)).astype(np.float32).reshape(-1), "f32")


def _dense(machine: Machine, a: object, metadata: object, selector: int, kind: str) -> Array:
    """[warps, 16, 32]: kept values at their positions. Registers and metadata lie as those of mma.sp.m16n8k32."""
    words = machine.bits(metadata, 4).reshape(-1, WARP)  # type: ignore[arg-type]
    warps = np.arange(words.shape[0])[:, None]
    dense = np.zeros((words.shape[0], 16, 32), np.float32)
    for i, register in enumerate(vector(a)):  # type: ignore[arg-type]
        pairs = np.ascontiguousarray(machine.bits(register, 4).reshape(-1, WARP), np.uint32).view(np.uint16)
        pairs = decode(pairs.reshape(-1, WARP, 2), kind).astype(np.float32)
        row, column = _G + 8 * (i % 2), 2 * _T + 8 * (i // 2)
        # compressed columns 2p and 2p + 1 are group p; 4 groups of a row are in half a word of lane 4g + 2F + p / 4
        group = column // 2
        holder = words[:, 4 * _G + 2 * selector + group // 4] >> (16 * (i % 2) + 4 * (group % 4)).astype(np.uint32)
        first, second = holder & 3, holder >> 2 & 3
        if not (first < second).all():
            raise SimulationError("metadata does not ascend within a group")
        dense[warps, row, 4 * group + first] = pairs[..., 0]
        dense[warps, row, 4 * group + second] = pairs[..., 1]
    return dense


def _rows(machine: Machine, descriptors: Array, columns: int, kind: str, place: str) -> Array:
    """[groups, columns, 32]: the rows of 64 bytes that the descriptors name, each in the 128-byte swizzle."""
    groups = descriptors.reshape(-1, _GROUP * WARP)
    if (groups != groups[:, :1]).any():
        raise SimulationError("four warps do not share a descriptor")
    words = groups[:, 0].astype(np.uint64)
    start, stride = ((words >> np.uint64(shift) & np.uint64(0x3FFF)) << np.uint64(4) for shift in (0, 32))
    if (words >> np.uint64(62) != _SWIZZLE_128).any():
        raise SimulationError("of descriptors only those of the 128-byte swizzle are known to the simulator")
    row = np.arange(columns, dtype=np.uint64)[None, :, None]
    chunk = np.arange(4, dtype=np.uint64)[None, None, :]
    plain = start[:, None, None] + row % np.uint64(8) * np.uint64(128)
    plain = plain + row // np.uint64(8) * stride[:, None, None] + chunk * np.uint64(16)
    addresses = plain ^ ((plain >> np.uint64(7) & np.uint64(7)) << np.uint64(4))
    # all four warps read all of it
    threads = np.arange(groups.size // WARP).reshape(-1, _GROUP, 1) * WARP
    spread = np.broadcast_to(addresses.reshape(len(words), 1, -1), (len(words), _GROUP, addresses[0].size))
    everyone = np.broadcast_to(threads, spread.shape)
    rows = machine.shared.rows(everyone.reshape(-1), np.ascontiguousarray(spread).reshape(-1), place)
    return decode(rows.reshape(len(words), _GROUP, columns, 32)[:, 0], kind).astype(np.float32)


@operation("stmatrix")
def store_matrix(machine: Machine, instruction: Instruction) -> None:
    """8x8 matrices of 16-bit elements: lanes 8i to 8i+7 point at rows of matrix i; lane l holds row l/4, pair l%4."""
    if not instruction.has("m8n8"):
        raise SimulationError("of stmatrix only m8n8 is known to the simulator")
    warps = np.flatnonzero(machine.full_warps(instruction.text))
    addresses = machine.addresses(instruction.operands[0]).reshape(-1, WARP)[warps]
    for i, source in enumerate(vector(instruction.operands[1])):
        lanes = slice(8 * i, 8 * i + 8)
        threads = (warps[:, None] * WARP + _LANE[lanes]).reshape(-1)
        words = np.ascontiguousarray(machine.bits(source, 4).reshape(-1, WARP)[warps], np.uint32)
        rows = words.view(np.uint16).reshape(-1, 8, 8)
        if instruction.has("trans"):
            rows = rows.transpose(0, 2, 1)
        values = np.ascontiguousarray(rows).reshape(-1, 8)
        place = f"{instruction.text} (line {instruction.line})"
        machine.shared.store(threads, addresses[:, lanes].reshape(-1), [values[:, k].copy() for k in range(8)], place)
