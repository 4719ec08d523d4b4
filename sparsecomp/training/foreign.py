"""The masks that a model carries, whichever library left them: one dict of matrices by layer name.

Reads a live training of this package, torch.nn.utils.prune, the FakeSparsity of torch.ao.pruning, and the buffers of
NVIDIA's ASP and Model-Optimizer. Imports none of them and changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsecomp.errors import ModelError, naming
from sparsecomp.models.batches import eager
from sparsecomp.models.convolutions import matrix_of, why_no_matrix
from sparsecomp.models.layers import require_module
from sparsecomp.models.refusals import kind_of
from sparsecomp.training.live import live_mask

# ASP registers the name as it is; where a class writes it as its own attribute, Python puts _Class before it
_ASP, _MODEL_OPTIMIZER, _TORCH = "__weight_mma_mask", "_weight_mask", "weight_mask"


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of the model's weights, bool [out, in] by layer name, True where a weight is kept; copies.

    Found are those of a live ``sparsify``; of torch.nn.utils.prune (buffer ``weight_mask`` beside ``weight_orig``); of
    torch.ao.pruning (a FakeSparsity on ``weight``); of ASP (buffer ``__weight_mma_mask``); of Model-Optimizer (buffer
    ``_weight_mask``). A layer with masks of several keeps what all of them keep. The dict is empty where nobody left a
    mask; zeros without a mask are read by ``sparsify(start="zeros")``. The matrix of a convolution is that of
    ``prune``. They serve as ``sparsify(start=)`` and ``prune(masks=)`` on a model that is plain again.

    The way back to torch, for the mask of an nn.Linear: ``torch.nn.utils.prune.custom_from_mask(layer, "weight",
    mask)``, or ``torch.nn.utils.parametrize.register_parametrization(layer, "weight", FakeSparsity(mask))``.

    Raises ModelError for a mask that is not the weight's shape or holds other numbers than 0 and 1. Warns of masks on
    weights that are no matrix, which are left out.
    """
    require_module(model)
    found: dict[str, Tensor] = {}
    left_out: list[str] = []
    with torch.no_grad():
        for name, module in eager(model).named_modules():
            whole: Tensor | None = None
            for stored in _stored(module):
                with naming(name):
                    mask = _checked(stored, _weight_shape(module))
                whole = mask if whole is None else whole & mask.to(whole.device)
            if whole is None:
                continue
            matrix = _matrix(module, whole)
            if matrix is None:
                left_out.append(name)
            else:
                found[name] = matrix.clone(memory_format=torch.contiguous_format)
    if left_out:
        some = ", ".join(f'"{each}"' for each in left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        warnings.warn(
            f"the masks of {len(left_out)} layers are left out ({some}): only the weights of nn.Linear, Conv1D and "
            "nn.Conv2d of one group are matrices that can be pruned",
            stacklevel=2,
        )
    return found


def _stored(module: nn.Module) -> Iterator[Tensor]:
    """The masks on a module's weight, in the shape in which it is stored."""
    weight = module._parameters.get("weight")
    if weight is not None and (live := live_mask(weight)) is not None:
        yield live
    if "weight_orig" in module._parameters and _TORCH in module._buffers:
        yield from _tensor(module._buffers[_TORCH])
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and "weight" in parametrizations:
        for each in parametrizations["weight"].children():
            if type(each).__name__ == "FakeSparsity":
                yield from _tensor(each._buffers.get("mask"))
    for held in (module._buffers, vars(module)):
        for key, value in held.items():
            if key == _MODEL_OPTIMIZER or key.endswith(_ASP):
                yield from _tensor(value)


def _tensor(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape in which the weight is stored, whatever computes it."""
    for name in ("weight", "weight_orig"):
        if (parameter := module._parameters.get(name)) is not None:
            return tuple(parameter.shape)
    computed = module.weight
    assert isinstance(computed, Tensor)  # of a parametrization
    return tuple(computed.shape)


def _checked(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(stored.shape) != shape:
        raise ModelError(
            f"its mask has shape {tuple(stored.shape)} and its weight {shape}; a mask has the shape of its weight"
        )
    mask = stored.detach().bool()
    if stored.dtype != torch.bool and not torch.equal(mask.to(stored.dtype), stored):
        raise ModelError("its mask holds other numbers than 0 and 1; give a mask that keeps a weight or drops it")
    return mask


def _matrix(module: nn.Module, stored: Tensor) -> Tensor | None:
    match kind_of(module):
        case "linear":
            return stored
        case "conv1d":
            return stored.t()
        case "conv2d" if isinstance(module, nn.Conv2d) and why_no_matrix(module) is None:
            return matrix_of(stored)
    return None
