"""The product of a layer for eager calls that nobody watches: it goes to the kernel past torch's dispatcher.

Takes a Kernel and gives a function. Knows nothing of modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsecomp.backends import cpu
from sparsecomp.backends.base import Kernel
from sparsecomp.backends.registry import backends
from sparsecomp.nn import operators
from sparsecomp.nn.eager.probe import Functions, probe, warn_of_a_mistake

# (x [..., in], bias, dense_above) -> y [..., out], or None if the dispatcher has to see the call
EagerProduct = Callable[[Tensor, Tensor | None, int | None], Tensor | None]

_is_grad_enabled = torch.is_grad_enabled


def eager_product(kernel: Kernel, activation: str) -> EagerProduct:
    """What gives y = activation(x W^T + bias) at once for plain tensors of the kernel, and None for all others.

    It gives None for all where ``probe`` has a reason against it.
    """
    found = probe()
    if isinstance(found, str):
        warn_of_a_mistake()
        return _dispatched
    product = _Product(kernel, activation, found)
    plain = all(type(tensor) is Tensor for tensor in kernel.tensors)
    if found.extension is None or kernel.backend != "cpu" or not plain:
        return product
    native: EagerProduct = cpu.eager_product(found.extension, kernel, activation, product)
    return native


def why_dispatched() -> str | None:
    """Why every call goes through the dispatcher, as a note for people; None where calls go past it."""
    found = probe()
    if not isinstance(found, str):
        return None
    return f"every call goes through torch's dispatcher, which takes longer: {found}"


def _dispatched(x: Tensor, bias: Tensor | None, dense_above: int | None) -> None:
    """The product of no call."""


class _Product:
    """The product of any backend; the extension's is the same for those of the CPU."""

    def __init__(self, kernel: Kernel, activation: str, functions: Functions) -> None:
        self._nobody_watches = functions.watch.nobody
        backend = backends()[kernel.backend]
        self._kernel, self._activation = kernel, activation
        self._run = backend.run if activation == "none" else partial(backend.run_activated, activation=activation)
        self._device = kernel.tensors[0].device
        self._on_cpu = kernel.tensors[0].is_cpu

    def __call__(self, x: Tensor, bias: Tensor | None, dense_above: int | None) -> Tensor | None:
        """y [..., out], or None if the dispatcher has to see the call, or to repair or name an argument."""
        if type(x) is not Tensor or x.is_nested or not self._nobody_watches():
            return None
        kernel, shape = self._kernel, x.shape
        out, columns = kernel.shape
        if x.dtype is not kernel.dtype or not shape or shape[-1] != columns or not self._fits(x, bias):
            return None
        if len(shape) != 2:
            x = operators.rows(x)
        if _is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            y = operators.differentiable(x, bias, kernel, dense_above, self._activation)
        elif dense_above is None:
            y = self._run(kernel, x, bias)
        else:
            y = operators.apply(kernel, x, bias, dense_above, self._activation)
        return y if len(shape) == 2 else y.view(*shape[:-1], out)

    def _fits(self, x: Tensor, bias: Tensor | None) -> bool:
        kernel = self._kernel
        if x.layout is not torch.strided or x.is_neg() or not (x.is_cpu if self._on_cpu else x.device == self._device):
            return False
        # the binding reads raw memory, so a bias that was replaced by hand is looked at first
        if bias is not None and not (
            (type(bias) is Parameter or type(bias) is Tensor)
            and bias.dtype is kernel.dtype
            and bias.ndim == 1
            and bias.shape[0] == kernel.shape[0]
            and bias.is_contiguous()
            and not bias.is_neg()
            and (bias.is_cpu if self._on_cpu else bias.device == x.device)
        ):
            return False
        return kernel.backend == "cpu" or not any(tensor.requires_grad for tensor in kernel.tensors)
