"""torch's own 2:4 kernel as a backend: layout, reasons and orientation; the kernel is replaced, for it needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.backends.gpu.semi_structured import SemiStructuredBackend
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.interop import to_torch_semi_structured
from sparsecomp.packing.layouts.sm80 import from_sm80_metadata
from sparsecomp.patterns import parse

HALF, BRAIN = torch.float16, torch.bfloat16


def _packed(out: int, columns: int, dtype: torch.dtype = HALF) -> PackedWeight:
    generator = torch.Generator().manual_seed(out + columns)
    mask = torch.rand(out, columns // 4, 4, generator=generator).argsort(dim=2) < 2
    return pack((torch.randn(out, columns, generator=generator) * mask.flatten(1)).to(dtype), "2:4")


def _dense(values: Tensor, metadata: Tensor) -> Tensor:
    out, kept = values.shape
    dense = torch.zeros(out, kept // 2, 4, dtype=values.dtype)
    dense.scatter_(2, from_sm80_metadata(metadata).to(torch.int64), values.view(out, kept // 2, 2))
    return dense.flatten(1)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """torch's kernel, by way of the metadata; gives the shapes of the operands it was given."""
    seen: list[tuple[int, ...]] = []

    def multiply(values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        assert x.t().is_contiguous() and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0
        seen.append(tuple(x.shape))
        return _dense(values, metadata) @ x

    def add(bias: Tensor, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        return multiply(values, metadata, x) + bias.unsqueeze(1)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", multiply)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", add)
    return seen


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (96, 192)])
def test_the_layout_is_torchs_own_and_restores_exactly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = _packed(*shape, dtype)
    kernel = SemiStructuredBackend().prepare(packed)
    twin = to_torch_semi_structured(packed)
    assert torch.equal(kernel.tensors[0], twin.packed) and torch.equal(kernel.tensors[1], twin.meta)
    restored = SemiStructuredBackend().restore(kernel).validate()
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products(batch: int, with_bias: bool, kernel: list[tuple[int, ...]]) -> None:
    packed = _packed(32, 64)
    x = torch.randn(batch, 66).to(HALF)[:, :64]
    bias = torch.randn(32).to(HALF) if with_bias else None
    y = SemiStructuredBackend().run(SemiStructuredBackend().prepare(packed), x, bias)
    assert y.shape == (batch, 32) and y.is_contiguous()
    assert kernel == ([(64, -(-batch // 8) * 8)] if batch else [])
    torch.testing.assert_close(y, functional.linear(x, packed.unpack(), bias), rtol=2e-3, atol=2e-2)


def _request(pattern: str = "2:4", shape: tuple[int, int] = (32, 64), dtype: torch.dtype = HALF) -> Request:
    return Request(parse(pattern), shape, dtype, "cuda:0", 1)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("4:8"), "has no kernel for 4:8; 2:4 only"),
        (_request("2:4@v4"), "has no kernel for 2:4@v4; 2:4 only"),
        (_request(dtype=torch.float32), "has no kernel for torch.float32; torch.float16 and torch.bfloat16 only"),
        (_request(shape=(48, 64)), "takes weights in multiples of 32x64, not 48x64"),
        (_request(shape=(32, 96)), "takes weights in multiples of 32x64, not 32x96"),
        (_request(shape=(0, 64)), "takes weights in multiples of 32x64, not 0x64"),
    ],
)
def test_supports_says_why_not(request_: Request, reason: str) -> None:
    assert SemiStructuredBackend().supports(request_) == reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_only_ampere_and_ada_are_taken(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsecomp.backends.gpu.semi_structured.missing_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    reason = f"a GPU has compute capability {capability[0]}.{capability[1]}; torch has this kernel for 8.x alone"
    assert SemiStructuredBackend().supports(_request()) == (None if capability[0] == 8 else reason)
    monkeypatch.delattr(torch, "_sparse_semi_structured_addmm")
    assert "has no CUTLASS kernel for semi-structured weights" in str(SemiStructuredBackend().missing())


def test_prepare_refuses_what_supports_refuses() -> None:
    with pytest.raises(BackendError, match="the semi_structured backend takes weights in multiples of 32x64"):
        SemiStructuredBackend().prepare(_packed(16, 64))
