"""Putting SparseLinears into the places of a model's layers: all of them or none, with what the old layers carried.

Takes a model and finished layers. Knows nothing of plans, masks and files.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsecomp.errors import naming
from sparsecomp.models.layers import replace_layer
from sparsecomp.modules.carry import carry_over
from sparsecomp.nn import SparseLinear

_FUSED = ("activation_relu_or_gelu", "use_nested_tensor")  # replace_layer turns them off in encoders of torch


def swap(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    """Replace the modules of these names. Hooks, attributes, buffers and modes of the old ones go on in the new ones.

    Raises ModelError for a name that cannot be replaced, and for an attribute that a sparse layer cannot have; the
    model is then as it was.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if name in known:
            adopt(known[name], layer, name)
    fused = [(each, {key: vars(each)[key] for key in _FUSED if key in vars(each)}) for each in model.modules()]
    done: list[str] = []
    try:
        for name, layer in layers.items():
            done.append(name)
            replace_layer(model, name, layer)
    except BaseException:  # KeyboardInterrupt as well
        for name in done:
            if name in known:
                _put_back(model, name, layers[name], known[name])
        for module, flags in fused:
            vars(module).update(flags)
        raise


def _put_back(model: nn.Module, name: str, layer: SparseLinear, old: nn.Module) -> None:
    if any(each is layer for each in model.modules()):
        replace_layer(model, name, old)


def share_bias(old: nn.Module, layer: SparseLinear) -> None:
    """Give ``layer`` the bias of ``old`` itself: hooks on it, optimizers and ties to other modules then go on."""
    mine, its = layer.bias, old._parameters.get("bias")
    if mine is None or type(its) is not nn.Parameter or its.is_inference() or not its.is_contiguous():
        return
    if (its.dtype, its.device, its.shape) == (mine.dtype, mine.device, mine.shape):
        layer._parameters["bias"] = its


def adopt(old: nn.Module, layer: SparseLinear, name: str) -> None:
    """Give ``layer`` what ``old`` has beside its weight; ModelError, with the name, for what it cannot have."""
    with naming(name):
        carry_over(old, layer, layer.reserved_names(), shared=True)
