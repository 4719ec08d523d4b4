"""SparseLinear with int8 weights and activations: how it is asked for, called, differentiated, saved and explained."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.backends.choice import Choice
from sparsecomp.backends.reference import ReferenceBackend
from sparsecomp.errors import PatternError
from sparsecomp.files.storage import inspect
from sparsecomp.nn import SparseLinear
from sparsecomp.nn import operators as ops
from sparsecomp.patterns.numbers import INT8_A8
from sparsecomp.reporting.codec import decoded, plain

NAMES = ["8:16+int8@a8", "2:4+int8@a8", "16:16+int8@a8"]


def rounded(pattern: str = "8:16+int8@a8", out: int = 24, columns: int = 48, **options: Any) -> SparseLinear:
    return SparseLinear.from_linear(nn.Linear(columns, out), pattern, method="magnitude", **options)


def twin(layer: SparseLinear, x: torch.Tensor) -> torch.Tensor:
    """What integers give, slowly, whichever backend the layer has."""
    backend = ReferenceBackend()
    return backend.run_activated(backend.prepare(layer.packed()), x, layer.bias, layer.activation)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()  # each test compiles the same forward for other layers


def test_every_way_to_ask_gives_the_same_layer() -> None:
    linear = nn.Linear(48, 24)
    ways = [
        SparseLinear.from_linear(linear, "8:16", "magnitude", quantize="int8", activations="int8"),
        SparseLinear.from_linear(linear, "8:16", "magnitude", quantized=True, activations="int8"),
        SparseLinear.from_linear(linear, "8:16+int8@a8", "magnitude"),
        SparseLinear.from_linear(linear, "8:16+int8@a8", "magnitude", quantize="int8", activations="int8"),
    ]
    for layer in ways:
        assert layer.numbers == INT8_A8 and layer.quantized and str(layer.pattern) == "8:16"
        assert layer.choice == ways[0].choice and torch.equal(layer.weight, ways[0].weight)
    for empty in (
        SparseLinear(48, 24, "8:16+int8@a8"),
        SparseLinear(48, 24, "8:16", quantize="int8", activations="int8"),
    ):
        assert empty.numbers == INT8_A8 and empty.load_state_dict(ways[0].state_dict())
        assert torch.equal(empty.weight, ways[0].weight)
    assert SparseLinear.from_packed(ways[0].packed()).choice == ways[0].choice
    assert "weights=int8@a8" in repr(ways[0])
    for wrong in ({"activations": "int8"}, {"quantize": "int8", "activations": "int4"}, {"quantize": "int3"}):
        with pytest.raises(PatternError):
            SparseLinear.from_linear(linear, "8:16", **wrong)


def test_dense_groups_take_any_weight_and_no_positions() -> None:
    linear = nn.Linear(50, 24)
    layer = SparseLinear.from_linear(linear, "16:16+int8@a8")
    assert layer.packed().metadata.numel() == 0
    moved = (layer.weight - linear.weight).abs().amax(1)
    assert bool((moved <= linear.weight.abs().amax(1) / 254 * 1.001).all())
    x = torch.randn(5, 50)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), twin(layer, x), rtol=1e-5, atol=0.02)
        assert float((layer(x) - linear(x)).norm() / linear(x).norm()) < 0.02


@pytest.mark.parametrize("pattern", NAMES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_calls_of_every_kind_agree(pattern: str, backend: str | None) -> None:
    layer = rounded(pattern, backend=backend, activation="silu")
    x = torch.randn(2, 3, 48)
    with torch.no_grad():
        y = layer(x)
        assert y.shape == (2, 3, 24) and torch.equal(layer(x[:0]), y[:0])
        torch.testing.assert_close(layer(x[1, 2]), y[1, 2])
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)
        exported = torch.export.export(copy.deepcopy(layer), (x,)).module()
        torch.testing.assert_close(exported(x), y)
        facts = layer.kernel.backend, pattern, 24, 48, torch.float32
        torch.testing.assert_close(ops.linear(x, list(layer.kernel.tensors), layer.bias, *facts, None, "silu"), y)
        if layer.kernel.backend == "reference":
            torch.testing.assert_close(y, twin(layer, x.flatten(0, 1)).view_as(y))
        layer.bfloat16()
        assert layer.numbers == INT8_A8 and layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", NAMES)
def test_gradients_go_straight_through(pattern: str) -> None:
    layer, x = rounded(pattern), torch.randn(3, 48, requires_grad=True)
    assert layer.bias is not None
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x.grad = layer.bias.grad = None
        grad = torch.randn(3, 24)
        call(x).backward(grad)
        assert x.grad is not None and layer.bias.grad is not None
        torch.testing.assert_close(x.grad, grad @ layer.packed().unpack(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def _loaded(fresh: SparseLinear, layer: SparseLinear, **options: Any) -> SparseLinear:
    fresh.load_state_dict(layer.state_dict(), **options)
    return fresh


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "meta": lambda layer: _loaded(SparseLinear(48, 24, _name(layer), device="meta"), layer, assign=True),
    "state_dict": lambda layer: _loaded(SparseLinear(48, 24, _name(layer)), layer),
    "there and back": lambda layer: _loaded(copy.deepcopy(layer).double().float(), layer),
}


def _name(layer: SparseLinear) -> str:
    return f"{layer.pattern}+{layer.numbers}"


@pytest.mark.parametrize("pattern", NAMES)
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_exact(how: str, pattern: str) -> None:
    layer = rounded(pattern)
    other, x = COPIES[how](layer), torch.randn(3, 48)
    assert sorted(layer.state_dict()) == ["bias", "metadata", "scales", "values"]
    assert other.numbers == INT8_A8
    for part, tensor in layer.packed().parts.items():
        assert torch.equal(other.packed().parts[part], tensor)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    again, facts = layer.weight.__reduce_ex__(2)[:2]
    assert facts[0] == pattern and torch.equal(again(*facts).detach(), layer.packed().unpack())


def test_states_of_other_numbers_are_refused() -> None:
    weight_only, layer = rounded("8:16+int8"), rounded()
    for state, into, said in (
        (weight_only.state_dict(), layer, "holds int8 weights, this layer was made for int8@a8"),
        (layer.state_dict(), weight_only, "holds int8@a8 weights, this layer was made for int8;"),
        (rounded("8:16").state_dict(), layer, "float32 weights, this layer was made for int8@a8"),
    ):
        with pytest.raises(RuntimeError, match=said):
            into.load_state_dict(state)
    older = weight_only.state_dict()
    older._metadata[""].pop("numbers")  # type: ignore[attr-defined]
    weight_only.load_state_dict(older)


def test_a_layer_says_in_what_numbers_it_multiplies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    layer = rounded()
    explanation = layer.explain()
    assert explanation.request.numbers == INT8_A8
    assert "int8 weights and int8 activations" in str(explanation)
    choice = Choice(layer.pattern, INT8_A8, "cpu")
    assert plain(choice)["numbers"] == "int8@a8" and decoded(Choice, plain(choice)) == choice


def test_files(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "m.safetensors"
    model = nn.Sequential(rounded(), nn.GELU(), rounded("16:16+int8@a8", 8, 24), rounded("2:4+int8", 8, 8))
    sc.save(model, path)
    fresh = nn.Sequential(nn.Linear(48, 24), nn.GELU(), nn.Linear(24, 8), nn.Linear(8, 8))
    again, x = sc.load(path, into=fresh), torch.randn(2, 48)
    assert [str(again[i].numbers) for i in (0, 2, 3)] == ["int8@a8", "int8@a8", "int8"]
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert inspect(path).format_version == "2"
    assert [each.dtype.partition(" ")[0] for each in inspect(path).layers] == ["int8@a8", "int8@a8", "int8"]


def test_files_that_older_readers_understand_keep_their_version(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    for name in ("2:4", "2:4+int8"):
        sc.save(nn.Sequential(rounded(name)), tmp_path / "m.safetensors")
        assert inspect(tmp_path / "m.safetensors").format_version == "1"


def test_the_dense_product_does_not_round_and_float64_falls_back_to_it() -> None:
    layer, x = rounded(backend="dense"), torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.packed().unpack(), layer.bias))
        double = rounded().double()
        assert double.numbers == INT8_A8 and double(x.double()).dtype == torch.float64
    note = "activations are not rounded"
    assert note in str(layer.explain()) and note not in str(rounded(backend="reference").explain())


def test_arrays_take_integers_by_name() -> None:
    layer, x = rounded(), torch.randn(3, 48)
    kernel = sc.prepare(layer.packed().unpack().numpy(), "8:16+int8")
    assert str(kernel.numbers) == "int8"
    linear = nn.Linear(48, 24)
    own = SparseLinear.from_linear(linear, "16:16+int8@a8")
    kernel = sc.prepare(linear.weight.detach().numpy(), "16:16+int8@a8")
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(sc.linear(x.numpy(), kernel, linear.bias.detach().numpy())), own(x))
