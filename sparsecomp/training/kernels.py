"""Layers of a model under masks, put on sparse kernels for training and taken off again.

Takes masks by layer name and gives, for each layer, what its kernels compute. Knows no optimizer and no rule.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsecomp.errors import PatternError, naming
from sparsecomp.models.layers import check_globs
from sparsecomp.modules.carry import why_not_carried
from sparsecomp.nn.training import SparseTrainingLinear
from sparsecomp.patterns import Pattern

BOTH = "y and the gradient of x are sparse"


def accelerate(model: nn.Module, masks: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> dict[str, str]:
    """Have the layers of these masks (bool [out, in], in a pattern by the same name) train by sparse CPU kernels.

    A layer becomes a SparseTrainingLinear in place, and one that is already takes the new mask. Gives a sentence for
    each name: ``BOTH``, or what stays dense and why. A layer of which nothing can be sparse, as where its mask does not
    fit the pattern yet, is what it was before, an nn.Linear.

    Raises ModelError for a name that is no layer of the model, and for a mask of another shape or dtype.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    check_globs(masks, modules, "the mask of")
    return {name: _accelerated(model, name, modules[name], mask, patterns[name]) for name, mask in masks.items()}


def restore(model: nn.Module) -> None:
    """Make every layer of ``model`` that ``accelerate`` changed what it was before; Parameters and all else stay."""
    for module in model.modules():
        if isinstance(module, SparseTrainingLinear):
            module.give_back()


def _accelerated(model: nn.Module, name: str, module: nn.Module, mask: Tensor, pattern: Pattern) -> str:
    if (reason := _why_not(model, module)) is not None:
        return f"dense: {reason}"
    assert isinstance(module, nn.Linear)
    try:
        with naming(name):
            layer = SparseTrainingLinear.take(module, mask, pattern)
    except PatternError as error:
        reason = str(error).removeprefix(f"{name}: ")
    else:
        reason = layer.why_dense()
        if reason is None:
            rest = layer.why_dense_gradient()
            return BOTH if rest is None else f"y is sparse, the gradient of x dense: {rest}"
    if isinstance(module, SparseTrainingLinear):
        module.give_back()
    return f"dense: {reason}"


def _why_not(model: nn.Module, module: nn.Module) -> str | None:
    if isinstance(module, SparseTrainingLinear):
        return None
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} layers have no sparse training kernel"
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention) and any(child is module for child in parent.children()):
            return "nn.MultiheadAttention reads its weight and never calls it"
    return why_not_carried(module, nn.Linear)
