"""Activation functions that may follow a product: their names, their torch forms and their derivatives.

Knows nothing of kernels; the position of a name is its number in csrc/include/sparsecomp.h.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import ModelError

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def require_activation(name: object) -> str:
    """The name itself; raises ModelError for one that is not in ``ACTIVATIONS``."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        allowed = ", ".join(f'"{each}"' for each in ACTIVATIONS)
        raise ModelError(f"activation={name!r} is not known; use one of {allowed}, or apply another after the layer")
    return name


def activate(y: Tensor, name: str) -> Tensor:
    """torch's own function of that name on ``y``, any shape; "gelu" is the exact one, by erf."""
    if name == "relu":
        return torch.relu(y)
    if name in ("gelu", "gelu_tanh"):
        return functional.gelu(y, approximate=_approximate(name))
    return functional.silu(y) if name == "silu" else y


def activation_gradient(grad: Tensor, before: Tensor, name: str) -> Tensor:
    """The gradient with respect to ``before``, given that of ``activate(before, name)``."""
    aten = torch.ops.aten
    result: Tensor = grad
    if name == "relu":
        result = aten.threshold_backward(grad, before, 0)
    elif name in ("gelu", "gelu_tanh"):
        result = aten.gelu_backward(grad, before, approximate=_approximate(name))
    elif name == "silu":
        # aten's formula has no derivative of its own
        wide = before.to(torch.promote_types(before.dtype, torch.float32))
        probability = torch.sigmoid(wide)
        result = (grad * probability * (1 + wide * (1 - probability))).to(before.dtype)
    return result


def _approximate(name: str) -> str:
    return "tanh" if name == "gelu_tanh" else "none"
