"""The dense values of a packed weight: unpacked when asked for, and kept when asked for again.

Takes a function that unpacks. Knows nothing of kernels, layers and parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_reading = threading.local()  # what the function of torch that runs in this thread has unpacked


@contextmanager
def one_read() -> Iterator[None]:
    """A function of torch reads a weight once, into however many operators it falls apart."""
    before = getattr(_reading, "known", None)
    _reading.known = {}
    try:
        yield
    finally:
        _reading.known = before


class Source:
    """The values of a packed weight, unpacked when asked for and kept when asked for again."""

    def __init__(  # noqa: D107  (as set)
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        unpack: Callable[[], Tensor],
        reduce: Callable[[], tuple[Any, ...]],
        version: Callable[[], object] = lambda: None,
    ) -> None:
        self.set(shape, dtype, device, unpack, reduce, version)

    def set(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        unpack: Callable[[], Tensor],
        reduce: Callable[[], tuple[Any, ...]],
        version: Callable[[], object],
    ) -> None:
        """Another weight from now on. ``version`` changes when the memory that ``unpack`` reads is written."""
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device
        self.unpack, self.reduce, self.version = unpack, reduce, version
        self.kept: Tensor | None = None
        self.at: object = None
        self.reads = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of the dense copy that is kept."""
        return 0 if self.kept is None else self.kept.nbytes

    def fresh(self) -> Tensor:
        """The dense weight, unpacked for the caller alone."""
        # a read inside a mode would be traced, or made fake, operation by operation
        with _no_modes(), torch.inference_mode(False), torch.no_grad():
            return self.unpack().detach()

    def dense(self) -> Tensor:
        """The dense weight, which must not be written."""
        if self.kept is not None and self.at == self.version():
            return self.kept
        self.kept = None
        known: dict[int, Tensor] | None = getattr(_reading, "known", None)
        if known is not None and id(self) in known:
            return known[id(self)]
        self.reads += 1
        dense = self.keep() if self.reads > 1 else self.fresh()
        if known is not None:
            known[id(self)] = dense
        return dense

    def keep(self) -> Tensor:
        """The dense weight, kept from now on."""
        if self.kept is None or self.at != self.version():
            self.at = self.version()
            self.kept = self.fresh()
        return self.kept


@contextmanager
def _no_modes() -> Iterator[None]:
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:  # another torch; modes then see the unpacking
        yield
        return
    with _disable_current_modes():
        yield
