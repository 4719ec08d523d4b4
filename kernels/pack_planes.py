"""Weights -> the slot planes of the decompressing kernel, and canonical weights -> dense ones, on the GPU in one pass.

Takes plain tensors in canonical form, or a dense weight, and launches on torch's current stream. Imports triton, so it
is loaded on first use. The slow twins are ``TritonBackend.prepare`` on the CPU, ``pack`` and ``PackedWeight.unpack``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomp.kernels import launching
from sparsecomp.kernels.nm_decompress import GROUP_BLOCK, plane_bits
from sparsecomp.kernels.pack_fragments import EXPONENTS, INTEGERS, element_bits, not_a_number
from sparsecomp.patterns import NM

_WARPS = 4
_GROUPS = 256  # of one program


@triton.jit
def _position(positions, slot, inside, INDEX_BITS: tl.constexpr):
    # entry ``slot`` of a row of canonical metadata
    bit = slot * INDEX_BITS
    octet = tl.load(positions + bit // 8, mask=inside, other=0).to(tl.int32) >> (bit % 8)
    if INDEX_BITS == 3:
        over = inside & (bit % 8 > 5)
        octet |= tl.load(positions + bit // 8 + 1, mask=over, other=0).to(tl.int32) << (8 - bit % 8)
    return octet & ((1 << INDEX_BITS) - 1)


@triton.jit
def _store_octets(octets, position, first, groups, BITS: tl.constexpr, GROUPS: tl.constexpr):
    # a plane's positions of groups ``first``.., BITS each; ``groups`` are those of the plane, a multiple of 8
    PER: tl.constexpr = 8 // BITS
    shifted = position << (tl.arange(0, GROUPS) % PER * BITS)
    packed = tl.sum(tl.reshape(shifted, [GROUPS // PER, PER]), 1)
    octet = first // PER + tl.arange(0, GROUPS // PER)
    tl.store(octets + octet, packed.to(tl.uint8), mask=octet < groups // PER)


@triton.jit(do_not_specialize=["groups", "padded", "row_bytes"])
def pack_planes_kernel(
    values,
    positions,
    planes,
    octets,
    groups,
    padded,
    row_bytes,
    N: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    BITS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # A program takes some groups of a row; where rows share a mask, the first one writes it.
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    group = first + tl.arange(0, GROUPS)
    inside = group < groups
    for s in tl.static_range(N):
        value = tl.load(values + row * groups * N + group * N + s, mask=inside, other=0)
        tl.store(planes + (row * N + s) * padded + group, value, mask=group < padded)
    if row % MASK_ROWS == 0:
        tile = row // MASK_ROWS
        for s in tl.static_range(N):
            position = _position(positions + tile * row_bytes, group * N + s, inside, INDEX_BITS)
            plane = octets + (tile * N + s) * (padded // 8 * BITS)
            _store_octets(plane, tl.where(inside, position, 0), first, padded, BITS, GROUPS)


@triton.jit
def _lowest(code):
    # position of the lowest bit that is set, of 16
    low = code & -code
    position = tl.where(low & 0xAAAA != 0, 1, 0) | tl.where(low & 0xCCCC != 0, 2, 0)
    return position | tl.where(low & 0xF0F0 != 0, 4, 0) | tl.where(low & 0xFF00 != 0, 8, 0)


@triton.jit(do_not_specialize=["out_features", "columns", "stride", "groups", "padded"])
def pack_planes_dense_kernel(
    weight,
    planes,
    octets,
    broken,
    out_features,
    columns,
    stride,
    groups,
    padded,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    EXPONENT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # As above, from the dense weight: mask, compress and reorder at once; programs that meet a broken group say so.
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    group = first + tl.arange(0, GROUPS)
    kept = tl.zeros([GROUPS], tl.int32)
    count = tl.zeros([GROUPS], tl.int32)
    faults = tl.zeros([GROUPS], tl.int32)
    for j in tl.static_range(M):
        bits = element_bits(weight, row, group * M + j, out_features, columns, stride, BYTES)
        kept |= tl.where(bits != 0, 1 << j, 0)
        count += tl.where(bits != 0, 1, 0)
        faults |= not_a_number(bits, EXPONENT)
    faults |= tl.where(count > N, 1, 0)
    for _ in tl.static_range(N):
        # free slots are filled at the lowest unused positions
        free = (kept ^ ((1 << M) - 1)) & ((1 << M) - 1)
        kept |= tl.where(count < N, free & -free, 0)
        count += tl.where(count < N, 1, 0)
    for s in tl.static_range(N):
        position = _lowest(kept)
        kept &= kept - 1
        bits = element_bits(weight, row, group * M + position, out_features, columns, stride, BYTES)
        tl.store(planes + (row * N + s) * padded + group, bits.to(planes.dtype.element_ty), mask=group < padded)
        plane = octets + (row * N + s) * (padded // 8 * BITS)
        _store_octets(plane, tl.where(group < groups, position, 0), first, padded, BITS, GROUPS)
    tl.store(broken + row * tl.num_programs(1) + tl.program_id(1), tl.max(faults, 0))


@triton.jit(do_not_specialize=["groups", "columns", "row_bytes"])
def unpack_kernel(
    values,
    positions,
    dense,
    groups,
    columns,
    row_bytes,
    N: tl.constexpr,
    M: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A program writes some columns of a row; each looks among the slots of its group for the one that is its own.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    found = tl.zeros([COLUMNS], values.dtype.element_ty)
    for s in tl.static_range(N):
        slot = column // M * N + s
        position = _position(positions + row // MASK_ROWS * row_bytes, slot, inside, INDEX_BITS)
        value = tl.load(values + row * groups * N + slot, mask=inside, other=0)
        found = tl.where(position == column % M, value, found)
    tl.store(dense + row * columns + column, found, mask=inside)


def pack_planes(
    values: torch.Tensor, positions: torch.Tensor, nm: NM, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes [out, N, G] and positions uint8 [tiles, N, bytes], as ``TritonBackend.prepare`` describes them.

    ``values`` [out, slots] of a canonical weight [out, columns], ``positions`` its metadata (uint8).
    """
    out, size = values.shape[0], values.dtype.itemsize
    planes, octets = _empty(out, nm, columns, values.dtype, values.device)
    if planes.numel() == 0:
        return planes, octets
    integers, positions = values.contiguous().view(INTEGERS[size]), positions.contiguous()
    sizes = (nm.groups(columns), planes.shape[2], positions.shape[1])
    bits = {"INDEX_BITS": nm.index_bits, "BITS": plane_bits(nm)}
    constants = {"N": nm.n, **bits, "MASK_ROWS": nm.mask_rows, "GROUPS": _GROUPS}
    grid = (out, triton.cdiv(planes.shape[2], _GROUPS))
    arguments = (integers, positions, planes.view(INTEGERS[size]), octets, *sizes)
    launching.launch(pack_planes_kernel, arguments, constants, grid, _WARPS)
    return planes, octets


