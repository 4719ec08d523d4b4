"""What a layer has beside its weight: carried over by compile, load, from_linear and to_linear, or refused by name."""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import sparsecomp as sc
from sparsecomp import compiler, swap
from sparsecomp.errors import ModelError
from sparsecomp.models.layers import find_linears
from sparsecomp.modules import carry
from sparsecomp.nn import SparseLinear


def test_every_kind_of_hook_that_a_module_has_is_carried_over() -> None:
    """A new kind of torch's is then seen here, and not left behind in silence."""
    kinds = {name for name in vars(nn.Module()) if "hook" in name}
    assert kinds == {*carry._HOOKS, *carry._STATE_HOOKS}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    sc.prune(model, "2:4", "magnitude", show_progress=False)
    return model


def packed(model: nn.Module) -> nn.Module:
    return sc.compile(model, "2:4", where="everywhere")


def one_more(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + 1


def one_more_by_name(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    return output + 1


def twice(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (2 * args[0],)


def halved(module: nn.Module, grad_input: Any, grad_output: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if each is None else each / 2 for each in grad_input)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda layer: layer.register_forward_hook(one_more),
    "forward, with kwargs": lambda layer: layer.register_forward_hook(one_more_by_name, with_kwargs=True),
    "before": lambda layer: layer.register_forward_pre_hook(twice),
    "forward, always": lambda layer: layer.register_forward_hook(one_more, always_call=True),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("how", ["compile", "load into dense", "load into packed", "copied", "and back"])
def test_hooks_go_on_in_the_packed_layer(kind: str, how: str, tmp_path: Path) -> None:
    model, x = net(), torch.randn(3, 16)
    plain = model(x).detach()
    other = packed(net()) if how == "load into packed" else model
    handle = HOOKS[kind](other[0])
    want = other(x).detach()
    assert not torch.allclose(want, plain, atol=1e-2)
    if how.startswith("load"):
        sc.save(packed(net()), tmp_path / "m.safetensors")
        other = sc.load(tmp_path / "m.safetensors", into=other)
    elif how == "compile":
        packed(other)
    elif how == "copied":
        other[0] = SparseLinear.from_linear(other[0], "2:4")
    else:
        other[0] = SparseLinear.from_linear(other[0], "2:4").to_linear()
    torch.testing.assert_close(other(x).detach(), want)
    if how not in ("copied", "and back"):
        handle.remove()  # of the hook that the packed layer now has
        torch.testing.assert_close(other(x).detach(), plain)


def test_backward_hooks_go_on_too() -> None:
    model, x = net(), torch.randn(3, 16, requires_grad=True)
    model[2].register_full_backward_hook(halved)
    model(x).sum().backward()
    want, x.grad = x.grad, None
    packed(model)(x).sum().backward()
    assert want is not None and x.grad is not None
    torch.testing.assert_close(x.grad, want)


class Noted(nn.Linear):
    """Says something of its own in its repr, and is a linear layer in all else."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.note = "kept"

    def extra_repr(self) -> str:
        return "noted"


class Scaled(nn.Linear):
    """Has a method that callers of it rely on."""

    def scale(self) -> float:
        return 2.0


class Numbered(nn.Linear):
    """Has an attribute of its class."""

    number = 3


def test_attributes_buffers_and_submodules_of_the_object_are_carried(tmp_path: Path) -> None:
    model = net()
    layer = model[0]
    layer.note, layer.temperature = "kept", nn.Parameter(torch.tensor(2.0))
    layer.register_buffer("seen", torch.tensor([1.0, 2.0]))
    layer.register_buffer("scratch", torch.tensor([3.0]), persistent=False)
    layer.helper = nn.Linear(2, 2)
    twin = copy.deepcopy(model)
    new = sc.compile(model, "2:4", where="everywhere", only=["0", "2"])[0]
    assert isinstance(new, SparseLinear) and new.note == "kept" and new.seen is layer.seen
    assert new.temperature is layer.temperature and new.helper is layer.helper
    assert {name for name in model.state_dict() if name.startswith("0.")} == {
        *("0.values", "0.metadata", "0.bias", "0.temperature", "0.seen", "0.helper.weight", "0.helper.bias")
    }
    sc.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        twin[0].seen.zero_()
        twin[0].helper.weight.zero_()
    again = sc.load(tmp_path / "m.safetensors", into=twin)
    assert torch.equal(again[0].seen, new.seen) and torch.equal(again[0].helper.weight, new.helper.weight)
    back = new.to_linear()
    assert back.note == "kept" and torch.equal(back.seen, new.seen) and back.seen is not new.seen
    assert copy.deepcopy(new).note == "kept" and torch.equal(copy.deepcopy(new).scratch, new.scratch)
    assert isinstance(packed(nn.Sequential(Noted(16, 8)).apply(_prune_one))[0], SparseLinear)


def _prune_one(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        sc.prune(module, "2:4", "magnitude", show_progress=False)


def test_a_name_that_the_packed_layer_uses_is_refused_and_nothing_changes() -> None:
    model = net()
    model[2].kernel = "mine"
    before = list(model)
    with pytest.raises(ModelError, match=r'2: the layer has "kernel" of its own.*skip'):
        packed(model)
    assert list(model) == before and not hasattr(model[0], "packed")


def hooked_state(layer: nn.Linear) -> nn.Linear:
    layer.register_state_dict_pre_hook(lambda *_: None)
    return layer


def computed_bias(layer: nn.Linear) -> nn.Linear:
    prune.random_unstructured(layer, "bias", amount=0.5)
    return layer


def parametrized_bias(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "bias", nn.Softplus())
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Scaled(8, 8), 'its class Scaled adds "scale"'),
        (lambda: Numbered(8, 8), 'its class Numbered adds "number"'),
        (lambda: hooked_state(nn.Linear(8, 8)), "hooks on its state_dict"),
        (lambda: computed_bias(nn.Linear(8, 8)), 'torch.nn.utils.prune computes its bias.*remove(layer, "bias")'),
        (lambda: parametrized_bias(nn.Linear(8, 8)), 'its bias is computed by a parametrization.*(layer, "bias")'),
        (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "torch.nn.utils.remove_weight_norm(layer)"),
        (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "torch.nn.utils.remove_spectral_norm(layer)"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_cannot_be_carried_is_named(make: Callable[[], nn.Linear], reason: str) -> None:
    skipped = find_linears(nn.Sequential(nn.Linear(4, 4), make())).skipped
    start, _, end = reason.partition(".*")
    assert start in skipped["1"] and end in skipped["1"]
    with pytest.raises(ModelError, match="cannot pack this layer"):
        SparseLinear.from_linear(make(), "2:4", method="magnitude")


class Pretrained(nn.Sequential):
    """A model with the method by which Hugging Face's models are saved."""

    def save_pretrained(self, folder: str) -> str:
        return f"saved {len(self.state_dict())} tensors in {folder}"


def test_save_pretrained_is_refused_while_layers_are_packed() -> None:
    model = Pretrained(*net())
    assert packed(model) is model
    partly = Pretrained(net())
    packed(partly[0])
    by_hand = Pretrained(*net(), nn.Identity())
    by_hand[0] = SparseLinear.from_linear(by_hand[0], "2:4")
    for each in (model, copy.deepcopy(model), Pretrained(model), partly, by_hand):
        with pytest.raises(ModelError, match=r"from_pretrained does not read.*sparsecomp\.save"):
            each.save_pretrained("d")
    for index in (0, 2):
        model[index] = model[index].to_linear()
    assert model.save_pretrained("d") == "saved 4 tensors in d"


def test_matrices_without_a_layer_are_named_with_their_share() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(10, 10, bias=False)
            self.proj = nn.Parameter(torch.zeros(10, 20))
            self.gain = nn.Parameter(torch.zeros(10))
            self.table = nn.Embedding(10, 10)
            self.more = nn.ParameterList([nn.Parameter(torch.zeros(10, 9))])

    table = find_linears(nn.Sequential(Tower()))
    assert list(table) == ["0.fc"] and set(table.skipped) == {"0.proj", "0.more.0"}
    assert table.skipped["0.proj"].startswith("a bare Parameter 10x20 (40.0% of the model's weights), no layer")
    report = compiler.plan(Tower(), "2:4", measure=False)
    assert "proj" in report.skipped


class Mixin:
    def extra(self) -> int:
        return 5


class Mixed(nn.Linear, Mixin):
    """Gets a method from a class behind nn.Linear."""


def test_what_a_class_adds_behind_its_base_counts() -> None:
    assert 'its class Mixed adds "extra"' in find_linears(nn.Sequential(nn.Linear(4, 4), Mixed(8, 8))).skipped["1"]


def test_a_patched_linear_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    with pytest.raises(ModelError, match=r"nn\.Linear\.forward was replaced"):
        packed(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize("how", ["method", "partial"])
def test_methods_bound_to_the_old_layer_are_refused(how: str) -> None:
    model = net()
    bound = types.MethodType(lambda self, x: self(x), model[0])
    model[0].again = bound if how == "method" else functools.partial(bound)
    with pytest.raises(ModelError, match='the layer has "again" as a method of its own'):
        SparseLinear.from_linear(model[0], "2:4")
    assert type(packed(model)[0]) is nn.Linear and "0" in find_linears(model).skipped


class Louder(SparseLinear):
    """A packed layer that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_a_packed_layer_does_more_is_not_dropped_on_the_way_back(tmp_path: Path) -> None:
    model = packed(net())
    sc.save(model, tmp_path / "m.safetensors")
    inner = model[0].forward
    model[0].forward = lambda x: inner(x) + 100
    with pytest.raises(ModelError, match='"forward"'):
        model[0].to_linear()
    before = model[0]
    with pytest.raises(ModelError, match='"forward"'):
        sc.load(tmp_path / "m.safetensors", into=model)
    assert model[0] is before
    with pytest.raises(ModelError, match="forward of its own"):
        Louder.from_packed(before.packed(), before.bias).to_linear()


def test_the_bias_stays_the_object_it_was() -> None:
    model = net()
    model.tied = nn.Module()
    model.tied.bias = model[0].bias
    seen: list[Tensor] = []
    model[0].bias.register_hook(seen.append)
    model[0].bias.note = "no decay"
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    bias = model[0].bias
    sc.compile(model, "2:4", where="everywhere", only=["0", "2"])
    assert model[0].bias is bias is model.tied.bias and bias.note == "no decay"
    before = bias.detach().clone()
    model[0](torch.randn(3, 16)).sum().backward()
    optimizer.step()
    assert len(seen) == 1 and not torch.equal(model[0].bias, before)


def test_a_compiled_layer_is_copied_as_what_it_is() -> None:
    layer, other = packed(net())[0], packed(nn.Sequential(nn.Linear(16, 16)).apply(_prune_one))[0]
    layer.compile(backend="eager")
    twin, x = copy.deepcopy(layer), torch.randn(3, 16)
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(twin(x), other(x))


def test_submodules_that_cannot_be_copied_go_on() -> None:
    model = net()
    model[0].helper = nn.Module()
    model[0].helper.lock = threading.Lock()
    helper = model[0].helper
    assert packed(model)[0].helper is helper


def test_an_interrupted_swap_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2)
    sc.prune(model, "2:4", "magnitude", show_progress=False)
    real, before = swap.replace_layer, [(name, type(each)) for name, each in model.named_modules()]

    def interrupted(given: nn.Module, name: str, module: nn.Module) -> None:
        real(given, name, module)
        if name.endswith("1.linear1") and isinstance(module, SparseLinear):
            raise KeyboardInterrupt

    monkeypatch.setattr(swap, "replace_layer", interrupted)
    flags = [each.activation_relu_or_gelu for each in model.layers], model.use_nested_tensor
    with pytest.raises(KeyboardInterrupt):
        packed(model)
    assert [(name, type(each)) for name, each in model.named_modules()] == before
    assert ([each.activation_relu_or_gelu for each in model.layers], model.use_nested_tensor) == flags
