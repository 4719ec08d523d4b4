"""Names of patterns, what is refused, and their geometry."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.errors import PatternError, SparsecompError
from sparsecomp.patterns import NM, VNM, Block, Unstructured, parse, row_nm


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("2:4", NM(2, 4)),
        (" 1:2 ", NM(1, 2)),
        ("16:16", NM(16, 16)),
        ("2:4@v4", NM(2, 4, 4)),
        ("2:4@t", NM(2, 4, transposable=True)),
        ("64:2:8", VNM(64, 2, 8)),
        ("block16x32:0.25", Block(16, 32, 0.25)),
        ("unstructured:0.5", Unstructured(0.5)),
        ("block4x4:1e-1", Block(4, 4, 0.1)),
    ],
)
def test_parse(name, value):
    assert parse(name) == value
    assert parse(value) is value
    assert parse(str(value)) == value


@given(st.sampled_from((2, 4, 8, 16)), st.data(), st.integers(1, 64))
def test_every_nm_has_a_name(m, data, rows):
    pattern = NM(data.draw(st.integers(1, m)), m, rows)
    assert parse(str(pattern)) == pattern


@given(st.integers(1, 512), st.integers(1, 512), st.floats(1e-6, 1.0))
def test_every_block_has_a_name(rows, cols, keep):
    pattern = Block(rows, cols, keep)
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "name",
    [
        "",
        "2",
        "2:3",
        "5:4",
        "0:4",
        "2:32",
        "-2:4",
        "2:4@v0",
        "2:4@4",
        "4:8@t",
        "2:4@v4@t",
        "2.0:4",
        "0:2:8",
        "64:3:8",
        "64:2:4",
        "block16:0.5",
        "block0x4:0.5",
        "block4x4:0",
        "block4x4:1.5",
        "block4x4:..",
        "unstructured",
        "unstructured:0",
        "unstructured:1.01",
        "2:4 and more",
        None,
        24,
        ("2", "4"),
    ],
)
def test_refusals_say_what_is_allowed(name):
    with pytest.raises(PatternError, match="allowed are") as caught:
        parse(name)
    assert isinstance(caught.value, SparsecompError | ValueError)


@given(st.sampled_from((2, 4, 8, 16)), st.data(), st.integers(0, 200))
def test_nm_geometry(m, data, columns):
    n = data.draw(st.integers(1, m))
    pattern = NM(n, m)
    assert pattern.groups(columns) == math.ceil(columns / m)
    assert pattern.slots(columns) == math.ceil(columns / m) * n
    assert 2**pattern.index_bits == m
    assert pattern.density == n / m


def test_vnm_rows_are_stored_as_nm():
    assert row_nm(parse("64:2:8")) == NM(2, 8)
    assert row_nm(parse("2:4@v4")) == NM(2, 4, 4)
    assert row_nm(parse("2:4@t")) == NM(2, 4)
    assert row_nm(parse("block4x4:0.5")) is None
    assert row_nm(parse("unstructured:0.5")) is None
    assert parse("64:2:16").density == 0.125


def test_block_geometry():
    pattern = parse("block16x32:0.5")
    assert pattern.grid(33, 64) == (3, 2)
    assert pattern.kept_blocks(33, 64) == 3
    assert parse("block16x16:0.1").kept_blocks(160, 16) == 1
    assert parse("block16x16:0.3").kept_blocks(160, 16) == 3
    assert pattern.grid(0, 5) == (0, 1)


def test_unstructured_geometry():
    assert parse("unstructured:0.5").kept_per_row(7) == 4
    assert parse("unstructured:0.1").kept_per_row(10) == 1


def test_patterns_are_values():
    assert len({parse("2:4"), parse("2:4"), parse("2:4@v1"), parse("2:8")}) == 2
    with pytest.raises(AttributeError):
        parse("2:4").n = 3