def pack_planes_dense(weight: torch.Tensor, nm: NM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Planes and positions of a dense weight [out, columns] whose rows share no masks, and which parts break ``nm``.

    Where a group holds more than N nonzeros, or an infinity or a NaN, ``broken`` int32 [out, programs of a row] is 1
    and that part of the layout is worthless.
    """
    (out, columns), size = weight.shape, weight.dtype.itemsize
    planes, octets = _empty(out, nm, columns, weight.dtype, weight.device)
    programs = triton.cdiv(planes.shape[2], _GROUPS)
    broken = torch.zeros(out, programs, dtype=torch.int32, device=weight.device)
    if planes.numel() == 0:
        return planes, octets, broken
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    arguments = (weight.view(INTEGERS[size]), planes.view(INTEGERS[size]), octets, broken)
    sizes = (out, columns, weight.stride(0), nm.groups(columns), planes.shape[2])
    elements = {"BYTES": size, "EXPONENT": EXPONENTS[weight.dtype]}
    constants = {"N": nm.n, "M": nm.m, "BITS": plane_bits(nm), **elements, "GROUPS": _GROUPS}
    launching.launch(pack_planes_dense_kernel, (*arguments, *sizes), constants, (out, programs), _WARPS)
    return planes, octets, broken


def unpack(values: torch.Tensor, positions: torch.Tensor, nm: NM, columns: int) -> torch.Tensor:
    """The dense weight [out, columns] of a canonical one; arguments as for ``pack_planes``."""
    out, size = values.shape[0], values.dtype.itemsize
    dense = torch.empty(out, columns, dtype=values.dtype, device=values.device)
    if dense.numel() == 0:
        return dense
    integers, positions = values.contiguous().view(INTEGERS[size]), positions.contiguous()
    sizes = (nm.groups(columns), columns, positions.shape[1])
    layout = {"INDEX_BITS": nm.index_bits, "MASK_ROWS": nm.mask_rows}
    constants = {"N": nm.n, "M": nm.m, **layout, "COLUMNS": 4 * _GROUPS}
    arguments = (integers, positions, dense.view(INTEGERS[size]), *sizes)
    launching.launch(unpack_kernel, arguments, constants, (out, triton.cdiv(columns, 4 * _GROUPS)), _WARPS)
    return dense


def _empty(
    out: int, nm: NM, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    padded = -(-nm.groups(columns) // GROUP_BLOCK) * GROUP_BLOCK
    planes = torch.empty(out, nm.n, padded, dtype=dtype, device=device)
    tiles = -(-out // nm.mask_rows)
    return planes, torch.empty(tiles, nm.n, padded * plane_bits(nm) // 8, dtype=torch.uint8, device=device)
