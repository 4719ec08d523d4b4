"""Float weights -> int8 weights with one scale for each row, in the canonical format. Knows nothing of kernels."""

from __future__ import annotations

from functools import cache

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
    scales = row_scales(values, nm, numbers)
    integers = row_integers(values, scales)
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


def row_scales(values: Tensor, nm: NM, numbers: Numbers) -> Tensor:
    """The scale of each row, fp32 [out], of kept weights fp32 [out, slots]: N for each group, groups in order.

    The order within a group does not matter, nor which slots of a group that keeps fewer hold its zeros.
    """
    scales = largest_scales(values)
    if pairs_matter(nm, numbers):
        scales = _without_saturation(values, scales, nm)
    return scales


def pairs_matter(nm: NM, numbers: Numbers) -> bool:
    """Whether scales depend on which weights are multiplied together, and not on the largest of a row alone."""
    return numbers.activation_bits is not None and nm.n < nm.m


def largest_scales(values: Tensor) -> Tensor:
    """max |w| / 127 of each row, fp32 [out], of weights fp32 [out, any]; 1 for a row of zeros."""
    largest = values.abs().amax(dim=1) if values.shape[1] else values.new_zeros(values.shape[0])
    # a scale below the smallest normal number would lose the digits it is meant to keep
    scales = (largest / LARGEST_INT8).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, scales, torch.ones_like(scales))


def row_integers(values: Tensor, scales: Tensor) -> Tensor:
    """Weights fp32 [out, any] in integers of their row's scale, int8."""
    return (values / scales[:, None]).round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)


def saturating_pairs(values: Tensor, nm: NM) -> Tensor:
    """The largest sum of one sign within a pair of each row: ``values`` [out, slots] in canonical order -> [out].

    In each step of 16 columns the smallest weight is paired with the largest, the next smaller with the next largest.
    """
    out, slots = values.shape
    each = _STEP // nm.m * nm.n
    steps = -(-slots // each)
    if not steps:
        return values.new_zeros(out)
    filled = functional.pad(values, (0, steps * each - slots)).view(out, steps, each)
    # one long vector for each slot of a step: a network sorts them many times faster than torch sorts short rows
    slices = list(filled.permute(2, 0, 1).contiguous().unbind(0))
    slices += [torch.zeros_like(slices[0])] * (-each % _REGISTER_SLOTS)
    for low, high in sorting_network(len(slices)):
        slices[low], slices[high] = torch.minimum(slices[low], slices[high]), torch.maximum(slices[low], slices[high])
    most = values.new_zeros(out, steps)
    for small, large in zip(slices[: len(slices) // 2], reversed(slices), strict=False):
        # of a pair of both signs only one is of either
        positive, negative = small.clamp_min(0) + large.clamp_min(0), small.clamp_max(0) + large.clamp_max(0)
        most = torch.maximum(most, torch.maximum(positive, -negative))
    return most.amax(dim=1)


@cache
def sorting_network(count: int) -> tuple[tuple[int, int], ...]:
    """Places to compare, in order, that sort ``count`` values: merge exchange (Batcher 1968; Knuth, TAOCP 5.2.2)."""
    found = []
    first = 1 << max(0, (count - 1).bit_length() - 1)
    span = first
    while span:
        reach, remainder, distance = first, 0, span
        while True:
            found += [(i, i + distance) for i in range(count - distance) if i & span == remainder]
            if reach == span:
                break
            distance, reach, remainder = reach - span, reach // 2, span
        span //= 2
    return tuple(found)


def _without_saturation(values: Tensor, scales: Tensor, nm: NM) -> Tensor:
    """The scales, raised in rows where integers of a pair would exceed what 16 bits hold, and just enough there."""
    (rows,) = _saturated(values, scales, nm).nonzero(as_tuple=True)
    if not len(rows):
        return scales
    values, raised = values[rows], scales[rows]
    pairs, broken = saturating_pairs(values, nm), torch.ones_like(rows, dtype=torch.bool)
    for divisor in _PAIR_DIVISORS:
        raised = torch.where(broken, torch.maximum(raised, pairs / divisor), raised)
        broken = _saturated(values, raised, nm)
        if not bool(broken.any()):
            break
    return scales.index_put((rows,), raised)


def _saturated(values: Tensor, scales: Tensor, nm: NM) -> Tensor:
    """Bool [out]: rows whose integers make a pair that is too large."""
    return saturating_pairs(row_integers(values, scales).float(), nm) > MOST_OF_A_PAIR
