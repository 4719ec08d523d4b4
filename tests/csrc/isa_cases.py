"""The cases of test_isa.py, run in a process of their own with SPARSECOMP_ISA set."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sparsecomp import _native
from sparsecomp.packing.format import pack
from tests.csrc.native_weight import EPSILON, Layout, check_linear, check_rounded, random_weight

# Those that some instruction set has kernels of its own for: csrc/cpu/nm/kernel_list.hpp, as test_isa.py checks.
LISTED = ["1:2", "2:2", "1:4", "2:4", "3:4", "4:4", "2:8", "4:8", "6:8", "4:16", "8:16", "10:16", "12:16"]
PATTERNS = [
    *LISTED,
    *("5:8", "7:8", "8:8", "1:16", "7:16", "9:16", "15:16", "16:16", "2:4@v4"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (5, 7), (16, 16), (123, 123), (40, 768), (33, 130)]
BATCHES = [0, 1, 2, 3, 5, 8, 17]


def test_isa_is_the_one_asked_for():
    assert _native.isa() == os.environ["SPARSECOMP_ISA"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_on_odd_shapes(pattern, dtype):
    for i, (out, columns) in enumerate(SHAPES):
        for j, batch in enumerate(BATCHES):
            check_linear(
                pattern, out, columns, batch, dtype, has_bias=(i + j) % 2 == 0, gap=(i + j) % 3, seed=i * 10 + j
            )


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [*((each, torch.float32) for each in PATTERNS), ("2:4", torch.float16), ("5:8", torch.bfloat16)],
)
def test_int8_weights_on_odd_shapes(pattern, dtype):
    for i, ((out, columns), batch) in enumerate(zip(SHAPES, BATCHES[1:], strict=True)):
        check_linear(pattern, out, columns, batch, dtype, has_bias=i % 2 == 0, gap=i % 3, seed=i, int8_weights=True)
    check_linear(pattern, 35, 1040, 40, dtype, threads=2, int8_weights=True)


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [*((each, torch.float32) for each in PATTERNS), ("8:16", torch.float16), ("12:16", torch.bfloat16)],
)
def test_int8_weights_by_rounded_activations(pattern, dtype):
    for i, ((out, columns), batch) in enumerate(zip(SHAPES, BATCHES[1:], strict=True)):
        check_rounded(pattern, out, columns, batch, dtype, gap=i % 3)
    check_rounded(pattern, 35, 1040, 40, dtype, threads=2)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "5:8"])
def test_blocked_in_both_directions(pattern, dtype, threads):
    check_linear(pattern, 123, 1040, 64, dtype, threads=threads)
    check_linear(pattern, 40, 4097, 19, dtype, threads=threads)
    check_linear(pattern, 24, 2048, 140, dtype, threads=threads)
    check_linear(pattern, 1024, 768, 1, dtype, threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_column_over_a_weight_larger_than_the_cache(threads):
    check_linear("2:4", 4113, 3090, 1, torch.float32, threads=threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [*LISTED, "2:4@v4", "4:8@v4", "8:16@v4", "5:16@v4", "1:8@v8"])
def test_batches_that_fill_panels(pattern, dtype):
    shapes = [(37, 123, 96), (123, 1040, 127), (40, 16, 272), (5, 7, 144), (64, 100, 30), (64, 100, 75)]
    for out, columns, batch in shapes:
        check_linear(pattern, out, columns, batch, dtype, threads=1 + batch % 2, gap=batch % 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_columns_gives_the_bias(dtype):
    layout = Layout(
        (5, 0, 2, 4, 1, {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]), *[torch.empty(0)] * 2
    )
    bias = torch.arange(5).to(dtype)
    y = torch.full((3, 5), float("nan"), dtype=dtype)
    layout.linear(torch.empty(3, 0, dtype=dtype), bias, y)
    assert y.equal(bias.expand(3, 5))
    layout.linear(torch.empty(3, 0, dtype=dtype), None, y)
    assert y.equal(torch.zeros(3, 5, dtype=dtype))


@pytest.mark.parametrize("scale", [1.0, 2e-6, 2e4], ids=["normal", "subnormal in fp16", "overflow in fp16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_output_rounds_to_nearest_even_and_keeps_nan_and_inf(dtype, scale):
    """Two products of 16-bit numbers are exact in fp32: y is their sum, rounded as torch rounds."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(64, 32, generator=generator) * scale).clamp(-65504, 65504).to(dtype)
    weight = torch.zeros(20, 32, dtype=dtype)
    weight[:, 0], weight[:, 17] = 1, torch.linspace(0, 1, 20).to(dtype)
    layout = Layout.of(pack(weight, "2:4"))
    y = torch.empty(64, 20, dtype=dtype)
    layout.linear(x, None, y)
    want = torch.addcmul(x[:, :1].float(), x[:, 17:18].float(), weight[:, 17].float()).to(dtype)
    assert y.equal(want)

    x[3, 0], x[4, 0], x[5, 0] = float("nan"), float("inf"), float("-inf")
    layout.linear(x, None, y)
    assert bool(y[3].isnan().all())
    assert bool((y[4] == float("inf")).all())
    assert bool((y[5] == float("-inf")).all())
    assert torch.cat([y[:3], y[6:]]).equal(torch.cat([want[:3], want[6:]]))


