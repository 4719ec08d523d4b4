"""How rows of activations become 8-bit integers, and what that costs: the rule that every kernel of such numbers obeys.

Takes and gives tensors. Knows no weight and no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 254  # steps from the smallest to the largest number of a row, which become 1 and 255


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [batch, in] in integers, each row with a step and a zero of its own: x is nearly (integers - zeros) * steps.

    The step is (max(0, largest) - min(0, smallest)) / 254, so that 0 is an integer itself. Integers are 1 to 255,
    int64; ``zeros`` int64 and ``steps`` fp32 are [batch, 1]. A step is at least 2^-126, so that it has an inverse. The
    step of a row that holds NaN or Inf is NaN, and its integers are all its zero.
    """
    x = x.to(torch.float32)
    finite = torch.isfinite(x).all(dim=1, keepdim=True)
    safe = torch.where(finite, x, 0.0)
    edge = safe.new_zeros(x.shape[0], 1)
    low, high = torch.cat([safe, edge], dim=1).aminmax(dim=1, keepdim=True)
    steps, zeros = _steps_and_zeros(low, high)
    # kernels divide once: a quotient may lie on the other side of a tie
    integers = (torch.round(safe * (1 / steps)) + zeros).clamp(1, 1 + LEVELS)
    return integers.to(torch.int64), zeros.to(torch.int64), torch.where(finite, steps, torch.nan)


def round_rows(x: Tensor) -> Tensor:
    """What a product of ``rounded_rows`` multiplies, (integers - zeros) * steps, of x [..., in] in its dtype.

    The same numbers, without leaving fp32. A row that holds NaN or Inf is NaN.
    """
    if x.shape[-1] == 0:
        return x
    wide = x.to(torch.float32)
    # two reductions: aminmax along rows is many times slower
    low, high = wide.amin(dim=-1, keepdim=True), wide.amax(dim=-1, keepdim=True)
    steps, zeros = _steps_and_zeros(low.clamp_max(0), high.clamp_min(0))
    # extremes pass on NaN, and an infinite one has no step
    steps = torch.where(steps.isfinite(), steps, torch.nan)
    integers = (wide * (1 / steps)).round_().add_(zeros).clamp_(1, 1 + LEVELS)
    return integers.sub_(zeros).mul_(steps).to(x.dtype)


def _steps_and_zeros(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The step and the zero, as fp32, of rows from ``low`` <= 0 to ``high`` >= 0."""
    steps = high / LEVELS - low / LEVELS  # the difference itself may be infinite
    steps = steps.clamp_min(torch.finfo(torch.float32).tiny)
    return steps, 1 - torch.round(low / steps)


def rounding_energy(x: Tensor) -> Tensor:
    """The squares of what rounding moves in each column of finite rows [batch, in], summed: float64 [in]."""
    integers, zeros, steps = rounded_rows(x)
    return ((integers - zeros) * steps - x).to(torch.float64).square().sum(dim=0)
