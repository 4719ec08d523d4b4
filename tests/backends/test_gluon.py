"""The gluon adapter without a GPU: layout and reasons, and SparseLinear through it, its kernel executed on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsecomp import SparseLinear
from sparsecomp.activations import ACTIVATIONS
from sparsecomp.backends.gluon import GluonBackend
from sparsecomp.backends.registry import Request, explain
from sparsecomp.errors import BackendError, PatternError
from sparsecomp.pack.format import pack
from sparsecomp.pack.fragments import to_fragments
from sparsecomp.pack.quantize import quantize
from sparsecomp.patterns import parse

HALF, BRAIN = torch.float16, torch.bfloat16


def _weight(out: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out + columns)
    mask = torch.rand(out, -(-columns // 4), 4, generator=generator).argsort(dim=2) < 2
    return (torch.randn(out, columns, generator=generator) * mask.flatten(1)[:, :columns]).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 128), (100, 250)])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_restore_is_the_inverse_of_prepare(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = pack(_weight(*shape, dtype), "2:4")
    kernel = GluonBackend().prepare(packed)
    restored = GluonBackend().restore(kernel)
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    assert torch.equal(GluonBackend().dense(kernel), packed.unpack())


def test_other_weights_are_refused() -> None:
    with pytest.raises(BackendError, match="the gluon backend has no kernel for 1:4; 2:4 only"):
        GluonBackend().prepare(pack(torch.zeros(8, 8, dtype=HALF), "1:4"))


def test_quantised_weights_are_refused() -> None:
    quantized = quantize(pack(_weight(64, 64, HALF), "2:4"))
    with pytest.raises(BackendError, match=r"has no kernel for torch\.int8"):
        GluonBackend().prepare(quantized)
    with pytest.raises(PatternError, match=r"has no kernel for torch\.int8"):
        to_fragments(quantized)


def _request(pattern: str = "2:4", dtype: torch.dtype = HALF, device: str = "cuda", quantized: bool = False) -> Request:
    return Request(parse(pattern), (64, 64), dtype, device, 1, quantized)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("4:8"), "has no kernel for 4:8; 2:4 only"),
        (_request(dtype=torch.float32), "has no kernel for torch.float32; torch.float16 and torch.bfloat16 only"),
        (_request(quantized=True), "has no kernel for torch.int8; torch.float16 and torch.bfloat16 only"),
        (_request(device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_supports_says_why_not(request_: Request, reason: str) -> None:
    assert GluonBackend().supports(request_) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_is_named() -> None:
    reason = GluonBackend().missing()
    assert reason is not None and ("CUDA" in reason or "ROCm" in reason)
    assert dict(explain(_request()))["gluon"] == reason


def test_a_gpu_that_is_new_enough_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert GluonBackend().supports(_request()) is None


def test_the_adapter_does_not_import_triton() -> None:
    code = "import sys, sparsecomp.backends.gluon as g; g.GluonBackend(); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_layer_runs_through_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # everything but the launch is as on a GPU: the layer, its operator, its state; the compiled PTX runs on the CPU
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "kernels_gpu"))
    from gluon_simulator import Simulator

    from sparsecomp.kernels import sparse_mma

    monkeypatch.setattr(sparse_mma, "launch", Simulator().launch)
    monkeypatch.setattr(sparse_mma, "gpu", lambda index: (80, 108))
    monkeypatch.setattr(sparse_mma, "tuned", lambda key, options, run: options[0])
    monkeypatch.setattr(GluonBackend, "supports", lambda self, request: None)
    monkeypatch.setattr(GluonBackend, "missing", lambda self: None)
    linear = torch.nn.Linear(72, 40, dtype=HALF)
    with torch.no_grad():
        linear.weight.copy_(_weight(40, 72, HALF))
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        layer = SparseLinear.from_linear(linear, backend="gluon")
        assert layer.kernel.backend == "gluon" and torch.equal(layer.weight, linear.weight)
        x = torch.randn(2, 3, 72, dtype=HALF)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), linear(x))
        x.requires_grad_()
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(2, 3, 72), rtol=1e-2, atol=1e-2)
        assert layer(x[:0]).shape == (0, 3, 40)
        fused = SparseLinear.from_linear(linear, activation="gelu", backend="gluon")
        with torch.no_grad():
            torch.testing.assert_close(fused(x), torch.nn.functional.gelu(linear(x)), rtol=2e-3, atol=2e-3)
        assert set(sparse_mma.ACTIVATIONS) == set(ACTIVATIONS)
    fresh = SparseLinear(72, 40, dtype=HALF, backend="gluon")
    fresh.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.kernel.tensors, layer.kernel.tensors, strict=True))
