"""Which numbers a layer bears: how far rounding to integers moves its output, measured against a limit.

Takes a weight that fits its pattern and what calibration knows of its inputs. Measures no time and decides no pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from sparsecomp.backends.choice import Choice
from sparsecomp.errors import ModelError
from sparsecomp.methods.error import energy
from sparsecomp.models.calibration import LayerStatistics
from sparsecomp.packing.format import pack
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns import Pattern, row_nm
from sparsecomp.patterns.numbers import FLOAT, Numbers
from sparsecomp.patterns.rounding import LEVELS

# relative, of the output of a layer. A layer without outliers moves by 1 to 2% (int8@a8) and 1% (int8).
MOST_ROUNDING = 0.05


@dataclass(frozen=True)
class Borne:
    """Numbers that a layer bears, None for a layer that is left as it is.

    ``error`` is the relative error of its output by rounding, 0.0 of floats. ``refused`` are sentences on numbers that
    come before these and are not borne.
    """

    choice: Choice | None
    error: float
    refused: tuple[str, ...] = ()


def rounding_error(
    weight: Tensor, pattern: Pattern, numbers: Numbers, statistics: LayerStatistics | None = None
) -> float:
    """||y - y'|| / ||y|| of a layer's outputs y = X W^T in floats and y' in ``numbers``, over calibration rows X.

    ``weight`` W [out, in] fits ``pattern``. What rounding moves in the weight V is tr((W-V) G (W-V)^T) on the Gram
    matrix G, exactly. What it moves in x is known for each input, over all rows, and counts as uncorrelated between
    inputs: sum_j r_j ||V_j||^2. Without ``statistics`` inputs are taken to be normal, independent and of one variance.

    0.0 of floats; inf where only y is zero.
    """
    if not numbers.has_scales or weight.numel() == 0:
        return 0.0
    gram = None if statistics is None else statistics.gram.to(weight.device)
    exact, stored = weight.double(), in_numbers(pack(weight, pattern), numbers).to(dtype=torch.float64).unpack()
    whole, moved = energy(exact, gram), energy(exact - stored, gram)
    if numbers.activation_bits is not None and statistics is not None and statistics.rounding is not None:
        moved += float(stored.square().sum(dim=0) @ statistics.rounding.to(weight.device))
    elif numbers.activation_bits is not None:
        # of inputs whose extremes are not known the variance may be
        variances = exact.new_ones(exact.shape[1]) if gram is None else gram.diagonal().double()
        moved += _of_normal_rows(exact.shape[1]) * float(variances.mean()) * float(stored.square().sum())
    if moved == 0.0:
        return 0.0
    return math.sqrt(moved / whole) if whole > 0.0 else math.inf


def require_most(most: float) -> None:
    """Raises ModelError for what cannot be the largest relative error of an output."""
    if not (isinstance(most, Real) and most >= 0):  # no NaN
        raise ModelError(
            f"max_rounding={most!r} is no relative error of an output; use a number from 0 on, such as "
            f'{MOST_ROUNDING}, or float("inf") to store every layer as asked'
        )


def _of_normal_rows(columns: int) -> float:
    """The mean square of what rounding moves in one number of a normal row of variance 1."""
    widest = 2 * math.sqrt(2 * math.log(max(columns, 2)))  # between the extremes of so many numbers
    return (widest / LEVELS) ** 2 / 12


def borne(
    weight: Tensor, asked: Choice, statistics: LayerStatistics | None = None, most: float = MOST_ROUNDING
) -> Iterator[Borne]:
    """How a layer can be stored whose weight [out, in] fits the pattern, what was asked for first.

    Numbers that move the output by more than ``most`` are left out: int8 weights and activations give way to int8
    weights alone, these to floats. Dense groups (N = M) are worth nothing in floats, where nn.Linear is faster; such a
    layer is left as it is.
    """
    nm = row_nm(asked.pattern)
    dense = nm is not None and nm.n == nm.m
    refused: list[str] = []
    for numbers in (asked.numbers,) if dense else _steps_back(asked.numbers):
        error = rounding_error(weight, asked.pattern, numbers, statistics)
        if error <= most:  # no NaN
            yield Borne(replace(asked, numbers=numbers), error, tuple(refused))
        else:
            refused.append(f"{numbers} would move its output by {error:.1%}, above {most:.1%}")
    if dense:
        yield Borne(None, 0.0, tuple(refused))


def _steps_back(numbers: Numbers) -> tuple[Numbers, ...]:
    return tuple(dict.fromkeys((numbers, replace(numbers, activation_bits=None), FLOAT)))
