"""The layouts of one mask that follow a weight in training: refilled where the weight was written.

Takes masks and dense weights, gives products. Knows no autograd and no module.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsecomp.backends.refill import Refillable, refillable, transposed, why_not_transposed
from sparsecomp.errors import ModelError
from sparsecomp.modules.snapshot import version
from sparsecomp.patterns import Pattern

_SAMPLE = 256


@dataclass(eq=False)
class _Following:
    """A layout with the values of the weight it saw last.

    Whoever writes through ``weight.data`` or NumPy leaves the version as it was. A sample of the weights tells then,
    of writes to the whole weight.
    """

    layout: Refillable
    sample: Tensor
    _weight: weakref.ref[Tensor] | None = field(default=None, repr=False)
    _seen: tuple[int | None, int] = (None, 0)
    _values: Tensor | None = field(default=None, repr=False)

    def follow(self, weight: Tensor) -> bool:
        """Refill the layout if ``weight``, contiguous, is not what it holds; whether that was so."""
        now = version(weight), weight.data_ptr()
        values = weight.detach().view(-1)[self.sample]
        known = self._weight is not None and self._weight() is weight and now[0] is not None and now == self._seen
        if known and self._values is not None and torch.equal(values, self._values):
            return False
        self.layout.fill(weight.detach())
        self._weight, self._seen, self._values = weakref.ref(weight), now, values
        return True


@dataclass(frozen=True)
class NoLayouts:
    """Why no kernel runs a weight of that dtype."""

    dtype: torch.dtype
    reason: str


class Layouts:
    """Kernels for y = x W^T and, where the transpose of the mask can be packed, for the gradient of x.

    ``why_dense_gradient`` is None or the reason why the gradient of x has no kernel. Both layouts and the places of
    their values take 2 to 2.5 times the bytes of a 2:4 weight in fp32 together.
    """

    def __init__(self, mask: Tensor, pattern: Pattern, dtype: torch.dtype) -> None:
        """Of a mask (bool [out, in]) that obeys ``pattern``; BackendError and PatternError as ``refillable``."""
        mask = mask.detach().cpu()
        flat = mask.reshape(-1)
        kept, dropped = (_spread(each.nonzero().view(-1)) for each in (flat, ~flat))
        self.dtype = dtype
        self._dropped = dropped
        self._forward = _Following(refillable(mask, pattern, dtype), kept)
        self.why_dense_gradient = why_not_transposed(mask, pattern, dtype)
        self._backward: _Following | None = None
        other = transposed(pattern)
        if self.why_dense_gradient is None and other is not None:
            self._backward = _Following(refillable(mask, other, dtype, transpose=True), kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the layouts and of the places of their values."""
        return sum(each.layout.nbytes for each in (self._forward, self._backward) if each is not None)

    def filled(self) -> tuple[Refillable, Refillable | None]:
        """The kernel of the weight, and that of its transpose if there is one, as they were filled last."""
        return self._forward.layout, None if self._backward is None else self._backward.layout

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] = x W^T + bias; ModelError where ``weight`` is not zero outside the mask."""
        if self._forward.follow(weight) and bool(weight.detach().view(-1)[self._dropped].any()):
            self._forward = _Following(self._forward.layout, self._forward.sample)  # it is looked at again
            raise ModelError(
                "the weight is not zero where its mask is False, which the sparse kernels take it to be; multiply it "
                "by the mask after every step of the optimizer and after loading other weights"
            )
        return self._forward.layout.run(x, bias)

    def gradient(self, grad: Tensor, weight: Tensor) -> Tensor | None:
        """The gradient of x [batch, in] = grad W; None where it has no kernel."""
        if self._backward is None:
            return None
        self._backward.follow(weight)
        return self._backward.layout.run(grad)


def _spread(places: Tensor) -> Tensor:
    """At most so many of them, from the first to the last."""
    count = min(_SAMPLE, places.numel())
    return places[torch.linspace(0, max(places.numel() - 1, 0), count, dtype=torch.float64, device="cpu").long()]
