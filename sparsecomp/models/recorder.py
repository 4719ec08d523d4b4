"""Sums of the inputs of layers, one Gram for all layers that are called with the same tensors.

Takes layer inputs as hooks report them, with a mask over their rows. Knows nothing of models and batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import CalibrationError
from sparsecomp.models.convolutions import Windows
from sparsecomp.models.gram import ROWS, GramSum
from sparsecomp.modules.snapshot import version


@dataclass(frozen=True, eq=False)
class _Input:
    """A tensor some layer was called with in the current batch, and its product."""

    tensor: weakref.ref[Tensor]
    version: int | None
    mask: Tensor | None
    windows: Windows | None
    product: GramSum

    def is_(self, x: Tensor, mask: Tensor | None, windows: Windows | None) -> bool:
        # in inference mode nobody counts writes, so that the same tensor may hold other numbers
        if self.tensor() is not x or self.version is None or self.version != version(x) or self.windows != windows:
            return False
        return self.mask is mask or (self.mask is not None and mask is not None and _alike(self.mask, mask))


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@dataclass(eq=False)
class _Shared:
    """Layers that were called with the same tensors so far, and the sum over them.

    ``queue`` holds the inputs of this batch that not all members have seen; ``seen`` counts, for each member, how many
    of them it has. A layer may join while the first input ever is in the queue.
    """

    seen: dict[str, int]
    total: GramSum | None = None
    queue: list[_Input] = field(default_factory=list)
    inputs: int = 0

    def settle(self, everything: bool = False) -> None:
        """Move inputs that all members have seen from the queue into the sum."""
        joinable = self.inputs == 1 and not everything
        while self.queue and not joinable and min(self.seen.values()) > 0:
            product = self.queue.pop(0).product
            if self.total is None:
                self.total = product
            else:
                self.total.add_sum(product)
            self.seen = {name: count - 1 for name, count in self.seen.items()}

    def split(self, name: str) -> _Shared:
        """Take the layer out, with a copy of all that it has seen."""
        count = self.seen.pop(name)
        queue = [replace(entry, product=entry.product.clone()) for entry in self.queue[:count]]
        total = None if self.total is None else self.total.clone()
        leaving = _Shared({name: count}, total, queue, self.inputs)
        for shared in (self, leaving):
            shared.settle()
        return leaving


class Recorder:
    """Sums layer inputs as hooks report them, one sum for all layers that see the same rows of the same tensors."""

    def __init__(self, dtype: torch.dtype, rows: Callable[[str, Tensor], Tensor | None]) -> None:
        """``rows(name, x)`` gives the mask of the rows of ``x`` [..., in] that count, or None."""
        self.dtype, self.rows = dtype, rows
        self.shared: dict[str, _Shared] = {}
        self.joinable: dict[tuple[int, Windows | None], _Shared] = {}
        self.batch = 0
        self.paused = False

    def hook(
        self, name: str, size: int, windows: Windows | None = None
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """A forward pre-hook for the layer of that name: rows of ``size`` numbers, or the ``windows`` of images."""

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # of an input that does not fit the layer itself says what is wrong
            if self.paused or not isinstance(x, Tensor):
                return
            if not (x.shape[-1:] == (size,) if windows is None else windows.fit(x)):
                return
            # a forward of its own may be in inference mode, where no sum could be added to later
            with torch.inference_mode(False), torch.no_grad():
                self.see(name, x, windows)

        return record

    def see(self, name: str, x: Tensor, windows: Windows | None = None) -> None:
        """Add the rows of ``x``, or its ``windows``, to what the layer has seen.

        Raises CalibrationError if they are not finite.
        """
        mask = self.rows(name, x)
        shared = self.shared.get(name)
        if shared is None:
            shared = self.joinable.get((id(x), windows))
            if shared is None or shared.inputs != 1 or not shared.queue or not shared.queue[0].is_(x, mask, windows):
                shared = _Shared({})
            shared.seen[name] = 0
            self.shared[name] = shared
        position = shared.seen[name]
        if position < len(shared.queue):
            if shared.queue[position].is_(x, mask, windows):
                shared.seen[name] += 1
                shared.settle()
                return
            shared = self.shared[name] = shared.split(name)
        parts = self._rows(name, x, mask, windows)
        shared.inputs += 1
        alone = shared.total is not None and not shared.queue and len(shared.seen) == 1
        size = x.shape[-1] if windows is None else windows.columns
        product = shared.total if alone and shared.total is not None else GramSum(size, self.dtype, x.device)
        for rows in parts:
            product.add_rows(rows)
        if alone:
            return
        shared.queue.append(_Input(weakref.ref(x), version(x), mask, windows, product))
        shared.seen[name] += 1
        if shared.inputs == 1:
            self.joinable[id(x), windows] = shared
        shared.settle()

    def _rows(self, name: str, x: Tensor, mask: Tensor | None, windows: Windows | None) -> Iterable[Tensor]:
        """The rows that count, in parts; for windows ``mask`` [B] says which images do."""
        rows = x.detach() if mask is None else x.detach()[mask]
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                f"{name or 'the model'}: its input holds NaN or Inf in calibration batch {self.batch} "
                f"(counted from 0); repair that batch, or mask its padding with mask=..."
            )
        return [rows.reshape(-1, x.shape[-1])] if windows is None else windows.rows(rows, ROWS)

    def end_batch(self) -> None:
        """Close the sums of this batch."""
        for name, shared in list(self.shared.items()):
            if shared.seen[name] < len(shared.queue):
                self.shared[name] = shared.split(name)
        for shared in self.shared.values():
            shared.settle(everything=True)
        self.joinable.clear()

    def sums(self, name: str) -> GramSum | None:
        """The sum that the layer of that name shares in, or None if it has seen no row."""
        shared = self.shared.get(name)
        return None if shared is None or shared.total is None or shared.total.tokens == 0 else shared.total