def _activated(x: torch.Tensor, out: int, activation: int, dtype: torch.dtype) -> torch.Tensor:
    """The kernels' activation of x [n] through a column of ones: y [n, out]."""
    weight = torch.zeros(out, 2, dtype=dtype)
    weight[:, 0] = 1
    y = torch.full((x.shape[0], out), 7.0, dtype=dtype)
    inputs = torch.stack([x, torch.zeros_like(x)], dim=1).to(dtype)
    Layout.of(pack(weight, "1:2")).linear(inputs, None, y, activation=activation)
    return y


# In float64, by formulas that do not cancel in the tails; torch's own lose all digits of gelu(-9) even there.
ACTIVATIONS = {
    0: lambda v: v,
    1: torch.relu,
    2: lambda v: v * torch.special.erfc(v * -(0.5**0.5)) / 2,
    3: lambda v: v * torch.sigmoid((8 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)),
    4: lambda v: v * torch.sigmoid(v),
}
TORCH = {
    0: lambda v: v,
    1: torch.relu,
    2: functional.gelu,
    3: lambda v: functional.gelu(v, approximate="tanh"),
    4: functional.silu,
}


@pytest.mark.parametrize("code", ACTIVATIONS)
def test_activations_are_right_to_a_few_ulp(code):
    tails = torch.logspace(-37, 38, 3001)
    x = torch.cat([torch.linspace(-12, 12, 60001), tails, -tails, torch.linspace(-90, -12, 2001)])
    y = _activated(x, 21, code, torch.float32)
    assert y.equal(y[:, :1].expand_as(y)), "a value depends on the row it is in"
    got, want = y[:, 0].double(), ACTIVATIONS[code](x.double())
    # the argument of the tanh form is rounded before exp magnifies that
    argument = 1.6 * x.double().abs() + 0.072 * x.double().abs() ** 3 if code == 3 else 0
    ulp = 6e-8 * (8 + 3 * argument)
    tiny = 1e-37  # exp is a subnormal number there
    assert bool(((got - want).abs() <= want.abs() * ulp + tiny).all())
    torch.testing.assert_close(got, TORCH[code](x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", ACTIVATIONS)
def test_activations_of_nan_and_inf_are_those_of_torch(code, dtype):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 3e38 if dtype == torch.float32 else 60000])
    want = TORCH[code](x.double()).to(dtype)
    got = _activated(x, 5, code, dtype)
    torch.testing.assert_close(got, want[:, None].expand_as(got), rtol=EPSILON[dtype], atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", ACTIVATIONS)
def test_epilogue_scales_then_adds_the_bias_then_activates(code, dtype):
    for out, columns, batch in [(1, 3, 1), (37, 40, 9), (16, 1040, 33)]:
        generator = torch.Generator().manual_seed(out)
        weight = random_weight("2:4", out, columns, dtype, generator)
        x = torch.randn(batch, columns, generator=generator).to(dtype)
        bias, scales = torch.randn(out, generator=generator).to(dtype), torch.rand(out, generator=generator) / 8
        y = torch.full((batch, out), float("nan"), dtype=dtype)
        Layout.of(pack(weight, "2:4")).linear(x, bias, y, 2, activation=code, scales=scales)
        want = ACTIVATIONS[code](x.double() @ weight.double().T * scales.double() + bias.double())
        torch.testing.assert_close(y.double(), want, rtol=EPSILON[dtype] * 2, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layout_converts_back_exactly(pattern, dtype):
    for out, columns in [*SHAPES, (257, 1000)]:
        weight = random_weight(pattern, out, columns, dtype, torch.Generator().manual_seed(out))
        packed = pack(weight, pattern)
        layout = Layout.of(packed)
        back = pack(torch.zeros_like(weight), pattern)
        back.values.fill_(3)
        back.metadata.fill_(0xA5)
        layout.unpack_into(back)
        assert back.values.equal(packed.values)
        assert back.metadata.equal(packed.metadata)
        assert layout.to_dense(dtype, threads=2).equal(weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layout_of_rounded_products_converts_back_exactly(pattern):
    for out, columns in [*SHAPES, (257, 1000)]:
        packed = pack(random_weight(pattern, out, columns, torch.int8, torch.Generator().manual_seed(out)), pattern)
        back = pack(torch.zeros(out, columns, dtype=torch.int8), pattern)
        back.values.fill_(3)
        Layout.of(packed, rounding=True).unpack_into(back)
        assert back.values.equal(packed.values)
        assert back.metadata.equal(packed.metadata)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.sampled_from([2, 4, 8, 16]),
    kept=st.integers(1, 16),
    rows=st.sampled_from([1, 1, 3, 4]),
    out=st.integers(1, 90),
    columns=st.integers(1, 300),
    batch=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    gap=st.integers(0, 5),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_random_products(m, kept, rows, out, columns, batch, dtype, has_bias, gap, threads, seed):
    pattern = f"{1 + (kept - 1) % m}:{m}@v{rows}"
    check_linear(pattern, out, columns, batch, dtype, has_bias=has_bias, gap=gap, threads=threads, seed=seed)
