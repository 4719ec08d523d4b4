"""SparseLinear with an activation: against torch's own in float64, with gradients, saved, copied and explained."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.activations import ACTIVATIONS, activate, activation_gradient
from sparsecomp.backends.registry import backends
from sparsecomp.errors import FormatError, ModelError
from sparsecomp.nn import SparseLinear
from sparsecomp.nn import operators as ops
from sparsecomp.patterns.numbers import weights_name
from tests.sparse_layers import TOLERANCE, make

NAMES = [name for name in ACTIVATIONS if name != "none"]
MODULES = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU()}


def layer_with(activation: str, **options: Any) -> SparseLinear:
    layer = make(**options)
    layer.activation = activation
    return layer


def twin(layer: SparseLinear) -> nn.Sequential:
    """Dense float64 layers with torch's own module."""
    plain = copy.copy(layer)
    plain.activation = "none"
    return nn.Sequential(plain.to_linear(), MODULES[layer.activation]).double()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_product_matches_torch(activation: str, dtype: torch.dtype, backend: str) -> None:
    if reason := backends()[backend].missing():
        pytest.skip(reason)
    for shape in [(0, 40), (1, 40), (7, 40), (2, 3, 40), (40,)]:
        for dense_above in (None, 2):
            layer = layer_with(activation, dtype=dtype, backend=backend)
            layer.dense_above = dense_above
            x = torch.randn(shape).to(dtype)
            with torch.no_grad():
                got, want = layer(x), twin(layer)(x.double())
            assert got.dtype == dtype
            scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
            torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


def through_layer(layer: SparseLinear, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def through_operator(layer: SparseLinear, x: Tensor) -> Tensor:
    facts = (
        layer.kernel.backend,
        weights_name(layer.pattern, layer.numbers),
        layer.out_features,
        layer.in_features,
        layer.dtype,
    )
    return ops.linear(x, list(layer.kernel.tensors), layer.bias, *facts, None, layer.activation)


def through_compiler(layer: SparseLinear, x: Tensor) -> Tensor:
    return torch.compile(layer, backend="aot_eager", fullgraph=True)(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("route", [through_layer, through_operator, through_compiler])
@pytest.mark.parametrize("activation", NAMES)
def test_gradients_match_torch(activation: str, route: Any) -> None:
    layer, x = layer_with(activation), torch.randn(5, 40, requires_grad=True)
    dense, x64 = twin(layer), x.detach().double().requires_grad_()
    seed = torch.randn(5, 24)
    y = route(layer, x)
    y.backward(seed)
    want = dense(x64)
    want.backward(seed.double())
    assert layer.bias is not None and layer.bias.grad is not None and x.grad is not None and x64.grad is not None
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad.double(), dense[0].bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", [through_layer, through_operator])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_second_derivatives_match_torch(activation: str, route: Any) -> None:
    layer, x = layer_with(activation), torch.randn(3, 40, requires_grad=True)
    dense, x64 = twin(layer), x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(route(layer, x).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(first.square().sum(), x)
    (first,) = torch.autograd.grad(dense(x64).sum(), x64, create_graph=True)
    (want,) = torch.autograd.grad(first.square().sum(), x64)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_formula_is_that_of_the_function(activation: str) -> None:
    before = torch.randn(50, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(50, dtype=torch.float64)
    (want,) = torch.autograd.grad(activate(before, activation), before, grad)
    torch.testing.assert_close(activation_gradient(grad, before.detach(), activation), want)


@pytest.mark.parametrize("activation", NAMES)
def test_operator_passes_opcheck(activation: str) -> None:
    layer = layer_with(activation)
    facts = (layer.kernel.backend, weights_name(layer.pattern, layer.numbers), 24, 40, layer.dtype, None, activation)
    for grad in (False, True):
        x, bias = torch.randn(3, 40, requires_grad=grad), torch.randn(24, requires_grad=grad)
        torch.library.opcheck(torch.ops.sparsecomp.linear.default, (x, list(layer.kernel.tensors), bias, *facts))


@pytest.mark.parametrize("activation", NAMES)
def test_autocast_and_transforms(activation: str) -> None:
    layer, x = layer_with(activation), torch.randn(3, 40)
    want, other = twin(layer)(x.double()), layer_with(activation, dtype=torch.float16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, half = layer(x), other(x.half())
    assert got.dtype == half.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=6e-2)
    torch.testing.assert_close(torch.func.vmap(layer)(x).double(), want, rtol=1e-4, atol=1e-4)


def test_unknown_names_are_refused() -> None:
    for build in (
        lambda: SparseLinear(8, 8, activation="tanh"),
        lambda: setattr(make(), "activation", "tanh"),
        lambda: through_operator(_with_raw_activation("tanh"), torch.randn(2, 40)),
    ):
        with pytest.raises(ModelError, match=r"activation='tanh' is not known; use one of \"none\", \"relu\""):
            build()


def _with_raw_activation(name: str) -> SparseLinear:
    layer = make()
    layer._activation = name
    return layer


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_it(how: Any) -> None:
    layer, x = layer_with("gelu"), torch.randn(2, 40)
    other = how(layer)
    assert other.activation == "gelu"
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    other.activation = "none"
    with torch.no_grad():
        assert layer.activation == "gelu" and not torch.equal(other(x), layer(x))


def test_conversion_keeps_it_and_a_state_of_another_is_refused() -> None:
    layer = layer_with("silu").to(torch.bfloat16)
    assert layer.activation == "silu"
    with torch.no_grad():
        want = twin(layer)(torch.ones(2, 40).double())
        torch.testing.assert_close(layer(torch.ones(2, 40).bfloat16()).double(), want, rtol=2e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match='activation "silu", this one has "none"'):
        make(dtype=torch.bfloat16).load_state_dict(layer.state_dict())


def test_from_linear_applies_it_and_to_linear_refuses_it() -> None:
    linear = nn.Linear(40, 24)
    layer = SparseLinear.from_linear(linear, "2:4", method="magnitude", activation="relu")
    with torch.no_grad():
        assert bool((layer(torch.randn(4, 40)) >= 0).all())
    with pytest.raises(ModelError, match=r"applies relu.*layer\.activation = \"none\""):
        layer.to_linear()


def test_it_is_shown() -> None:
    assert "activation=gelu" in repr(layer_with("gelu")) and "activation" not in repr(make())
    if backends()["cpu"].missing() is None:
        layer = layer_with("gelu", backend="cpu")
        assert "gelu, inside the kernel" in str(layer.explain())
        layer.dense_above = 8
        assert "gelu, by torch, after the product" in str(layer.explain(batch=8))
    assert "gelu, by torch, after the product" in str(layer_with("gelu", backend="dense").explain())
    assert "epilogue" not in str(make().explain())


def test_files_keep_it_and_refuse_a_layer_with_another(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = nn.Sequential(layer_with("gelu"), nn.Linear(24, 3))
    sc.save(model, tmp_path / "m.safetensors")
    again = nn.Sequential(layer_with("gelu"), nn.Linear(24, 3))
    sc.load(tmp_path / "m.safetensors", into=again)
    x = torch.randn(2, 40)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    for first in (nn.Linear(40, 24), make(), layer_with("relu")):
        with pytest.raises(FormatError, match=r'applies the activation "gelu".*put a SparseLinear'):
            sc.load(tmp_path / "m.safetensors", into=nn.Sequential(first, nn.Linear(24, 3)))
    sc.save(nn.Sequential(make(), nn.Linear(24, 3)), tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match='applies the activation "none", the model\'s layer "gelu"'):
        sc.load(tmp_path / "plain.safetensors", into=again)
