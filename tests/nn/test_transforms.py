"""Transforms of torch.func and dual numbers through a packed layer, beside nn.Linear of the same weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from tests.sparse_layers import make

Case = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (layer [24, 40], x [3, 40], biases [5, 24])


def _with_bias(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda bias: functional_call(layer, {"bias": bias}, (x,))


def _dual(layer: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent
    assert tangent is not None
    return tangent


def _beside_dual(layer: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    with forward_ad.dual_level():
        forward_ad.make_dual(x, x)
        return layer(x)  # type: ignore[no-any-return]


def _bias_gradient(layer: nn.Module, y: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), layer.bias)[0]  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "vmap": lambda layer, x, _: vmap(layer)(x),
    "vmap of a closure": lambda layer, x, _: vmap(lambda scale: scale * layer(x))(torch.arange(4.0)),
    "vmap of the bias": lambda layer, x, biases: vmap(_with_bias(layer, x))(biases),
    "grad": lambda layer, x, _: grad(lambda x: layer(x).sum())(x),
    "grad of a closure": lambda layer, x, _: grad(lambda scale: (scale * layer(x)).sum())(torch.tensor(2.0)),
    "grad of the bias": lambda layer, x, biases: grad(lambda b: _with_bias(layer, x)(b).square().sum())(biases[0]),
    "vmap of grad": lambda layer, x, _: vmap(grad(lambda x: layer(x).square().sum()))(x),
    "vjp": lambda layer, x, biases: vjp(layer, x)[1](biases[:3])[0],
    "jvp": lambda layer, x, _: jvp(layer, (x,), (x.cos(),))[1],
    "jvp of a closure": lambda layer, x, _: jvp(lambda s: s * layer(x), (torch.ones(()),), (torch.ones(()),))[1],
    "jvp of the bias": lambda layer, x, biases: jvp(_with_bias(layer, x), (biases[0],), (biases[1],))[1],
    "linearize": lambda layer, x, _: linearize(layer, x)[1](x),
    "jacrev": lambda layer, x, _: jacrev(layer)(x),
    "jacfwd": lambda layer, x, _: jacfwd(layer)(x),
    "hessian": lambda layer, x, _: hessian(lambda x: layer(x).square().sum())(x[0]),
    "functionalize": lambda layer, x, _: torch.func.functionalize(layer)(x),
    "backward through vmap": lambda layer, x, _: _bias_gradient(layer, vmap(layer)(x)),
    "inference mode": lambda layer, x, _: torch.inference_mode()(lambda: vmap(layer)(x))(),
    "dual number": _dual,
    "dual level around it": _beside_dual,
}


@pytest.mark.parametrize("name", CASES)
def test_a_transform_gives_what_it_gives_for_a_dense_layer(name: str) -> None:
    torch.manual_seed(0)
    layer, x, biases = make(), torch.randn(3, 40), torch.randn(5, 24)
    want = CASES[name](layer.to_linear(), x, biases)
    torch.testing.assert_close(CASES[name](layer, x, biases), want, rtol=1e-4, atol=1e-4)


def test_autocast_around_a_transform() -> None:
    layer, x = make(), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = vmap(layer)(x), vmap(layer.to_linear())(x)
    torch.testing.assert_close(got, want)  # of the same dtype
