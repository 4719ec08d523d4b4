"""Packed weights on other devices and in other dtypes, also where there is no content: the meta device, zeros.

Takes and gives PackedWeight values. Knows nothing of kernels.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch

from sparsecomp.errors import ModelError, SparsecompError
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns import Block, Pattern, row_nm
from sparsecomp.patterns.numbers import FLOAT, LAYER_DTYPES, Numbers


def zero_weight(
    pattern: Pattern, shape: tuple[int, int], device: torch.device, dtype: torch.dtype, numbers: Numbers = FLOAT
) -> PackedWeight:
    """The packed all-zero weight [out, in], without its dense form where rows are alike.

    Raises ModelError for a dtype that no layer computes in and for a shape of other than two natural numbers.
    """
    if dtype not in LAYER_DTYPES:
        raise ModelError(f"a layer computes in {', '.join(map(str, LAYER_DTYPES))}, got {dtype}; choose one of them")
    try:
        out, columns = shape = operator.index(shape[0]), operator.index(shape[1])
    except TypeError:
        out = columns = -1
    if out < 0 or columns < 0:
        raise ModelError(f"out_features and in_features must be whole numbers >= 0, got {shape[0]!r} and {shape[1]!r}")
    nm = row_nm(pattern)
    if isinstance(pattern, Block) or nm is None:
        packed = pack(torch.zeros(shape, dtype=dtype, device="cpu"), pattern)
    else:
        row = pack(torch.zeros(1, columns, dtype=dtype, device="cpu"), nm)
        values = torch.zeros(out, nm.slots(columns), dtype=dtype, device="cpu")
        metadata = row.metadata.repeat(-(-out // nm.mask_rows), 1)
        packed = PackedWeight(values, metadata, pattern, shape)
    return moved(in_numbers(packed, numbers), device, dtype)


def moved(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> PackedWeight:
    """The weight elsewhere; to the meta device without content, from it as zeros.

    Raises ModelError for a dtype in which a layer cannot hold it.
    """
    if device.type == "meta" and packed.numbers.has_scales:
        return replace(packed.to(device), dense_dtype=dtype)
    if device.type == "meta":
        return replace(packed, values=packed.values.to(device, dtype), metadata=packed.metadata.to(device))
    if packed.device.type == "meta":
        return zero_weight(packed.pattern, packed.shape, device, dtype, packed.numbers)
    try:
        return packed.to(device, dtype)
    except SparsecompError as error:
        raise ModelError(f"the layer cannot become {dtype}: {error}; or take layer.to_linear() there") from error
