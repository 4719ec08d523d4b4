"""Weights -> the fragment layout of the mma.sp kernel, on the GPU, in one pass (Triton).

Takes plain tensors in canonical form, or a dense weight, and launches on torch's current stream. Imports triton, so it
is loaded on first use. ``sparsecomp.packing.layouts.fragments.to_fragments`` is the slow twin and describes the layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomp.kernels import launching
from sparsecomp.patterns import NM

_WARPS = 4
EXPONENTS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.int8: 0}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}

# bits of a group in the layout: positions 0 and 1, or of two elements of fp32 the first, and the second
_FIRST = tl.constexpr(0b0100)
_SECOND = tl.constexpr(0b1110)


@triton.jit
def _fragment_place(place, block_row, block_column):
    # (row, word of the compressed row) that word ``place`` of the 8 tiles of a block of 64 rows comes from
    register, t, g = place % 4, place // 4 % 4, place // 16 % 8
    half, tile = place // 128 % 2, place // 256
    row = block_row * 64 + tile * 16 + g + register % 2 * 8
    return row, block_column * 16 + half * 8 + t + register // 2 * 4


@triton.jit
def _metadata_place(place, nibble, block_row, block_column, BYTES: tl.constexpr):
    # (row, group) that 4 bits of word ``place`` of the metadata of such a block come from
    tile, t, g = place % 4, place // 4 % 4, place // 16 % 8
    if BYTES == 1:
        row = block_row * 64 + tile * 16 + g + t % 2 * 8
        return row, block_column * 32 + place // 128 * 16 + t // 2 * 8 + nibble
    else:  # noqa: RET505 - only a branch is left out when Triton compiles the other one
        row = block_row * 64 + tile * 16 + g + nibble // 4 * 8
        return row, block_column * 16 + t * 4 + nibble % 4


@triton.jit
def element_bits(weight, row, column, out_features, columns, stride, BYTES: tl.constexpr):
    # an element as unsigned in 32 bits, +0 for the -0 of floats
    inside = (row < out_features) & (column < columns)
    bits = tl.load(weight + row.to(tl.int64) * stride + column, mask=inside, other=0).to(tl.int32)
    if BYTES == 1:
        return bits & 0xFF
    elif BYTES == 2:  # noqa: RET505 - only a branch is left out when Triton compiles the other one
        return tl.where(bits & 0x7FFF == 0, 0, bits & 0xFFFF)
    else:
        return tl.where(bits & 0x7FFFFFFF == 0, 0, bits)


@triton.jit
def not_a_number(bits, EXPONENT: tl.constexpr):
    # 1 where the bits are those of an infinity or a NaN; integers have none
    return tl.where((EXPONENT != 0) & (bits & EXPONENT == EXPONENT), 1, 0)


@triton.jit
def _pair(weight, row, group, out_features, columns, stride, BYTES: tl.constexpr, EXPONENT: tl.constexpr):
    # of a group of four: the bits of the two values kept, the 4 bits of where they were, whether it breaks 2:4
    v0 = element_bits(weight, row, group * 4, out_features, columns, stride, BYTES)
    v1 = element_bits(weight, row, group * 4 + 1, out_features, columns, stride, BYTES)
    v2 = element_bits(weight, row, group * 4 + 2, out_features, columns, stride, BYTES)
    v3 = element_bits(weight, row, group * 4 + 3, out_features, columns, stride, BYTES)
    u0, u1, u2, u3 = v0 != 0, v1 != 0, v2 != 0, v3 != 0
    # free slots are filled at the lowest unused positions, where there is a zero
    first = tl.where(u0, 0, tl.where(u1 & (u2 | u3), 1, tl.where(u2 & u3, 2, 0)))
    last = tl.where(u3, 3, tl.where(u2, 2, 1))
    low = tl.where(first == 0, v0, tl.where(first == 1, v1, v2))
    high = tl.where(last == 3, v3, tl.where(last == 2, v2, v1))
    strange = (
        not_a_number(v0, EXPONENT)
        | not_a_number(v1, EXPONENT)
        | not_a_number(v2, EXPONENT)
        | not_a_number(v3, EXPONENT)
    )
    broken = tl.where((u0 & u1 & (u2 | u3)) | (u2 & u3 & (u0 | u1)), 1, 0)
    return low, high, first | last << 2, broken | strange


@triton.jit(do_not_specialize=["out_features", "slots", "groups", "row_bytes", "blocks"])
def pack_fragments_kernel(
    values,
    positions,
    fragments,
    metadata,
    out_features,
    slots,
    groups,
    row_bytes,
    blocks,
    BYTES: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    # A program fills 64 rows by 128 bytes of a dense row: each thread looks up where its words come from.
    EACH: tl.constexpr = 4 // BYTES
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    base = (block_row.to(tl.int64) * 8 * blocks + block_column * 2) * 128
    place = tl.arange(0, 1024)
    row, word = _fragment_place(place, block_row, block_column)
    packed = tl.zeros([1024], tl.int32)
    for e in tl.static_range(EACH):
        slot = word * EACH + e
        inside = (row < out_features) & (slot < slots)
        bits = tl.load(values + row.to(tl.int64) * slots + slot, mask=inside, other=0).to(tl.int32)
        packed |= bits if EACH == 1 else (bits & ((1 << (8 * BYTES)) - 1)) << (8 * BYTES * e)
    tl.store(fragments + base + place // 256 * (blocks * 256) + place % 256, packed)

    WORDS: tl.constexpr = 256 if BYTES == 1 else 128
    place = tl.arange(0, WORDS)
    packed = tl.zeros([WORDS], tl.int32)
    for nibble in tl.static_range(8):
        row, group = _metadata_place(place, nibble, block_row, block_column, BYTES)
        inside = (row < out_features) & (group < groups)
        shared = positions + (row // MASK_ROWS).to(tl.int64) * row_bytes
        if BYTES == 4:
            bit = tl.load(shared + group // 8, mask=inside, other=0).to(tl.int32) >> (group % 8)
            bits = tl.where(bit & 1 == 1, _SECOND, _FIRST)
        else:
            bits = tl.load(shared + group // 2, mask=inside, other=0).to(tl.int32) >> (group % 2 * 4) & 15
            bits = tl.where(inside, bits, _FIRST)
        packed |= bits << (4 * nibble)
    tl.store(metadata + (block_row.to(tl.int64) * blocks + block_column) * WORDS + place, packed)


@triton.jit(do_not_specialize=["out_features", "columns", "stride", "blocks"])
def pack_dense_kernel(
    weight,
    fragments,
    metadata,
    broken,
    out_features,
    columns,
    stride,
    blocks,
    BYTES: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    # As above, from the dense weight: mask, compress and reorder at once; blocks that break the pattern are reported.
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    base = (block_row.to(tl.int64) * 8 * blocks + block_column * 2) * 128
    place = tl.arange(0, 1024)
    row, word = _fragment_place(place, block_row, block_column)
    if BYTES == 4:
        even = element_bits(weight, row, word * 2, out_features, columns, stride, BYTES)
        packed = even | element_bits(weight, row, word * 2 + 1, out_features, columns, stride, BYTES)
    else:
        packed = tl.zeros([1024], tl.int32)
        for pair in tl.static_range(2 // BYTES):
            group = word * (2 // BYTES) + pair
            low, high, _, _ = _pair(weight, row, group, out_features, columns, stride, BYTES, EXPONENT)
            packed |= (low | high << (8 * BYTES)) << (16 * pair)
    tl.store(fragments + base + place // 256 * (blocks * 256) + place % 256, packed)

    WORDS: tl.constexpr = 256 if BYTES == 1 else 128
    place = tl.arange(0, WORDS)
    packed = tl.zeros([WORDS], tl.int32)
    faults = tl.zeros([WORDS], tl.int32)
    for nibble in tl.static_range(8):
        row, group = _metadata_place(place, nibble, block_row, block_column, BYTES)
        if BYTES == 4:
            even = element_bits(weight, row, group * 2, out_features, columns, stride, BYTES)
            odd = element_bits(weight, row, group * 2 + 1, out_features, columns, stride, BYTES)
            bits = tl.where(odd != 0, _SECOND, _FIRST)
            faults |= (
                tl.where((even != 0) & (odd != 0), 1, 0) | not_a_number(even, EXPONENT) | not_a_number(odd, EXPONENT)
            )
        else:
            _, _, bits, fault = _pair(weight, row, group, out_features, columns, stride, BYTES, EXPONENT)
            faults |= fault
        packed |= bits << (4 * nibble)
    tl.store(metadata + (block_row.to(tl.int64) * blocks + block_column) * WORDS + place, packed)
    tl.store(broken + block_row * blocks + block_column, tl.max(faults, 0))


def pack_fragments(
    values: torch.Tensor, positions: torch.Tensor, nm: NM, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fragments and metadata, as ``to_fragments`` gives them, of a canonical weight [out, columns].

    ``values`` [out, slots] of any dtype that has fragments, ``positions`` its canonical metadata (uint8).
    """
    out, size = values.shape[0], values.dtype.itemsize
    fragments, metadata = _empty(out, columns, size, values.device)
    if out == 0:
        return fragments, metadata
    integers = values.contiguous().view(INTEGERS[size])
    positions = positions.contiguous()
    blocks = fragments.shape[1] // 2
    sizes = (out, values.shape[1], nm.groups(columns), positions.shape[1], blocks)
    constants = {"BYTES": size, "MASK_ROWS": nm.mask_rows}
    arguments = (integers, positions, fragments, metadata, *sizes)
    launching.launch(pack_fragments_kernel, arguments, constants, (metadata.shape[0], blocks), _WARPS)
    return fragments, metadata


