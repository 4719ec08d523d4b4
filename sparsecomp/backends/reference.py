"""The slow, obvious twin of every kernel: unpack, multiply in float64, round once. Always there; taken by name."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.backends.dense import DenseBackend
from sparsecomp.backends.registry import Kernel


class ReferenceBackend(DenseBackend):
    """The truth that kernels are compared with; it holds and refuses what ``dense`` does."""

    name = "reference"

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out], summed in float64 and rounded once to the kernel's dtype."""
        y = x.to(torch.float64) @ self.restore(kernel).unpack().to(torch.float64).T
        if bias is not None:
            y = y + bias.to(torch.float64)
        return y.to(kernel.dtype)
