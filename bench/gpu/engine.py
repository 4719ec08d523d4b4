"""What the GPU sweep asks of a way to compute one linear layer. Knows none of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.cases import Case

Call = Callable[[], Tensor]


class GpuEngine(ABC):
    """One way to compute y = x W^T."""

    name: str
    sparse: bool

    def missing(self) -> str | None:
        """None if this machine can run it, else the reason why not."""
        return None

    def refuses(self, case: Case, dtype: torch.dtype) -> str | None:
        """None if it runs this case, else the reason why not."""
        return None

    @abstractmethod
    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """Everything that is done once; the call does what is done for every batch."""

    def note(self, case: Case) -> str:
        """What it chose for a case it has run, for the row; empty where there is no choice."""
        return ""
