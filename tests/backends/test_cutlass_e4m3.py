"""The fp8 backend through the slow twin of its kernels: rounding, restoring, products, layers, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sparsecomp import SparseLinear
from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass.e4m3 import FP8, CutlassFp8Backend, CutlassFp8TensorBackend, rounded
from sparsecomp.backends.registry import explain
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8, Numbers
from tests.backends.cutlass_twins import Twins, twin_folder, twins

__all__ = ["twin_folder", "twins"]

HALF, BRAIN = torch.float16, torch.bfloat16
BOTH = [CutlassFp8Backend(), CutlassFp8TensorBackend()]
SHAPES = [(1, 1), (5, 33), (64, 128), (70, 250)]


def _packed(out: int, columns: int, dtype: torch.dtype = BRAIN) -> PackedWeight:
    generator = torch.Generator().manual_seed(out + columns)
    mask = (torch.rand(out, -(-columns // 4), 4, generator=generator).argsort(dim=2) < 2).flatten(1)[:, :columns]
    sizes = torch.logspace(-3, 2, out).unsqueeze(1)
    return pack((torch.randn(out, columns, generator=generator) * mask * sizes).to(dtype), "2:4")


@pytest.mark.parametrize("backend", BOTH, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rounded_weight_is_given_back_exactly(
    backend: CutlassFp8Backend, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    packed = _packed(*shape, dtype)
    kernel = backend.prepare(packed)
    assert kernel.tensors[0].dtype == FP8 and kernel.numbers == FLOAT and kernel.dtype == dtype
    scales = kernel.tensors[2]
    assert scales.shape == ((shape[0],) if backend.name == "cutlass_fp8" else (1,))
    assert bool((scales.frexp().mantissa == 0.5).all()), "powers of two"
    once = backend.restore(kernel).validate()
    assert torch.equal(backend.dense(kernel), once.unpack())
    # to 4 bits, or to a 512th of the scale among the smallest
    off = (once.unpack().double() - packed.unpack().double()).abs()
    assert bool((off <= packed.unpack().double().abs() / 16 + scales.double().unsqueeze(1) / 1024).all())
    again = backend.prepare(once)
    assert torch.equal(backend.dense(again), once.unpack())
    wide = [(each.tensors[0].double() * each.tensors[2].double().unsqueeze(1)).abs().sum(1) for each in (kernel, again)]
    assert torch.equal(wide[0], wide[1]), "16 bits hold what the kernel multiplies"


def test_rows_that_share_a_mask_are_restored() -> None:
    dense = (torch.randn(8, 16) * torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(4)).to(BRAIN)
    backend, packed = CutlassFp8Backend(), pack(dense, "2:4@v4")
    restored = backend.restore(backend.prepare(packed)).validate()
    assert torch.equal(restored.metadata, packed.metadata) and restored.pattern == packed.pattern


@pytest.mark.parametrize("backend", BOTH, ids=lambda backend: backend.name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 9])
def test_products_match_the_twin(twins: Twins, backend: CutlassFp8Backend, shape: tuple[int, int], batch: int) -> None:
    kernel = backend.prepare(_packed(*shape))
    x, bias = torch.randn(batch, shape[1]).to(BRAIN), torch.randn(shape[0]).to(BRAIN)
    for activation, shift in (("none", bias), ("silu", None)):
        y = backend.run_activated(kernel, x, shift, activation)
        twin = backend.run_slowly(kernel, x, shift, activation)
        assert y.dtype == BRAIN and y.shape == (batch, shape[0])
        torch.testing.assert_close(y, twin, rtol=1.6e-2, atol=2e-2)


def test_x_is_rounded_token_by_token_or_as_a_whole() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [300.0, 100.0, 7.0], [1.0, float("inf"), 2.0]]).to(BRAIN)
    values, scales = rounded(x, per_row=True)
    assert values.dtype == FP8 and values.float()[0].tolist() == [224.0, -448.0, 112.0]
    assert values.float()[1].tolist() == [0.0, 0.0, 0.0] and values.float()[2, 0] == 448
    assert bool((values.float() * scales.unsqueeze(1))[3].isnan().all())
    off = (values.float() * scales.unsqueeze(1) - x.float())[:3].abs()
    assert bool((off <= x[:3].float().abs() / 16 + scales[:3].unsqueeze(1) / 1024).all())
    values, scales = rounded(x[:3], per_row=False)
    assert scales.shape == (1,) and values.float()[2, 0] == 448
    for per_row, count in ((True, 0), (False, 1)):
        values, scales = rounded(x[:0], per_row)
        assert values.shape == (0, 3) and scales.shape == (count,)


@pytest.mark.parametrize("backend", BOTH, ids=lambda backend: backend.name)
def test_a_layer_by_name(twins: Twins, backend: CutlassFp8Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (CutlassFp8Backend, CutlassFp8TensorBackend):
        monkeypatch.setattr(kind, "supports", lambda self, request: None)
        monkeypatch.setattr(kind, "missing", lambda self: None)
    packed = _packed(24, 40)
    layer = SparseLinear.from_packed(packed, torch.randn(24), backend=backend.name, activation="relu")
    x = torch.randn(2, 3, 40).to(BRAIN).requires_grad_()
    y = layer(x)
    twin = backend.run_slowly(layer.kernel, x.detach().flatten(0, 1), layer.bias, "relu").view(2, 3, 24)
    torch.testing.assert_close(y, twin, rtol=1.6e-2, atol=2e-2)
    y.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    again = SparseLinear(40, 24, dtype=BRAIN, activation="relu")
    again.load_state_dict(layer.state_dict())  # the rounded weight, in any other kernel
    assert torch.equal(again.weight, layer.weight)


def _request(device: str = "cuda:0", numbers: Numbers = FLOAT, pattern: str = "2:4") -> Request:
    return Request(parse(pattern), (64, 64), BRAIN, device, 1, numbers)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CutlassFp8Backend()
    assert backend.supports(_request("cpu")) == "runs on cuda, not on cpu"
    own = "rounds fp16 and bf16 weights to fp8 itself and takes none in int8"
    assert backend.supports(_request(numbers=INT8)) == own
    assert backend.supports(_request(pattern="4:8")) == "has no kernel for 4:8; 2:4 only"
    with pytest.raises(BackendError, match="the cutlass_fp8 backend rounds"):
        backend.prepare(quantize(_packed(16, 32)))
    with pytest.raises(BackendError, match=r"the cutlass_fp8 backend has no kernel for torch\.float32"):
        backend.prepare(_packed(16, 32, torch.float32))


def test_it_is_taken_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sparsecomp.backends.gpu.cutlass.e4m3", "sparsecomp.backends.gpu.cutlass.backend"):
        monkeypatch.setattr(f"{module}.missing_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cutlass_build, "why_not", lambda needed: None)
    for backend in BOTH:
        assert backend.missing() is None and backend.supports(_request()) is None
        assert f'taken by name only: backend="{backend.name}"' in str(dict(explain(_request()))[backend.name])
    monkeypatch.setattr(cutlass_build, "why_not", lambda needed: "finds no nvcc")
    assert BOTH[0].supports(_request()) == "finds no nvcc"
