"""PackedWeight <-> the packed forms of others, exactly: torch's semi-structured tensors, compressed-tensors' bitmask.

Knows nothing of kernels; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsecomp.errors import FormatError, PatternError
from sparsecomp.packing.bits import pack_positions, packed_bytes, unpack_positions
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.sm80 import from_sm80_metadata, to_sm80_metadata
from sparsecomp.patterns import Pattern


def to_torch_semi_structured(packed: PackedWeight) -> Any:
    """A ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` of a 2:4 weight (fp16, bf16 or int8, whole tiles).

    It holds the same values; groups with fewer than two nonzeros keep the canonical fill, where torch would choose
    other positions. Raises PatternError for a weight that has no such form, with the reason.
    """
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    return SparseSemiStructuredTensorCUTLASS(
        torch.Size(packed.shape),
        packed=packed.values,
        meta=to_sm80_metadata(packed),
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def from_torch_semi_structured(tensor: Any) -> PackedWeight:
    """The canonical 2:4 form of a ``SparseSemiStructuredTensorCUTLASS`` [out, in], whoever packed it.

    Raises FormatError for another class (cuSPARSELt's blob is opaque; call its ``to_dense`` and pack that),
    a transposed view, or tensors that do not belong together.
    """
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    if not isinstance(tensor, SparseSemiStructuredTensorCUTLASS) or tensor.packed is None or tensor.meta is None:
        raise FormatError(
            f"{type(tensor).__name__} holds no CUTLASS metadata of [out, in]; convert it with .to_dense() and use pack"
        )
    out, columns = tensor.shape
    values, positions = tensor.packed, from_sm80_metadata(tensor.meta)
    if tuple(values.shape) != (out, columns // 2) or tuple(positions.shape) != (out, columns // 4, 2):
        raise FormatError(
            f"semi-structured tensor of shape {(out, columns)} has values {tuple(values.shape)} and positions "
            f"{tuple(positions.shape)}; they do not belong together"
        )
    dense = torch.zeros(out, columns // 4, 4, dtype=values.dtype, device=values.device)
    dense.scatter_(2, positions.to(torch.int64), values.reshape(out, columns // 4, 2))
    return pack(dense.flatten(1), "2:4")


def to_bitmask(packed: PackedWeight) -> dict[str, Tensor]:
    """The "sparse-bitmask" tensors of compressed-tensors, of a weight of any pattern.

    ``shape`` int64 [2]; ``compressed`` [nonzeros], row by row; ``bitmask`` uint8 [out, ceil(in/8)], least
    significant bit first; ``row_offsets`` int64 [out], where each row starts in ``compressed``.
    """
    dense = packed.unpack()
    mask = dense != 0
    counts = mask.sum(dim=1)
    return {
        "shape": torch.tensor(packed.shape, device="cpu"),
        "compressed": dense[mask],
        "bitmask": pack_positions(mask.to(torch.uint8), 1),
        "row_offsets": counts.cumsum(0) - counts,
    }


def from_bitmask(tensors: Mapping[str, Tensor], pattern: str | Pattern) -> PackedWeight:
    """The canonical form of "sparse-bitmask" tensors whose weight fits ``pattern``.

    Raises FormatError for tensors that do not belong together, PatternError for a weight that breaks the pattern.
    """
    missing = [name for name in ("shape", "compressed", "bitmask", "row_offsets") if name not in tensors]
    if missing:
        raise FormatError(f"sparse-bitmask tensors lack {', '.join(missing)}; all four of the format are needed")
    if tensors["shape"].numel() != 2:
        raise FormatError(
            f"sparse-bitmask shape {tensors['shape'].tolist()} is no matrix; only [out, in] can be packed"
        )
    out, columns = (int(size) for size in tensors["shape"].flatten().tolist())
    bitmask, values = tensors["bitmask"], tensors["compressed"]
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (out, packed_bytes(columns, 1)):
        raise FormatError(
            f"sparse-bitmask has a bitmask {tuple(bitmask.shape)} of {bitmask.dtype}; a weight of {(out, columns)} "
            f"needs torch.uint8 {(out, packed_bytes(columns, 1))}"
        )
    mask = unpack_positions(bitmask, columns, 1).to(torch.bool)
    counts = mask.sum(dim=1)
    if values.numel() != int(counts.sum()) or not torch.equal(tensors["row_offsets"], counts.cumsum(0) - counts):
        raise FormatError("sparse-bitmask values and row_offsets do not match the bits of the bitmask; it is damaged")
    if bool((values == 0).any()):
        raise PatternError("sparse-bitmask values hold zeros where the bitmask names nonzeros; drop them first")
    dense = torch.zeros(out, columns, dtype=values.dtype, device=values.device)
    dense[mask] = values.flatten()
    return pack(dense, pattern)
