"""Float weights -> int8 weights with one scale for each row, in the canonical format. Knows nothing of kernels."""

from __future__ import annotations

import torch

from sparsecomp.errors import ModelError, PatternError
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns.numbers import INT8, LARGEST_INT8, LAYER_DTYPES, Numbers, integers_why_not, parse_numbers


def quantize(packed: PackedWeight) -> PackedWeight:
    """The weight with int8 values and one fp32 scale for each row, symmetric: scale = max |w| / 127.

    Values are rounded to nearest: a stored weight moves by at most scale / 2, that is 1/254 of the largest of its row.
    Weights that round to zero free their slots. ``dtype`` of the result, and what ``unpack`` gives, stays that of
    ``packed``.

    Raises ModelError for anything but a PackedWeight, PatternError for a weight that is not stored as N:M groups, and
    one that holds integers already.
    """
    if not isinstance(packed, PackedWeight):
        raise ModelError(
            f"quantize takes a PackedWeight, got {type(packed).__name__}; make an int8 layer with "
            "SparseLinear.from_linear(linear, pattern, quantized=True)"
        )
    if reason := integers_why_not(packed.pattern, INT8):
        raise PatternError(reason)
    if packed.values.dtype not in LAYER_DTYPES:
        raise PatternError(f"the weight holds {packed.values.dtype} already; quantise the packed float weight")
    values = packed.values.to(torch.float32)
    out, slots = values.shape
    largest = values.abs().amax(dim=1) if slots else values.new_zeros(out)
    # a scale below the smallest normal number would lose the digits it is meant to keep
    scales = (largest / LARGEST_INT8).clamp_min(torch.finfo(torch.float32).tiny)
    scales = torch.where(largest > 0, scales, torch.ones_like(scales))
    integers = (values / scales[:, None]).round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
    stored = PackedWeight(integers, packed.metadata, packed.pattern, packed.shape)
    if bool(((integers == 0) & (values != 0)).any()):
        stored = pack(stored.unpack(), packed.pattern)  # free slots have a place of their own
    parts = stored.values, stored.metadata, scales
    return PackedWeight.of(parts, packed.pattern, packed.shape, packed.dtype, INT8)


def in_numbers(packed: PackedWeight, numbers: Numbers) -> PackedWeight:
    """The floating weight ``packed`` stored in ``numbers``, itself where they are floating.

    Raises PatternError as ``quantize`` does, and for numbers that nothing computes.
    """
    return quantize(packed) if parse_numbers(numbers).has_scales else packed
