"""The CUTLASS backend without a GPU: operands, strides, tails, reasons; a slow twin replaces the kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from sparsecomp.activations import ACTIVATIONS, activate
from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass import library as cutlass_library
from sparsecomp.backends.gpu.cutlass.backend import CutlassBackend, other_gpu
from sparsecomp.backends.gpu.cutlass.config import candidates, configs
from sparsecomp.backends.gpu.cutlass.library import aligned
from sparsecomp.backends.registry import explain
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.machine.sources import cuda_folder
from sparsecomp.nn import SparseLinear
from sparsecomp.packing.format import pack
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8, Numbers
from tests.backends.cutlass_twins import Twins, twin_folder, twins

__all__ = ["twin_folder", "twins"]

HALF, BRAIN = torch.float16, torch.bfloat16
TOLERANCE = {HALF: 1e-3, BRAIN: 8e-3}


def _weight(out: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // 4)
    mask = (torch.rand(out, groups, 4, generator=generator).argsort(dim=2) < 2).flatten(1)[:, :columns]
    weight = torch.randn(out, columns, generator=generator) * mask
    # groups with fewer than two nonzeros
    return (weight * (torch.rand(out, columns, generator=generator) > 0.1)).to(dtype)


def _check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == exact.shape and y.is_contiguous()
    torch.testing.assert_close(y.double(), exact, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (64, 128), (70, 250), (128, 260)])
@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_products_of_any_shape(twins: Twins, shape: tuple[int, int], dtype: torch.dtype, batch: int) -> None:
    weight = _weight(*shape, dtype)
    kernel = CutlassBackend().prepare(pack(weight, "2:4"))
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    _check(CutlassBackend().run(kernel, x, bias), x, weight, bias)
    _check(CutlassBackend().run(kernel, x, None), x, weight, None)


@pytest.mark.parametrize("gap", [0, 3, 7, 8, 40])
@pytest.mark.parametrize("start", [0, 1, 8])
def test_strided_x_is_copied_only_where_its_rows_are_not_aligned(twins: Twins, gap: int, start: int) -> None:
    weight = _weight(24, 72, HALF)
    kernel = CutlassBackend().prepare(pack(weight, "2:4"))
    wide = torch.full((5, start + 72 + gap), torch.nan, dtype=HALF)
    x = wide[:, start : start + 72]
    x.copy_(torch.randn(5, 72).to(HALF))
    free = wide.data_ptr() % 16 == 0 and wide.shape[1] % 8 == 0 and start % 8 == 0
    assert (aligned(x) is x) == free
    assert torch.equal(aligned(x), x) and aligned(x).data_ptr() % 16 == 0
    _check(CutlassBackend().run(kernel, x, None), x, weight, None)


def test_overlapping_and_transposed_rows_are_copied(twins: Twins) -> None:
    weight = _weight(16, 64, HALF)
    kernel = CutlassBackend().prepare(pack(weight, "2:4"))
    expanded = torch.randn(1, 64).to(HALF).expand(4, 64)
    _check(CutlassBackend().run(kernel, expanded, None), expanded, weight, None)
    transposed = torch.randn(64, 8).to(HALF).t()
    _check(CutlassBackend().run(kernel, transposed, None), transposed, weight, None)
    single = torch.randn(64, 3).to(HALF)[:, 1:2].t()
    _check(CutlassBackend().run(kernel, single, None), single, weight, None)
    odd = torch.randn(1, 67).to(HALF)[:, 3:]
    assert odd.data_ptr() % 16 != 0
    _check(CutlassBackend().run(kernel, odd, None), odd, weight, None)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_fused(twins: Twins, activation: str) -> None:
    weight = _weight(20, 40, HALF)
    kernel = CutlassBackend().prepare(pack(weight, "2:4"))
    x, bias = torch.randn(6, 40).to(HALF), torch.randn(20).to(HALF)
    y = CutlassBackend().run_activated(kernel, x, bias, activation)
    exact = activate(functional.linear(x.double(), weight.double(), bias.double()), activation)
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_header_numbers_the_activations_alike() -> None:
    header = (cuda_folder() / "activation.cuh").read_text()
    names = ["".join(part.capitalize() for part in name.split("_")) for name in ACTIVATIONS]
    wanted = ", ".join(f"k{name} = {number}" for number, name in enumerate(names))
    assert f"{{ {wanted} }}" in header


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 128), (100, 250)])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "2:4@v4"])
def test_restore_is_the_inverse_of_prepare(shape: tuple[int, int], dtype: torch.dtype, pattern: str) -> None:
    weight = _weight(*shape, dtype)
    if pattern != "2:4":
        weight = weight[:1].expand(shape).contiguous()
    packed = pack(weight, pattern)
    restored = CutlassBackend().restore(CutlassBackend().prepare(packed))
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    assert restored.pattern == packed.pattern and restored.shape == packed.shape


def test_a_layer_runs_through_it(twins: Twins) -> None:
    linear = torch.nn.Linear(72, 40, dtype=BRAIN)
    with torch.no_grad():
        linear.weight.copy_(_weight(40, 72, BRAIN))
    layer = SparseLinear.from_linear(linear, backend="cutlass")
    x = torch.randn(2, 3, 72, dtype=BRAIN, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, linear(x), rtol=2e-2, atol=2e-2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(2, 3, 72), rtol=3e-2, atol=3e-2)
    assert layer(x[:0]).shape == (0, 3, 40) and torch.equal(layer.weight, linear.weight)
    assert twins.loaded[0].element == "bfloat16"


def test_a_refusal_of_the_library_is_named(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = CutlassBackend().prepare(pack(_weight(16, 64, HALF), "2:4"))
    monkeypatch.setattr(cutlass_library, "aligned", lambda x: x)
    x = torch.randn(2, 68).to(HALF)[:, 4:]
    with pytest.raises(BackendError, match=r"refused a product of 2 tokens with a weight of 16x64 \(misaligned\)"):
        CutlassBackend().run(kernel, x, None)


def test_other_weights_are_refused() -> None:
    with pytest.raises(BackendError, match="the cutlass backend has no kernel for 1:4; 2:4 only"):
        CutlassBackend().prepare(pack(torch.zeros(8, 8, dtype=HALF), "1:4"))
    with pytest.raises(BackendError, match=r"has no kernel for torch\.int8"):
        CutlassBackend().prepare(quantize(pack(_weight(64, 64, HALF), "2:4")))


def _request(
    pattern: str = "2:4", dtype: torch.dtype = HALF, device: str = "cuda", numbers: Numbers = FLOAT
) -> Request:
    return Request(parse(pattern), (64, 64), dtype, device, 1, numbers)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("4:8"), "has no kernel for 4:8; 2:4 only"),
        (_request(dtype=torch.float32), "has no kernel for torch.float32; torch.float16 and torch.bfloat16 only"),
        (_request(numbers=INT8), "has no kernel for torch.int8; torch.float16 and torch.bfloat16 only"),
        (_request(device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_supports_says_why_not(request_: Request, reason: str) -> None:
    assert CutlassBackend().supports(request_) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_is_named() -> None:
    reason = CutlassBackend().missing()
    assert reason is not None and ("CUDA" in reason or "ROCm" in reason)
    assert dict(explain(_request()))["cutlass"] == reason


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")


def test_only_hopper_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutlass_build, "why_not", lambda needed: None)
    _pretend_gpu(monkeypatch, (9, 0))
    assert CutlassBackend().supports(_request()) is None
    for capability in ((8, 9), (10, 0)):
        _pretend_gpu(monkeypatch, capability)
        reason = f"NVIDIA Something has compute capability {capability[0]}.{capability[1]}; wgmma is of 9.0"
        assert str(other_gpu("cuda:0")).startswith(reason)
        assert str(CutlassBackend().supports(_request())).startswith(reason)


def test_a_gpu_without_a_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(cutlass_build, "why_not", lambda needed: "finds no nvcc")
    assert CutlassBackend().supports(_request()) == "finds no nvcc"
    assert dict(explain(_request()))["cutlass"] == "finds no nvcc"


@pytest.mark.slow
def test_the_adapter_loads_nothing() -> None:
    code = (
        "import sys, sparsecomp.backends.gpu.cutlass.backend as c; c.CutlassBackend();"
        "from sparsecomp.backends.gpu.cutlass import build as b, library as l;"
        "sys.exit('triton' in sys.modules or b.toolchain.cache_info().misses or l.load.cache_info().misses)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_small_batches_get_small_tiles_and_large_ones_large_tiles() -> None:
    options = configs("bfloat16", "bfloat16")
    assert len(set(options)) == len(options) == len({str(option) for option in options})
    assert candidates(options, 4096, 1, 132)[0].config.tokens == 32
    large = candidates(options, 4096, 8192, 132)
    assert large[0].config.out * large[0].config.tokens == 128 * 256
    assert {choice.swizzle for choice in large} == {1, 4}
    assert len(set(large)) == len(large)
