"""Float weights -> int8 weights with one scale for each row, in the canonical format. Knows nothing of kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import ModelError, PatternError
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import GROUP_SIZES, NM, row_nm
from sparsecomp.patterns.numbers import (
    INT8,
    LARGEST_INT8,
    LAYER_DTYPES,
    Numbers,
    integers_why_not,
    numbers_asked,
    parse_numbers,
)

# AVX2 without VNNI multiplies bytes and adds two products in 16 bits: 255 * 128 is the most of either sign that fits,
# since activations are 0 to 255. Kernels that meet larger pairs stay exact on a slower way.
MOST_OF_A_PAIR = 128
_STEP = max(GROUP_SIZES)  # columns that a kernel multiplies together
_REGISTER_SLOTS = 4  # bytes of a row in one vector; fewer weights are filled up with zeros
# two roundings add one at most, so that the last always suffices
_PAIR_DIVISORS = tuple(MOST_OF_A_PAIR + 1 - quarter / 4 for quarter in range(1, 9))


def quantize(packed: PackedWeight, activations: str | None = None) -> PackedWeight:
    """The weight with int8 values and one fp32 scale for each row, symmetric: scale = max |w| / 127.

    Values are rounded to nearest: a stored weight moves by at most scale / 2, that is 1/254 of the largest of its row.
    Weights that round to zero free their slots. ``dtype`` of the result, and what ``unpack`` gives, stays that of
    ``packed``.

    With ``activations="int8"`` the product rounds its input to int8 as well. Scales of a few rows are then larger, so
    that AVX2 multiplies without saturation: the kept weights of 16 consecutive columns, zeros included, are sorted and
    the smallest is paired with the largest, and in no pair may the integers of one sign exceed 128 together. A scale
    doubles at most, where the two largest weights of a row make a pair. Dense groups (N = M) are multiplied another
    way and keep the scale above.

    Raises ModelError for anything but a PackedWeight, PatternError for a weight that is not stored as N:M groups, one
    that holds integers already, and activations that are not known.
    """
    if not isinstance(packed, PackedWeight):
        raise ModelError(
            f"quantize takes a PackedWeight, got {type(packed).__name__}; make an int8 layer with "
            'SparseLinear.from_linear(linear, pattern, quantize="int8")'
        )
    numbers = numbers_asked(str(INT8), activations)
    if reason := integers_why_not(packed.pattern, numbers):
        raise PatternError(reason)
    if packed.values.dtype not in LAYER_DTYPES:
        raise PatternError(f"the weight holds {packed.values.dtype} already; quantise the packed float weight")
    nm = row_nm(packed.pattern)
    assert nm is not None  # integers_why_not refused the others
    values = packed.values.to(torch.float32)
    scales = _scales(values)
    if numbers.activation_bits is not None and nm.n < nm.m:
        scales = _without_saturation(values, scales, nm)
    integers = _rounded(values, scales)
    stored = PackedWeight(integers, packed.metadata, packed.pattern, packed.shape)
    if bool(((integers == 0) & (values != 0)).any()):
        stored = pack(stored.unpack(), packed.pattern)  # free slots have a place of their own
    metadata = stored.metadata if numbers.position_bits(nm) else stored.metadata[:, :0]
    parts = stored.values, metadata, scales
    return PackedWeight.of(parts, packed.pattern, packed.shape, packed.dtype, numbers)


def in_numbers(packed: PackedWeight, numbers: Numbers) -> PackedWeight:
    """The floating weight ``packed`` stored in ``numbers``, itself where they are floating.

    Raises PatternError as ``quantize`` does, and for numbers that nothing computes.
    """
    if not parse_numbers(numbers).has_scales:
        return packed
    return quantize(packed, None if numbers.activation_bits is None else "int8")


def saturating_pairs(values: Tensor, nm: NM) -> Tensor:
    """The largest sum of one sign within a pair of each row: ``values`` [out, slots] in canonical order -> [out].

    In each step of 16 columns the smallest weight is paired with the largest, the next smaller with the next largest.
    """
    out, slots = values.shape
    each = _STEP // nm.m * nm.n
    steps = -(-slots // each)
    filled = functional.pad(values, (0, steps * each - slots)).view(out, steps, each)
    ordered = functional.pad(filled, (0, -each % _REGISTER_SLOTS)).sort(dim=2).values
    half = ordered.shape[2] // 2
    small, large = ordered[..., :half], ordered.flip(2)[..., :half]
    # of a pair of both signs only one is of either
    positive, negative = small.clamp_min(0) + large.clamp_min(0), small.clamp_max(0) + large.clamp_max(0)
    return torch.maximum(positive, -negative).flatten(1).amax(dim=1) if steps else values.new_zeros(out)


def _scales(values: Tensor) -> Tensor:
    largest = values.abs().amax(dim=1) if values.shape[1] else values.new_zeros(values.shape[0])
    # a scale below the smallest normal number would lose the digits it is meant to keep
    scales = (largest / LARGEST_INT8).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, scales, torch.ones_like(scales))


def _without_saturation(values: Tensor, scales: Tensor, nm: NM) -> Tensor:
    """The scales, raised in rows where integers of a pair would exceed what 16 bits hold, and just enough there."""
    pairs = saturating_pairs(values, nm)
    for divisor in _PAIR_DIVISORS:
        (broken,) = (saturating_pairs(_rounded(values, scales).float(), nm) > MOST_OF_A_PAIR).nonzero(as_tuple=True)
        if not len(broken):
            break
        scales = scales.index_put((broken,), torch.maximum(scales, pairs / divisor)[broken])
    return scales


def _rounded(values: Tensor, scales: Tensor) -> Tensor:
    return (values / scales[:, None]).round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
