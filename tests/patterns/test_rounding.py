"""Rounded activations: the fast product of the rule against the rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.patterns.rounding import round_rows, rounded_rows


def slowly(x: torch.Tensor) -> torch.Tensor:
    integers, zeros, steps = rounded_rows(x.reshape(-1, x.shape[-1]))
    return ((integers - zeros) * steps).to(x.dtype).view(x.shape)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 6),
    columns=st.integers(1, 70),
    exponent=st.integers(-44, 38),
    kind=st.sampled_from(["plain", "positive", "ties", "a row of zeros", "nan", "inf", "-inf", "both"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
)
def test_the_fast_way_gives_the_numbers_of_the_rule(rows, columns, exponent, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x.abs() if kind == "positive" else (x * 4).round() / 4 if kind == "ties" else x
    x = (x * 10.0**exponent).to(dtype)
    if rows and kind == "a row of zeros":
        x[0] = 0
    if rows and kind in ("nan", "inf", "-inf"):
        x[-1, seed % columns] = float(kind)
    if rows and kind == "both":
        x[0, 0], x[0, -1] = torch.inf, -torch.inf
    fast, slow = round_rows(x), slowly(x)
    assert fast.dtype == dtype and torch.equal(fast.isnan(), slow.isnan())
    assert torch.equal(fast.nan_to_num(7.0), slow.nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 40), (3, 0), (2, 0, 5)])
def test_rows_are_those_of_the_last_dimension(shape):
    x = torch.randn(shape)
    assert round_rows(x).shape == x.shape
    if x.numel():
        assert torch.equal(round_rows(x), slowly(x)) and not torch.equal(round_rows(x), x)
