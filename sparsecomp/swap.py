"""Putting SparseLinears into the places of a model's layers: all of them or none, with what the old layers carried.

Takes a model and finished layers. Knows nothing of plans, masks and files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from sparsecomp.carry import carry_over
from sparsecomp.errors import ModelError, SparsecompError
from sparsecomp.layers import replace_layer
from sparsecomp.nn import SparseLinear

_SAVE = "save_pretrained"


def swap(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    """Replace the modules of these names. Hooks, attributes, buffers and modes of the old ones go on in the new ones.

    ``save_pretrained`` of a model around them is refused from then on, as nothing reads back what it would write.

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
    if layers:
        _refuse_other_files(model)


def adopt(old: nn.Module, layer: SparseLinear, name: str) -> None:
    """Give ``layer`` what ``old`` has beside its weight; ModelError, with the name, for what it cannot have."""
    try:
        carry_over(old, layer, layer.reserved_names(), shared=True)
    except SparsecompError as error:
        raise type(error)(f"{name or 'the model'}: {error}") from error


def _refuse_other_files(model: nn.Module) -> None:
    for module in model.modules():
        if callable(getattr(type(module), _SAVE, None)) and _has_packed(module):
            module.__dict__[_SAVE] = partial(_save_pretrained, module)


def _has_packed(module: nn.Module) -> bool:
    return any(isinstance(each, SparseLinear) for each in module.modules())


def _save_pretrained(module: Any, *arguments: Any, **named: Any) -> object:
    if _has_packed(module):
        raise ModelError(
            "save_pretrained would write packed weights, which from_pretrained does not read: it would make these "
            'layers anew, at random. Use sparsecomp.save(model, "model.safetensors"), and sparsecomp.load(...) into a '
            "model of this class"
        )
    return getattr(type(module), _SAVE)(module, *arguments, **named)
