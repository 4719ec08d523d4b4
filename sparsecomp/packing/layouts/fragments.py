"""Canonical weights <-> the fragments that lanes of a warp feed to mma.sp: 2:4 of 16 or 8 bits, 1:2 of fp32 (tf32).

Pure functions on tensors, on any device. Knows nothing of kernels. Layouts are those of PTX ISA 8.7, section 9.7.14.6.
A register is 32 bits and an instruction takes 16 registers' worth of columns, so in words of 32 bits the values lie
alike for every element type; a row of 128 bytes, two instructions, is what weights are padded to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import PatternError
from sparsecomp.packing.bits import pack_positions, unpack_positions
from sparsecomp.packing.format import PackedWeight
from sparsecomp.patterns import Pattern, row_nm
from sparsecomp.patterns.numbers import LARGEST_INT8

ROWS, ROW_BYTES = 64, 128
"""Weights are padded to whole blocks of this many rows, and of this many bytes of a dense row."""

_SPARSITY = {torch.float16: (2, 4), torch.bfloat16: (2, 4), torch.int8: (2, 4), torch.float32: (1, 2)}
"""What the instruction takes of each element type."""

_FIRST_POSITIONS = 0b0100
"""Metadata of a group of padding: positions 0 and 1, as of any group without nonzeros; of tf32, position 0."""

_SECOND_OF_TWO = 0b1110
"""Metadata of position 1 in a group of two of tf32: the upper two of four halves."""

_MOST_WORDS = 2**31 - 1
"""Kernels count the 32-bit words of the values in 32 bits."""

_MOST_INT8_COLUMNS = 2 * (_MOST_WORDS // LARGEST_INT8**2)
"""Half of the columns are kept, and their products are summed in 32 bits."""


def fragments_why_not(
    pattern: Pattern,
    dtype: torch.dtype,
    shape: tuple[int, int],
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16),
) -> str | None:
    """None if weights [out, in] of this kind have fragments, and the caller takes their ``dtypes``, else the reason."""
    if dtype not in dtypes:
        return f"has no kernel for {dtype}; {' and '.join(map(str, dtypes))} only"
    nm, (kept, group) = row_nm(pattern), _SPARSITY[dtype]
    if nm is None or (nm.n, nm.m) != (kept, group):
        named = f"{pattern} in {dtype}" if group == 2 else str(pattern)
        return f"has no kernel for {named}; {kept}:{group} only"
    columns = ROW_BYTES // dtype.itemsize
    words = -(-shape[0] // ROWS) * ROWS * -(-shape[1] // columns) * ROW_BYTES // 8
    most = _MOST_WORDS * 8 // dtype.itemsize
    if shape[1] == 0 or words > _MOST_WORDS:
        return f"takes weights of 1 input feature to {most} elements, not {shape[0]}x{shape[1]}"
    if dtype == torch.int8 and shape[1] > _MOST_INT8_COLUMNS:
        return f"sums up to {_MOST_INT8_COLUMNS} columns of int8 in 32 bits, not {shape[1]}"
    return None


def to_fragments(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Values int32 [R/16, 2 B, 128] and metadata int32 [R/64, B, 128] (int8: [R/64, 2 B, 128]) of a padded weight.

    The weight is padded with zeros to R rows and B blocks of 128 bytes of a dense row, which are two tiles each: of 32
    columns for 16 bits, 64 for int8, 16 for fp32. With g = lane // 4 and t = lane % 4, word 4 * lane + r of a tile of
    16 rows holds word t + 4 (r // 2) of the compressed columns, the lowest bits first, of row g + 8 (r % 2).

    Metadata has 4 bits for each group of four, or of two of fp32. Word 4 * lane + i of a block serves row tile i.
    16 bits and fp32: 4 groups of rows g (low half) and g + 8, from group 8 (t // 2) + 4 (t % 2) of the block on: lanes
    with t < 2 serve the first tile, as selector 0 of the instruction reads them. int8, where a block of metadata serves
    one tile: 8 groups of row g + 8 (t % 2), from group 8 (t // 2) on.
    Raises PatternError for another pattern, dtype or size, with the reason.
    """
    if reason := fragments_why_not(packed.pattern, packed.values.dtype, packed.shape, tuple(_SPARSITY)):
        raise PatternError(f"the sparse tensor core layout {reason}; pack the weight otherwise")
    out, columns = packed.shape
    dtype = packed.values.dtype
    rows, blocks = -(-out // ROWS) * ROWS, -(-columns * dtype.itemsize // ROW_BYTES)
    groups = blocks * ROW_BYTES // dtype.itemsize // _SPARSITY[dtype][1]
    nibbles = _nibbles(packed)
    nibbles = functional.pad(nibbles, (0, groups - nibbles.shape[1], 0, rows - out), value=_FIRST_POSITIONS)
    octets = pack_positions(nibbles, 4)
    slots = blocks * ROW_BYTES // dtype.itemsize // 2
    values = functional.pad(packed.values, (0, slots - packed.values.shape[1], 0, rows - out)).view(torch.int32)
    tiles = values.view(rows // 16, 2, 8, 2 * blocks, 2, 4).permute(0, 3, 2, 5, 4, 1)
    if dtype == torch.int8:
        words = octets.view(torch.int32).view(rows // 64, 4, 2, 8, 2 * blocks, 2).permute(0, 4, 3, 5, 2, 1)
    else:
        words = octets.view(torch.int16).view(rows // 64, 4, 2, 8, blocks, 4).permute(0, 4, 3, 5, 1, 2)
    return (
        tiles.reshape(rows // 16, 2 * blocks, 128),
        words.flatten().view(torch.int32).view(rows // 64, groups * ROWS // 8 // 128, 128),
    )


def from_fragments(
    fragments: Tensor, metadata: Tensor, pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype
) -> PackedWeight:
    """The canonical form, byte for byte the one that ``to_fragments`` was given; of int8, without its scales."""
    nm = row_nm(pattern)
    assert nm is not None
    out, columns = shape
    rows, blocks = ROWS * metadata.shape[0], fragments.shape[1] // 2
    tiles = fragments.view(rows // 16, 2 * blocks, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3)
    values = tiles.reshape(rows, blocks * ROW_BYTES // 8).view(dtype)[:out, : nm.slots(columns)].contiguous()
    if dtype == torch.int8:
        words = metadata.view(rows // 64, 2 * blocks, 8, 2, 2, 4).permute(0, 5, 4, 2, 1, 3)
    else:
        words = metadata.view(torch.int16).view(rows // 64, blocks, 8, 4, 4, 2).permute(0, 4, 5, 2, 1, 3)
    per_row = metadata.shape[1] * 128 * 4 // ROWS // words.element_size()
    octets = words.reshape(rows, per_row).view(torch.uint8)[: out : nm.mask_rows]
    nibbles = unpack_positions(octets, nm.groups(columns), 4)
    if nm.m == 2:
        positions = (nibbles == _SECOND_OF_TWO).to(torch.uint8)
    else:
        positions = torch.stack([nibbles & 3, nibbles >> 2], dim=2).flatten(1)
    return PackedWeight(values, pack_positions(positions, nm.index_bits), pattern, shape)


def _nibbles(packed: PackedWeight) -> Tensor:
    """The metadata of each group, uint8 [out, groups]."""
    positions = packed.positions()
    if positions.shape[2] == 1:
        return torch.where(positions[..., 0] == 1, _SECOND_OF_TWO, _FIRST_POSITIONS).to(torch.uint8)
    return positions[..., 0] | positions[..., 1] << 2
