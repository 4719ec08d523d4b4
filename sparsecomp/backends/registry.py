"""Which backends there are, which of them can run a request, and why the others cannot.

Takes a ``PackedWeight`` and gives a ``Kernel`` (the weight in one backend's layout). Knows nothing of nn, plan or prune.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecomp.pack.format import PackedWeight
from sparsecomp.patterns import Pattern


@dataclass(frozen=True)
class Request:
    """One linear product y[batch, out] = x[batch, in] W^T, as backends are asked about it."""

    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    device: str
    batch: int


@dataclass(frozen=True, eq=False)
class Kernel:
    """A weight [out, in] prepared for one backend: the only copy a live layer holds."""

    backend: str
    tensors: tuple[Tensor, ...]
    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the layout."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Backend(ABC):
    """A family of kernels. Stateless; one instance is registered under its name."""

    name: ClassVar[str]

    @abstractmethod
    def missing(self) -> str | None:
        """None if this machine can run the backend at all, else the reason why not."""

    @abstractmethod
    def supports(self, request: Request) -> str | None:
        """None if the backend runs this request here, else the reason why not."""

    @abstractmethod
    def prepare(self, packed: PackedWeight) -> Kernel:
        """The weight in this backend's layout, on the device of ``packed``."""

    @abstractmethod
    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form back from the layout, exactly."""

    @abstractmethod
    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] for x [batch, in] of the kernel's dtype and device; ``x`` may have any row stride."""
