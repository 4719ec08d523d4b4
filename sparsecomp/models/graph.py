"""Which hidden channels of a model may change their order without changing its function, read off its exported graph.

Takes a model and one batch, gives ``Hidden`` values and, for every other layer, the reason. Permutes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from sparsecomp.models.batches import arguments, entering, evaluating, fresh
from sparsecomp.models.layers import LinearRef

_aten = torch.ops.aten
# act on each number alone, so channels may come in any order
_POINTWISE = frozenset(
    (
        _aten.relu,
        _aten.relu_,
        _aten.gelu,
        _aten.silu,
        _aten.silu_,
        _aten.tanh,
        _aten.sigmoid,
        _aten.hardswish,
        _aten.leaky_relu,
        _aten.elu,
        _aten.softplus,
        _aten.mish,
        _aten.clamp,
        _aten.square,
        _aten.pow,
        _aten.dropout,
        _aten.clone,
        _aten.contiguous,
        _aten.alias,
        _aten.detach,
        _aten.to,
        _aten._to_copy,
    )
)
_JOINING = frozenset((_aten.mul, _aten.add, _aten.sub, _aten.div, _aten.mul_, _aten.add_))
_VIEWS = frozenset((_aten.view, _aten.reshape, _aten._unsafe_view, _aten.flatten, _aten.unflatten))


@dataclass(frozen=True)
class Hidden:
    """Channels between layers: rows of the ``producers`` and columns of the ``consumer`` may be permuted together.

    ``segments`` are lengths of runs of channels that must not mix: one for the units of an MLP, one for each head.
    """

    consumer: str
    producers: tuple[str, ...]
    segments: tuple[int, ...]


class _No(Exception):
    """Why a layer's inputs cannot be permuted."""


def find_hidden(
    model: nn.Module, batch: Any, layers: Mapping[str, LinearRef]
) -> tuple[tuple[Hidden, ...], dict[str, str]]:
    """The permutable hidden channels of ``model`` between ``layers``, and why no others are: reasons by layer.

    ``batch`` is an example as ``calibrate`` takes it. Follows the graph of torch.export from each layer's input back
    through what acts on channels one by one, the joins of gated MLPs, and attention from the output projection to the
    values of each head.
    """
    try:
        args, kwargs = arguments(fresh(batch), 0)
        # a cache of keys and values is no tensor that the program could return
        with entering(model), evaluating(model), torch.no_grad():
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch.export raises whatever the model's code meets
        reason = f"torch.export cannot trace the model: {' '.join(str(error).split())[:200]}"
        return (), dict.fromkeys(layers, reason)
    graph = _Graph(program.graph.nodes, program.graph_signature.inputs_to_parameters, layers)
    found: list[Hidden] = []
    reasons: dict[str, str] = {}
    for name, nodes in graph.nodes_of(program.graph.nodes).items():
        try:
            found.append(graph.hidden(name, nodes))
        except _No as reason:
            reasons[name] = str(reason)
    for name in layers:
        if name not in reasons and all(name != each.consumer for each in found):
            convolution = layers[name].kind == "conv2d"
            reasons[name] = (
                "input channels of convolutions are not permuted"
                if convolution
                else "the exported graph does not call it as a linear layer"
            )
    return _apart(found, reasons), reasons


def _apart(found: list[Hidden], reasons: dict[str, str]) -> tuple[Hidden, ...]:
    """Those whose producers no other one permutes."""
    taken: set[str] = set()
    kept = []
    for each in found:
        if taken & set(each.producers):
            reasons[each.consumer] = "its hidden channels are those of another layer"
        else:
            taken.update(each.producers)
            kept.append(each)
    return tuple(kept)


@dataclass(frozen=True)
class _Place:
    """Where the channels are in a tensor: along ``axis``, of each head along ``heads`` if they are split."""

    axis: int
    heads: int | None = None


