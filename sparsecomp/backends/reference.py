"""The slow, obvious twin of every kernel: unpack, multiply in float64, round once. Always there; taken by name."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.backends.dense import FLOAT_DTYPES
from sparsecomp.backends.registry import Backend, Kernel, Request
from sparsecomp.pack.format import PackedWeight


class ReferenceBackend(Backend):
    """The truth that kernels are compared with."""

    name = "reference"

    def missing(self) -> str | None:
        """None: torch is always there."""
        return None

    def supports(self, request: Request) -> str | None:
        """None for every packable pattern in a floating dtype, else the reason."""
        if request.dtype not in FLOAT_DTYPES:
            return f"multiplies in torch.float32, torch.float16 and torch.bfloat16, not in {request.dtype}"
        return None

    def prepare(self, packed: PackedWeight) -> Kernel:
        """The canonical tensors themselves."""
        return Kernel(self.name, (packed.values, packed.metadata), packed.pattern, packed.shape, packed.dtype)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical tensors themselves."""
        values, metadata = kernel.tensors
        return PackedWeight(values, metadata, kernel.pattern, kernel.shape)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out], summed in float64 and rounded once to the kernel's dtype."""
        y = x.to(torch.float64) @ self.restore(kernel).unpack().to(torch.float64).T
        if bias is not None:
            y = y + bias.to(torch.float64)
        return y.to(kernel.dtype)
