"""wgmma.mma_async, dense and sparse, and stmatrix (PTX ISA 8.7, sections 9.7.15 and 9.7.14.5.16).

A of a product, [64, K], is in registers or in shared memory, dense; sparse in registers alone. B [K, N] is in shared
memory, K being the side whose elements are neighbours. Results are there at once, but their registers, those of A and
the memory that is read must not be touched until the group was waited for. Where weights and metadata lie follows the
PTX manual and agrees with CUTLASS's traits of the instruction (tests/packing/test_wgmma_registers.py).
"""

from __future__ import annotations

import re

import numpy as np

from tests.kernels.ptxsim.machine import WARP, Machine, operation, vector
from tests.kernels.ptxsim.parser import Immediate, Instruction, Operand, Register, SimulationError, Vector
from tests.kernels.ptxsim.values import Array, decode

_LANE = np.arange(WARP)
_G, _T = _LANE // 4, _LANE % 4
_GROUP = 4  # warps
_SHAPE = re.compile(r"m64n(\d+)k(\d+)")
_DENSE_DEPTH, _SPARSE_DEPTH = 16, 32
# bits 62 and 63 of a descriptor -> bytes of a row of the swizzle
_SWIZZLES = {1: 128, 2: 64, 3: 32}


@operation("wgmma")
def warpgroup(machine: Machine, instruction: Instruction) -> None:
    """Products, the fence of their registers, and their groups."""
    if instruction.has("mma_async"):
        with machine.asynchronous():
            _multiply(machine, instruction)
    elif instruction.has("fence"):
        machine.fence_registers()
    elif instruction.has("commit_group"):
        machine.commit()
    elif instruction.has("wait_group"):
        (outstanding,) = instruction.operands
        assert isinstance(outstanding, Immediate)
        machine.wait(outstanding.bits)
    else:
        raise SimulationError("of wgmma only mma_async, fence and groups are known to the simulator")


