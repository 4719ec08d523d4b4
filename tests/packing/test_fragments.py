"""The fragment layout of mma.sp: byte for byte against torch's converter, an obvious twin, and back exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsecomp.errors import PatternError
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.fragments import ROW_BYTES, ROWS, fragments_why_not, from_fragments, to_fragments
from sparsecomp.patterns import parse


def _weight(out: int, columns: int, dtype: torch.dtype, seed: int, kept: int = 2, shared_rows: int = 1) -> torch.Tensor:
    """A 2:4 weight, of fp32 a 1:2 one (``kept`` 2 standing for whole groups), of int8 with values of some dozens."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 if dtype == torch.float32 else 4
    groups = -(-columns // size)
    order = torch.rand(-(-out // shared_rows), groups, size, generator=generator).argsort(dim=2)
    mask = (order < kept * size // 4).repeat_interleave(shared_rows, dim=0)[:out].flatten(1)[:, :columns]
    values = torch.randn(out, columns, generator=generator)
    if dtype == torch.int8:
        values = values.sign() * (1 + 20 * values.abs()).floor()
    return (values * mask).to(dtype)


def _pattern(dtype: torch.dtype) -> str:
    return "1:2" if dtype == torch.float32 else "2:4"


def _same(one: PackedWeight, other: PackedWeight) -> bool:
    return torch.equal(one.values, other.values) and torch.equal(one.metadata, other.metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_metadata_holds_torchs_words(dtype: torch.dtype) -> None:
    # in torch's order, a tile of 32 x 32 is 32 words, one a lane: lanes 0 and 1 of each four hold rows 0 to 15 and
    # lanes 2 and 3 rows 16 to 31, each pair the columns 0 to 15 and 16 to 31
    weight = _weight(128, 192, dtype, 1)
    _, ours = to_fragments(pack(weight, "2:4"))
    _, theirs = sparse_semi_structured_from_dense_cutlass(weight)
    words = theirs.contiguous().flatten().view(torch.int32).view(192 // 32, 128 // 32, 32)
    blocks = ours.view(128 // 64, 192 // 64, 32, 4)
    for row_tile in range(128 // 16):
        for depth in range(192 // 32):
            for lane in range(32):
                g, t = lane // 4, lane % 4
                if t // 2 != depth % 2:
                    continue
                word = words[depth, row_tile // 2, 4 * g + 2 * (row_tile % 2) + t % 2]
                assert blocks[row_tile // 4, depth // 2, lane, row_tile % 4] == word


def test_int8_metadata_holds_torchs_words() -> None:
    # a tile of 16 x 64 is 32 words, and lane l takes word l
    weight = _weight(128, 256, torch.int8, 1)
    _, ours = to_fragments(pack(weight, "2:4"))
    _, theirs = sparse_semi_structured_from_dense_cutlass(weight)
    words = theirs.contiguous().flatten().view(256 // 64, 128 // 16, 32)
    assert torch.equal(ours.view(2, 4, 32, 4).permute(1, 0, 3, 2).reshape(4, 8, 32), words)


def test_tf32_metadata_holds_torchs_words() -> None:
    # as for 16 bits, of tiles of 32 x 16
    weight = _weight(128, 96, torch.float32, 1)
    _, ours = to_fragments(pack(weight, "1:2"))
    _, theirs = sparse_semi_structured_from_dense_cutlass(weight)
    words = theirs.contiguous().flatten().view(torch.int32).view(96 // 16, 128 // 32, 32)
    blocks = ours.view(2, 96 // 32, 32, 4)
    for row_tile in range(128 // 16):
        for depth in range(96 // 16):
            for lane in range(32):
                g, t = lane // 4, lane % 4
                if t // 2 == depth % 2:
                    word = words[depth, row_tile // 2, 4 * g + 2 * (row_tile % 2) + t % 2]
                    assert blocks[row_tile // 4, depth // 2, lane, row_tile % 4] == word


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float32], ids=str)
def test_fragments_hold_what_lanes_want(dtype: torch.dtype) -> None:
    each = 4 // dtype.itemsize
    packed = pack(_weight(128, 64 * each, dtype, 2), _pattern(dtype))
    fragments, _ = to_fragments(packed)
    elements = fragments.view(dtype).view(8, 4, 32, 4, each)
    for tile, depth, lane, register in [(0, 0, 0, 0), (1, 2, 5, 3), (7, 3, 31, 2), (4, 1, 18, 1)]:
        row = 16 * tile + lane // 4 + 8 * (register % 2)
        column = each * (8 * depth + lane % 4 + 4 * (register // 2))
        assert torch.equal(elements[tile, depth, lane, register], packed.values[row, column : column + each])


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(0, 140),
    columns=st.integers(1, 200),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.int8, torch.float32]),
    kept=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_back_exactly(out: int, columns: int, dtype: torch.dtype, kept: int, seed: int) -> None:
    packed = pack(_weight(out, columns, dtype, seed, kept), _pattern(dtype))
    fragments, metadata = to_fragments(packed)
    rows, blocks = -(-out // ROWS) * ROWS, -(-columns * dtype.itemsize // ROW_BYTES)
    per_block = 2 if dtype == torch.int8 else 1
    assert fragments.shape == (rows // 16, 2 * blocks, 128) and fragments.dtype == torch.int32
    assert metadata.shape == (rows // 64, per_block * blocks, 128) and metadata.dtype == torch.int32
    assert _same(from_fragments(fragments, metadata, packed.pattern, packed.shape, dtype), packed)


@pytest.mark.parametrize("shape", [(8, 16), (100, 70)])
def test_rows_that_share_a_mask_come_back_sharing_it(shape: tuple[int, int]) -> None:
    packed = pack(_weight(*shape, torch.bfloat16, 3, shared_rows=4), "2:4@v4")
    fragments, metadata = to_fragments(packed)
    assert _same(from_fragments(fragments, metadata, packed.pattern, packed.shape, packed.dtype), packed)


def test_padding_ascends_and_weighs_nothing() -> None:
    packed = pack(_weight(65, 66, torch.float16, 4), "2:4")
    fragments, metadata = to_fragments(packed)
    values = fragments.view(torch.float16)
    assert int((values != 0).sum()) == int((packed.values != 0).sum())
    nibbles = torch.stack([(metadata >> 4 * i) & 15 for i in range(8)])
    assert bool(((nibbles & 3) < (nibbles >> 2)).all())


@pytest.mark.parametrize("shape", [(64, 64), (4096, 128)])
def test_whole_blocks_cost_no_byte_more_than_the_canonical_form(shape: tuple[int, int]) -> None:
    packed = pack(_weight(*shape, torch.bfloat16, 5), "2:4")
    assert sum(tensor.nbytes for tensor in to_fragments(packed)) == packed.nbytes


@pytest.mark.parametrize(
    ("pattern", "dtype", "reason"),
    [
        ("1:4", torch.float16, r"has no kernel for 1:4; 2:4 only"),
        ("1:2", torch.int8, r"has no kernel for 1:2; 2:4 only"),
        ("block16x16:0.5", torch.float16, "2:4 only"),
        ("2:4", torch.float32, r"has no kernel for 2:4 in torch\.float32; 1:2 only"),
    ],
)
def test_other_weights_are_refused(pattern: str, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        to_fragments(pack(torch.zeros(32, 32, dtype=dtype), pattern))


def test_sizes_that_cannot_be_counted_are_refused() -> None:
    for shape in ((8, 0), (2**17, 2**16)):
        assert "takes weights of 1 input feature to" in str(fragments_why_not(parse("2:4"), torch.float16, shape))
    assert fragments_why_not(parse("2:4"), torch.float16, (2**16, 2**16)) is None
    assert "in 32 bits" in str(fragments_why_not(parse("2:4"), torch.int8, (8, 266289), [torch.int8]))
    assert fragments_why_not(parse("2:4"), torch.int8, (8, 266288), [torch.int8]) is None


def test_the_int8_bound_is_where_sums_would_overflow() -> None:
    assert 266288 // 2 * 127**2 < 2**31 <= (266288 // 2 + 1) * 127**2
