"""The simulator's mma.sp against torch's layout, which is what CUTLASS's kernels read, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from tests.kernels.ptx_snippets import run_snippet
from tests.kernels.ptxsim import SimulationError

_SPARSE = """
	mul.wide.u32 %rd6, %r1, 32;
	add.s64 %rd7, %rd1, %rd6;	// 8 words a thread: a0..a3, b0..b3
	ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd7];
	ld.global.v4.b32 {{%r14, %r15, %r16, %r17}}, [%rd7+16];
	add.s64 %rd8, %rd1, %rd3;
	ld.global.b32 %r18, [%rd8+1024];
	mov.b32 %r20, 0;
	mma.sp{ordered}.sync.aligned.{types}
		{{%r21, %r22, %r23, %r24}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15, %r16, %r17}},
		{{%r20, %r20, %r20, %r20}}, %r18, {selector};
	mul.wide.u32 %rd9, %r1, 16;
	add.s64 %rd10, %rd2, %rd9;
	st.global.v4.b32 [%rd10], {{%r21, %r22, %r23, %r24}};
"""
_TYPES = {
    torch.float16: "m16n8k32.row.col.f32.f16.f16.f32",
    torch.bfloat16: "m16n8k32.row.col.f32.bf16.bf16.f32",
    torch.float32: "m16n8k16.row.col.f32.tf32.tf32.f32",
    torch.int8: "m16n8k64.row.col.s32.s8.s8.s32",
}
# rows of the tile whose metadata is 32 words, one for each lane: torch writes them in this order
_ROWS = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 32, torch.int8: 16}


def _sparse_product(
    values: torch.Tensor, metadata: np.ndarray, b: torch.Tensor, selector: int, ordered: bool = True
) -> torch.Tensor:
    """D [16, 8] of one mma.sp, its operands [16, K/2] and [K, 8] put into lanes as the PTX manual's figures show."""
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    size = values.dtype.itemsize
    left, right = (each.contiguous().view(torch.uint8).numpy() for each in (values, b.t()))
    words = np.zeros((32, 8, 4), np.uint8)
    # of either operand a register is 4 neighbouring bytes along K; rows of A and columns of B are rows here
    for i in range(4):
        for byte in range(4):
            words[:, i, byte] = left[g + 8 * (i % 2), 4 * t + byte + 16 * (i // 2)]
            words[:, 4 + i, byte] = right[g, 4 * t + byte + 16 * i]
    assert left.shape[1] == 32 and right.shape[1] == 64 == b.shape[0] * size
    body = _SPARSE.format(
        types=_TYPES[values.dtype], selector=hex(selector), ordered="::ordered_metadata" if ordered else ""
    )
    got, _ = run_snippet(body, np.concatenate([words.view(np.uint32).reshape(-1), metadata]), out_words=128)
    numbers = torch.from_numpy(got.view(np.int32 if values.dtype == torch.int8 else np.float32).reshape(32, 4).copy())
    result = torch.zeros(16, 8, dtype=numbers.dtype)
    for i in range(4):
        result[g + 8 * (i // 2), 2 * t + i % 2] = numbers[:, i]
    return result


def _sparse_tile(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A weight of integers, as wide as one instruction, in which every choice of positions occurs; sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = _ROWS[dtype], 64 // dtype.itemsize
    kept, of = (1, 2) if dtype == torch.float32 else (2, 4)
    order = torch.rand(rows, columns // of, of, generator=generator).argsort(dim=2)
    weight = torch.randint(1, 9, (rows, columns // of, of), generator=generator) * (order < kept)
    codes = ((order < kept) * 2 ** torch.arange(of)).sum(2)
    assert len(torch.unique(codes)) == (2 if dtype == torch.float32 else 6)
    return weight.flatten(1).to(dtype)


def _torch_form(weight: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    return values, metadata.contiguous().flatten().view(torch.int32).numpy().view(np.uint32)


def _right(dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-4, 5, (64 // dtype.itemsize, 8)).to(dtype)


@pytest.mark.parametrize("dtype", _TYPES, ids=str)
def test_sparse_products_read_metadata_as_torch_writes_it(dtype: torch.dtype) -> None:
    # torch's converter is what CUTLASS's kernels take: of a tile lane l is given word l, and for 16 and 32 bits the
    # selector says whether lanes 0 and 1 of each four (rows 0 to 15) or lanes 2 and 3 (rows 16 to 31) count
    weight = _sparse_tile(dtype, 1)
    values, words = _torch_form(weight)
    b = _right(dtype)
    for selector in range(_ROWS[dtype] // 16):
        rows = slice(16 * selector, 16 * selector + 16)
        product = _sparse_product(values[rows], words, b, selector)
        assert torch.equal(product.float(), weight[rows].float() @ b.float())


@pytest.mark.parametrize("dtype", _TYPES, ids=str)
def test_metadata_of_other_lanes_gives_a_wrong_product(dtype: torch.dtype) -> None:
    weight = _sparse_tile(dtype, 2)
    values, words = _torch_form(weight)
    b = _right(dtype)
    exact = weight[:16].float() @ b.float()
    for swapped in (words.reshape(-1, 2)[:, ::-1], words.reshape(-1, 2, 2)[:, ::-1], words.reshape(2, -1)[::-1]):
        assert not torch.equal(_sparse_product(values[:16], swapped.reshape(-1), b, 0).float(), exact)


def test_metadata_that_no_packer_writes_is_refused() -> None:
    values, words = _torch_form(_sparse_tile(torch.float16, 2))
    b = _right(torch.float16)
    assert not torch.equal(_sparse_product(values[:16], words, b, 1), _sparse_product(values[:16], words, b, 0))
    # 0001: positions 1 and 0
    descending = np.full(32, 0x11111111, np.uint32)
    with pytest.raises(SimulationError, match="does not ascend"):
        _sparse_product(values[:16], descending, b, 0)
    _sparse_product(values[:16], descending, b, 0, ordered=False)
    values, words = _torch_form(_sparse_tile(torch.int8, 2))
    with pytest.raises(SimulationError, match="selector of this shape must be 0"):
        _sparse_product(values, words, _right(torch.int8), 1)
    with pytest.raises(SimulationError, match="does not ascend"):
        _sparse_product(values, descending, _right(torch.int8), 0)


def test_numbers_finer_than_tf32_are_refused() -> None:
    values, words = _torch_form(_sparse_tile(torch.float32, 3))
    fine = _right(torch.float32)
    fine[3, 2] = 1 + 2.0**-11
    with pytest.raises(SimulationError, match="bits that tf32 does not have"):
        _sparse_product(values[:16], words, fine, 0)
    with pytest.raises(SimulationError, match="neither 0100 nor 1110"):
        _sparse_product(values[:16], np.full(32, 0x99999999, np.uint32), _right(torch.float32), 0)


def test_integer_sums_wrap() -> None:
    # 127 * 127 on top of 2^31 - 1, which the instruction adds without saturating unless it says so
    body = """mov.b32 %r10, 0x7f7f7f7f;
	mov.b32 %r18, 0x44444444;
	mov.b32 %r20, 0x7fffffff;
	mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%r21, %r22, %r23, %r24},
		{%r10, %r10, %r10, %r10}, {%r10, %r10, %r10, %r10}, {%r20, %r20, %r20, %r20}, %r18, 0x0;
	st.global.b32 [%rd5], %r21;"""
    got, _ = run_snippet(body, np.zeros(32, np.uint32))
    assert set(got.tolist()) == {2**31 - 1 + 32 * 127 * 127}


def test_rounding_to_tf32() -> None:
    numbers = np.array(
        [1.0, 1 + 2.0**-11, 1 + 2.0**-12, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 0.0, np.inf, 3e38], np.float32
    )
    numbers = np.resize(numbers, 32)
    got, _ = run_snippet(
        "ld.global.b32 %r2, [%rd4];\ncvt.rna.tf32.f32 %r3, %r2;\nst.global.b32 [%rd5], %r3;", numbers.view(np.uint32)
    )
    wanted = [1.0, 1 + 2.0**-10, 1.0, 1 + 2 * 2.0**-10, -1 - 2.0**-10, 0.0, np.inf]
    assert got.view(np.float32)[:7].tolist() == wanted
    assert got.view(np.float32)[7] == pytest.approx(3e38, rel=2.0**-11)
