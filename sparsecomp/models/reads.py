"""Which layers' weights a model reads beside calling the layer, found while it runs.

Takes modules and watches torch's functions. Knows nothing of batches and patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# what only asks about a tensor
_DESCRIBING: frozenset[Any] = frozenset(
    [
        *(
            getattr(Tensor, name).__get__
            for name in ("requires_grad", "is_leaf", "grad", "grad_fn", "_version", "layout", "device")
        ),
        *(
            getattr(Tensor, name).__get__
            for name in ("dtype", "shape", "is_cuda", "is_cpu", "is_meta", "ndim", "itemsize", "nbytes")
        ),
        *(
            Tensor.size,
            Tensor.dim,
            Tensor.numel,
            Tensor.nelement,
            Tensor.element_size,
            Tensor.ndimension,
            Tensor.stride,
        ),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.__len__, Tensor.is_contiguous),
        *(Tensor.is_inference, Tensor.is_conj, Tensor.is_neg, Tensor.data_ptr, Tensor.untyped_storage, Tensor.type),
        *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference),
    ]
)


class _Reads(TorchFunctionMode):
    """Notes every function of torch that is given a weight outside the layer's own call."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.running: list[str] = []
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` as it is."""
        if func not in _DESCRIBING:
            for each in (*args, *(kwargs or {}).values()):
                for value in each if isinstance(each, list | tuple) else (each,):
                    name = self.names.get(id(value)) if isinstance(value, Tensor) else None
                    if name is not None and name not in self.running:
                        self.found.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def noting_reads(modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """A set that gets the names of those of ``modules`` whose weight's values are read outside their own call.

    Asking for device, dtype or shape is no read. The weights must stay the same objects meanwhile.
    """
    weights = {id(module._parameters.get("weight")): name for name, module in modules.items()}
    reads = _Reads(weights)

    def begin(name: str) -> Callable[..., None]:
        return lambda module, args: reads.running.append(name)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        reads.running.pop()

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(begin(name), prepend=True))
        handles.append(module.register_forward_hook(end, always_call=True))
    try:
        with reads:
            yield reads.found
    finally:
        for handle in handles:
            handle.remove()
