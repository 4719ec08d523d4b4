"""layer.weight: reads as the dense weight, costs nothing to ask about, cannot be written by any way, is a parameter."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune  # noqa: F401 (torch does not import it)

import sparsecomp as sc
from sparsecomp.backends.cpu import CpuBackend
from sparsecomp.errors import ModelError
from sparsecomp.modules.readonly import PackedParameter
from sparsecomp.nn import SparseLinear
from tests.sparse_layers import make

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "operator": lambda w: w.__iadd__(1),
    "item": lambda w: w.__setitem__(0, 0),
    "mask": lambda w: w.__setitem__(w > 0, 0.0),
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
    "data": lambda w: w.data.add_(1),
    "data of data": lambda w: w.data.data.add_(1),
    "new data": lambda w: setattr(w, "data", torch.zeros(w.shape)),
    "detached": lambda w: w.detach().mul_(0),
    "transposed": lambda w: w.t().mul_(0),
    "row": lambda w: w[0].zero_(),
    "view": lambda w: w.view(-1).__setitem__(0, 1.0),
    "diagonal": lambda w: torch.diagonal(w).zero_(),
    "split": lambda w: w.split(4)[0].fill_(1),
    "iterated": lambda w: next(iter(w)).zero_(),
    "init": nn.init.zeros_,
    "init, kaiming": nn.init.kaiming_uniform_,
    "init, orthogonal": nn.init.orthogonal_,
    "out": lambda w: torch.add(w, 1, out=w),
    "out of another": lambda w: torch.randn(w.shape, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "inplace": lambda w: functional.relu(w, inplace=True),
    "operator of aten": lambda w: torch.ops.aten.mul_.Tensor(w, torch.tensor(2.0)),
    "out of aten": lambda w: torch.ops.aten.add.out(w, w, out=w),
    "set_": lambda w: w.set_(torch.zeros(w.shape)),
    "resize_": lambda w: w.resize_(2, 2),
    "vector": lambda w: nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w]),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("reads", [0, 3])
def test_writing_is_refused(how: str, reads: int) -> None:
    layer, x = make(), torch.randn(2, 40)
    want, before = layer.packed().unpack(), layer(x).detach()
    for _ in range(reads):
        layer.weight.sum()
    with torch.no_grad(), pytest.raises(ModelError, match=r"to_linear\(\)"):
        WRITES[how](layer.weight)
    assert torch.equal(layer.weight, want) and torch.equal(layer(x), before)


def test_memory_that_is_handed_out_is_not_the_layers() -> None:
    layer = make()
    want = layer.packed().unpack()
    layer.weight.sum(), layer.weight.sum()
    for array in (layer.weight.numpy(), np.asarray(layer.weight), layer.weight[0].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    torch.from_dlpack(layer.weight).zero_()
    assert torch.equal(layer.weight, want)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(layer.weight, torch.zeros(24, 40))


def test_a_merge_of_an_adapter_is_refused() -> None:
    layer, up, down = make(), torch.randn(24, 4), torch.randn(4, 40)
    with pytest.raises(ModelError, match="in place"):
        layer.weight.data += up @ down
    dense = layer.to_linear()
    dense.weight.data += up @ down  # the way the message names
    assert torch.equal(dense.weight, layer.weight + up @ down)


def test_asking_about_the_weight_unpacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(dtype=torch.bfloat16)
    unpacked: list[int] = []
    dense = CpuBackend.dense
    monkeypatch.setattr(CpuBackend, "dense", lambda self, kernel: unpacked.append(1) or dense(self, kernel))
    weight = layer.weight
    assert weight is layer.weight and weight is next(layer.parameters()) and isinstance(weight, nn.Parameter)
    assert weight.shape == (24, 40) and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
    assert weight.numel() == 960 and weight.ndim == 2 and weight.size(1) == 40 and len(weight) == 24
    assert weight.element_size() == 2 and weight.is_floating_point() and not weight.requires_grad
    assert weight.grad is None and weight.is_leaf and weight.nbytes == 0
    torch.empty(1, device=weight.device, dtype=weight.dtype)
    assert unpacked == []
    for _ in range(5):
        functional.linear(torch.randn(2, 40).bfloat16(), weight)
    assert len(unpacked) == 2 and weight.nbytes == 2 * 960 and "dense copy of 1920" in repr(layer)
    layer.load_state_dict(make(dtype=torch.bfloat16).state_dict())
    assert weight.nbytes == 0 and layer.weight is weight
    assert torch.equal(weight, layer.packed().unpack())


def test_one_read_keeps_no_memory() -> None:
    layer = make()
    assert torch.isfinite(layer.weight).all() and layer.weight.nbytes == 0


def test_models_without_biases_have_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False)).eval()
    count = sum(each.numel() for each in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    sc.compile(model, "2:4", method="magnitude", where="everywhere")
    first = next(model.parameters())
    assert first.dtype is torch.float32 and first.device.type == "cpu"
    assert sum(each.numel() for each in model.parameters()) == count
    assert [name for name, _ in model.named_parameters()] == names
    assert model.get_parameter("0.weight") is first and not any(each.requires_grad for each in model.parameters())
    assert next(model.half().parameters()).dtype is torch.float16
    assert sorted(model.state_dict()) == ["0.metadata", "0.values", "2.metadata", "2.values"]
    assert next(model.to("meta").parameters()).is_meta


def test_optimizers_and_clipping_pass_the_packed_weight_by() -> None:
    model = nn.Sequential(make(), nn.Linear(24, 8))
    want = model[0].packed().unpack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(3, 40)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(model[0].packed().unpack(), want) and torch.equal(model[0].weight, want)
    model.requires_grad_(False).requires_grad_(True)
    assert model[0].bias.requires_grad and not model[0].weight.requires_grad


def test_another_weight_takes_effect_in_functional_call() -> None:
    layer, x = make(), torch.randn(3, 40)
    other = torch.randn(24, 40, requires_grad=True)
    got = torch.func.functional_call(layer, {"weight": other}, (x,))
    torch.testing.assert_close(got, functional.linear(x, other, layer.bias))
    same = torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
    assert torch.equal(same, layer(x))

    compiled = torch.compile(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), backend="aot_eager")
    torch.testing.assert_close(compiled(other), got)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).sum()

    gradients = torch.func.grad(loss)(dict(layer.named_parameters()))
    torch.testing.assert_close(gradients["weight"], torch.ones(3, 24).T @ x)


def _saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "block4x4:0.5"])
def test_a_saved_parameter_comes_back_packed_and_exact(pattern: str) -> None:
    layer = make(64, 64, pattern=pattern)
    again = _saved(dict(layer.named_parameters()))["weight"]
    assert isinstance(again, PackedParameter) and torch.equal(again, layer.packed().unpack())
    with pytest.raises(ModelError):
        again.zero_()
    twin = copy.deepcopy(layer.weight)
    assert type(twin) is nn.Parameter and torch.equal(twin, layer.weight) and twin.data_ptr() != layer.weight.data_ptr()


def test_compiled_models_ask_about_and_read_the_weight() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = make()

        def forward(self, x: Tensor) -> Tensor:
            p = next(self.parameters())
            y = self.fc(x.to(p.device, p.dtype))
            return y + (1 if self.fc.weight.dtype is torch.float32 else 2) + functional.linear(x, self.fc.weight)

    model, x = Asking(), torch.randn(3, 40)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def test_exported_programs_hold_no_dense_weight() -> None:
    model = nn.Sequential(SparseLinear.from_linear(nn.Linear(256, 256), "2:4", method="magnitude")).eval()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.randn(4, 256),)), buffer)
    assert buffer.getbuffer().nbytes < 2.6 * model[0].kernel.nbytes < 2 * 4 * 256 * 256
    buffer.seek(0)
    x = torch.randn(4, 256)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x))


def test_fx_draws_a_packed_layer_as_one_node() -> None:
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(24, 8)).eval()
    graph = torch.fx.symbolic_trace(model)
    assert [(each.op, each.target) for each in graph.graph.nodes][1:4] == [("call_module", key) for key in "012"]
    x = torch.randn(3, 40)
    assert torch.equal(graph(x), model(x)) and graph.get_submodule("0") is model[0]
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    with pytest.raises(ModelError, match="trace the model around it"):
        torch.fx.symbolic_trace(model[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_made_without_gradients_can_be_part_of_a_graph(mode: Callable[[], Any]) -> None:
    with mode():
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
        sc.compile(model, "2:4", method="magnitude", where="everywhere")
    x = torch.randn(3, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and model[0].bias is not None
    torch.compile(model, backend="aot_eager")(x).sum().backward()


# --- below Python ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [0, 3])
def test_what_goes_past_pythons_functions_sees_the_values(reads: int) -> None:
    layer = make()
    want = layer.packed().unpack()
    for _ in range(reads):
        layer.weight.sum()
    weight = layer.weight
    assert torch.equal(torch.tensor(weight), want) and torch.equal(torch.Tensor(weight), want)
    assert torch.equal(torch.empty(0).set_(weight), want) and weight.tolist() == want.tolist()
    torch.testing.assert_close(torch.vmap(torch.linalg.vector_norm)(weight), torch.linalg.vector_norm(want, dim=1))
    torch.testing.assert_close(torch.func.grad(lambda w: (w * w).sum())(weight), 2 * want)
    torch.testing.assert_close(torch.func.vjp(lambda w: w * 2, weight)[0], 2 * want)
    assert torch.equal(torch.func.functionalize(lambda w: w * 1)(weight), want)
    assert torch.equal(weight.as_strided(weight.size(), weight.stride()), want)
    assert torch.equal(torch.from_dlpack(weight), want) and torch.equal(torch.cat([weight, weight])[24:], want)
    doubled = torch.jit.trace(lambda w: w * 2, (torch.zeros(24, 40),))
    assert torch.equal(doubled(weight), 2 * want)
    assert torch.equal(copy.copy(weight.data), want)


def test_gradients_through_every_parameter_are_those_of_a_dense_layer() -> None:
    layer, x = make(), torch.randn(3, 40)
    dense = layer.to_linear()

    def loss(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    got = torch.func.grad_and_value(lambda p: loss(layer, p))(dict(layer.named_parameters()))
    want = torch.func.grad_and_value(lambda p: loss(dense, p))(dict(dense.named_parameters()))
    torch.testing.assert_close(got, want)
    read = torch.func.grad(lambda x: functional.linear(x, layer.weight).square().sum())(x)
    torch.testing.assert_close(read, torch.func.grad(lambda x: functional.linear(x, dense.weight).square().sum())(x))


def test_traces_of_a_model_that_reads_the_weight_hold_it(tmp_path: Any) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = make()

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.fc.weight) + self.fc.weight.sum()

    model, x, other = Reading().eval(), torch.randn(3, 40), torch.randn(3, 40)
    want = model(other)
    torch.testing.assert_close(torch.jit.trace(Reading().eval(), (x,))(other).shape, want.shape)
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(other), want)
    torch.jit.save(traced, tmp_path / "m.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "m.pt")(other), want)
    drawn = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
    torch.testing.assert_close(drawn(other), want)


def test_questions_of_every_kind_keep_no_dense_copy() -> None:
    layer, x = make(), torch.randn(40, 24)
    weight = layer.weight
    for _ in range(3):
        x.type_as(weight), x.to(weight), weight.new_zeros(3), torch.zeros_like(weight), torch.empty_like(weight)
        x.view_as(weight), weight.data.dtype, weight.detach().shape, weight.data.numel(), torch.result_type(x, weight)
        weight.cpu(), weight.to("cpu"), weight.requires_grad_(False), repr(weight), weight.untyped_storage().nbytes()
    assert weight.nbytes == 0 and torch.zeros_like(weight).is_contiguous()
    assert torch.equal(torch.zeros_like(weight), torch.zeros(24, 40)) and type(torch.ones_like(weight)) is Tensor


def test_a_write_of_the_same_values_is_none() -> None:
    model = nn.Sequential(make(), nn.Linear(24, 8))
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        average.update_parameters(model)
    with torch.no_grad():
        assert model[0].weight.mul_(1) is model[0].weight
        model[0].weight.copy_(model[0].packed().unpack())
    assert torch.equal(average.module[0].weight, model[0].weight)


def test_states_cannot_be_written_in_vain() -> None:
    layer, other = make(), make()
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            with pytest.raises(ModelError, match="in place"):
                tensor.copy_(torch.ones_like(tensor))
    state = layer.state_dict()
    assert {type(each) for each in _saved(state).values()} == {Tensor}
    other.load_state_dict(copy.deepcopy(state))
    assert torch.equal(other.weight, layer.weight)


def test_statistics_and_renormalised_rows_are_writes() -> None:
    layer, x = make(), torch.randn(5, 40)
    want = layer.packed().unpack()
    with pytest.raises(ModelError):
        functional.batch_norm(x, layer.weight.data[0], layer.weight.data[1], training=True)
    with pytest.raises(ModelError):
        functional.embedding(torch.tensor([0, 1]), layer.weight.data, max_norm=0.01)
    assert torch.equal(layer.weight, want)


def test_a_layout_that_is_written_is_read_anew() -> None:
    layer, other = make(), make()
    layer.weight.sum(), layer.weight.sum()
    with torch.no_grad():  # as DistributedDataParallel brings replicas in step
        for mine, its in zip(layer.buffers(), other.buffers(), strict=True):
            mine.copy_(its)
    assert torch.equal(layer.weight, other.packed().unpack())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tools_that_would_compute_the_weight_are_refused_and_change_nothing() -> None:
    layer = make()
    tools: list[Callable[[], Any]] = [
        lambda: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        lambda: torch.nn.utils.weight_norm(layer),
        lambda: torch.nn.utils.spectral_norm(layer),
        lambda: layer.register_parameter("weight", nn.Parameter(torch.zeros(24, 40))),
        lambda: delattr(layer, "weight"),
    ]
    for tool in tools:
        with pytest.raises(ModelError, match=r"to_linear\(\)"):
            tool()
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        assert layer.weight is layer._packed_weight and not layer._forward_pre_hooks


def test_broadcasts_into_the_weight_are_refused() -> None:
    import torch.distributed as dist

    layer = make()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for each in (layer.weight, layer.weight.data):
            with pytest.raises(ModelError, match="broadcast"):
                dist.broadcast(each, 0)
    finally:
        dist.destroy_process_group()


def test_a_replica_of_data_parallel_computes_from_its_layout() -> None:
    layer, x = make(), torch.randn(3, 40)
    replica = layer._replicate_for_data_parallel()
    replica.weight = layer.weight.clone()  # as torch sets what it copied to a device
    replica.bias = layer.bias.detach().clone()
    torch.testing.assert_close(replica(x), layer(x))
    assert layer.weight is layer._packed_weight
