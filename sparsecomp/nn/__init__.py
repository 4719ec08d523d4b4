"""SparseLinear, and the product as operators and as a function of arrays. Knows no model and no plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsecomp.backends.choice import Choice
    from sparsecomp.nn.linear import SparseLinear

__all__ = ["Choice", "SparseLinear"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'sparsecomp.nn' has no attribute {name!r}; it has {', '.join(__all__)}")
    from sparsecomp.nn import linear

    found: object = getattr(linear, name)
    return found
