"""What surrounds the call of a layer, as of any module: hooks, patches, profilers, compilers; and what it keeps."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from sparsecomp.errors import ModelError
from sparsecomp.nn import SparseLinear
from tests.sparse_layers import assert_right, expected, make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (2, 3, 40), (0, 40)])
def test_a_plain_call_is_right(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = make(bias=bias), torch.randn(shape)
    assert_right(layer, x)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.forward(x)) and torch.equal(layer(x), layer(input=x))


def test_gradients_flow_through_a_call() -> None:
    layer, x = make(), torch.randn(3, 40, requires_grad=True)
    layer(x).sum().backward()
    assert layer.bias is not None and layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 3.0))
    torch.testing.assert_close(x.grad, layer.packed().unpack().sum(0).expand(3, 40))


Surround = Callable[[SparseLinear, list[str], pytest.MonkeyPatch], Any]


def _hook(name: str) -> Surround:
    def surround(layer: SparseLinear, seen: list[str], _: pytest.MonkeyPatch) -> Any:
        return getattr(layer, f"register_{name}")(lambda *_: seen.append(name))

    return surround


def _global_hook(name: str) -> Surround:
    def surround(_: SparseLinear, seen: list[str], patch: pytest.MonkeyPatch) -> Any:
        # the first full backward hook sets it and nothing of torch takes it back
        patch.setattr(torch_module, "_global_is_full_backward_hook", torch_module._global_is_full_backward_hook)
        return getattr(torch_module, f"register_module_{name}")(lambda *_: seen.append(name))

    return surround


def _patched(owner: Callable[[SparseLinear], object], name: str) -> Surround:
    def surround(layer: SparseLinear, seen: list[str], patch: pytest.MonkeyPatch) -> None:
        before = getattr(owner(layer), name)

        def patched(*args: Any, **named: Any) -> Any:
            seen.append(name)
            return before(*args, **named)

        patch.setattr(owner(layer), name, patched)

    return surround


def _replaced_hooks(layer: SparseLinear, seen: list[str], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layer, "_forward_hooks", {7: lambda *_: seen.append("replaced")})


def _compiled(layer: SparseLinear, seen: list[str], _: pytest.MonkeyPatch) -> None:
    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        seen.append("compiled")
        return graph.forward

    torch._dynamo.reset()
    layer.compile(backend=backend, fullgraph=True)


def _hooks_of_all_replaced(_: SparseLinear, seen: list[str], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_module, "_global_forward_hooks", {7: lambda *_: seen.append("replaced")})


def _profiled(layer: SparseLinear, seen: list[str], _: pytest.MonkeyPatch) -> Any:
    def profile(frame: Any, event: str, __: object) -> None:
        if event == "call" and frame.f_code is SparseLinear.forward.__code__ and frame.f_locals["self"] is layer:
            seen.append("profiled")

    sys.setprofile(profile)

    class Handle:
        def remove(self) -> None:
            sys.setprofile(None)

    return Handle()


SURROUNDINGS: dict[str, Surround] = {
    "forward hook": _hook("forward_hook"),
    "forward pre-hook": _hook("forward_pre_hook"),
    "backward hook": _hook("full_backward_hook"),
    "backward pre-hook": _hook("full_backward_pre_hook"),
    "forward hook of all": _global_hook("forward_hook"),
    "forward pre-hook of all": _global_hook("forward_pre_hook"),
    "backward hook of all": _global_hook("full_backward_hook"),
    "backward pre-hook of all": _global_hook("full_backward_pre_hook"),
    "hooks replaced": _replaced_hooks,
    "hooks of all replaced": _hooks_of_all_replaced,
    "forward of the layer": _patched(lambda layer: layer, "forward"),
    "forward of the class": _patched(lambda _: SparseLinear, "forward"),
    "_call_impl of the layer": _patched(lambda layer: layer, "_call_impl"),
    "_call_impl of the class": _patched(lambda _: SparseLinear, "_call_impl"),
    "_call_impl of all": _patched(lambda _: nn.Module, "_call_impl"),
    "__call__ of all": _patched(lambda _: nn.Module, "__call__"),
    "compiled": _compiled,
    "profiled": _profiled,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_surrounds_a_call_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = make(), list[str]()
    x = torch.randn(3, 40)
    want = expected(layer, x).float()
    with ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        handle = SURROUNDINGS[name](layer, seen, patch)
        if handle is not None:
            stack.callback(handle.remove)
        y = layer(x)
        y.sum().backward()
        assert len(seen) == 1
        torch.testing.assert_close(y.detach(), want)
    if name == "compiled":
        del layer._compiled_call_impl
    seen.clear()
    layer(x).sum().backward()
    assert seen == []


def test_a_hook_may_change_what_comes_in_and_out() -> None:
    layer, x = make(), torch.randn(3, 40)
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    layer.register_forward_hook(lambda _, args, y: y + args[0].sum())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(layer, 2 * x).float() + (2 * x).sum())


def test_subclasses_keep_their_own_forward() -> None:
    class Doubled(SparseLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Mixin(nn.Module):
        def __call__(self, *args: Any, **named: Any) -> Any:
            return 3 * super().__call__(*args, **named)

    class Mixed(SparseLinear, Mixin):
        pass

    layer, x = make(), torch.randn(3, 40)
    with torch.no_grad():
        y = layer(x)
        for kind, factor in ((Doubled, 2.0), (Mixed, 3.0)):
            other = kind.from_packed(layer.packed(), layer.bias)
            torch.testing.assert_close(other(x), factor * y)


def test_wrong_arguments_are_named_as_for_any_module() -> None:
    layer, x = make(), torch.randn(3, 40)
    for call in (layer, layer.__call__):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
            call()
        with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
            call(x, x)
        with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
            call(x, x=x)
    with pytest.raises(ModelError, match="this layer takes a tensor"):
        layer([1.0])
    with pytest.raises(ModelError, match="reshape it"):
        layer(torch.randn(3, 41))


def test_what_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_eager", "choice", "_forward_hooks", "_backward_pre_hooks", "_parameters"):
        layer = make()
        delattr(layer, name)
        with pytest.raises(AttributeError, match=name):
            layer(torch.randn(3, 40))
    layer = make()
    monkeypatch.delattr(nn.Module, "_call_impl")
    with pytest.raises(AttributeError, match="_call_impl"):
        layer(torch.randn(3, 40))


class _Gathering(dict[str, Any]):
    """As some keep parameters that are elsewhere until they are asked for."""

    def __getitem__(self, name: str) -> Any:
        return torch.ones(24)


class _OddKey(str):
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise ValueError("an odd key")


def test_parameters_that_are_no_plain_dict() -> None:
    layer, x = make(), torch.randn(3, 40)
    with torch.no_grad():
        want = layer(x) - layer.bias + 1
        layer._parameters = _Gathering(bias=layer.bias)
        torch.testing.assert_close(layer(x), want)
        layer._parameters = {_OddKey("bias"): None}
        with pytest.raises(ValueError, match="an odd key"):
            layer(x)


def test_an_error_of_the_product_is_heard_and_the_layer_lives_on() -> None:
    layer, x = make(), torch.randn(3, 40)

    def broken(*_: object) -> Tensor:
        layer.bias = None  # the call holds what it was given
        raise RuntimeError("no product today")

    held, layer._eager = layer._eager, broken
    with pytest.raises(RuntimeError, match="no product today"):
        layer(x)
    layer._eager = held
    assert_right(layer, x)


def test_a_call_that_the_dispatcher_must_see_gets_there() -> None:
    layer, x = make(), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_a_call_keeps_nothing() -> None:
    layer, x = make(), torch.randn(3, 40)
    with torch.no_grad():
        layer(x)
        before = [sys.getrefcount(each) for each in (x, layer, layer.bias, layer._eager)]
        for _ in range(100):
            layer(x)
        assert [sys.getrefcount(each) for each in (x, layer, layer.bias, layer._eager)] == before
    with pytest.raises(ModelError):
        layer(x[:, 1:])
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
