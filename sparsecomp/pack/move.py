"""Packed weights on other devices and in other dtypes, also where there is no content: the meta device, zeros.

Takes and gives PackedWeight values. Knows nothing of kernels.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsecomp.errors import ModelError, SparsecompError
from sparsecomp.pack.format import PackedWeight, pack
from sparsecomp.pack.quantize import quantize
from sparsecomp.patterns import Block, Pattern, row_nm


def zero_weight(
    pattern: Pattern, shape: tuple[int, int], device: torch.device, dtype: torch.dtype, quantized: bool = False
) -> PackedWeight:
    """The packed all-zero weight [out, in], without its dense form where rows are alike."""
    out, columns = shape
    nm = row_nm(pattern)
    if isinstance(pattern, Block) or nm is None:
        packed = pack(torch.zeros(shape, dtype=dtype, device="cpu"), pattern)
    else:
        row = pack(torch.zeros(1, columns, dtype=dtype, device="cpu"), nm)
        values = torch.zeros(out, nm.slots(columns), dtype=dtype, device="cpu")
        metadata = row.metadata.repeat(-(-out // nm.mask_rows), 1)
        packed = PackedWeight(values, metadata, pattern, shape)
    return moved(quantize(packed) if quantized else packed, device, dtype)


def moved(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> PackedWeight:
    """The weight elsewhere; to the meta device without content, from it as zeros.

    Raises ModelError for a dtype in which a layer cannot hold it.
    """
    if device.type == "meta" and packed.scales is not None:
        return replace(packed.to(device), dense_dtype=dtype)
    if device.type == "meta":
        return replace(packed, values=packed.values.to(device, dtype), metadata=packed.metadata.to(device))
    if packed.device.type == "meta":
        return zero_weight(packed.pattern, packed.shape, device, dtype, packed.scales is not None)
    try:
        return packed.to(device, dtype)
    except SparsecompError as error:
        raise ModelError(f"the layer cannot become {dtype}: {error}; or take layer.to_linear() there") from error
