"""Canonical 2:4 weights of 16-bit types <-> the fragments that lanes of a warp feed to mma.sp.m16n8k32.

Pure functions on tensors, on any device. Knows nothing of kernels. Layouts are those of PTX ISA 8.7, section 9.7.14.6.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import PatternError
from sparsecomp.pack.bits import pack_positions, unpack_positions
from sparsecomp.pack.format import PackedWeight
from sparsecomp.patterns import Pattern, row_nm

ROWS, COLUMNS = 64, 64
"""Weights are padded to whole blocks of this many rows and columns."""

_FIRST_POSITIONS = 0b0100
"""Metadata of a group of padding: positions 0 and 1, ascending, as of any group without nonzeros."""

_MOST_WORDS = 2**31 - 1
"""Kernels count the 32-bit words of the values in 32 bits."""


def fragments_why_not(pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    """None if weights [out, in] of this kind have fragments, else the reason."""
    nm = row_nm(pattern)
    if nm is None or (nm.n, nm.m) != (2, 4):
        return f"has no kernel for {pattern}; 2:4 only"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"has no kernel for {dtype}; torch.float16 and torch.bfloat16 only"
    words = -(-shape[0] // ROWS) * ROWS * -(-shape[1] // COLUMNS) * COLUMNS // 4
    if shape[1] == 0 or words > _MOST_WORDS:
        return f"takes weights of 1 input feature to {4 * _MOST_WORDS} elements, not {shape[0]}x{shape[1]}"
    return None


def to_fragments(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Values int32 [R/16, C/32, 128] and metadata int32 [R/64, C/64, 128] of a weight padded to R x C with zeros.

    With g = lane // 4 and t = lane % 4, word 4 * lane + r of a tile of 16 rows and 32 columns holds compressed columns
    2t + 8 (r // 2) and the next (low half first) of row g + 8 (r % 2). Word 4 * lane + i of a metadata block of 64 x 64
    serves row tile i: 16 columns of rows g (low half) and g + 8, 4 bits for each group, starting at column
    32 (t // 2) + 16 (t % 2): lanes with t < 2 serve the first 32 columns, as selector 0 of the instruction reads them.
    Raises PatternError for another pattern, dtype or size, with the reason.
    """
    if reason := fragments_why_not(packed.pattern, packed.values.dtype, packed.shape):
        raise PatternError(f"the sparse tensor core layout {reason}; pack the weight otherwise")
    out, columns = packed.shape
    rows_missing, columns_missing = -out % ROWS, -columns % COLUMNS
    metadata = packed.metadata
    if metadata.shape[0] != out:  # rows that share a mask share a metadata row
        metadata = pack_positions(packed.positions().flatten(1), 2)
    rows, width = out + rows_missing, columns + columns_missing
    nibbles = unpack_positions(metadata, packed.values.shape[1] // 2, 4)
    nibbles = functional.pad(nibbles, (0, width // 4 - nibbles.shape[1], 0, rows_missing), value=_FIRST_POSITIONS)
    words = pack_positions(nibbles, 4).view(torch.int16)
    values = functional.pad(packed.values, (0, width // 2 - packed.values.shape[1], 0, rows_missing)).view(torch.int16)
    tiles = values.view(rows // 16, 2, 8, width // 32, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    blocks = words.view(rows // 64, 4, 2, 8, width // 64, 4).permute(0, 4, 3, 5, 1, 2)
    return (
        tiles.flatten().view(torch.int32).view(rows // 16, width // 32, 128),
        blocks.flatten().view(torch.int32).view(rows // 64, width // 64, 128),
    )


def from_fragments(
    fragments: Tensor, metadata: Tensor, pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype
) -> PackedWeight:
    """The canonical form, byte for byte the one that ``to_fragments`` was given."""
    nm = row_nm(pattern)
    assert nm is not None
    out, columns = shape
    rows, width = 64 * metadata.shape[0], 64 * metadata.shape[1]
    tiles = fragments.view(torch.int16).view(rows // 16, width // 32, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    values = tiles.reshape(rows, width // 2).view(dtype)[:out, : nm.slots(columns)].contiguous()
    blocks = metadata.view(torch.int16).view(rows // 64, width // 64, 8, 4, 4, 2).permute(0, 4, 5, 2, 1, 3)
    octets = blocks.reshape(rows, width // 16).view(torch.uint8)[: out : nm.mask_rows]
    positions = unpack_positions(octets, nm.slots(columns), nm.index_bits)
    return PackedWeight(values, pack_positions(positions, nm.index_bits), pattern, shape)
