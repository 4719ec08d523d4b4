"""What a model holds beside its layers: bare matrices, ways past its modules, and names that a file uses."""

import functools
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsecomp.models.layers import find_linears
from sparsecomp.nn import SparseLinear
from sparsecomp.packing import pack


def matrix(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=dtype.is_floating_point or dtype.is_complex)


class Holding(nn.Module):
    def __init__(self, **held):
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)


def adding(base, name, *args):
    """A subclass of a layer of torch that has a matrix of its own."""
    made = type(f"My{base.__name__}", (base,), {})(*args)
    made.register_parameter(name, matrix(8, 4))
    return made


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (torch.float32, "a bare Parameter 8x4"),
        (torch.complex64, "a bare complex64 Parameter 8x4"),
        (torch.int8, "a bare int8 Parameter 8x4"),
    ],
)
def test_a_bare_matrix_is_named_whatever_it_is_made_of(dtype, text):
    reason = find_linears(Holding(turn=matrix(8, 4, dtype=dtype))).skipped["turn"]
    assert reason == f"{text} (100.0% of the model's weights), no layer; the model may multiply by it outside a layer"


@pytest.mark.parametrize(
    "layer",
    [
        adding(nn.Embedding, "turn", 10, 4),
        adding(nn.EmbeddingBag, "turn", 10, 4),
        adding(nn.MultiheadAttention, "turn", 8, 2),
        adding(nn.MultiheadAttention, "turn", 8, 2, 0.0, True, True, False, 4, 4),
        adding(nn.Conv2d, "turn", 3, 4, 3),
        adding(nn.LSTM, "turn", 4, 4, 2),
        adding(nn.Linear, "lora_A", 6, 6),
        adding(nn.LayerNorm, "turn", (3, 4)),
        adding(nn.Sequential, "turn"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_subclass_of_a_layer_of_torch_has_only_its_own_matrices_named(layer):
    skipped = find_linears(nn.ModuleDict({"part": layer})).skipped
    bare = [name for name, reason in skipped.items() if "bare" in reason or "stacks" in reason]
    assert bare == [f"part.{'lora_A' if isinstance(layer, nn.Linear) else 'turn'}"]


def test_what_is_perhaps_looked_up_is_not_said_to_be_multiplied_by():
    grid = find_linears(Holding(grid=matrix(3, 4, 5))).skipped[""]
    assert grid == (
        "Holding holds stacks of matrices (grid; 100.0% of the model's weights); if it multiplies by them, it does so "
        "outside linear layers"
    )


def test_one_parameter_under_two_names_is_one_matrix():
    one, stack = matrix(8, 4), matrix(2, 3, 4)
    skipped = find_linears(Holding(a=Holding(x=one, y=one), b=Holding(z=one, s=stack), c=Holding(s=stack))).skipped
    assert list(skipped) == ["a.x", "b"]
    assert "57.1%" in skipped["a.x"]
    assert "42.9%" in skipped["b"]


def test_a_packed_weight_held_elsewhere_is_no_bare_matrix():
    layer = SparseLinear.from_packed(pack(torch.zeros(8, 16), "2:4"))
    model = Holding(layer=layer, other=Holding())
    model.other._parameters["kept"] = layer.weight
    assert find_linears(model).skipped == {"layer": "already sparse"}


def test_a_layer_with_an_attribute_called_packed_is_no_sparse_one():
    linear = nn.Linear(4, 4)
    linear.packed = True
    assert list(find_linears(nn.Sequential(linear))) == ["0"]


@pytest.mark.parametrize("name", ["values", "metadata", "scales"])
def test_a_layer_that_has_a_name_of_the_file_stays_dense(name):
    linear, other = nn.Linear(4, 4), nn.Linear(4, 4)
    linear.register_buffer(name, torch.zeros(2))
    other.register_parameter(name, nn.Parameter(torch.zeros(2)))
    table = find_linears(nn.Sequential(linear, other))
    assert table.skipped == {
        "0": f'it has a buffer "{name}" of its own, a name that the file uses',
        "1": f'it has a Parameter "{name}" of its own, a name that the file uses',
    }
    unsaved = nn.Linear(4, 4)
    unsaved.register_buffer(name, torch.zeros(2), persistent=False)
    assert list(find_linears(nn.Sequential(unsaved))) == ["0"]


def closed_over(layer):
    return lambda x: layer(x) + 1


@pytest.mark.parametrize(
    "hold",
    [
        lambda layer: [layer],
        lambda layer: (torch.relu, layer),
        lambda layer: {"first": layer},
        lambda layer: {"first": [torch.relu, layer]},
        lambda layer: functools.partial(layer),
        lambda layer: [functools.partial(layer.forward)],
        lambda layer: functools.partial(map, layer),
        lambda layer: layer.forward,
        closed_over,
        lambda layer: weakref.ref(layer),
        lambda layer: deque([layer]),
        lambda layer: SimpleNamespace(run=[layer]),
        lambda layer: [nn.Sequential(layer, nn.ReLU())],
        lambda layer: [torch.compile(layer)],
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_layer_that_is_reached_past_the_modules_stays_dense(hold, deep):
    block = Holding(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    block.fns = hold(block.a)
    table = find_linears(nn.ModuleDict({"block": block}) if deep else block)
    name = "block.a" if deep else "a"
    assert list(table) == ["block.b" if deep else "b"]
    assert table.skipped[name] == (
        f"the model also reaches it past its modules, through {'block' if deep else 'self'}.fns; a packed layer would "
        "not be called there"
    )


def test_a_layer_inside_a_module_that_is_held_twice_is_found():
    block = Holding(a=nn.Linear(4, 4))
    model = Holding(block=block)
    model.blocks = [block]
    block.above, block.owner = [nn.ModuleList([model])], [weakref.proxy(block)]
    model.method, model.nothing = block.forward, lambda: unset
    assert list(find_linears(model)) == ["block.a"]
    unset = None


class Guarded:
    """An object that answers no questions."""

    @property
    def __dict__(self):
        raise RuntimeError("no")

    def __getattr__(self, name):
        raise RuntimeError("no")


def test_attributes_of_any_kind_do_not_stop_the_search():
    model = nn.Sequential(nn.Linear(4, 4))
    model.guarded, model.numbers, model.round = Guarded(), iter([1, 2]), []
    model.round.append(model.round)
    assert list(find_linears(model)) == ["0"]
    assert next(model.numbers) == 1
