"""SparseLinear with int8 weights: against its own dequantised weight in float64, saved, copied, moved, exported."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.activations import activate
from sparsecomp.backends import registry
from sparsecomp.backends.registry import backends
from sparsecomp.errors import BackendError, ModelError
from sparsecomp.files.storage import inspect
from sparsecomp.machine.request import Request
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import SparseLinear
from sparsecomp.nn import operators as ops
from sparsecomp.patterns.numbers import INT8
from tests.sparse_layers import TOLERANCE, make


def quantised(
    out: int = 24, columns: int = 40, pattern: str = "2:4", dtype: torch.dtype = torch.float32, **options: Any
) -> SparseLinear:
    packed = sc.pack(prune_weight(torch.randn(out, columns), pattern).weight.to(dtype), pattern)
    return SparseLinear.from_packed(sc.quantize(packed), torch.randn(out), **options)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "5:8", "2:4@v4", "4:2:8"])
def test_product_is_that_of_the_dequantised_weight(pattern: str, dtype: torch.dtype, backend: str) -> None:
    if reason := backends()[backend].missing():
        pytest.skip(reason)
    for out, columns in [(1, 1), (17, 43), (24, 40)]:
        for activation in ("none", "gelu"):
            layer = quantised(out, columns, pattern, dtype, backend=backend, activation=activation)
            assert layer.quantized and layer.dtype == dtype and layer.bias is not None and layer.bias.dtype == dtype
            for batch in (0, 1, 7):
                x = torch.randn(batch, columns).to(dtype)
                weight = layer.packed().to(dtype=torch.float32).unpack().double()
                with torch.no_grad():
                    got, want = layer(x), activate(x.double() @ weight.T + layer.bias.double(), activation)
                scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
                torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("pattern", ["2:4", "5:8"])
def test_gradients_and_the_operator(pattern: str) -> None:
    layer, x = quantised(pattern=pattern, activation="silu"), torch.randn(3, 40, requires_grad=True)
    weight = layer.packed().unpack().double()
    x64 = x.detach().double().requires_grad_()
    assert layer.bias is not None
    want = activate(x64 @ weight.T + layer.bias.detach().double(), "silu")
    want.square().sum().backward()
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x.grad = None
        y = call(x)
        y.square().sum().backward()
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
        assert x.grad is not None and x64.grad is not None
        torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-3, atol=1e-3)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "meta": lambda layer: _loaded(SparseLinear(40, 24, device="meta", quantized=True), layer, assign=True),
    "state_dict": lambda layer: _loaded(SparseLinear(40, 24, quantized=True), layer),
    "bfloat16 and back": lambda layer: _bias_kept(layer, copy.deepcopy(layer).bfloat16().float()),
}


def _loaded(fresh: SparseLinear, layer: SparseLinear, **options: Any) -> SparseLinear:
    assert fresh.quantized
    fresh.load_state_dict(layer.state_dict(), **options)
    return fresh


def _bias_kept(layer: SparseLinear, other: SparseLinear) -> SparseLinear:
    other.bias = layer.bias
    return other


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_exact(how: str) -> None:
    layer = quantised()
    other, x = COPIES[how](layer), torch.randn(3, 40)
    assert sorted(layer.state_dict()) == ["bias", "metadata", "scales", "values"]
    for part, tensor in layer.packed().parts.items():
        assert torch.equal(other.packed().parts[part], tensor)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


def test_weight_is_held_once_and_smaller() -> None:
    layer = quantised(256, 256)
    held = sum(tensor.nbytes for tensor in layer.buffers())
    assert held == layer.kernel.nbytes == layer.packed().nbytes
    assert held / layer.packed().dense_nbytes == pytest.approx(0.5 / 4 + 1 / 32 + 1 / 256, abs=1e-6)
    assert "weights=int8" in repr(layer)


def test_states_of_the_other_kind_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.int8 weights, this layer was made for float"):
        make().load_state_dict(quantised().state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"torch\.float32 weights, this layer was made for int8"):
            quantised().load_state_dict(make().state_dict(), strict=strict)
    state = make().state_dict() | {"scales": torch.ones(24)}
    with pytest.raises(RuntimeError, match=r"torch\.float32 weights, this layer was made for int8"):
        quantised().load_state_dict(state)


def test_a_weight_pickled_before_its_name_told_its_numbers_is_int8() -> None:
    layer = quantised()
    again, (name, *facts) = layer.weight.__reduce_ex__(2)[:2]
    assert name == "2:4+int8"
    for parameter in (again(name, *facts), again("2:4", *facts)):
        assert torch.equal(parameter.detach(), layer.packed().unpack())


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_a_program_exported_before_names_told_the_numbers_runs(backend: str) -> None:
    layer, x = SparseLinear.from_packed(quantised().packed(), backend=backend), torch.randn(2, 40)
    tensors = list(layer.kernel.tensors)
    with torch.no_grad():
        want = layer(x)
    for name in ("2:4+int8", "2:4"):
        facts = backend, name, 24, 40, torch.float32
        assert torch.equal(ops.linear(x, tensors, None, *facts, None), want)
        assert torch.equal(ops.to_dense(tensors, *facts), layer.packed().unpack())


def test_from_linear_and_the_way_back() -> None:
    linear = nn.Linear(40, 24)
    layer = SparseLinear.from_linear(linear, "2:4", method="magnitude", quantized=True)
    kept = prune_weight(linear.weight.detach(), "2:4").weight
    back = layer.to_linear()
    assert torch.equal(back.weight, layer.packed().unpack())
    error = float((back.weight.detach() - kept).norm() / kept.norm())
    assert 0 < error < 0.01


def test_integers_without_scales_still_have_no_kernel() -> None:
    with pytest.raises(BackendError, match="no backend runs"):
        SparseLinear.from_packed(sc.pack(torch.zeros(8, 8, dtype=torch.int8), "2:4"))


def test_files(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = nn.Sequential(quantised(), nn.GELU(), quantised(8, 24, "8:16"))
    sc.save(model, tmp_path / "m.safetensors")
    again = sc.load(tmp_path / "m.safetensors", into=nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 8)))
    x = torch.randn(2, 40)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert "int8 weights, float32" in str(inspect(tmp_path / "m.safetensors"))


def test_the_vendor_library_refuses_int8() -> None:
    request = Request(sc.parse_pattern("2:4"), (64, 64), torch.float16, "cuda", 1, numbers=INT8)
    assert "torch.int8" in str(backends()["cusparselt"].supports(request))
    packed = sc.quantize(sc.pack(torch.zeros(16, 16, dtype=torch.float16), "2:4"))
    with pytest.raises(BackendError, match="int8"):
        backends()["cusparselt"].prepare(packed)


def test_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    layer = quantised(64, 64)
    explanation = layer.explain()
    assert "int8 weights" in str(explanation) and explanation.request.numbers == INT8
    assert registry.choose(explanation.request) == layer.kernel.backend


def test_model_error_for_unpackable_quantised_blocks() -> None:
    with pytest.raises(sc.errors.PatternError, match="row scales need"):
        SparseLinear(16, 16, "block4x4:0.5", quantized=True)
    with pytest.raises(ModelError, match="cannot become"):
        quantised().to(torch.float8_e5m2)


def test_onnx_writes_what_the_integers_stand_for(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    layer = quantised()
    report = sc.export_onnx(layer, (torch.randn(2, 40),), tmp_path / "m.onnx")
    assert [(each.form, each.note) for each in report.layers] == [("dense", "int8 weights have no packed node")]
    stored = [onnx.numpy_helper.to_array(each) for each in onnx.load(str(tmp_path / "m.onnx")).graph.initializer]
    (weight,) = [each for each in stored if each.ndim == 2]
    assert torch.equal(torch.from_numpy(weight.copy()).T, layer.packed().unpack())


def test_quantize_says_what_it_takes() -> None:
    for other in (nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), torch.zeros(8, 8)):
        with pytest.raises(ModelError, match=rf"takes a PackedWeight, got {type(other).__name__}.*quantize="):
            sc.quantize(other)  # type: ignore[arg-type]
