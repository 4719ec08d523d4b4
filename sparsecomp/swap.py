"""Putting SparseLinears into the places of a model's layers: all of them or none, with what the old layers carried.

Takes a model and finished layers. Knows nothing of plans, masks and files.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsecomp.carry import carry_over
from sparsecomp.errors import SparsecompError
from sparsecomp.layers import replace_layer
from sparsecomp.nn import SparseLinear


def swap(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    """Replace the modules of these names. Hooks, attributes, buffers and modes of the old ones go on in the new ones.

    Raises ModelError for a name that cannot be replaced, and for an attribute that a sparse layer cannot have; the
    model is then as it was.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if name in known:
            adopt(known[name], layer, name)
    done: list[str] = []
    try:
        for name, layer in layers.items():
            replace_layer(model, name, layer)
            done.append(name)
    except Exception:
        for name in done:
            replace_layer(model, name, known[name])
        raise


def adopt(old: nn.Module, layer: SparseLinear, name: str) -> None:
    """Give ``layer`` what ``old`` has beside its weight; ModelError, with the name, for what it cannot have."""
    try:
        carry_over(old, layer, layer.reserved_names(), shared=True)
    except SparsecompError as error:
        raise type(error)(f"{name or 'the model'}: {error}") from error
