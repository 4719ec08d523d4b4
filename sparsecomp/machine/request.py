"""One linear product as everybody speaks of it: pattern, shape, types, device, batch. Knows nothing of who runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsecomp.patterns import Pattern


@dataclass(frozen=True)
class Request:
    """One linear product y[batch, out] = x[batch, in] W^T, as backends are asked about it.

    ``dtype`` is that of x and y. The weight is stored in it, or, with ``quantized``, in int8 with row scales.
    """

    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    device: str
    batch: int
    quantized: bool = False

    @property
    def weight_dtype(self) -> torch.dtype:
        """Element type in which the weight is stored."""
        return torch.int8 if self.quantized else self.dtype
