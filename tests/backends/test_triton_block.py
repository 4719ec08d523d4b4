"""The block-sparse GPU adapter without a GPU: its layout, exactly undone, and its reasons."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparsecomp.backends.gpu.triton_block import TritonBlockBackend
from sparsecomp.backends.registry import explain
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import Block, parse
from sparsecomp.patterns.numbers import FLOAT, INT8


def _packed(pattern: str, out: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    block = parse(pattern)
    assert isinstance(block, Block)
    down, across = block.grid(out, columns)
    generator = torch.Generator().manual_seed(out + columns)
    order = torch.rand(down * across, generator=generator).argsort().argsort().view(down, across)
    kept = (order < block.kept_blocks(out, columns)).repeat_interleave(block.rows, 0).repeat_interleave(block.cols, 1)
    dense = torch.arange(1, out * columns + 1).view(out, columns) % 97 - 48
    return pack((dense * kept[:out, :columns]).to(dtype), pattern)


@pytest.mark.parametrize("pattern", ["block16x16:0.5", "block32x64:0.25", "block128x16:1"])
@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (100, 250)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_is_the_inverse_of_prepare(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = _packed(pattern, *shape, dtype)
    kernel = TritonBlockBackend().prepare(packed)
    restored = TritonBlockBackend().restore(kernel)
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    assert kernel.numbers == FLOAT
    starts, columns = kernel.tensors[1].split([len(kernel.tensors[1]) - len(packed.values), len(packed.values)])
    assert starts[0] == 0 and starts[-1] == len(columns) == len(packed.values)
    for row in range(len(starts) - 1):
        inside = columns[starts[row] : starts[row + 1]].tolist()
        assert inside == sorted(set(inside))


def test_a_weight_without_blocks_has_empty_rows() -> None:
    kernel = TritonBlockBackend().prepare(pack(torch.zeros(64, 64, dtype=torch.float16), "block16x16:0.5"))
    assert kernel.tensors[0].shape == (0, 16, 16) and not kernel.tensors[1].any()
    assert not TritonBlockBackend().dense(kernel).any()


@pytest.mark.parametrize(
    ("pattern", "dtype", "reason"),
    [
        ("2:4", torch.float16, "has no kernel for 2:4; blocks only"),
        ("block8x16:0.5", torch.float16, "has no kernel for blocks of 8x16; sides of 16, 32, 64 or 128 only"),
        ("block16x16:0.5", torch.int8, "has no kernel for torch.int8"),
    ],
)
def test_other_weights_are_refused(pattern: str, dtype: torch.dtype, reason: str) -> None:
    request = Request(parse(pattern), (64, 64), dtype, "cuda", 1)
    assert str(TritonBlockBackend().supports(request)).startswith(reason)
    with pytest.raises(BackendError, match="the triton_block backend has no kernel"):
        TritonBlockBackend().prepare(pack(torch.zeros(64, 64, dtype=dtype), pattern))


def test_int8_weights_with_scales_are_refused() -> None:
    request = Request(parse("block16x16:0.5"), (64, 64), torch.float16, "cuda", 1, numbers=INT8)
    assert str(TritonBlockBackend().supports(request)).startswith("has no kernel for torch.int8")


def test_other_devices_are_named() -> None:
    request = Request(parse("block16x16:0.5"), (64, 64), torch.float16, "cpu", 1)
    assert dict(explain(request))["triton_block"] is not None
    assert TritonBlockBackend().supports(request) == "runs on cuda, not on cpu"


@pytest.mark.slow
def test_the_adapter_does_not_import_triton() -> None:
    code = (
        "import sys, sparsecomp.backends.gpu.triton_block as t; "
        "t.TritonBlockBackend(); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
