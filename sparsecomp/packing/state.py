"""The packed weight in a state_dict: read back and checked against the layer that asks for it.

Takes tensors and the notes that torch keeps beside them. Knows nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsecomp.errors import ModelError
from sparsecomp.packing.format import PackedWeight
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import Numbers

STATE_VERSION = 1


def require_kind(values: Tensor, numbers: Numbers) -> None:
    """Raises ModelError for values of floating weights where ``numbers`` are integers, and the other way round."""
    if (values.dtype == torch.int8) != numbers.has_scales:
        raise _other_numbers(str(values.dtype), numbers)


def _other_numbers(stored: str, numbers: Numbers) -> ModelError:
    return ModelError(
        f"the state holds {stored} weights, this layer was made for {numbers}; make it for the same with quantize= and "
        f"activations=, or from the packed weight with SparseLinear.from_packed"
    )


def packed_of_state(
    parts: Sequence[Tensor],
    notes: Mapping[str, Any],
    pattern: Pattern,
    shape: tuple[int, int],
    dtype: torch.dtype,
    numbers: Numbers,
    activation: str,
) -> PackedWeight:
    """The weight of the tensors of ``numbers``, in the order of their names; ``dtype`` is what integers stand for.

    Raises ModelError for a state of another kind of layer, FormatError for tensors that no packer writes.
    """
    if notes.get("version", STATE_VERSION) > STATE_VERSION:
        raise ModelError(f"the state has version {notes['version']}; this package reads up to {STATE_VERSION}")
    if (stored := notes.get("pattern", str(pattern))) != str(pattern):
        raise ModelError(f"the state holds a {stored} weight; this layer was made for {pattern}")
    if (applied := notes.get("activation", activation)) != activation:
        raise ModelError(
            f'the state is of a layer with activation "{applied}", this one has "{activation}"; '
            f"set layer.activation to the one that is meant"
        )
    require_kind(parts[0], numbers)
    if (multiplied := notes.get("numbers", str(numbers))) != str(numbers):
        raise _other_numbers(multiplied, numbers)
    return PackedWeight.of(parts, pattern, shape, dtype, numbers).validate()
