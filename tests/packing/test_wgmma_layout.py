"""The wgmma.sp layout: byte for byte what CUTLASS's own compressor wrote, an obvious twin, and back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.errors import PatternError
from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.wgmma import from_wgmma, padded, tiled, to_wgmma, wgmma_why_not
from sparsecomp.patterns import parse
from tests.packing.wgmma_cases import RECORD, SHAPES, digest, weight

GOLDEN = json.loads((Path(__file__).parent / RECORD).read_text())["cases"]


def _octets(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_the_bytes_are_those_of_cutlass(kind: str, shape: tuple[int, int]) -> None:
    values, metadata = to_wgmma(pack(weight(kind, *shape), "2:4"))
    for name, tensor in (("values", values), ("metadata", metadata)):
        golden = GOLDEN[f"{kind} {shape[0]}x{shape[1]}"][name]
        assert _octets(tensor)[:32].hex() == golden["first"]
        assert digest(_octets(tensor)) == golden["sha256"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_of_fp8_are_those_of_cutlass(shape: tuple[int, int]) -> None:
    values, octets = padded(pack(weight("e4m3", *shape).to(torch.float16), "2:4"))
    golden = GOLDEN[f"e4m3 {shape[0]}x{shape[1]}"]
    assert digest(_octets(values.to(torch.float8_e4m3fn))) == golden["values"]["sha256"]
    assert _octets(tiled(octets, 1))[:32].hex() == golden["metadata"]["first"]
    assert digest(_octets(tiled(octets, 1))) == golden["metadata"]["sha256"]


def _random(out: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(out, -(-columns // 4), 4, generator=generator).argsort(dim=2) < 2).flatten(1)[:, :columns]
    mask = mask & (torch.rand(out, columns, generator=generator) > 0.2)
    return (torch.randn(out, columns, generator=generator) * mask).to(dtype)


def test_every_byte_is_where_the_description_says() -> None:
    out, columns = 70, 200
    packed = pack(_random(out, columns, torch.float16, 1), "2:4")
    values, metadata = to_wgmma(packed)
    assert values.shape == (70, 128) and metadata.shape == (2, 2, 1024)
    positions = packed.positions()
    for row in range(128):
        for byte in range(32):
            tile = metadata[byte // 16, row // 64]
            a, b, c = row % 64 // 16, row % 16 // 8, row % 8
            d, e, f = byte % 16 // 4, byte % 4 // 2, byte % 2
            got = int(tile[((((a * 2 + e) * 8 + c) * 4 + d) * 2 + b) * 2 + f])
            for half in range(2):
                first, second = (0, 1) if row >= out or 2 * byte + half >= 50 else positions[row, 2 * byte + half]
                assert got >> (4 * half) & 15 == int(first) | int(second) << 2
    assert torch.equal(values[:, :100], packed.values) and int(values[:, 100:].count_nonzero()) == 0


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(0, 150),
    columns=st.integers(1, 300),
    shared=st.sampled_from([1, 4]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_back_exactly(out: int, columns: int, shared: int, dtype: torch.dtype, seed: int) -> None:
    dense = _random(-(-out // shared), columns, dtype, seed).repeat_interleave(shared, 0)[:out]
    packed = pack(dense, "2:4" if shared == 1 else f"2:4@v{shared}")
    values, metadata = to_wgmma(packed)
    again = from_wgmma(values, metadata, packed.pattern, packed.shape, dtype)
    assert torch.equal(again.values, packed.values) and torch.equal(again.metadata, packed.metadata)
    first, second = metadata & 3, metadata >> 2 & 3
    assert bool((first < second).all()) and bool(((metadata >> 4 & 3) < metadata >> 6).all())


@pytest.mark.parametrize(
    ("pattern", "dtype", "shape", "reason"),
    [
        ("4:8", torch.float16, (8, 8), "has no kernel for 4:8; 2:4 only"),
        ("block16x16:0.5", torch.float16, (16, 16), "has no kernel for block16x16:0.5; 2:4 only"),
        ("2:4", torch.float32, (8, 8), "has no kernel for torch.float32; torch.float16 and torch.bfloat16 only"),
        ("2:4", torch.float16, (8, 0), "takes weights of 1 to 2147483519 input features, not 8x0"),
    ],
)
def test_what_has_no_such_layout_is_named(
    pattern: str, dtype: torch.dtype, shape: tuple[int, int], reason: str
) -> None:
    assert wgmma_why_not(parse(pattern), dtype, shape) == reason


def test_packing_another_weight_is_refused() -> None:
    with pytest.raises(PatternError, match=r"the wgmma.sp layout has no kernel for torch.float32"):
        to_wgmma(pack(torch.zeros(4, 8), "2:4"))
