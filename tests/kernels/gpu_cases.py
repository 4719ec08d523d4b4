"""Random weights that fit a pattern, and the product in float64 with the error that fp32 accumulation may add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from torch.nn import functional

from sparsecomp.activations import activate
from sparsecomp.backends.base import Backend
from sparsecomp.patterns import VNM, VNM_KEPT_COLUMNS, Block, parse, row_nm

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}


@dataclass(frozen=True)
class Case:
    """A dense weight [out, in] that fits a pattern, and what it is multiplied with."""

    weight: Tensor
    pattern: str
    x: Tensor
    bias: Tensor | None
    quantized: bool = False  # int8 holds the weight exactly, and it is to be stored so
    activation: str = "none"


def with_every_triton(
    cases: Iterable[tuple[Any, ...]], chosen: Callable[..., bool] = lambda *case: True
) -> list[ParameterSet]:
    """The cases of a compile matrix, ``chosen(*case)`` of them marked ``every_triton``, the others ``exhaustive``.

    A case begins with the compute capability; 80 stands for 86 and 89 as well. ``make nightly`` runs all with each
    Triton.
    """
    return [
        pytest.param(
            *case,
            marks=pytest.mark.every_triton if case[0] in (80, 90) and chosen(*case) else pytest.mark.exhaustive,
        )
        for case in cases
    ]


def need(backend: Backend) -> None:
    """Skip, with the reason, where the backend cannot run."""
    reason = backend.missing()
    if reason is not None:
        pytest.skip(reason)


def _top(scores: Tensor, count: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, dim=-1).indices, True)


def random_weight(pattern: str, out: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A weight that fits a pattern; a tenth of what the pattern keeps is zero, and so is a whole row."""
    generator = torch.Generator().manual_seed(seed)
    parsed = parse(pattern)
    if isinstance(parsed, Block):
        down, across = parsed.grid(out, columns)
        kept = _top(torch.rand(down * across, generator=generator), parsed.kept_blocks(out, columns)).view(down, across)
        kept = kept.repeat_interleave(parsed.rows, 0).repeat_interleave(parsed.cols, 1)[:out, :columns]
        dense = torch.randn(out, columns, generator=generator).to(dtype)
        dense = dense * (kept & (torch.rand(dense.shape, generator=generator) > 0.1))
        dense[out // 2 : out // 2 + 1] = 0
        return dense
    nm = row_nm(parsed)
    assert nm is not None
    groups = nm.groups(columns)
    scores = torch.rand(-(-out // nm.mask_rows), groups, nm.m, generator=generator)
    mask = _top(scores, nm.n).repeat_interleave(nm.mask_rows, dim=0)[:out]
    if isinstance(parsed, VNM):
        tiles = torch.rand(-(-out // parsed.v), groups, nm.m, generator=generator)
        shared = _top(tiles, VNM_KEPT_COLUMNS).repeat_interleave(parsed.v, dim=0)[:out]
        mask = _top(scores * shared, nm.n)
    dense = torch.randn(out, groups, nm.m, generator=generator).to(dtype)
    dense = dense * (mask & (torch.rand(dense.shape, generator=generator) > 0.1))
    dense[out // 2 : out // 2 + 1] = 0
    return dense.flatten(1)[:, :columns].contiguous()


def random_case(
    pattern: str, out: int, columns: int, batch: int, dtype: torch.dtype, with_bias: bool = True, row_gap: int = 0
) -> Case:
    """A case of that shape; the rows of ``x`` lie ``columns + row_gap`` elements apart, NaN between them."""
    weight = random_weight(pattern, out, columns, dtype, seed=out * 1000 + columns)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, columns + row_gap, generator=generator).to(dtype)
    x[:, columns:] = torch.nan
    x = x[:, :columns]
    bias = torch.randn(out, generator=generator).to(dtype) if with_bias else None
    return Case(weight, pattern, x, bias)


def strided_columns(case: Case) -> Case:
    """The same case, with neighbours in a row of ``x`` apart, as they are in a transposed tensor; NaN between them."""
    wide = torch.full((case.x.shape[1], case.x.shape[0] + 3), torch.nan, dtype=case.x.dtype)
    return replace(case, x=wide.t()[: case.x.shape[0]].copy_(case.x))


def moved(x: Tensor, device: str = "cuda") -> Tensor:
    """``x`` with its strides and what lies between its elements; ``Tensor.to`` would close the gaps."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return x.as_strided((span,), (1,)).to(device).as_strided(x.shape, x.stride())


def quantized_case(pattern: str, out: int, columns: int, batch: int, dtype: torch.dtype) -> Case:
    """A case whose weight int8 holds exactly: integers up to 127 in every row that has any, times powers of two."""
    case = random_case(pattern, out, columns, batch, dtype)
    integers = (case.weight.float() * 40).round().clamp(-127, 127)
    largest = integers.abs().argmax(dim=1, keepdim=True)
    integers.scatter_(1, largest, integers.gather(1, largest).sign() * 127)
    steps = 2.0 ** -(torch.arange(out) % 5)
    return replace(case, weight=(integers * steps[:, None]).to(dtype), quantized=True)


def assert_close_to_float64(y: Tensor, case: Case) -> None:
    """|y - float64 product| is within one rounding to the dtype and the worst of an fp32 sum of that length.

    Activations are no steeper than 1.13, and their approximations in fp32 are good to a few roundings of the sum.
    """
    assert y.dtype == case.x.dtype
    weight, x = case.weight.double(), case.x.double()
    bias = torch.zeros(weight.shape[0]).double() if case.bias is None else case.bias.double()
    exact = functional.linear(x, weight, bias)
    assert y.shape == exact.shape
    magnitude = functional.linear(x.abs(), weight.abs(), bias.abs())
    summed = (case.x.shape[1] + 1) * 2.0**-23 * magnitude
    if case.activation != "none":
        summed = 1.13 * summed + 8 * 2.0**-24 * exact.abs()
        exact = activate(exact, case.activation)
    allowed = UNIT_ROUNDOFF[y.dtype] * (exact.abs() + summed) + summed + SMALLEST[y.dtype]
    error = (y.cpu().double() - exact).abs()
    # not "error > allowed": a NaN must fail
    assert bool((error <= allowed).all()), f"error exceeds its bound by {(error - allowed).max().item():.3g}"


def rounded_to_tf32(numbers: Tensor) -> Tensor:
    """fp32 with 10 bits of mantissa, rounded to nearest, ties away from zero; finite numbers only."""
    return (numbers.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def assert_close_to_integer_product(y: Tensor, case: Case, integers: Tensor, scales: Tensor, quantized: Any) -> None:
    """|y - float64| is within one rounding to the dtype and those of fp32 when an exact integer sum is scaled.

    ``integers`` and ``scales`` are of x, one scale for each row; ``quantized`` is the packed weight.
    """
    sums = integers.double() @ quantized.integers().unpack().double().T
    product = sums * quantized.scales.double() * scales.double()[:, None]
    bias = torch.zeros(y.shape[1]).double() if case.bias is None else case.bias.double()
    exact = product + bias
    assert y.dtype == case.x.dtype and y.shape == exact.shape
    # the sum, the product of the scales, their product: three roundings, and one more for the addition
    single = 4 * 2.0**-24 * (product.abs() + bias.abs())
    allowed = UNIT_ROUNDOFF[y.dtype] * (exact.abs() + single) + single + SMALLEST[y.dtype]
    error = (y.cpu().double() - exact).abs()
    assert bool((error <= allowed).all()), f"error exceeds its bound by {(error - allowed).max().item():.3g}"