class _Graph:
    """Walks from a layer's input back to the layers that make its channels."""

    def __init__(self, nodes: Collection[Node], parameters: Mapping[str, str], layers: Mapping[str, LinearRef]) -> None:
        weights = {f"{name}.weight" if name else "weight": name for name in layers}
        for name, layer in layers.items():
            weights.update({f"{alias}.weight": name for alias in layer.aliases})
        self.weight_of = {node: weights[key] for node, key in parameters.items() if key in weights}
        self.parameters = frozenset(parameters)
        self.layers = layers
        self.users: dict[str, set[Node]] = {}
        for node in nodes:
            if node.name in self.weight_of:
                self.users.setdefault(self.weight_of[node.name], set()).update(node.users)

    def nodes_of(self, nodes: Collection[Node]) -> dict[str, list[Node]]:
        """The calls of each layer."""
        calls: dict[str, list[Node]] = {}
        for node in nodes:
            name = self.layer(node)
            if name is not None:
                calls.setdefault(name, []).append(node)
        return calls

    def layer(self, node: Node) -> str | None:
        """The layer that this node is a call of."""
        kind = _kind(node)
        if kind is _aten.linear and isinstance(node.args[1], Node):
            return self.weight_of.get(node.args[1].name)
        if kind is _aten.addmm and isinstance(node.args[2], Node):
            return self.weight_of.get(node.args[2].name)
        return None

    def _walk(self, name: str, source: Node, call: Node) -> _Walk:
        place = _Place(len(_shape(source)) - 1)
        walk = _Walk(self, name, strict=False)
        try:
            walk.back(source, place, call)
            walk.check()
        except _No:
            # of several reasons the one that is met first says most
            _Walk(self, name, strict=True).back(source, place, call)
            raise
        return walk

    def hidden(self, name: str, calls: list[Node]) -> Hidden:
        if len(calls) != 1:
            raise _No(f"it is called {len(calls)} times")
        call = calls[0]
        source = call.args[0] if _kind(call) is _aten.linear else call.args[1]
        assert isinstance(source, Node)
        walk = self._walk(name, source, call)
        width = self.layers[name].shape[1]
        # other readers of a weight would meet its channels in another order
        for layer, met in [(name, {call}), *walk.producers.items()]:
            if self.users[layer] != met:
                raise _No(f'the weight of "{layer}" is also used elsewhere in the model')
        for producer in walk.producers:
            if self.layers[producer].shape[0] != width:
                raise _No(f'"{producer}" makes {self.layers[producer].shape[0]} channels, not {width}')
        heads = walk.heads or 1
        return Hidden(name, tuple(walk.producers), (width // heads,) * heads)


class _Walk:
    """One way back; ``strict`` gives up at the first tensor with two readers, be it that both ways meet again."""

    def __init__(self, graph: _Graph, name: str, strict: bool) -> None:
        self.graph, self.name, self.strict = graph, name, strict
        self.places: dict[Node, _Place] = {}
        self.readers: dict[Node, set[Node]] = {}  # those on the way to the layer
        self.producers: dict[str, set[Node]] = {}  # and the calls met
        self.heads: int | None = None

    def back(self, node: Node, place: _Place, reader: Node) -> None:
        """Follow the channels at ``place`` of what ``node`` returns; ``reader`` is who reads it on this path."""
        if node in self.places:
            if self.places[node] != place:
                raise _No(f"its channels come from {_named(node)} along two axes")
            self.readers[node].add(reader)
            return
        self.places[node], self.readers[node] = place, {reader}
        if node.op != "call_function":
            raise _No("its input comes straight from the model's inputs or parameters")
        if self.strict:
            self.check()
        kind = _kind(node)
        producer = self.graph.layer(node)
        if producer is not None:
            self._producer(producer, node, place)
        elif kind in _POINTWISE:
            if len(node.all_input_nodes) > 1:
                raise _No(f"its input comes through {_named(node)} with numbers of each channel's own")
            self.back(_input(node, 0), place, node)
        elif kind in _JOINING:
            self._join(node, place)
        elif kind in _VIEWS:
            self.back(_input(node, 0), self._view(node, place), node)
        elif kind in (_aten.transpose, _aten.permute):
            self.back(_input(node, 0), _transposed(node, place), node)
        elif kind in (_aten.scaled_dot_product_attention, _aten.matmul, _aten.bmm):
            self._attention(node, place, 2 if kind is _aten.scaled_dot_product_attention else 1)
        else:
            raise _No(f"its input comes through {_named(node)}, which mixes or orders channels")

    def check(self) -> None:
        """That nothing but the layer reads, in the end, what its input is made of."""
        for node, readers in self.readers.items():
            others = [user for user in node.users if user not in readers]
            if others:
                raise _No(f"its input is also read elsewhere ({_named(others[0])}), such as a residual stream")

    def _producer(self, producer: str, node: Node, place: _Place) -> None:
        if place.heads is not None or place.axis != len(_shape(node)) - 1:
            raise _No(f'"{producer}" does not make its channels along the last axis')
        if producer == self.name:
            raise _No("it makes its own input")
        self.producers.setdefault(producer, set()).add(node)

    def _join(self, node: Node, place: _Place) -> None:
        shape = _shape(node)
        for each in node.args[:2]:
            if not isinstance(each, Node):
                continue
            other = _shape(each)
            offset = len(shape) - len(other)
            if place.axis - offset < 0 or other[place.axis - offset] == 1:
                continue  # the same number for every channel
            if each.name in self.graph.parameters:
                raise _No(f"its input is scaled or shifted by a parameter of its own ({each.name})")
            heads = None if place.heads is None else place.heads - offset
            self.back(each, _Place(place.axis - offset, heads), node)

    def _view(self, node: Node, place: _Place) -> _Place:
        before, after = _shape(_input(node, 0)), _shape(node)
        last = len(after) - 1
        if before == after:
            return place
        if place.axis == last and place.heads is None and before[-1] == after[-1]:
            return _Place(len(before) - 1)
        if place.axis == last and place.heads is None and len(before) >= 2 and before[-2] * before[-1] == after[-1]:
            if self.heads not in (None, before[-2]):
                raise _No("its heads are split in two ways")
            self.heads = before[-2]
            return _Place(len(before) - 1, len(before) - 2)
        if place.axis == last and place.heads == last - 1 and before[-1] == after[-2] * after[-1]:
            return _Place(len(before) - 1)
        raise _No("its input is reshaped in a way that mixes channels")

    def _attention(self, node: Node, place: _Place, values: int) -> None:
        source = _input(node, values)
        if sum(each is source for each in node.args) > 1:
            raise _No("its values are keys or queries as well")
        shape, last = _shape(node), len(_shape(node)) - 1
        if place.axis != last or (place.heads is None) != (last < 3) or place.heads not in (None, last - 2):
            raise _No(f"its input comes through {_named(node)} along another axis than the values'")
        if _shape(source)[:-2] != shape[:-2]:
            raise _No("heads share their values (grouped-query attention)")
        self.back(source, place, node)


def _kind(node: Node) -> Callable[..., Any] | None:
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None


def _input(node: Node, index: int) -> Node:
    value = node.args[index]
    assert isinstance(value, Node)
    return value


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _named(node: Node) -> str:
    if node.op == "output":
        return "the output"
    kind = _kind(node)
    return str(getattr(node.target, "__name__", node.name) if kind is None else kind).removeprefix("aten.")


def _transposed(node: Node, place: _Place) -> _Place:
    count = len(_shape(node))
    if _kind(node) is _aten.permute:
        order = [int(axis) % count for axis in node.args[1]]  # type: ignore[union-attr,arg-type]
    else:
        order = list(range(count))
        first, second = (int(axis) % count for axis in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = order[second], order[first]
    return _Place(order[place.axis], None if place.heads is None else order[place.heads])
