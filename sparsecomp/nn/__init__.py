"""SparseLinear, SparseConv2d, and the product as operators and as a function of arrays. Knows no model and no plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsecomp.backends.choice import Choice
    from sparsecomp.nn.convolution import SparseConv2d
    from sparsecomp.nn.linear import SparseLinear

__all__ = ["Choice", "SparseConv2d", "SparseLinear"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'sparsecomp.nn' has no attribute {name!r}; it has {', '.join(__all__)}")
    from sparsecomp.nn import convolution, linear

    found: object = getattr(convolution if name == "SparseConv2d" else linear, name)
    return found
