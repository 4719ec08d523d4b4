"""What a backend is, and a weight prepared for one.

Takes a ``PackedWeight``, gives a ``Kernel`` (the weight in one backend's layout). Knows no backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecomp.activations import activate
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import Numbers, listed

Weight = PackedWeight | Tensor  # a dense one is [out, in]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A weight [out, in] prepared for one backend: the only copy a live layer holds.

    ``dtype`` is that of x and y, ``numbers`` are those of the weight that was prepared, whatever the layout holds.
    ``arguments`` are constants the backend derived from the other fields, so that no call derives them again.
    ``refused`` names backends that were tried before this one and could not prepare the weight, each with the reason.
    ``sizes`` are the bytes of each tensor, for a backend that checks them before it reads raw memory.
    """

    backend: str
    tensors: tuple[Tensor, ...]
    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    numbers: Numbers
    arguments: tuple[int, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the layout."""
        return sum(tensor.nbytes for tensor in self.tensors)


def numbers_why_not(numbers: Numbers, known: Sequence[Numbers]) -> str | None:
    """None if ``numbers`` are among those that a backend knows, else the reason why it does not run them."""
    if numbers in known:
        return None
    return f"has no kernel for weights in {numbers}; {listed(known)} only"


class Backend(ABC):
    """A family of kernels. Stateless; one instance is registered under its name.

    ``sparse``: the kernels multiply the packed weight, so that they are worth measuring beside a dense product.
    ``of_a_vendor``: the kernels are torch's or the GPU vendor's, who answer for the architectures they run on.
    """

    name: ClassVar[str]
    sparse: ClassVar[bool] = True
    fuses_activations: ClassVar[bool] = False
    of_a_vendor: ClassVar[bool] = False

    @abstractmethod
    def missing(self) -> str | None:
        """None if this machine can run the backend at all, else the reason why not."""

    def refusal(self) -> str | None:
        """Why kernels that are installed refuse this machine or its settings, so that layers run slower unasked."""
        return None

    @abstractmethod
    def supports(self, request: Request) -> str | None:
        """None if the backend runs this request here, else the reason why not."""

    def by_name_only(self, request: Request) -> str | None:
        """Why nobody gets it for this request without asking for it by name; None if it is taken unasked.

        It is asked of requests that the backend supports.
        """
        return None

    def nearest(self, request: Request) -> bool:
        """Whether no other backend for that device runs more weights of that kind: its refusal is the one to tell."""
        return False

    @abstractmethod
    def prepare(self, packed: PackedWeight) -> Kernel:
        """The weight in this backend's layout, on the device of ``packed``."""

    def _kernel(self, tensors: tuple[Tensor, ...], packed: PackedWeight) -> Kernel:
        """``packed`` in this backend's layout, which these tensors are."""
        return Kernel(self.name, tensors, packed.pattern, packed.shape, packed.dtype, packed.numbers)

    def prepare_dense(self, weight: Tensor, pattern: Pattern) -> Kernel:
        """What ``prepare`` makes of ``pack(weight, pattern)``, for a dense weight [out, in] that fits the pattern."""
        return self.prepare(pack(weight, pattern))

    @abstractmethod
    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form back from the layout, exactly."""

    def adopt(
        self,
        tensors: tuple[Tensor, ...],
        pattern: Pattern,
        shape: tuple[int, int],
        dtype: torch.dtype,
        numbers: Numbers,
    ) -> Kernel:
        """The kernel whose layout these tensors, prepared earlier by this backend, already are."""
        return Kernel(self.name, tensors, pattern, shape, dtype, numbers)

    def dense(self, kernel: Kernel) -> Tensor:
        """The dense weight [out, in] of the kernel's dtype, as a temporary."""
        return self.restore(kernel).unpack()

    @abstractmethod
    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] for x [batch, in] of the kernel's dtype and device; ``x`` may have any row stride."""

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run``, then an activation of ``sparsecomp.activations``; a backend that can fuse it overrides this."""
        return activate(self.run(kernel, x, bias), activation)
