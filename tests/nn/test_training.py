"""The sparse training layer, compared with nn.Linear under autograd in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparsecomp.errors import ModelError, PatternError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import training
from sparsecomp.nn.eager import dense
from sparsecomp.nn.following import Layouts
from sparsecomp.nn.training import SparseTrainingLinear
from tests.training_layers import assert_as_dense, layer

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 1e-2}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which products ran sparse, in order."""
    seen: list[str] = []

    def noting(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(self: Layouts, *args: Tensor) -> Tensor:
            y = real(self, *args)
            seen.extend([name] if y is not None else [])
            return y

        return noted

    for name in ("product", "gradient"):
        monkeypatch.setattr(Layouts, name, noting(name, getattr(Layouts, name)))
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (), (5,), (2, 3), (2, 0, 3), (70,)], ids=str)
@pytest.mark.parametrize("shape", [(24, 36), (33, 17), (1, 1), (5, 64), (130, 70)], ids=str)
@pytest.mark.parametrize("pattern", ["2:4@t", "2:4", "block16x16:0.5"])
def test_products_and_gradients(pattern: str, shape: tuple[int, int], rows: tuple[int, ...], bias: bool) -> None:
    assert_as_dense(layer(*shape, pattern, bias), torch.randn(*rows, shape[1]))


@pytest.mark.parametrize("pattern", ["8:16", "4:2:8", "2:4@v4", "1:2@t", "16:16"])
def test_other_patterns(pattern: str) -> None:
    assert_as_dense(layer(40, 48, pattern), torch.randn(7, 48))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4@t", "8:16"])
def test_sixteen_bits(dtype: torch.dtype, pattern: str, calls: list[str]) -> None:
    assert_as_dense(layer(pattern=pattern, dtype=dtype), torch.randn(9, 36).to(dtype), TOLERANCE[dtype])
    assert calls == (["product", "gradient"] if pattern == "2:4@t" else ["product"])


def test_the_kernels_run(calls: list[str]) -> None:
    both, only_y = layer(), layer(pattern="2:4")
    assert_as_dense(both, torch.randn(3, 36))
    assert calls == ["product", "gradient"]
    assert both.why_dense() is None and both.why_dense_gradient() is None
    calls.clear()
    assert_as_dense(only_y, torch.randn(3, 36))
    assert calls == ["product"]
    assert "the transposed mask breaks 2:4" in str(only_y.why_dense_gradient())
    with torch.no_grad():
        both(torch.randn(3, 36))
    with torch.inference_mode():
        both(torch.randn(3, 36))
    assert calls == ["product"] * 3


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "rows apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "columns apart": lambda x: torch.stack([x, x], 2)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed batch": lambda x: x.view(2, 3, -1).transpose(0, 1),
}


@pytest.mark.parametrize("way", STRIDES)
def test_inputs_of_any_strides(way: str, calls: list[str]) -> None:
    assert_as_dense(layer(), STRIDES[way](torch.randn(6, 36)))
    assert calls == ["product", "gradient"]


def test_gradients_of_any_strides() -> None:
    sparse = layer()
    x = torch.randn(6, 36, requires_grad=True)
    sparse(x).sum().backward()  # expanded from one number
    torch.testing.assert_close(x.grad, sparse.weight.detach().sum(0).expand(6, 36), rtol=0, atol=1e-4)
    y = sparse(x)
    grad = torch.randn(24, 6).t()
    (got,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(got, grad @ sparse.weight.detach(), rtol=0, atol=1e-4)


# --- what autograd does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("bias_grad", [True, False])
def test_only_what_is_asked_for(x_grad: bool, weight_grad: bool, bias_grad: bool, calls: list[str]) -> None:
    sparse = layer()
    sparse.weight.requires_grad_(weight_grad)
    assert sparse.bias is not None
    sparse.bias.requires_grad_(bias_grad)
    x = torch.randn(5, 36, requires_grad=x_grad)
    y = sparse(x)
    assert y.requires_grad == (x_grad or weight_grad or bias_grad)
    if y.requires_grad:
        y.square().sum().backward()
    grads = [each.grad is not None for each in (x, sparse.weight, sparse.bias)]
    assert grads == [x_grad, weight_grad, bias_grad]
    assert ("gradient" in calls) == x_grad


def test_accumulated_gradients() -> None:
    sparse, parts = layer(), torch.randn(3, 5, 36)
    for part in parts:
        sparse(part).square().sum().backward()
    weight = sparse.weight.detach().double().requires_grad_()
    functional.linear(parts.double(), weight, sparse.bias.detach().double()).square().sum().backward()
    torch.testing.assert_close(sparse.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, calls: list[str]) -> None:
    sparse = layer()
    x = torch.randn(5, 36, requires_grad=True)
    checkpoint(lambda row: sparse(row).relu(), x, use_reentrant=reentrant).sum().backward()
    got = [x.grad, sparse.weight.grad]
    assert calls == ["product", "product", "gradient"]
    twin = [x.detach().clone().requires_grad_(), sparse.weight.detach().clone().requires_grad_()]
    functional.linear(*twin, sparse.bias).relu().sum().backward()
    for mine, its in zip(got, twin, strict=True):
        torch.testing.assert_close(mine, its.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4@t", "2:4"])
def test_gradients_of_gradients_are_right(pattern: str) -> None:
    found = []
    sparse = layer(pattern=pattern)
    start = torch.randn(5, 36)
    for module in (sparse, lambda row: functional.linear(row, sparse.weight, sparse.bias)):
        x = start.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, sparse.weight]))
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def test_batched_gradients_are_right() -> None:
    sparse, x = layer(), torch.randn(5, 36, requires_grad=True)
    y, seeds = sparse(x), torch.randn(4, 5, 24)
    (got,) = torch.autograd.grad(y, x, seeds, is_grads_batched=True)
    torch.testing.assert_close(got, seeds @ sparse.weight.detach(), rtol=0, atol=1e-4)


