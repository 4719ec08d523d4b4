"""One linear product as everybody speaks of it: pattern, shape, types, device, batch. Knows nothing of who runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import FLOAT, Numbers


@dataclass(frozen=True)
class Request:
    """One linear product y[batch, out] = x[batch, in] W^T, as backends are asked about it.

    ``dtype`` is that of x and y; the weight is stored in ``numbers``.
    """

    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    device: str
    batch: int
    numbers: Numbers = FLOAT

    @property
    def values_dtype(self) -> torch.dtype:
        """Element type of the tensor that holds the weight."""
        return self.numbers.values_dtype(self.dtype)
