"""The slow, obvious twin of every kernel: unpack, multiply in float64, round once. Always there; taken by name."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsecomp.activations import activate
from sparsecomp.backends.base import Kernel
from sparsecomp.backends.dense import DenseBackend


class ReferenceBackend(DenseBackend):
    """The truth that kernels are compared with; it holds and refuses what ``dense`` does."""

    name = "reference"
    of_a_vendor = True

    fuses_activations = True

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out], summed in float64 and rounded once to the kernel's dtype."""
        return self.run_activated(kernel, x, bias, "none")

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation in float64, before the rounding."""
        packed = self.restore(kernel)
        if packed.numbers.has_scales:
            packed = replace(packed, dense_dtype=torch.float64)  # the weight itself is not rounded
        y = x.to(torch.float64) @ packed.unpack().to(torch.float64).T
        if bias is not None:
            y = y + bias.to(torch.float64)
        return activate(y, activation).to(kernel.dtype)
