"""The cusparselt adapter without a GPU: its reasons, and its algebra on a stand-in for the library's two calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.backends.gpu import cusparselt
from sparsecomp.backends.gpu.cusparselt import CusparseltBackend
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import parse


def _request(
    pattern: str = "2:4", shape: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.float16, device: str = "cuda"
) -> Request:
    return Request(parse(pattern), shape, dtype, device, 1)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("1:4"), "has no kernel for 1:4; 2:4 only"),
        (_request("64:2:8"), "has no kernel for 64:2:8; 2:4 only"),
        (_request("block16x16:0.5"), "has no kernel for block16x16:0.5; 2:4 only"),
        (_request(dtype=torch.float32), "has no kernel for torch.float32; torch.float16 and torch.bfloat16 only"),
        (_request(dtype=torch.int8), "has no kernel for torch.int8; torch.float16 and torch.bfloat16 only"),
        (_request(shape=(64, 72)), "takes weights whose sides are multiples of 16, not 64x72"),
        (_request(shape=(8, 64)), "takes weights whose sides are multiples of 16, not 8x64"),
        (_request(shape=(0, 64)), "takes weights whose sides are multiples of 16, not 0x64"),
        (_request(device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_supports_says_why_not(request_: Request, reason: str) -> None:
    assert CusparseltBackend().supports(request_) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_is_named() -> None:
    reason = CusparseltBackend().missing()
    assert reason is not None and ("CUDA" in reason or "ROCm" in reason)
    assert CusparseltBackend().supports(_request()) == reason


def test_prepare_refuses_what_supports_refuses() -> None:
    with pytest.raises(BackendError, match="the cusparselt backend takes weights whose sides are multiples of 16"):
        CusparseltBackend().prepare(pack(torch.zeros(8, 8, dtype=torch.float16), "2:4"))


def _compress(dense: Tensor) -> Tensor:
    return dense.clone()


def _multiply(
    compressed: Tensor, dense_b: Tensor, bias: Tensor | None = None, transpose_result: bool = False
) -> Tensor:
    # what torch's source does with the operand: a non-contiguous one is read as a contiguous transpose
    assert transpose_result and not dense_b.is_contiguous() and dense_b.t().is_contiguous()
    assert dense_b.shape[1] % 8 == 0, "the dense operand is not padded"
    return functional.linear(dense_b.t(), compressed, bias)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", _compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", _multiply)
    # so that small weights are given back in several parts, too
    monkeypatch.setattr(cusparselt, "_RESTORE_COLUMNS", 1024)


def _packed(out: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    dense = torch.randn(out, columns // 4, 4, generator=torch.Generator().manual_seed(0))
    dense[..., :2][torch.rand(out, columns // 4, 2) > 0.5] = 0
    dense = dense * (dense.abs().argsort(dim=2).argsort(dim=2) >= 2)
    return pack(dense.flatten(1).to(dtype), "2:4")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out", "columns"), [(16, 16), (32, 1040), (16, 2048)])
def test_restore_is_exact(out: int, columns: int, dtype: torch.dtype) -> None:
    packed = _packed(out, columns, dtype)
    restored = CusparseltBackend().restore(CusparseltBackend().prepare(packed))
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    assert (restored.shape, restored.pattern) == (packed.shape, packed.pattern)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_run_pads_the_batch_and_takes_any_row_stride(batch: int, with_bias: bool) -> None:
    packed = _packed(32, 48, torch.float16)
    kernel = CusparseltBackend().prepare(packed)
    x = torch.randn(batch, 50).to(torch.float16)[:, :48]
    bias = torch.randn(32).to(torch.float16) if with_bias else None
    y = CusparseltBackend().run(kernel, x, bias)
    assert y.shape == (batch, 32)
    torch.testing.assert_close(y, functional.linear(x, packed.unpack(), bias), rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("library")
def test_x_is_copied_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = CusparseltBackend().prepare(_packed(16, 32, torch.float16))
    seen: list[int] = []

    def multiply(compressed: Tensor, dense_b: Tensor, **rest: object) -> Tensor:
        seen.append(dense_b.data_ptr())
        return _multiply(compressed, dense_b, None, True)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    memory = torch.randn(40 * 32 + 64).to(torch.float16)
    start = -memory.data_ptr() % 16 // 2
    aligned = memory[start : start + 16 * 32].view(16, 32)
    shifted = memory[start + 1 : start + 1 + 16 * 32].view(16, 32)
    wide = memory[start : start + 16 * 64].view(16, 64)[:, :32]
    for x, kept in ((aligned, True), (aligned[:8], True), (aligned[:7], False), (shifted, False), (wide, False)):
        y = CusparseltBackend().run(kernel, x, None)
        assert (seen[-1] == x.data_ptr()) == kept and seen[-1] % 16 == 0
        torch.testing.assert_close(y, functional.linear(x, kernel.tensors[0]), rtol=2e-3, atol=2e-3)


def test_a_library_that_loses_bits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense * (1 - 2**-7))
    monkeypatch.setattr(torch, "_cslt_sparse_mm", _multiply)
    with pytest.raises(BackendError, match="does not give this weight back exactly"):
        CusparseltBackend().prepare(_packed(16, 16, torch.float16))
