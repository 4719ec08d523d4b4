"""SparseLinear against a dense linear in float64, in every shape, dtype and situation a model puts a layer into."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsecomp.backends.registry import backends
from sparsecomp.errors import ModelError, PatternError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import SparseLinear
from sparsecomp.packing.format import pack
from tests.sparse_layers import PATTERNS, TOLERANCE, assert_right, expected, make

ROUTES = ["cpu", "dense", "reference"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ROUTES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if reason := backends()[name].missing():
        pytest.skip(reason)
    return name


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (5, 3), (24, 40), (17, 123), (33, 64)])
def test_product_matches_the_dense_twin(pattern: str, dtype: torch.dtype, out: int, columns: int) -> None:
    for bias in (True, False):
        layer = make(out, columns, pattern, dtype, bias)
        for batch in (0, 1, 7, 40):
            assert_right(layer, torch.randn(batch, columns).to(dtype))


@pytest.mark.parametrize("shape", [(40,), (1, 40), (0, 40), (2, 0, 40), (3, 4, 40), (2, 1, 3, 40), (5, 1, 1, 2, 40)])
def test_any_number_of_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    assert_right(make(backend=backend), torch.randn(shape))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 3, 40)])
def test_any_number_of_dimensions_with_gradients(backend: str, shape: tuple[int, ...]) -> None:
    layer, x = make(backend=backend), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.requires_grad
    torch.testing.assert_close(y.detach().double(), expected(layer, x.detach()), rtol=0, atol=1e-4)


def test_inputs_of_any_strides(backend: str) -> None:
    layer = make(backend=backend)
    assert_right(layer, torch.randn(40, 6).T)
    assert_right(layer, torch.randn(6, 80)[:, ::2])
    assert_right(layer, torch.randn(6, 50)[:, 3:43])
    assert_right(layer, torch.randn(12, 40)[::2])
    assert_right(layer, torch.randn(40).expand(5, 40))
    assert_right(layer, torch.randn(60).as_strided((8, 40), (2, 1)))
    assert_right(layer, torch.randn(4, 40, 3).transpose(1, 2))
    assert_right(layer, torch.view_as_complex(torch.randn(5, 40, 2)).conj().imag)


@pytest.mark.parametrize("layout", ["coo", "csr", "mkldnn", "nested", "jagged"])
def test_inputs_of_other_layouts_give_what_linear_gives(backend: str, layout: str) -> None:
    layer, rows = make(backend=backend), torch.randn(3, 40)
    x = {
        "coo": rows.to_sparse,
        "csr": rows.to_sparse_csr,
        "mkldnn": rows.to_mkldnn,
        "nested": lambda: torch.nested.nested_tensor([rows, rows[:2]]),
        "jagged": lambda: torch.nested.nested_tensor([rows, rows[:2]], layout=torch.jagged),
    }[layout]()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            got, want = layer(x), layer.to_linear()(x)
        assert got.layout == want.layout
        assert got.requires_grad == want.requires_grad == gradients
        if got.is_nested:
            got, want = torch.cat(got.unbind()), torch.cat(want.unbind())
        torch.testing.assert_close(got.to_dense(), want.to_dense())


def test_no_columns_gives_the_bias() -> None:
    layer = make(6, 0)
    assert layer.bias is not None
    with torch.no_grad():
        assert torch.equal(layer(torch.randn(3, 0)), layer.bias.expand(3, 6))


def test_wrong_input_is_named() -> None:
    layer = make()
    with pytest.raises(ModelError, match=r"shape \(3, 39\).*\[\.\.\., 40\]"):
        layer(torch.randn(3, 39))
    with pytest.raises(ModelError, match="shape"):
        layer(torch.tensor(1.0))
    with pytest.raises(ModelError, match=r"float64.*float32.*\.to\(\)"):
        layer(torch.randn(3, 40).double())
    with pytest.raises(ModelError, match="meta"):
        layer(torch.randn(3, 40, device="meta"))
    with pytest.raises(ModelError, match=r"input is a ndarray; this layer takes a tensor \[\.\.\., 40\]"):
        layer(torch.randn(3, 40).numpy())


def test_another_gpu_than_the_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    with FakeTensorMode():
        x, there = torch.empty(3, 40, device="cuda:1"), torch.empty(24, 20, device="cuda:0")
    monkeypatch.setattr(layer, "_tensors", lambda: [there])
    with pytest.raises(ModelError, match=r"input is on cuda:1 and the layer on cuda:0; move one of them"):
        layer(x)


def test_replaced_bias_of_another_kind_is_named() -> None:
    layer = make()
    layer.bias = nn.Parameter(torch.zeros(24, dtype=torch.float16))
    with pytest.raises(ModelError, match="bias"), torch.no_grad():
        layer(torch.randn(2, 40))


def test_bias_with_strides() -> None:
    layer = make()
    layer.bias = nn.Parameter(torch.randn(48)[::2])
    assert_right(layer, torch.randn(3, 40))


def test_dense_above_gives_the_same_product(backend: str) -> None:
    layer = make(backend=backend)
    layer.dense_above = 4
    for batch in (3, 4, 9):
        assert_right(layer, torch.randn(batch, 40))


@pytest.mark.parametrize("wrong", [64.0, "64", 1 << 63, float("inf")])
def test_dense_above_counts_rows(wrong: Any) -> None:
    layer = make()
    with pytest.raises(ModelError, match=r"^dense_above must be an int or None, got "):
        layer.dense_above = wrong
    assert layer.dense_above is None
    for right in (np.int64(2), 1 << 62, None):
        layer.dense_above = right  # type: ignore[assignment]
        assert_right(layer, torch.randn(3, 40))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "block4x4:0.5"])
@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40), (0, 40)])
def test_gradients_of_input_and_bias(pattern: str, shape: tuple[int, ...]) -> None:
    layer, x = make(pattern=pattern), torch.randn(shape, requires_grad=True)
    seed = torch.randn(*shape[:-1], 24)
    layer(x).backward(seed)
    twin, xt = layer.to_linear().double(), x.detach().double().requires_grad_()
    twin(xt).backward(seed.double())
    assert x.grad is not None and xt.grad is not None and layer.bias is not None and twin.bias.grad is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(x.grad.double(), xt.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad.double(), twin.bias.grad, rtol=1e-4, atol=1e-4)


def test_second_derivative_of_the_input() -> None:
    layer, x = make(), torch.randn(3, 40, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    twin = layer.to_linear()
    (first,) = torch.autograd.grad(twin(x).square().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-3)


def test_training_the_weight_is_refused() -> None:
    layer = make()
    with pytest.warns(UserWarning, match=r"to_linear\(\)"):
        layer.weight.requires_grad_()
    with pytest.warns(UserWarning, match=r"to_linear\(\)"):
        layer.weight.requires_grad = True
    assert not layer.weight.requires_grad
    with pytest.raises(ModelError, match=r"to_linear\(\)"):
        layer.weight.grad = torch.zeros(24, 40)
    with pytest.raises(ModelError, match=r"to_linear\(\)"):
        layer.weight = nn.Parameter(torch.zeros(24, 40))
    dense = make(backend="dense")
    dense.kernel.tensors[0].requires_grad_()
    with pytest.raises(ModelError, match=r"to_linear\(\)"):
        dense(torch.randn(2, 40))


def test_requires_grad_touches_only_the_bias() -> None:
    layer = make().requires_grad_(False)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.bias is not None and not layer.bias.requires_grad
    assert not layer(torch.randn(2, 40)).requires_grad


def test_weight_reads_as_the_dense_weight() -> None:
    layer = make()
    want = layer.packed().unpack()
    assert torch.equal(layer.weight, want) and layer.weight.shape == (24, 40)
    assert layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
    assert type(layer.weight + 1) is Tensor


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("given", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "block4x4:0.5"])
def test_autocast_gives_the_dtype_of_linear(
    target: torch.dtype, weight: torch.dtype, given: torch.dtype, pattern: str
) -> None:
    layer = make(dtype=weight, pattern=pattern)
    twin, x = layer.to_linear(), torch.randn(3, 40).to(given)
    with torch.autocast("cpu", dtype=target), torch.no_grad():
        got, want = layer(x), twin(x)
    assert got.dtype == want.dtype == target
    torch.testing.assert_close(got.double(), expected(layer, x), rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize("dense_above", [None, 2])
def test_autocast_keeps_gradients(backend: str, dense_above: int | None) -> None:
    layer, x = make(backend=backend), torch.randn(3, 40, requires_grad=True)
    layer.dense_above = dense_above
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    want = layer.packed().unpack().sum(0).expand(3, 40)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_float64_alone_as_linear_does() -> None:
    layer, x = make().double(), torch.randn(3, 40).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = layer(x), layer.to_linear()(x)
    assert got.dtype == want.dtype == torch.float64
    torch.testing.assert_close(got, want)


def test_autocast_refuses_what_linear_refuses() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ModelError, match="float64"):
        make()(torch.randn(3, 40).double())


# --- construction and report ----------------------------------------------------------------------------------------


def test_from_linear_refuses_what_does_not_fit_and_prunes_when_told() -> None:
    linear = nn.Linear(40, 24).eval()
    dense = linear.weight.detach().clone()
    with pytest.raises(PatternError, match="row 0, group 0"):
        SparseLinear.from_linear(linear, "2:4")
    layer = SparseLinear.from_linear(linear, "2:4", method="magnitude")
    assert torch.equal(layer.weight, prune_weight(dense, "2:4").weight) and not layer.training
    x = torch.randn(100, 40)
    wanda = SparseLinear.from_linear(linear, "2:4", method="wanda", gram=x.T @ x)
    assert torch.equal(wanda.weight, prune_weight(dense, "2:4", "wanda", x.T @ x).weight)
    assert torch.equal(linear.weight, dense)


def test_from_linear_refuses_layers_whose_weight_means_something_else() -> None:
    class Conv1D(nn.Module):
        """Holds its weight as [in, out]; a square one would be packed transposed."""

        weight = nn.Parameter(torch.eye(8))
        bias = nn.Parameter(torch.zeros(8))

    for layer in (Conv1D(), make(), nn.Conv2d(3, 3, 3)):
        with pytest.raises(ModelError, match=rf"takes an nn\.Linear, got {type(layer).__name__}"):
            SparseLinear.from_linear(layer, "2:4", method="magnitude")  # type: ignore[arg-type]


def test_the_argument_is_called_as_that_of_linear() -> None:
    layer, x = make(), torch.randn(3, 40)
    assert torch.equal(layer(input=x), layer(x))


def test_explain_takes_whole_numbers_of_rows() -> None:
    for batch in (-1, 1.5, "a"):
        with pytest.raises(ModelError, match="is not a number of rows"):
            make().explain(batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_to_linear_is_the_exact_way_back(pattern: str) -> None:
    layer = make(19, 37, pattern).eval()
    linear = layer.to_linear()
    assert isinstance(linear, nn.Linear) and not linear.training and linear.weight.requires_grad
    again = SparseLinear.from_linear(linear, pattern)
    assert torch.equal(again.packed().values, layer.packed().values)
    assert torch.equal(again.packed().metadata, layer.packed().metadata)
    assert again.bias is not None and layer.bias is not None and torch.equal(again.bias, layer.bias)
    assert make(bias=False).to_linear().bias is None


def test_unusable_weights_are_refused() -> None:
    with pytest.raises(PatternError, match="mask-only"):
        SparseLinear(8, 8, "unstructured:0.5")
    for sizes in ((-1, 8), (8, 8.0), ("8", 8)):
        with pytest.raises(ModelError, match="whole numbers"):
            SparseLinear(*sizes)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"computes in torch\.float32"):
        SparseLinear(8, 8, dtype=torch.int8)
    with pytest.raises(ModelError, match=r"float64, which has no sparse kernel"):
        SparseLinear.from_linear(nn.Linear(8, 8).double(), method="magnitude")
    with pytest.raises(ModelError, match="bias has shape"):
        SparseLinear.from_packed(pack(torch.zeros(4, 8), "2:4"), torch.zeros(5))
    with pytest.raises(ModelError, match="not known"):
        make(backend="fpga")
    with pytest.raises(ModelError, match="cusparselt"):
        make(backend="cusparselt")


def test_repr_and_explanation_tell_what_runs(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    layer = make(64, 64)
    assert "in_features=64, out_features=64" in repr(layer) and "pattern=2:4" in repr(layer)
    assert f"bytes={layer.kernel.nbytes} of 16384 dense" in repr(layer)
    explanation = layer.explain(batch=8)
    assert explanation.kernel == layer.kernel.backend and explanation.request.batch == 8
    assert {name for name, _ in explanation.rejected} == set(backends()) - {explanation.kernel}
    assert "not yet on this machine" in str(explanation) and "triton" in str(explanation)
    assert explanation.bound is not None and explanation.bound.value == pytest.approx(2.0)
    layer.dense_above = 8
    assert "from 8 rows on" in layer.explain(batch=8).reason
    assert "from 8 rows on" not in layer.explain(batch=7).reason
    named = make(backend="reference").explain()
    assert named.reason == "asked for by name" and dict(named.rejected)["cpu"] == "runs it too"
