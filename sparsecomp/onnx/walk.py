"""An ONNX model -> every weight its products read, in the order of its nodes, and every place that was not understood.

Follows values through subgraphs, model-local functions and constant nodes. Knows nothing of patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sparsecomp.onnx import products
from sparsecomp.onnx.constants import (
    ACTIVE,
    Array,
    Attributes,
    Unevaluated,
    Value,
    attributes_of,
    blind,
    computed,
    literal,
    stored,
)
from sparsecomp.onnx.extra import require
from sparsecomp.onnx.function import DENSE_INTEGERS, DOMAIN, OPERATORS
from sparsecomp.onnx.protos import is_ours, resolved, static_shapes, subgraphs, without_ones

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
# what these give is a choice among the numbers of input 0, whatever chooses
_CHOOSING = (
    "Cast",
    "Compress",
    "DequantizeLinear",
    "Expand",
    "Flatten",
    "Gather",
    "GatherBlockQuantized",
    "GatherElements",
    "GatherND",
    "Pad",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
_SCALING = ("Add", "Clip", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub")
_SCATTERING = ("ScatterElements", "ScatterND", "TensorScatter")
_MOST_CALLS = 64
_MANY_NUMBERS = 1 << 16  # more than a bias has
_MANY_ATTRIBUTES = 32  # more than axes, pads and sizes have


@dataclass(frozen=True)
class Unseen:
    """A place that may hold a weight which was not judged, and why. ``name`` is the stored tensor, if one is known."""

    name: str
    operator: str
    node: str
    reason: str


@dataclass(frozen=True)
class Weight:
    """A weight that a node multiplies by, as ``rows`` [rows, reduced axis] in place of its own ``shape``."""

    name: str
    operator: str
    node: str
    shape: tuple[int, ...]
    rows: Array


@dataclass(frozen=True)
class Packed:
    """A packed layer of this package, which its attributes and the ``shape`` of its values describe."""

    name: str
    operator: str
    node: str
    shape: tuple[int, ...]
    attributes: Attributes


Judged = TypeVar("Judged")
Scope = dict[str, Value]


def places(model: Any, folder: str, judge: Callable[[Weight | Packed], Judged]) -> list[Judged | Unseen]:
    """What the products of ``model``, an onnx.ModelProto whose external data lie in ``folder``, multiply by.

    Each weight is given to ``judge`` as soon as it is met, so that one at a time is in memory. Where ``judge`` raises
    Unevaluated, the place counts as unseen.
    Raises FormatError for stored tensors that cannot be read.
    """
    walk = _Walk(model, folder, judge)
    scope = {value.name: ACTIVE for value in model.graph.input}
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    walk.graph(model.graph, _Frame(scope, "", opsets, {}, static_shapes(model)))
    return walk.found


@dataclass(frozen=True)
class _Frame:
    """Where a node stands: the values it can name, and what its function was called with."""

    scope: Scope
    path: str
    opsets: Mapping[str, int]
    attributes: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def inside(self, part: str) -> _Frame:
        return _Frame(dict(self.scope), f"{self.path}{part}/", self.opsets, self.attributes, self.shapes)


class _Walk(Generic[Judged]):
    def __init__(self, model: Any, folder: str, judge: Callable[[Weight | Packed], Judged]) -> None:
        self.folder, self.judge = folder, judge
        self.found: list[Judged | Unseen] = []
        self.functions = {(each.domain, each.name, each.overload): each for each in model.functions}
        self.calls = 0

    # --- graphs -----------------------------------------------------------------------------------------------------

    def graph(self, graph: Any, frame: _Frame) -> list[Value]:
        """Walk a graph whose inputs are in the frame's scope already; gives its outputs."""
        for tensor in graph.initializer:  # an input of the same name is a default, and judged as that
            frame.scope[tensor.name] = stored(tensor, tensor.name, self.folder)
        for tensor in graph.sparse_initializer:
            frame.scope[tensor.values.name] = stored(tensor, tensor.values.name, self.folder)
        self.nodes(graph.node, frame)
        return [frame.scope.get(value.name, ACTIVE) for value in graph.output]

    def nodes(self, nodes: Any, frame: _Frame) -> None:
        for node in nodes:
            node = resolved(node, frame.attributes)
            inputs = [frame.scope.get(name, ACTIVE) if name else None for name in node.input]
            outputs = self.node(node, inputs, frame)
            frame.scope.update((name, value) for name, value in zip(node.output, outputs, strict=False) if name)

    def node(self, node: Any, inputs: list[Value | None], frame: _Frame) -> list[Value]:
        known = [value for value in inputs if value is not None]
        function = self.functions.get((node.domain, node.op_type, node.overload))
        kind = OPERATORS.get(node.op_type, (None,))[0] if node.domain == DOMAIN else None
        # what is dense is judged by the product in its function
        if kind is not None and not (kind == DENSE_INTEGERS and function) and is_ours(function, node.op_type):
            self._packed(node, inputs, frame)
            return [ACTIVE] * len(node.output)
        if function is not None:
            return self._call(node, function, inputs, frame)
        if node.domain in products.STANDARD:
            if node.op_type == "If":
                return self._if(node, inputs, frame)
            if node.op_type in ("Loop", "Scan"):
                return self._repeated(node, inputs, frame)
            if node.op_type == "Constant":
                return [literal(node, self.folder)]
            if node.op_type in _RANDOM:
                return [ACTIVE] * len(node.output)
            # CastLike rounds, which makes no zero a nonzero
            if node.op_type in ("Identity", "Dropout", "CastLike") and known:
                return [known[0], *[ACTIVE] * (len(node.output) - 1)]
        attributes = attributes_of(node)
        self._products(node, attributes, inputs, frame)
        self._odd_places(node, attributes, inputs, frame)
        return self._results(node, inputs, frame)

    def _results(self, node: Any, inputs: list[Value | None], frame: _Frame) -> list[Value]:
        """What a node gives, by what its inputs are."""
        known, count = [value for value in inputs if value is not None], len(node.output)
        kinds = {value.kind for value in known}
        source = next((value for value in known if value.kind != "active"), ACTIVE)
        if "active" not in kinds and "selected" not in kinds:
            dequantised = node.domain == products.MICROSOFT and node.op_type == "DequantizeLinear"
            if (node.domain in products.STANDARD or dequantised) and not subgraphs(node):
                return computed(node, inputs, frame.opsets.get("", frame.opsets.get("ai.onnx", 1)))
            return [blind(source.name, f"it is what {node.op_type} makes of constants")] * count
        if products.operands(node.domain, node.op_type, attributes_of(node), len(inputs)):
            return [ACTIVE] * count
        if node.op_type == "Where":
            known = known[1:]
            source = next((value for value in known if value.kind != "active"), ACTIVE)
        chosen = Value("selected", source.name, None, f"the inputs choose or change it in {node.op_type}", source.dims)
        if not any(value.kind == "active" for value in known):
            return [chosen] * count
        if node.op_type in _CHOOSING and known[0].kind != "active":
            return [Value("selected", known[0].name, None, f"the inputs choose its numbers in {node.op_type}")] * count
        if node.op_type in _SCALING and source.is_matrix():
            if _scaled(node, source, inputs, frame):
                return [chosen] * count
            return [Value("active", source.name, product=node.op_type == "Mul")] * count
        if node.op_type == "Concat" and any(value.is_matrix() for value in known):
            return [chosen] * count
        if (
            node.op_type in _SCATTERING
            and known[0].kind == "constant"
            and known[0].is_matrix()
            and not known[0].is_blank()
        ):
            return [chosen] * count
        return [ACTIVE] * count

    # --- weights ----------------------------------------------------------------------------------------------------

    def _unseen(self, node: Any, frame: _Frame, name: str, reason: str) -> None:
        self.found.append(Unseen(name, node.op_type, _title(node, frame), reason))

    def _products(self, node: Any, attributes: Attributes, inputs: list[Value | None], frame: _Frame) -> None:
        candidates = products.operands(node.domain, node.op_type, attributes, len(inputs))
        candidates = tuple(each for each in candidates if each.index < len(inputs))
        judged = False
        for operand in candidates:
            value = inputs[operand.index]
            if value is not None and value.kind == "constant":
                judged = True
                try:
                    self.found.append(self.judge(self._weight(node, attributes, operand, inputs, frame)))
                except Unevaluated as reason:
                    self._unseen(node, frame, value.name, str(reason))
        for operand in candidates:
            value = inputs[operand.index]
            # where a stored weight stands on the other side, a lookup is what it is applied to
            if value is not None and value.kind == "selected" and not judged:
                self._unseen(node, frame, value.name, value.note)

    def _weight(
        self, node: Any, attributes: Attributes, operand: products.Operand, inputs: list[Value | None], frame: _Frame
    ) -> Weight:
        value = inputs[operand.index]
        assert value is not None
        array = value.array()
        at = operand.zero_point
        point = inputs[at] if at is not None and at < len(inputs) else None
        if point is not None and point.kind != "constant":
            raise Unevaluated("its zero point is computed from the inputs")
        others: list[Array | None] = []
        if operand.layout == "blocks":
            if any(each is not None and each.kind != "constant" for each in inputs[2:5]):
                raise Unevaluated("its scales or zero points are computed from the inputs")
            others = [None if each is None or each.kind != "constant" else each.array() for each in inputs]
        try:
            rows = products.rows(operand, attributes, array, None if point is None else point.array(), others)
        except (ValueError, KeyError, IndexError) as error:  # of numpy, for a file that breaks the operator's rules
            raise Unevaluated(f"its shape or attributes do not fit {node.op_type}") from error
        return Weight(value.name, node.op_type, _title(node, frame), tuple(array.shape), rows)

    def _packed(self, node: Any, inputs: list[Value | None], frame: _Frame) -> None:
        values = inputs[1] if len(inputs) > 1 else None
        shape = None if values is None or values.kind != "constant" else values.shape()
        if values is None or not shape:
            self._unseen(node, frame, values.name if values else "", "its values are no constant of the file")
            return
        title = _title(node, frame)
        try:
            self.found.append(self.judge(Packed(values.name, node.op_type, title, shape, attributes_of(node))))
        except Unevaluated as reason:
            self._unseen(node, frame, values.name, str(reason))

    def _odd_places(self, node: Any, attributes: Attributes, inputs: list[Value | None], frame: _Frame) -> None:
        """Name stored matrices that reach an operator which may multiply by them in a way that is not known here."""
        if node.domain in products.STANDARD:
            foreign = not require("onnx.defs").has(node.op_type)  # of a version that is newer than the onnx package
        else:
            foreign = node.domain != products.MICROSOFT or node.op_type not in products.WITHOUT_WEIGHTS
        read = [operand.index for operand in products.operands(node.domain, node.op_type, attributes, len(inputs))]
        if node.domain == "ai.onnx.ml":
            foreign = False
            if node.op_type in products.CLASSICAL:
                self._unseen(node, frame, "", "its coefficients are attributes")
        if read:  # what is no operand there is a bias, a scale or a mask
            foreign = False
        stored_keys = node.op_type == "Attention" and node.domain in products.STANDARD
        for index, value in enumerate(inputs):
            if value is None:
                continue
            odd = index not in read and (foreign or (stored_keys and index < 3))
            if odd and (value.is_matrix() or value.size() > _MANY_NUMBERS):
                self._unseen(node, frame, value.name, f"what {node.op_type} does with it is not known here")
            if value.product and node.op_type in ("ReduceSum", "ReduceMean") and index == 0:
                self._unseen(node, frame, value.name, "it is multiplied and summed without a product of matrices")
        if not foreign:
            return
        for name, attribute in attributes.items():
            if _many(attribute):
                self._unseen(node, frame, name, f"what {node.op_type} does with it is not known here")
        for name, graph in subgraphs(node):
            inside = frame.inside(f"{_title(node, frame, short=True)}.{name}")
            inside.scope.update((value.name, ACTIVE) for value in graph.input)
            self.graph(graph, inside)

    # --- calls and control flow -------------------------------------------------------------------------------------

    def _call(self, node: Any, function: Any, inputs: list[Value | None], frame: _Frame) -> list[Value]:
        if self.calls >= _MOST_CALLS:
            self._unseen(node, frame, "", "functions call one another without end")
            return [ACTIVE] * len(node.output)
        given = {attribute.name: attribute for attribute in [*function.attribute_proto, *node.attribute]}
        scope = dict.fromkeys(function.input, ACTIVE)
        scope.update((name, value) for name, value in zip(function.input, inputs, strict=False) if value is not None)
        opsets = {entry.domain: entry.version for entry in function.opset_import}
        path = f"{frame.path}{_title(node, frame, short=True)}/"
        inside = _Frame(scope, path, opsets, given, {})
        self.calls += 1
        self.nodes(function.node, inside)
        self.calls -= 1
        return [inside.scope.get(name, ACTIVE) for name in function.output]

    def _if(self, node: Any, inputs: list[Value | None], frame: _Frame) -> list[Value]:
        branches = [self.graph(graph, frame.inside(f"{_title(node, frame, True)}.{n}")) for n, graph in subgraphs(node)]
        fixed = inputs[0] is not None and inputs[0].kind == "constant"
        results = []
        for values in zip(*branches, strict=False):
            source = next((value for value in values if value.kind != "active"), ACTIVE)
            if all(value is values[0] for value in values):
                results.append(values[0])
            elif fixed and all(value.kind == "constant" for value in values):
                results.append(blind(source.name, "an If chooses it"))
            else:
                results.append(source if source is ACTIVE else Value("selected", source.name, None, "an If chooses it"))
        return results

    def _repeated(self, node: Any, inputs: list[Value | None], frame: _Frame) -> list[Value]:
        """Loop and Scan: what they carry is a constant only while the body hands it on as it is."""
        attributes = attributes_of(node)
        body, given = attributes["body"], [value or ACTIVE for value in inputs]
        step = f"{node.op_type} takes one part of it in each step"
        if node.op_type == "Loop":
            first, carried, sliced = [blind("", "it counts the steps of a Loop"), ACTIVE], given[2:], []
        else:
            count = len(given) - attributes["num_scan_inputs"]
            first, carried = [], given[:count]
            sliced = [blind(v.name, step) if v.kind == "constant" else v for v in given[count:]]
        skipped = 1 if node.op_type == "Loop" else 0  # the condition that the body gives back
        held, kept = list(carried), len(self.found)
        while True:
            inside = frame.inside(f"{_title(node, frame, True)}.body")
            formal = [*first, *held, *sliced]
            inside.scope.update(zip([value.name for value in body.input], formal, strict=False))
            del self.found[kept:]
            outputs = self.graph(body, inside)[skipped:]
            after = [_carried(old, new, node.op_type) for old, new in zip(held, outputs, strict=False)]
            if all(old is new for old, new in zip(held, after, strict=False)):
                break
            held = after
        scanned = outputs[len(held) :]
        return [*held, *[blind(v.name, step) if v.kind == "constant" else v for v in scanned]]


