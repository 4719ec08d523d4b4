"""The fragment layout of mma.sp: byte for byte against torch's converter, an obvious twin, and back exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsecomp.errors import PatternError
from sparsecomp.pack.format import PackedWeight, pack
from sparsecomp.pack.fragments import COLUMNS, ROWS, fragments_why_not, from_fragments, to_fragments
from sparsecomp.patterns import parse


def _weight(out: int, columns: int, dtype: torch.dtype, seed: int, kept: int = 2, shared_rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // 4)
    order = torch.rand(-(-out // shared_rows), groups, 4, generator=generator).argsort(dim=2)
    mask = (order < kept).repeat_interleave(shared_rows, dim=0)[:out].flatten(1)[:, :columns]
    return (torch.randn(out, columns, generator=generator) * mask).to(dtype)


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


def test_fragments_hold_what_lanes_want() -> None:
    packed = pack(_weight(128, 128, torch.float16, 2), "2:4")
    fragments, _ = to_fragments(packed)
    halves = fragments.view(torch.float16).view(8, 4, 32, 4, 2)
    for tile, depth, lane, register, half in [(0, 0, 0, 0, 0), (1, 2, 5, 3, 1), (7, 3, 31, 2, 0), (4, 1, 18, 1, 1)]:
        row = 16 * tile + lane // 4 + 8 * (register % 2)
        column = 16 * depth + 2 * (lane % 4) + half + 8 * (register // 2)
        assert halves[tile, depth, lane, register, half] == packed.values[row, column]


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(0, 140),
    columns=st.integers(1, 200),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    kept=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_back_exactly(out: int, columns: int, dtype: torch.dtype, kept: int, seed: int) -> None:
    packed = pack(_weight(out, columns, dtype, seed, kept), "2:4")
    fragments, metadata = to_fragments(packed)
    rows, width = -(-out // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS
    assert fragments.shape == (rows // 16, width // 32, 128) and fragments.dtype == torch.int32
    assert metadata.shape == (rows // 64, width // 64, 128) and metadata.dtype == torch.int32
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
        ("1:4", torch.float16, "has no kernel for 1:4; 2:4 only"),
        ("block16x16:0.5", torch.float16, "2:4 only"),
        ("2:4", torch.float32, r"has no kernel for torch\.float32"),
        ("2:4", torch.int8, r"has no kernel for torch\.int8"),
    ],
)
def test_other_weights_are_refused(pattern: str, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        to_fragments(pack(torch.zeros(32, 32, dtype=dtype), pattern))


def test_sizes_that_cannot_be_counted_are_refused() -> None:
    for shape in ((8, 0), (2**17, 2**16)):
        assert "takes weights of 1 input feature to" in str(fragments_why_not(parse("2:4"), torch.float16, shape))
    assert fragments_why_not(parse("2:4"), torch.float16, (2**16, 2**16)) is None