# --- where the layer is nn.Linear -------------------------------------------------------------------------------------


def _modes() -> dict[str, Callable[[], AbstractContextManager[object]]]:
    return {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "a dispatch mode": lambda: FlopCounterMode(display=False),
        "a default device": lambda: torch.device("meta"),
    }


@pytest.mark.parametrize("mode", _modes())
def test_modes_see_torch_alone(mode: str, calls: list[str]) -> None:
    sparse, x = layer(), torch.randn(5, 36)
    with _modes()[mode]():
        y, want = sparse(x), functional.linear(x, sparse.weight, sparse.bias)
    assert calls == [] and y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=0, atol=0)


def test_transforms(calls: list[str]) -> None:
    sparse, x = layer(), torch.randn(5, 36)
    weight, bias = sparse.weight.detach(), sparse.bias.detach()
    torch.testing.assert_close(torch.func.vmap(sparse)(x), functional.linear(x, weight, bias))
    jacobian = torch.func.jacrev(lambda row: sparse(row))(x[0])
    torch.testing.assert_close(jacobian, weight)
    other = {"weight": weight * 2, "bias": bias}
    grads = torch.func.grad(lambda held: torch.func.functional_call(sparse, held, (x,)).sum())(other)
    torch.testing.assert_close(grads["weight"], x.sum(0).expand(24, 36))
    tangent = torch.func.jvp(sparse, (x,), (x,))[1]
    torch.testing.assert_close(tangent, functional.linear(x, weight))
    assert calls == []


def test_functional_call_with_other_weights(calls: list[str]) -> None:
    sparse, x = layer(), torch.randn(5, 36)
    for factor in (2.0, 3.0):
        weight = sparse.weight.detach() * factor
        y = torch.func.functional_call(sparse, {"weight": weight}, (x,))
        torch.testing.assert_close(y, functional.linear(x, weight, sparse.bias), rtol=0, atol=1e-4)
    assert_as_dense(sparse, x)
    assert "product" in calls


