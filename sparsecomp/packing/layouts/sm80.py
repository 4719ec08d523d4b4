"""Canonical 2:4 metadata <-> the order in which the sparse tensor cores of sm_80 (mma.sp through CUTLASS) read it.

Pure functions on tensors, on any device. Knows nothing of kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.errors import FormatError, PatternError
from sparsecomp.packing.bits import pack_positions, unpack_positions
from sparsecomp.packing.format import PackedWeight
from sparsecomp.patterns import NM

# metadata words: their type, the columns one covers, and the rows of a tile
_WORDS = {
    torch.float16: (torch.int16, 16, 32),
    torch.bfloat16: (torch.int16, 16, 32),
    torch.int8: (torch.int32, 32, 16),
}


def sm80_why_not(packed: PackedWeight) -> str | None:
    """None if the weight has an sm_80 layout, else the reason: 2:4, fp16, bf16 or int8 without scales, whole tiles."""
    if not isinstance(packed.pattern, NM) or (packed.pattern.n, packed.pattern.m) != (2, 4):
        return f"pattern {packed.pattern} is not 2:4"
    if packed.numbers.has_scales:
        return "it has no place for the row scales of a quantised weight"
    if packed.dtype not in _WORDS:
        return f"{packed.dtype} is none of torch.float16, torch.bfloat16, torch.int8"
    _, columns, rows = _WORDS[packed.dtype]
    if packed.shape[0] % rows or packed.shape[1] % (2 * columns):
        return f"shape {packed.shape} is no multiple of [{rows}, {2 * columns}]"
    return None


def sm80_offsets(rows: int, words: int, word_dtype: torch.dtype) -> Tensor:
    """Where word (row, column) of row-major metadata [rows, words] is in memory, int64 [rows, words].

    The order is CUTLASS's ColumnMajorInterleaved<2> with rows swapped so that one warp loads its fragment as 32
    consecutive 32-bit words; torch's semi-structured tensors use the same.
    """
    m = torch.arange(rows, device="cpu").unsqueeze(1)
    c = torch.arange(words, device="cpu").unsqueeze(0)
    column = c // 2 * 2 * rows + c % 2 * 2 + m % 16 // 8
    if word_dtype == torch.int16:
        # the interleave of the columns of a pair sits inside groups of eight words
        return column + m // 32 * 64 + m % 8 * 8 + m % 32 // 16 * 4
    return column + m // 16 * 32 + m % 8 * 4


def to_sm80_metadata(packed: PackedWeight) -> Tensor:
    """Metadata of a 2:4 weight in sm_80 order: int16 [out, in/16] for 16-bit types, int32 [out, in/32] for int8.

    Raises PatternError for a weight that has no such layout, with the reason.
    """
    if reason := sm80_why_not(packed):
        raise PatternError(f"the weight has no sm_80 layout: {reason}; pad the layer or use another kernel")
    word_dtype, _, _ = _WORDS[packed.dtype]
    metadata = packed.metadata
    if packed.metadata.shape[0] != packed.shape[0]:  # rows that share a mask share a metadata row
        metadata = pack_positions(packed.positions().flatten(1), 2)
    words = metadata.contiguous().view(word_dtype)
    offsets = sm80_offsets(words.shape[0], words.shape[1], word_dtype).to(words.device)
    return torch.empty_like(words).flatten().scatter_(0, offsets.flatten(), words.flatten()).view_as(words)


def from_sm80_metadata(metadata: Tensor) -> Tensor:
    """The inverse of ``to_sm80_metadata`` for metadata of any writer: positions, uint8 [out, groups, 2].

    Raises FormatError for positions that do not ascend within a group.
    """
    if metadata.dtype not in (torch.int16, torch.int32) or metadata.ndim != 2:
        raise FormatError(
            f"sm_80 metadata is {metadata.dtype} of shape {tuple(metadata.shape)}; it must be torch.int16 or "
            f"torch.int32 [rows, words]"
        )
    offsets = sm80_offsets(metadata.shape[0], metadata.shape[1], metadata.dtype).to(metadata.device)
    words = metadata.flatten()[offsets.flatten()].view(metadata.shape)
    groups = metadata.shape[1] * (4 if metadata.dtype == torch.int16 else 8)
    positions = unpack_positions(words.contiguous().view(torch.uint8), 2 * groups, 2).view(-1, groups, 2)
    if not bool((positions[..., 0] < positions[..., 1]).all()):
        raise FormatError("sm_80 metadata holds positions that do not ascend within a group; it is damaged")
    return positions
