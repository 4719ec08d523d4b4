"""Int8 weights with row scales: their error, their canonical form, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsecomp as sc
from sparsecomp.errors import FormatError, PatternError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.packing import PackedWeight


def packed(pattern: str, out: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> PackedWeight:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    return sc.pack(prune_weight(weight, pattern).weight.to(dtype), pattern)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(["2:4", "1:4", "5:8", "8:16", "2:4@v4", "4:2:8"]),
    out=st.integers(1, 40),
    columns=st.integers(1, 90),
    scale=st.sampled_from([1.0, 1e-30, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_every_weight_moves_by_half_a_step_at_most(pattern, out, columns, scale, dtype, seed):
    original = packed(pattern, out, columns, torch.float32, seed)
    original = replace(original, values=original.values * scale).to(dtype=dtype)
    before = original.values.clone()
    quantised = sc.quantize(original)
    assert quantised.validate() is quantised and torch.equal(original.values, before)
    assert quantised.dtype == dtype and quantised.values.dtype == torch.int8 and quantised.scales is not None
    dense, exact = original.unpack().double(), replace(quantised, dense_dtype=torch.float64).unpack()
    largest = dense.abs().amax(dim=1, keepdim=True)
    assert bool(((exact - dense).abs() <= largest / 254 * (1 + 1e-5)).all())
    assert bool((quantised.values.abs().amax(dim=1) == 127)[largest[:, 0] > 0].all())
    assert not bool((exact != 0)[dense == 0].any())
    assert torch.equal(quantised.unpack(), (exact.float()).to(dtype)) and quantised.unpack().dtype == dtype


def test_weights_that_round_to_zero_free_their_slots():
    weight = torch.tensor([[0.0, 1e-6, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    quantised = sc.quantize(sc.pack(weight, "2:4"))
    assert quantised.values.tolist() == [[0, 127], [0, 0]]
    assert quantised.positions().tolist() == [[[0, 3]], [[0, 1]]]
    assert quantised.scales is not None and quantised.scales.tolist() == [pytest.approx(1 / 127), 1.0]


def test_rows_of_the_smallest_numbers_keep_a_scale():
    weight = torch.tensor([[0.0, 1e-44, 0.0, 0.0], [0.0, 3e-38, 0.0, 0.0]])
    quantised = sc.quantize(sc.pack(weight, "2:4")).validate()
    assert quantised.scales is not None and bool((quantised.scales >= torch.finfo(torch.float32).tiny).all())
    assert bool(((quantised.unpack() - weight).abs() <= torch.finfo(torch.float32).tiny).all())


@pytest.mark.parametrize(("out", "columns"), [(0, 8), (8, 0), (0, 0)])
def test_empty_weights(out, columns):
    quantised = sc.quantize(sc.pack(torch.zeros(out, columns), "2:4")).validate()
    assert quantised.unpack().shape == (out, columns)


def test_bytes_and_conversion():
    original = packed("2:4", 64, 128)
    quantised = sc.quantize(original)
    assert quantised.nbytes == 64 * 64 + 64 * 16 + 64 * 4 and quantised.dense_nbytes == original.dense_nbytes
    half = quantised.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half.values, quantised.values)
    assert torch.equal(half.unpack(), quantised.unpack().bfloat16())
    with pytest.raises(PatternError, match="stands for a floating dtype"):
        quantised.to(dtype=torch.int8)


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(PatternError, match="row scales need an N:M"):
        sc.quantize(sc.pack(torch.zeros(8, 8), "block4x4:0.5"))
    with pytest.raises(PatternError, match=r"holds torch\.int8 already"):
        sc.quantize(sc.pack(torch.zeros(8, 8, dtype=torch.int8), "2:4"))
    with pytest.raises(PatternError, match=r"holds torch\.int8 already"):
        sc.quantize(sc.quantize(packed("2:4", 8, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"scales": p.scales[:-1]}, r"scales have shape \(7,\)"),
        (lambda p: {"scales": p.scales.double()}, "float64"),
        (lambda p: {"scales": -p.scales}, "not positive and finite"),
        (lambda p: {"scales": p.scales / 0}, "not positive and finite"),
        (lambda p: {"values": torch.full_like(p.values, -128)}, "hold -128"),
        (lambda p: {"dense_dtype": torch.int8}, "belong to int8 values"),
        (lambda p: {"dense_dtype": None}, "belong to int8 values"),
        (lambda p: {"scales": None}, "belong to int8 values"),
        (lambda p: {"values": p.values.float()}, "belong to int8 values"),
        (lambda p: {"metadata": p.metadata * 0}, "do not ascend"),
    ],
)
def test_damage_is_found(change, message):
    quantised = sc.quantize(packed("2:4", 8, 16))
    with pytest.raises(FormatError, match=message):
        replace(quantised, **change(quantised)).validate()
