"""Layouts and foreign formats, byte for byte against the converters of torch."""

import numpy as np
import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsecomp.errors import FormatError, PatternError
from sparsecomp.packing import pack, quantize
from sparsecomp.packing.interop import from_bitmask, from_torch_semi_structured, to_bitmask, to_torch_semi_structured
from sparsecomp.packing.layouts.sm80 import from_sm80_metadata, to_sm80_metadata

TYPES = [torch.float16, torch.bfloat16, torch.int8]
SHAPES = [(32, 64), (64, 128), (96, 192), (160, 64)]


def full_groups(shape, dtype, mask_rows=1, seed=0):
    """A 2:4 weight with two nonzeros in each group: here torch has no choice of positions."""
    generator = torch.Generator().manual_seed(seed)
    out, columns = shape
    scores = torch.rand(out // mask_rows, columns // 4, 4, generator=generator).repeat_interleave(mask_rows, dim=0)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2).indices, True).view(shape)
    weight = torch.randint(1, 100, shape, generator=generator).to(dtype)
    return torch.where(kept, weight, torch.zeros_like(weight))


def sparse_groups(shape, dtype, seed=0):
    weight = full_groups(shape, dtype, seed=seed)
    drop = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(drop, torch.zeros_like(weight), weight)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask_rows", [1, 4])
def test_metadata_order_equals_torch(shape, dtype, mask_rows):
    weight = full_groups(shape, dtype, mask_rows)
    packed = pack(weight, f"2:4@v{mask_rows}")
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(packed.values, values)
    ours = to_sm80_metadata(packed)
    assert ours.dtype == metadata.dtype
    assert torch.equal(ours, metadata)
    assert torch.equal(from_sm80_metadata(metadata), packed.positions())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_ours_and_we_read_torchs(shape, dtype):
    weight = sparse_groups(shape, dtype)
    packed = pack(weight, "2:4")
    theirs = to_torch_semi_structured(packed)
    assert isinstance(theirs, SparseSemiStructuredTensorCUTLASS)
    assert theirs.shape == weight.shape
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(theirs.packed, theirs.meta), weight)
    for tensor in (theirs, by_torch(weight)):
        back = from_torch_semi_structured(tensor)
        assert torch.equal(back.values, packed.values)
        assert torch.equal(back.metadata, packed.metadata)


def by_torch(weight):
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    return SparseSemiStructuredTensorCUTLASS(
        weight.shape, packed=values, meta=metadata, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


@pytest.mark.parametrize(
    ("weight", "pattern", "reason"),
    [
        (torch.zeros(32, 64), "2:4", "torch.float32"),
        (torch.zeros(32, 64, dtype=torch.float16), "1:4", "1:4 is not 2:4"),
        (torch.zeros(32, 64, dtype=torch.float16), "64:2:8", "64:2:8 is not 2:4"),
        (torch.zeros(16, 64, dtype=torch.float16), "2:4", "no multiple"),
        (torch.zeros(32, 48, dtype=torch.float16), "2:4", "no multiple"),
        (torch.zeros(16, 32, dtype=torch.int8), "2:4", "no multiple"),
    ],
)
def test_what_has_no_sm80_layout(weight, pattern, reason):
    with pytest.raises(PatternError, match=reason):
        to_torch_semi_structured(pack(weight, pattern))


def test_quantised_weights_have_no_sm80_layout():
    quantized = quantize(pack(full_groups((32, 64), torch.float16), "2:4"))
    for convert in (to_sm80_metadata, to_torch_semi_structured):
        with pytest.raises(PatternError, match="no place for the row scales"):
            convert(quantized)
    values = to_torch_semi_structured(quantized.integers())
    assert torch.equal(values.to_dense(), quantized.integers().unpack())
    dense = quantized.unpack()
    assert torch.equal(from_bitmask(to_bitmask(quantized), "2:4").unpack(), dense)


def test_what_is_no_semi_structured_tensor():
    with pytest.raises(FormatError, match="Tensor holds no CUTLASS metadata"):
        from_torch_semi_structured(torch.zeros(32, 64))
    damaged = by_torch(full_groups((32, 64), torch.float16))
    damaged.meta[3, 2] = 0
    with pytest.raises(FormatError, match="do not ascend"):
        from_torch_semi_structured(damaged)
    with pytest.raises(FormatError, match=r"torch\.uint8"):
        from_sm80_metadata(torch.zeros(32, 4, dtype=torch.uint8))
    values, metadata = sparse_semi_structured_from_dense_cutlass(full_groups((32, 64), torch.float16))
    wrong = SparseSemiStructuredTensorCUTLASS(torch.Size((32, 128)), values, metadata, None, None, None)
    with pytest.raises(FormatError, match="do not belong together"):
        from_torch_semi_structured(wrong)


@pytest.mark.parametrize("pattern", ["2:4", "3:8@v2", "block4x4:0.5"])
@pytest.mark.parametrize("shape", [(6, 19), (1, 8), (5, 64), (3, 0), (0, 4)])
def test_bitmask_follows_its_definition(pattern, shape):
    generator = torch.Generator().manual_seed(7)
    weight = torch.zeros(shape)
    weight[:4, 0:4:2] = torch.randn(weight[:4, 0:4:2].shape, generator=generator)
    packed = pack(weight, pattern)
    tensors = to_bitmask(packed)
    dense = weight.numpy()
    assert tensors["shape"].tolist() == list(shape)
    assert np.array_equal(tensors["bitmask"].numpy(), np.packbits(dense != 0, axis=-1, bitorder="little"))
    rows = [[value for value in row if value != 0] for row in dense.tolist()]
    assert tensors["compressed"].tolist() == [value for row in rows for value in row]
    assert tensors["row_offsets"].tolist() == [sum(map(len, rows[:i])) for i in range(len(rows))]
    back = from_bitmask(tensors, pattern)
    assert torch.equal(back.values, packed.values)
    assert torch.equal(back.metadata, packed.metadata)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("compressed", torch.ones(3), "do not match the bits"),
        ("row_offsets", torch.tensor([0, 1]), "do not match the bits"),
        ("bitmask", torch.zeros(2, 2, dtype=torch.uint8), "needs torch.uint8"),
        ("bitmask", torch.zeros(2, 1), "needs torch.uint8"),
        ("shape", torch.tensor([2, 2, 2]), "no matrix"),
        ("compressed", torch.tensor([1.0, 0.0, 2.0, 3.0]), "zeros"),
    ],
)
def test_damaged_bitmasks(name, value, message):
    tensors = to_bitmask(pack(torch.tensor([[1.0, 0, 2.0, 0], [0, 0, 3.0, 4.0]]), "2:4"))
    with pytest.raises((FormatError, PatternError), match=message):
        from_bitmask({**tensors, name: value}, "2:4")
    with pytest.raises(FormatError, match="lack"):
        from_bitmask({}, "2:4")
    with pytest.raises(PatternError, match="breaks 1:4"):
        from_bitmask(tensors, "1:4")
