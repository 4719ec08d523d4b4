"""A warning where training gives values back to the weights that pruning removed.

Takes parameters that were pruned, watches their first gradient, and changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_WARNING = (
    "this backward pass gives gradients to weights that pruning removed: an optimizer fills the zeros, and the layers "
    'no longer fit their pattern. Train with sparsecomp.sparsify(model, pattern, optimizer, start="zeros", steps=...), '
    "or tune with sparsecomp.distill, which keep them"
)
# parameters whose zeros somebody keeps while they are trained
_KEPT = WeakIdKeyDictionary()


class _Watch:
    """One warning for all parameters of a model; each is looked at until one has had a gradient."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def look(self, parameter: Tensor) -> None:
        """Called once the gradient of a parameter is whole, the caller's own hooks included."""
        handles, self.handles = self.handles, []
        for handle in handles:
            handle.remove()
        gradient = parameter.grad
        if parameter in _KEPT:
            return
        if handles and gradient is not None and bool(((parameter.detach() == 0) & (gradient != 0)).any()):
            warnings.warn(_WARNING, stacklevel=2)


def warn_where_refilled(parameters: Iterable[nn.Parameter]) -> None:
    """Warn once, at the first backward pass that reaches one of ``parameters``, if its zeros get gradients."""
    watch = _Watch()
    for parameter in parameters:
        if parameter.requires_grad and parameter.is_leaf and not parameter.is_inference():
            handle = parameter.register_post_accumulate_grad_hook(watch.look)  # type: ignore[no-untyped-call]
            watch.handles.append(handle)


def zeros_are_kept(parameters: Iterable[nn.Parameter]) -> None:
    """Say of ``parameters`` that whoever trains them keeps their zeros, so that no warning is due."""
    for parameter in parameters:
        _KEPT[parameter] = True