def _multiply(machine: Machine, instruction: Instruction) -> None:
    """D [64, N] += A [64, K] B [K, N] for each four warps."""
    groups = _whole_groups(machine, instruction)
    columns, sparse, kind = _shape(instruction)
    place = f"line {instruction.line}: {instruction.text[:80]}"
    target, a, b, *rest = instruction.operands
    registers, reads = (
        [*vector(target)],
        [_rows(machine, b, groups, columns, _SPARSE_DEPTH if sparse else _DENSE_DEPTH)],
    )
    if sparse:
        metadata, selector, *rest = rest
        assert isinstance(selector, Immediate)
        left = _expanded(machine, a, metadata, selector.bits, kind, groups)
    elif isinstance(a, Vector):
        left = _fragments(machine, a, kind)[_warps(groups)]
    else:
        reads.append(_rows(machine, a, groups, 16 * _GROUP, _DENSE_DEPTH))
    registers += [*vector(a)] if isinstance(a, Vector) else []
    accumulate, *signs = rest
    # scales of A and B, then whether a matrix in shared memory has its other side first
    wanted = [1, 1] if sparse else [1, 1, *[0] * len(reads)]
    if [sign.bits for sign in signs if isinstance(sign, Immediate)][: len(wanted)] != wanted:
        raise SimulationError("negated and transposed operands of wgmma are not known to the simulator")
    readers, addresses = (np.concatenate(each) for each in zip(*reads, strict=True))
    names = frozenset(each.name for each in registers if isinstance(each, Register))
    machine.issue(names, readers, addresses, place)
    right, *shared = [
        decode(machine.shared.peek(*read).reshape(len(groups), _GROUP, rows, -1)[:, 0], kind).astype(np.float64)
        for read, rows in zip(reads, (columns, 16 * _GROUP), strict=False)
    ]
    if shared:
        left = shared[0].reshape(len(groups) * _GROUP, 16, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        result = left.astype(np.float64) @ np.repeat(right, _GROUP, axis=0).transpose(0, 2, 1)
    whole = np.zeros((machine.total // WARP, 16, columns))
    whole[_warps(groups)] = result
    kept = machine.predicate(accumulate).reshape(-1, WARP)
    for i, register in enumerate(vector(target)):
        # register 4j + 2h + l: row g + 8h of the warp's 16, column 8j + 2t + l
        product = whole[:, _G + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * _T + i % 2]
        before = machine.read(register, "f32").reshape(-1, WARP)
        with np.errstate(invalid="ignore", over="ignore"):
            machine.write(register, (product + np.where(kept, before, 0)).astype(np.float32).reshape(-1), "f32")


def _shape(instruction: Instruction) -> tuple[int, bool, str]:
    """N, whether A is sparse, and the type of the elements."""
    found = next((found for name in instruction.modifiers if (found := _SHAPE.fullmatch(name))), None)
    kind, sparse = instruction.types[-1], instruction.has("sp")
    depth = _SPARSE_DEPTH if sparse else _DENSE_DEPTH
    if found is None or int(found[2]) != depth or kind not in ("f16", "bf16") or instruction.types[0] != "f32":
        raise SimulationError("of wgmma only the shapes of f16 and bf16 with sums in f32 are known to the simulator")
    return int(found[1]), sparse, kind


def _whole_groups(machine: Machine, instruction: Instruction) -> Array:
    """Which fours of warps are active; none of them may be so in part."""
    warps = machine.full_warps(instruction.text).reshape(-1, _GROUP)
    if (warps.any(axis=1) & ~warps.all(axis=1)).any():
        raise SimulationError("only a part of four warps reaches a wgmma")
    return np.flatnonzero(warps[:, 0])


def _warps(groups: Array) -> Array:
    return (groups[:, None] * _GROUP + np.arange(_GROUP)).reshape(-1)


def _pairs(machine: Machine, register: Operand, kind: str) -> Array:
    """The two numbers in a register, [warps, lanes, 2]."""
    words = np.ascontiguousarray(machine.bits(register, 4).reshape(-1, WARP), np.uint32)
    return decode(words.view(np.uint16).reshape(-1, WARP, 2), kind).astype(np.float32)


def _fragments(machine: Machine, a: Operand, kind: str) -> Array:
    """[warps, 16, 16]: register i holds columns 2 (t + 4 (i / 2)) and the next of row g + 8 (i % 2), as of mma."""
    matrix = np.zeros((machine.total // WARP, 16, _DENSE_DEPTH), np.float32)
    for i, register in enumerate(vector(a)):
        pairs = _pairs(machine, register, kind)
        for e in range(2):
            matrix[:, _G + 8 * (i % 2), 2 * (_T + 4 * (i // 2)) + e] = pairs[..., e]
    return matrix


def _expanded(machine: Machine, a: Operand, metadata: Operand, selector: int, kind: str, groups: Array) -> Array:
    """[warps, 16, 32]: kept values at their positions. Registers and metadata lie as those of mma.sp.m16n8k32."""
    chosen = _warps(groups)
    words = machine.bits(metadata, 4).reshape(-1, WARP)[chosen]
    warps = np.arange(len(chosen))[:, None]
    dense = np.zeros((len(chosen), 16, _SPARSE_DEPTH), np.float32)
    for i, register in enumerate(vector(a)):
        pairs = _pairs(machine, register, kind)[chosen]
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


def _rows(machine: Machine, descriptor: Operand, groups: Array, rows: int, depth: int) -> tuple[Array, Array]:
    """(thread, address) of each 16 bytes of the ``rows`` rows that the descriptors name; all four warps read all."""
    words = machine.bits(descriptor, 8).reshape(-1, _GROUP * WARP)[groups]
    if (words != words[:, :1]).any():
        raise SimulationError("four warps do not share a descriptor")
    words = words[:, 0].astype(np.uint64)
    swizzles = np.unique(words >> np.uint64(62))
    if len(swizzles) != 1 or int(swizzles[0]) not in _SWIZZLES or (words >> np.uint64(49) & np.uint64(7)).any():
        raise SimulationError(
            "of descriptors only those of a swizzle that begins at offset 0 are known to the simulator"
        )
    pitch = _SWIZZLES[int(swizzles[0])]
    start, stride = ((words >> np.uint64(shift) & np.uint64(0x3FFF)) << np.uint64(4) for shift in (0, 32))
    row = np.arange(rows, dtype=np.uint64)[None, :, None]
    chunk = np.arange(depth // 8, dtype=np.uint64)[None, None, :]
    plain = start[:, None, None] + row % np.uint64(8) * np.uint64(pitch)
    plain = plain + row // np.uint64(8) * stride[:, None, None] + chunk * np.uint64(16)
    # chunks of 16 bytes change places within a row of the swizzle by the number of the 128 bytes they are in
    addresses = plain ^ ((plain >> np.uint64(7) & np.uint64(pitch // 16 - 1)) << np.uint64(4))
    threads = (groups[:, None] * _GROUP + np.arange(_GROUP)).reshape(len(groups), _GROUP, 1) * WARP
    spread = np.broadcast_to(addresses.reshape(len(words), 1, -1), (len(words), _GROUP, rows * depth // 8))
    everyone = np.broadcast_to(threads, spread.shape)
    return everyone.reshape(-1), np.ascontiguousarray(spread).reshape(-1)


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