def pack_dense(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fragments and metadata of a dense weight [out, columns] and, int32, which of its blocks break the pattern.

    fp16, bf16 and int8 are taken as 2:4, fp32 as 1:2. Where a group of a block holds more nonzeros than that, or an
    infinity or a NaN, ``broken`` [rows / 64, blocks of 128 bytes] is 1 and its part of the layout is worthless.
    """
    (out, columns), size = weight.shape, weight.dtype.itemsize
    fragments, metadata = _empty(out, columns, size, weight.device)
    blocks = fragments.shape[1] // 2
    broken = torch.zeros(metadata.shape[0], blocks, dtype=torch.int32, device=weight.device)
    if out == 0:
        return fragments, metadata, broken
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    integers = weight.view(INTEGERS[size])
    constants = {"BYTES": size, "EXPONENT": EXPONENTS[weight.dtype]}
    arguments = (integers, fragments, metadata, broken, out, columns, weight.stride(0), blocks)
    launching.launch(pack_dense_kernel, arguments, constants, (metadata.shape[0], blocks), _WARPS)
    return fragments, metadata, broken


def _empty(out: int, columns: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows, blocks = -(-out // 64), -(-columns * size // 128)
    fragments = torch.empty(4 * rows, 2 * blocks, 128, dtype=torch.int32, device=device)
    return fragments, torch.empty(rows, blocks * (2 if size == 1 else 1), 128, dtype=torch.int32, device=device)
