"""The slow, obvious twin of every kernel: unpack, multiply exactly, round once. Always there; taken by name."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsecomp.activations import activate
from sparsecomp.backends.base import Kernel
from sparsecomp.backends.dense import DenseBackend
from sparsecomp.packing.format import PackedWeight
from sparsecomp.patterns.rounding import rounded_rows


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
        if packed.numbers.activation_bits is not None:
            y = _integer_product(packed, x)
        else:
            if packed.numbers.has_scales:
                packed = replace(packed, dense_dtype=torch.float64)  # the weight itself is not rounded
            y = x.to(torch.float64) @ packed.unpack().to(torch.float64).T
        if bias is not None:
            y = y + bias.to(torch.float64)
        return activate(y, activation).to(kernel.dtype)


def _integer_product(packed: PackedWeight, x: Tensor) -> Tensor:
    """x [batch, in] in integers times the integers of the weight, exactly; in float64, scaled."""
    assert packed.scales is not None  # its numbers say so
    integers, zeros, steps = rounded_rows(x)
    # every sum is a whole number below 2**53, and torch multiplies no integers on a GPU
    sums = (integers - zeros).to(torch.float64) @ packed.integers().unpack().to(torch.float64).T
    return sums * steps.to(torch.float64) * packed.scales.to(torch.float64)
