"""The operators: opcheck, torch.compile, torch.export, modes that must not be bypassed."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecomp.backends.registry import backends
from sparsecomp.errors import BackendError, ModelError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import SparseLinear
from sparsecomp.nn import operators as ops
from sparsecomp.packing.format import pack
from sparsecomp.patterns.numbers import weights_name

PATTERNS = ["2:4", "8:16", "block4x4:0.5"]


def make(out: int = 24, columns: int = 40, pattern: str = "2:4", dtype: torch.dtype = torch.float32) -> SparseLinear:
    weight = prune_weight(torch.randn(out, columns), pattern).weight.to(dtype)
    return SparseLinear.from_packed(pack(weight, pattern), torch.randn(out))


class Net(nn.Module):
    def __init__(self, pattern: str = "2:4") -> None:
        super().__init__()
        self.up, self.down = make(56, 40, pattern), make(40, 56, pattern)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def facts(layer: SparseLinear) -> tuple[Any, ...]:
    return (
        layer.kernel.backend,
        weights_name(layer.pattern, layer.numbers),
        layer.out_features,
        layer.in_features,
        layer.dtype,
    )


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (0, 40)])
@pytest.mark.parametrize("grad", [False, True])
def test_linear_passes_opcheck(pattern: str, shape: tuple[int, ...], grad: bool) -> None:
    layer = make(pattern=pattern)
    x, bias = torch.randn(shape, requires_grad=grad), torch.randn(24, requires_grad=grad)
    arguments = (x, list(layer.kernel.tensors), bias, *facts(layer), None, "none")
    torch.library.opcheck(torch.ops.sparsecomp.linear.default, arguments)
    torch.library.opcheck(torch.ops.sparsecomp.linear.default, (x, arguments[1], None, *facts(layer), 2, "gelu"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_to_dense_passes_opcheck(pattern: str) -> None:
    layer = make(pattern=pattern)
    arguments = (list(layer.kernel.tensors), *facts(layer))
    torch.library.opcheck(torch.ops.sparsecomp.to_dense.default, arguments)
    assert torch.equal(ops.to_dense(*arguments), layer.packed().unpack())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_operator_gradients_match_the_eager_ones(pattern: str) -> None:
    layer = make(pattern=pattern)
    gradients = []
    for through_operator in (True, False):
        x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        assert layer.bias is not None
        layer.bias.grad = None
        y = ops.linear(x, list(layer.kernel.tensors), layer.bias, *facts(layer), None) if through_operator else layer(x)
        y.square().sum().backward()
        assert x.grad is not None and layer.bias.grad is not None
        gradients.append((x.grad, layer.bias.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_operator_refuses_what_does_not_belong_together() -> None:
    layer = make()
    tensors, x = list(layer.kernel.tensors), torch.randn(2, 40)
    with pytest.raises(ModelError, match="takes"):
        ops.linear(x.double(), tensors, None, *facts(layer), None)
    with pytest.raises(ModelError, match="bias"):
        ops.linear(x, tensors, torch.zeros(23), *facts(layer), None)
    with FakeTensorMode():
        elsewhere, there = torch.empty(2, 40, device="cuda:1"), torch.empty(24, 20, device="cuda:0")
    with pytest.raises(ModelError, match=r"got x on cuda:1 and a weight on cuda:0; both must be on one device"):
        ops._linear(elsewhere, [there], None, *facts(layer), None, "none")
    for name in ("weight", "bias"):  # torch would take the result of the meta device, which has no values
        parts = {"weight": tensors, "bias": torch.zeros(24)}
        parts[name] = [each.to("meta") for each in tensors] if name == "weight" else torch.zeros(24, device="meta")
        with pytest.raises(ModelError, match=f"got x on cpu and a {name} on meta; both must be on one device"):
            torch.ops.sparsecomp.linear(x, *parts.values(), *facts(layer), None, "none")
    layer.bias = nn.Parameter(torch.zeros(24, device="meta"))
    with pytest.raises(ModelError, match="a bias on meta"):
        layer(x)
    if layer.kernel.backend == "cpu":
        with pytest.raises(BackendError, match="bytes"):
            ops.linear(x, [tensors[0][:-1], tensors[1]], None, *facts(layer), None)
    dense = SparseLinear.from_packed(layer.packed(), backend="dense")
    values = dense.kernel.tensors[0].clone().requires_grad_()
    with pytest.raises(ModelError, match=r"to_linear\(\)"):
        ops.linear(x, [values, dense.kernel.tensors[1]], None, *facts(dense), None)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_has_no_graph_break_and_no_recompile_per_batch(pattern: str, compiler: str) -> None:
    net = Net(pattern)
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    fast = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 5, 9):
        x = torch.randn(batch, 40, requires_grad=True)
        y = fast(x)
        y.sum().backward()
        got, x.grad = x.grad, None
        want = net(x)
        want.sum().backward()
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(got, x.grad)
    assert counter.frame_count == 1


def test_compile_reads_the_weight_and_honours_autocast() -> None:
    layer = make()

    def twice(x: Tensor) -> Tensor:
        return layer(x) + x @ layer.weight.T

    fast = torch.compile(twice, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), twice(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compiled, eager = torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)
    assert compiled.dtype == eager.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_compile_with_inductor() -> None:
    net = Net("8:16")
    fast = torch.compile(net, fullgraph=True)
    x = torch.randn(4, 40)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_export_with_dynamic_batch(strict: bool, pattern: str) -> None:
    net = Net(pattern).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(net, (torch.randn(4, 40),), dynamic_shapes=({0: batch},), strict=strict)
    assert sum(node.target is torch.ops.sparsecomp.linear.default for node in program.graph.nodes) == 2
    program = program.run_decompositions()
    for size in (1, 4, 13):
        x = torch.randn(size, 40)
        torch.testing.assert_close(program.module()(x), net(x))


def test_export_survives_a_file(tmp_path: Any) -> None:
    net = Net().eval()
    torch.export.save(torch.export.export(net, (torch.randn(4, 40),)), tmp_path / "net.pt2")
    x = torch.randn(4, 40)
    torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), net(x))


def test_modes_and_traces_see_the_operator() -> None:
    layer, x = make().requires_grad_(False), torch.randn(3, 40)
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        layer(x)
    assert torch.ops.sparsecomp.linear.default in seen
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    assert torch.ops.sparsecomp.linear.default in [node.target for node in graph.graph.nodes]
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    other = torch.randn(3, 40)
    torch.testing.assert_close(traced(other), layer(other))


def test_fake_results_have_the_true_shapes() -> None:
    layer = make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(2, 3, 40))
    assert tuple(y.shape) == (2, 3, 24) and y.dtype == torch.float32


def test_functional_call_replaces_the_bias() -> None:
    layer, x = make(), torch.randn(3, 40)
    bias = torch.randn(24)
    with torch.no_grad():
        got = torch.func.functional_call(layer, {"bias": bias}, (x,))
    torch.testing.assert_close(got, x @ layer.packed().unpack().T + bias, rtol=1e-5, atol=1e-5)


def test_parametrized_bias_is_used() -> None:
    layer, x = make(), torch.randn(3, 40)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Softplus())
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got, x @ layer.packed().unpack().T + layer.bias, rtol=1e-5, atol=1e-5)


def test_every_backend_of_this_machine_agrees_through_the_operator() -> None:
    layer, x = make(), torch.randn(5, 40)
    want = ops.linear(x, list(layer.kernel.tensors), None, *facts(layer), None)
    for name, backend in backends().items():
        if backend.missing() is None and name != layer.kernel.backend:
            other = SparseLinear.from_packed(layer.packed(), backend=name)
            got = ops.linear(x, list(other.kernel.tensors), None, *facts(other), None)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
