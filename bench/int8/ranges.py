"""Ways to choose the range of numbers that 8 bits stand for, in floats: by row, by tensor, fixed beforehand.

Takes and gives tensors. The kernels round by row; the others are here to say what they would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsecomp.patterns.rounding import LEVELS, rounded_rows

Rounding = Callable[[Tensor], Tensor]

BY_ROW, BY_TENSOR, FIXED, CLIPPED = "row", "tensor", "fixed", "clipped"
# parts of the calibrated range that clipping tries
PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass
class Calibrated:
    """The smallest and largest number that a layer was given, 0 included, and what each part of that range moves."""

    low: float = 0.0
    high: float = 0.0
    moved: dict[float, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def see(self, x: Tensor) -> None:
        """Widen the range by what is in x."""
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))

    def try_parts(self, x: Tensor) -> None:
        """Add what every part of the range, which is final by now, moves in x, squared."""
        for part in PARTS:
            self.moved[part] += float((within(x, part * self.low, part * self.high) - x).double().square().sum())

    @property
    def best_part(self) -> float:
        """The part that moved least."""
        return min(self.moved, key=lambda part: self.moved[part])


def by_row(x: Tensor) -> Tensor:
    """Rows [rows, in] as the kernels round them, each between its own extremes."""
    integers, zeros, steps = rounded_rows(x)
    return (integers - zeros) * steps


def by_tensor(x: Tensor) -> Tensor:
    """Rows [rows, in], all of them rounded between the extremes of the whole."""
    return within(x, float(x.min()), float(x.max()))


def within(x: Tensor, low: float, high: float) -> Tensor:
    """Numbers rounded to 254 steps between ``low`` and ``high``, 0 included; what lies outside becomes the nearest."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / LEVELS
    if step == 0.0:
        return torch.zeros_like(x)
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp_(0, LEVELS).sub_(zero).mul_(step)


def ways(calibrated: Calibrated) -> Mapping[str, Rounding]:
    """Every way by its name, for one layer."""
    low, high, part = calibrated.low, calibrated.high, calibrated.best_part
    return {
        BY_ROW: by_row,
        BY_TENSOR: by_tensor,
        FIXED: lambda x: within(x, low, high),
        CLIPPED: lambda x: within(x, part * low, part * high),
    }