@pytest.mark.slow
def test_compiled(calls: list[str]) -> None:
    sparse, x = layer(), torch.randn(5, 36, requires_grad=True)
    compiled = torch.compile(nn.Sequential(sparse, nn.ReLU()), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert calls == []
    twin = x.detach().clone().requires_grad_()
    functional.linear(twin, sparse.weight, sparse.bias).relu().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_a_dtype_without_kernels(dtype: torch.dtype, calls: list[str]) -> None:
    sparse = layer().to(dtype)
    assert_as_dense(sparse, torch.randn(5, 36, dtype=dtype), 1e-10)
    assert calls == [] and "torch.float64" in str(sparse.why_dense())
    assert_as_dense(sparse.to(torch.float32), torch.randn(5, 36))
    assert calls == ["product", "gradient"]


def test_the_meta_device_and_mixed_dtypes_are_torchs_affair() -> None:
    sparse = layer()
    with pytest.raises(RuntimeError):
        sparse(torch.randn(5, 36).double())
    with pytest.raises(RuntimeError):
        sparse(torch.randn(5, 35))
    meta = copy.deepcopy(sparse).to("meta")
    assert meta(torch.empty(5, 36, device="meta")).shape == (5, 24)
    assert "the weight is on meta" in str(meta.why_dense())


def test_without_what_tells_of_modes_the_layer_is_dense(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(training, "probe", lambda: "SPARSECOMP_EAGER=off")
    sparse = layer()
    assert_as_dense(sparse, torch.randn(5, 36))
    assert calls == [] and "SPARSECOMP_EAGER=off" in str(sparse.why_dense())


# --- the layer itself -------------------------------------------------------------------------------------------------


def test_it_is_the_same_object_with_the_same_parameters() -> None:
    linear = nn.Linear(36, 24)
    found = prune_weight(linear.weight.detach(), "2:4@t", method="magnitude")
    weight, bias, seen = linear.weight, linear.bias, []
    linear.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        weight.copy_(found.weight)
    keys = list(linear.state_dict())
    sparse: nn.Linear = SparseTrainingLinear.take(linear, found.mask, "2:4@t")
    assert sparse is linear and sparse.weight is weight and sparse.bias is bias
    assert list(sparse.state_dict()) == keys and "2:4@t" in repr(sparse)
    assert torch.equal(sparse.mask, found.mask) and str(sparse.pattern) == "2:4@t"
    assert_as_dense(sparse, torch.randn(3, 36))
    assert len(seen) == 1
    attributes = set(vars(nn.Linear(1, 1)))
    assert type(sparse.give_back()) is nn.Linear and set(vars(linear)) == attributes
    assert linear.weight is weight and linear(torch.randn(3, 36)).shape == (3, 24)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way: str, warm: bool) -> None:
    sparse, x = layer(), torch.randn(5, 36)
    if warm:
        assert_as_dense(sparse, x)
    twin = copy.deepcopy(sparse) if way == "deepcopy" else pickle.loads(pickle.dumps(sparse))
    assert twin.weight is not sparse.weight and torch.equal(twin.mask, sparse.mask)
    with torch.no_grad():
        twin.weight.mul_(2)
    assert_as_dense(twin, x)
    assert_as_dense(sparse, x)
    assert type(twin.give_back()) is nn.Linear


def test_another_mask() -> None:
    sparse, x = layer(), torch.randn(5, 36)
    assert_as_dense(sparse, x)
    held = sparse.layouts()
    sparse.set_mask(sparse.mask)
    assert sparse.layouts() is held
    other = prune_weight(torch.randn(24, 36), "2:4@t", method="magnitude").mask
    with torch.no_grad():
        sparse.weight.copy_(torch.randn(24, 36) * other)
    sparse.set_mask(other)
    assert_as_dense(sparse, x)
    coarser = prune_weight(torch.randn(24, 36), "8:16", method="magnitude").mask
    with torch.no_grad():
        sparse.weight.copy_(torch.randn(24, 36) * coarser)
    assert SparseTrainingLinear.take(sparse, coarser, "8:16") is sparse
    assert str(sparse.pattern) == "8:16"
    assert_as_dense(sparse, x)


def test_masks_and_layers_that_do_not_fit() -> None:
    linear, mask = nn.Linear(8, 4), torch.ones(4, 8, dtype=torch.bool)
    for wrong in (mask.float(), mask[:2], "mask"):
        with pytest.raises(ModelError, match=r"this layer takes torch.bool \(4, 8\)"):
            SparseTrainingLinear.take(linear, wrong, "8:8")
    with pytest.raises(PatternError, match="the mask breaks 2:4"):
        SparseTrainingLinear.take(linear, mask, "2:4")
    assert type(linear) is nn.Linear
    with pytest.raises(ModelError, match=r"allowed is an nn\.Linear"):
        SparseTrainingLinear.take(nn.Conv1d(1, 1, 1), mask, "2:4")
    torch.nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(ModelError, match="parametrization"):
        SparseTrainingLinear.take(linear, mask, "8:8")


def test_an_empty_layer() -> None:
    sparse = SparseTrainingLinear.take(nn.Linear(0, 3), torch.ones(3, 0, dtype=torch.bool), "2:4")
    assert_as_dense(sparse, torch.randn(2, 0))


@pytest.mark.parametrize("onednn", [True, False])
def test_dense_products_of_both_libraries(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(dense, "onednn", lambda: dense._product if onednn else None)
    for rows, columns, shared in [(3, 5, 7), (1, 1, 1), (0, 4, 3), (4, 0, 3), (3, 4, 0), (64, 33, 20)]:
        a, b = torch.randn(shared, rows), torch.randn(shared, columns)
        for left, right in [(a.t(), b.t()), (a.t().contiguous(), b.t()), (a.t(), b.t().contiguous())]:
            got = dense.dense_product(left, right)
            assert got.shape == (rows, columns) and got.is_contiguous()
            torch.testing.assert_close(got.double(), a.double().t() @ b.double(), rtol=0, atol=1e-4)
    assert_as_dense(layer(), torch.randn(5, 36))
