"""Adapter that unpacks the weight into a temporary at every call and multiplies with torch: correct for every pattern.

Holds the canonical tensors only, so it costs no memory and serves what has no kernel. Where numbers ask for rounded
activations it multiplies them as they are, which is the product that the rounding approximates. Knows no kernel.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sparsecomp.backends.base import Backend, Kernel, numbers_why_not
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight
from sparsecomp.patterns.numbers import COMPUTED, LAYER_DTYPES


class DenseBackend(Backend):
    """torch's own linear on a dense temporary."""

    name = "dense"
    sparse = False
    of_a_vendor = True

    def missing(self) -> str | None:
        """None: torch is always there."""
        return None

    def supports(self, request: Request) -> str | None:
        """None for every packable pattern in a floating dtype, else the reason."""
        if request.dtype not in LAYER_DTYPES:
            return f"multiplies in {', '.join(map(str, LAYER_DTYPES))}, not in {request.dtype}"
        return numbers_why_not(request.numbers, COMPUTED)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """The canonical tensors themselves."""
        parts = tuple(packed.parts.values())
        return self._kernel(parts, packed)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical tensors themselves."""
        return PackedWeight.of(kernel.tensors, kernel.pattern, kernel.shape, kernel.dtype, kernel.numbers)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out], the dense weight being freed before it returns."""
        return functional.linear(x, self.dense(kernel), bias)
