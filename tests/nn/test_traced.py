"""The call of a layer before compilers and tracers: they see the call that any module has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsecomp.nn import SparseLinear
from tests.sparse_layers import make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("hooked", [False, True])
def test_compilers_follow_the_call(hooked: bool) -> None:
    layer, x = make(), torch.randn(3, 40)
    if hooked:
        layer.register_forward_hook(lambda _, __, y: 2 * y)
    with torch.no_grad():
        want = layer(x)
        for model in (layer, nn.Sequential(layer, nn.Identity())):
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), want)
            torch.testing.assert_close(compiled(x), want)
        for strict in (True, False):
            program = torch.export.export(nn.Sequential(layer), (x,), strict=strict)
            torch.testing.assert_close(program.module()(x), want)


def test_compilers_follow_the_attribute_too() -> None:
    layer, x = make(), torch.randn(3, 40)
    with torch.no_grad():
        want = layer(x)
        for call in (lambda x: layer.__call__(x), lambda x: SparseLinear.__call__(layer, x)):
            for fullgraph in (False, True):
                compiled = torch.compile(call, backend="eager", fullgraph=fullgraph)
                torch.testing.assert_close(compiled(x), want)


def test_compilers_find_the_operator_after_a_graph_break() -> None:
    operators: list[str] = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([make(40), make(40)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model, x = Broken(), torch.randn(3, 40)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert set(operators) == {"sparsecomp.linear"}


OWN_CALLS = """
import torch
from torch import Tensor, nn
from sparsecomp.nn import SparseLinear

class Negated(SparseLinear):
    def __call__(self, *args, **named):
        return -super().__call__(*args, **named)

class Mixin(nn.Module):
    def __call__(self, *args, **named):
        return 3 * super().__call__(*args, **named)

class Mixed(Mixin, SparseLinear):
    pass

x = torch.randn(3, 40)
for kind, factor in ((Negated, -1.0), (Mixed, 3.0)):
    layer = kind.from_linear(nn.Linear(40, 24), method="magnitude")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), factor * layer.forward(x))
        torch.testing.assert_close(layer(x), factor * layer.forward(x))
"""

PATCHED_BEFORE = """
from torch import nn
import torch
seen, before = [], nn.Module.{name}

def patched(self, *args, **named):
    seen.append(type(self).__name__)
    return before(self, *args, **named)

patched.__name__ = "{name}"
nn.Module.{name} = patched
from sparsecomp.nn import SparseLinear
nn.Sequential(SparseLinear(40, 24))(torch.randn(3, 40))
assert seen == ["Sequential", "SparseLinear"], seen
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [OWN_CALLS, *(PATCHED_BEFORE.format(name=n) for n in ("_call_impl", "__call__"))])
def test_in_a_process_of_its_own(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_tracer_sees_the_layer_as_a_leaf() -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, _: str) -> bool:
            return isinstance(m, SparseLinear)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(torch.ones(1, 40))  # type: ignore[no-any-return]

    model, x = Model(), torch.randn(3, 40)
    graph = Tracer().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["layer", "layer"]
    with torch.no_grad():
        torch.testing.assert_close(fx.GraphModule(model, graph)(x), model(x))
