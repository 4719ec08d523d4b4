"""Canonical 2:4 weights <-> the two operands that wgmma.sp reads through CUTLASS on sm_90.

Pure functions on tensors, on any device. Knows nothing of kernels. The order of the metadata is that of
``Sm90GemmSparseConfig`` in CUTLASS (cutlass/gemm/collective/builders/sm90_sparse_config.inl) for steps of 128 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import PatternError
from sparsecomp.packing.bits import pack_positions, unpack_positions
from sparsecomp.packing.format import PackedWeight
from sparsecomp.patterns import Pattern, row_nm

DEPTH = 128
"""Columns of one step of the kernel: weights are padded to whole steps."""

ROWS = 64
"""Rows of one tile of metadata."""

DTYPES = (torch.float16, torch.bfloat16)

_FIRST_POSITIONS = 0b0100_0100
"""Metadata of two groups of padding: positions 0 and 1, ascending, as of any group without nonzeros."""

_MOST = 2**31 - 1
"""CUTLASS counts rows and columns in 32 bits."""


def wgmma_why_not(pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    """None if weights [out, in] of this kind have this layout, else the reason."""
    nm = row_nm(pattern)
    if nm is None or (nm.n, nm.m) != (2, 4):
        return f"has no kernel for {pattern}; 2:4 only"
    if dtype not in DTYPES:
        return f"has no kernel for {dtype}; torch.float16 and torch.bfloat16 only"
    if shape[1] == 0 or max(shape) > _MOST - DEPTH:
        return f"takes weights of 1 to {_MOST - DEPTH} input features, not {shape[0]}x{shape[1]}"
    return None


def to_wgmma(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Values [out, C/2] in the weight's dtype, and metadata uint8 [C/128, R/64, 1024], padded to R x C.

    C is ``in`` rounded up to 128 and R is ``out`` rounded up to 64. A tile of 1024 bytes holds 64 rows and 128 columns.
    Of its rows, written as 16 a + 8 b + c, and its bytes of 8 columns, written as 4 d + 2 e + f, the order in
    memory is a, e, c, d, b, f.
    Raises PatternError for another pattern, dtype or size, with the reason.
    """
    if reason := wgmma_why_not(packed.pattern, packed.values.dtype, packed.shape):
        raise PatternError(f"the wgmma.sp layout {reason}; pack the weight otherwise")
    values, octets = padded(packed)
    return values, tiled(octets, packed.values.itemsize)


def from_wgmma(
    values: Tensor, metadata: Tensor, pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype
) -> PackedWeight:
    """The canonical form, byte for byte the one that ``to_wgmma`` was given."""
    nm = row_nm(pattern)
    assert nm is not None
    out, columns = shape
    steps, tiles = metadata.shape[:2]
    octets = metadata.view(steps, tiles, 4, 2, 8, 4, 2, 2).permute(1, 2, 6, 4, 0, 5, 3, 7)
    octets = octets.reshape(tiles * ROWS, steps * 16)[: out : nm.mask_rows]
    positions = unpack_positions(octets, nm.slots(columns), nm.index_bits)
    kept = values.view(dtype)[:, : nm.slots(columns)].contiguous()
    return PackedWeight(kept, pack_positions(positions, nm.index_bits), pattern, shape)


def tiled(octets: Tensor, itemsize: int) -> Tensor:
    """Metadata uint8 [R, C/8], whole tiles in canonical order, as [C/128, R/64, 1024] for values of 2 bytes or of 1.

    Tiles of 1-byte values hold row after row.
    """
    rows, width = octets.shape
    tiles = octets.view(rows // ROWS, 4, 2, 8, width // 16, 4, 2, 2)
    order = (4, 0, 1, 6, 3, 5, 2, 7) if itemsize == 2 else (4, 0, 1, 2, 3, 5, 6, 7)
    return tiles.permute(order).reshape(width // 16, rows // ROWS, ROWS * 16)


def padded(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Values [out, C/2] and metadata uint8 [R, C/8] in their canonical order, R and C rounded up as above."""
    out, columns = packed.shape
    metadata = packed.metadata
    if metadata.shape[0] != out:  # rows that share a mask share a metadata row
        metadata = pack_positions(packed.positions().flatten(1), 2)
    width = -(-columns // DEPTH) * DEPTH
    values = functional.pad(packed.values, (0, width // 2 - packed.values.shape[1])).contiguous()
    if packed.values.shape[1] % 4:  # a last byte with one group
        metadata = metadata.clone()
        metadata[:, -1] |= _FIRST_POSITIONS & 0xF0
    missing = (0, width // 8 - metadata.shape[1], 0, -out % ROWS)
    return values, functional.pad(metadata, missing, value=_FIRST_POSITIONS)
