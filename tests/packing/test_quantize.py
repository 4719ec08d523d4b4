"""Int8 weights with row scales: their error, their canonical form, what is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsecomp as sc
from sparsecomp.errors import FormatError, PatternError
from sparsecomp.machine.bound import packed_nbytes
from sparsecomp.methods.weight import prune_weight
from sparsecomp.packing import PackedWeight
from sparsecomp.packing.quantize import in_numbers, sorting_network
from sparsecomp.patterns import row_nm
from sparsecomp.patterns.numbers import FLOAT, INT8, INT8_A8


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


def _largest_pair(integers: torch.Tensor, n: int, m: int) -> int:
    """The sum of one sign that a pair comes to at most, by the words of ``quantize``, weight by weight."""
    slots, worst = 16 // m * n, 0
    for row in integers.tolist():
        for start in range(0, len(row), slots):
            step = row[start : start + slots] + [0] * (slots - len(row[start : start + slots]))
            step = sorted(step + [0] * (-slots % 4))
            for small, large in zip(step, reversed(step), strict=True):
                worst = max(worst, max(small, 0) + max(large, 0), max(-small, 0) + max(-large, 0))
    return worst


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(["2:4", "1:4", "4:16", "5:8", "8:16", "12:16", "1:2", "2:4@v4", "4:2:8"]),
    out=st.integers(1, 20),
    columns=st.integers(1, 90),
    same_sign=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_pairs_fit_16_bits_where_activations_are_rounded(pattern, out, columns, same_sign, dtype, seed):
    original = packed(pattern, out, columns, torch.float32, seed)
    original = replace(original, values=original.values.abs() if same_sign else original.values).to(dtype=dtype)
    quantised, plain = sc.quantize(original, "int8").validate(), sc.quantize(original)
    nm = row_nm(original.pattern)
    assert quantised.numbers == INT8_A8 and _largest_pair(quantised.values, nm.n, nm.m) <= 128
    growth = quantised.scales / plain.scales
    assert bool((growth >= 1).all()) and bool((growth <= 2.01).all())
    kept = growth == 1
    assert torch.equal(quantised.unpack()[kept], plain.unpack()[kept])
    # no scale is raised that need not be, and none by more than a hundredth too much
    for row in (~kept).nonzero().flatten().tolist():
        smaller = quantised.scales[row] / 1.01
        integers = (original.values[row].float() / smaller).round()[None].to(torch.int32)
        assert _largest_pair(integers, nm.n, nm.m) > 128
    wide = replace(quantised, dense_dtype=torch.float64)
    moved = (wide.unpack() - original.unpack().double()).abs()
    assert bool((moved <= quantised.scales[:, None] / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("pattern", ["16:16", "4:4", "2:2", "8:8@v3"])
@pytest.mark.parametrize(("out", "columns"), [(5, 33), (3, 16), (0, 8), (8, 0)])
def test_dense_groups_have_no_positions_where_activations_are_rounded(pattern, out, columns):
    weight = torch.randn(out, columns)
    weight[:, ::3] = 0
    plain = sc.quantize(sc.pack(weight, pattern))
    quantised = sc.quantize(sc.pack(weight, pattern), "int8").validate()
    rows = -(-out // row_nm(plain.pattern).mask_rows)
    assert quantised.metadata.shape == (rows, 0) and torch.equal(quantised.values, plain.values)
    assert torch.equal(quantised.scales, plain.scales) and torch.equal(quantised.positions(), plain.positions())
    assert torch.equal(quantised.unpack(), plain.unpack())
    assert torch.equal(quantised.integers().metadata, plain.metadata)
    assert quantised.nbytes == packed_nbytes(plain.pattern, (out, columns), torch.float32, INT8_A8)
    with pytest.raises(FormatError, match="metadata"):
        replace(quantised, metadata=plain.metadata if plain.metadata.numel() else torch.zeros(rows, 1)).validate()


def test_how_a_weight_is_multiplied_is_a_fact_of_it():
    quantised = sc.quantize(packed("8:16", 4, 32), "int8")
    parts = tuple(quantised.parts.values())
    again = sc.PackedWeight.of(parts, quantised.pattern, quantised.shape, quantised.dtype, quantised.numbers)
    for other in (again, pickle.loads(pickle.dumps(quantised)), copy.deepcopy(quantised), quantised.to("cpu")):
        assert other.numbers == INT8_A8 and other.validate() is other
    assert quantised.to(dtype=torch.bfloat16).numbers == INT8_A8 and quantised.integers().numbers == FLOAT
    assert in_numbers(packed("8:16", 4, 32), INT8_A8).numbers == INT8_A8
    for bits in (4, 0, "8"):
        with pytest.raises(FormatError, match=r"activations of .* bits are not known"):
            replace(quantised, activation_bits=bits).validate()
    with pytest.raises(FormatError, match="belong to int8 values"):
        replace(packed("8:16", 4, 32), activation_bits=8).validate()
    with pytest.raises(PatternError, match="activations='int4' is not known"):
        sc.quantize(packed("8:16", 4, 32), "int4")


def test_a_weight_pickled_before_activations_were_rounded_is_read():
    quantised = sc.quantize(packed("8:16", 4, 32))
    state = {name: value for name, value in vars(quantised).items() if name != "activation_bits"}
    older = sc.PackedWeight.__new__(sc.PackedWeight)
    older.__dict__.update(state)
    assert older.numbers == INT8 and older.validate() is older


@pytest.mark.parametrize("count", range(17))
def test_the_network_sorts(count):
    # what sorts every row of zeros and ones sorts everything (Knuth, TAOCP 5.3.4)
    rows = (torch.arange(2 ** min(count, 12))[:, None] >> torch.arange(min(count, 12))) & 1
    if count > 12:
        rows = torch.cat([rows, torch.randint(2, (len(rows), count - 12))], dim=1)
    columns = list(rows.unbind(1))
    for low, high in sorting_network(count):
        assert low < high
        columns[low], columns[high] = (
            torch.minimum(columns[low], columns[high]),
            torch.maximum(columns[low], columns[high]),
        )
    if count:
        assert torch.equal(torch.stack(columns, dim=1), rows.sort(dim=1).values)
