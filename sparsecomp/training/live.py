"""Which parameters are being trained under masks now. Knows layers, and no handle."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sparsecomp.training.layers import TrainedLayer

# neither a parameter nor the layer that trains it lives longer for being listed
_TRAINED = WeakIdKeyDictionary()


def enlist(layers: Iterable[TrainedLayer]) -> None:
    """Note that these layers train their parameters."""
    for each in layers:
        _TRAINED[each.parameter] = weakref.ref(each)


def discharge(layers: Iterable[TrainedLayer]) -> None:
    """Forget them."""
    for each in layers:
        _TRAINED.pop(each.parameter, None)  # type: ignore[no-untyped-call]


def live_mask(parameter: nn.Parameter) -> Tensor | None:
    """The mask, as stored, under which this parameter is being trained, or None; a copy."""
    entry: weakref.ref[TrainedLayer] | None = _TRAINED.get(parameter)  # type: ignore[no-untyped-call]
    layer = None if entry is None else entry()
    return None if layer is None else layer.mask.clone()
