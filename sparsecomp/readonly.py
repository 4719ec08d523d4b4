"""A tensor that can be read and computed with, but not trained: what a packed layer shows as its dense weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparsecomp.errors import ModelError

NO_WEIGHT_GRADIENT = (
    "a packed weight cannot be trained or assigned; train layer.to_linear() and pack the result with "
    "SparseLinear.from_linear(), or load another weight with SparseLinear.from_packed()"
)


class DenseCopy(Tensor):
    """What ``SparseLinear.weight`` gives: a dense copy to read. Results computed from it are plain tensors."""

    _TRAINING = frozenset(
        [
            Tensor.requires_grad_,
            vars(torch._C.TensorBase)["requires_grad"].__set__,
            vars(torch._C.TensorBase)["grad"].__get__,
            vars(torch._C.TensorBase)["grad"].__set__,
            Tensor.retain_grad,
        ]
    )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` on plain tensors; ModelError for whatever would train the copy."""
        if func in cls._TRAINING:
            raise ModelError(f"layer.weight is a copy: {NO_WEIGHT_GRADIENT}")
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(cls, _plain, (args, kwargs or {}))
            return func(*args, **kwargs)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)