def _scaled(node: Any, source: Value, inputs: list[Value | None], frame: _Frame) -> bool:
    """Whether a node changes a stored matrix by smaller numbers from the inputs, and not an activation by a table."""
    whole, shape = frame.shapes.get(node.output[0]), source.shape()
    if whole is None or shape is None or without_ones(whole) != without_ones(shape):
        return False
    others = [name for name, value in zip(node.input, inputs, strict=True) if value is not None and value is not source]
    return any(without_ones(frame.shapes.get(name, ())) != without_ones(shape) for name in others)


def _many(attribute: Any) -> bool:
    """Whether an attribute of an unknown operator may hold a matrix: a tensor, a list of numbers or a blob."""
    if isinstance(attribute, list | bytes):
        return len(attribute) > (_MANY_ATTRIBUTES if isinstance(attribute, list) else 1024)
    return bool(sum(size > 1 for size in getattr(attribute, "dims", ())) >= 2)


def _carried(old: Value, new: Value, operator: str) -> Value:
    """What a loop hands on: ``old`` itself while nothing changes, else something that only ever tells less."""
    changed = f"{operator} changes it from step to step"
    order = ("constant", "selected", "active")
    if new is old or order.index(old.kind) > order.index(new.kind) or old.note == changed == new.note:
        return old
    if new.kind == "active":
        return old if old.kind == "active" else ACTIVE
    if new.kind == "selected":
        return old if old.kind == "selected" else Value("selected", old.name or new.name, None, changed)
    return old if old.make is None and old.note == changed else blind(old.name or new.name, changed)


def _title(node: Any, frame: _Frame, short: bool = False) -> str:
    own = node.name or f"{node.op_type} of {node.output[0] if node.output else 'nothing'}"
    return own if short else f"{frame.path}{own}"
