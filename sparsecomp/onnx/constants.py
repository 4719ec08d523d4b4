"""Values of an ONNX graph as far as the file alone tells them, and constant nodes computed with numpy.

Takes tensors and nodes and gives arrays, each made when it is asked for, as a model may be larger than memory.
Knows nothing of weights or patterns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sparsecomp.errors import FormatError
from sparsecomp.onnx.extra import require

Array = npt.NDArray[Any]
Attributes = dict[str, Any]


class Unevaluated(Exception):
    """A constant whose numbers cannot be told; the text is the reason."""


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of one value of a graph.

    "constant": it depends on stored tensors only, and ``array`` gives it or raises Unevaluated. "selected": the inputs
    choose or scale stored numbers, as in a lookup. "active": it is computed from the inputs. ``name`` is the stored
    tensor it comes from. ``product`` marks an elementwise product of inputs and a stored matrix.
    """

    kind: Literal["constant", "selected", "active"]
    name: str = ""
    make: Callable[[], Array] | None = None
    note: str = ""
    dims: tuple[int, ...] | None = None
    product: bool = False

    def array(self) -> Array:
        """The numbers of a constant."""
        if self.make is None:
            raise Unevaluated(self.note or "it is computed from the inputs")
        return self.make()

    def shape(self) -> tuple[int, ...] | None:
        """The shape of a constant, None where it cannot be told."""
        if self.dims is None and self.kind == "constant":
            try:
                return tuple(self.array().shape)
            except Unevaluated:
                return None
        return self.dims

    def size(self) -> int:
        """How many stored numbers it has, 0 where that cannot be told."""
        return math.prod(self.shape() or (0,)) if self.kind != "active" else 0

    def is_blank(self) -> bool:
        """Whether it is a constant of zeros, as a buffer that is filled later."""
        try:
            return self.kind == "constant" and not np.any(self.array())
        except Unevaluated:
            return False

    def is_matrix(self) -> bool:
        """Whether it may be a stored matrix: two of its axes or more are longer than 1."""
        if self.kind == "active":
            return False
        shape = self.shape()
        return shape is None or sum(size > 1 for size in shape) >= 2


ACTIVE = Value("active")


def blind(name: str, reason: str) -> Value:
    """A constant that cannot be evaluated."""
    return Value("constant", name, None, reason)


def stored(tensor: Any, name: str, folder: str) -> Value:
    """A TensorProto or SparseTensorProto of the file."""
    if hasattr(tensor, "dims") and hasattr(tensor, "values"):
        return Value("constant", name, partial(_densified, tensor, folder), dims=tuple(tensor.dims))
    return Value("constant", name, partial(_to_array, tensor, folder), dims=tuple(tensor.dims))


def _to_array(tensor: Any, folder: str) -> Array:
    numpy_helper, external = require("onnx.numpy_helper"), require("onnx.external_data_helper")
    try:
        array: Array = numpy_helper.to_array(tensor, base_dir=folder)
    except Exception as error:  # of a file that is missing or too short
        if external.uses_external_data(tensor):
            raise FormatError(
                f'tensor "{tensor.name}" cannot be read from the file its numbers are in ({error}); keep that file '
                f"beside the model"
            ) from error
        raise FormatError(f'tensor "{tensor.name}" cannot be read ({error}); export the model again') from error
    return array


def _densified(tensor: Any, folder: str) -> Array:
    """COO with linear indices [nonzeros] or coordinates [nonzeros, rank]."""
    values, indices = _to_array(tensor.values, folder), _to_array(tensor.indices, folder)
    dense = np.zeros(tuple(tensor.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def attributes_of(node: Any) -> Attributes:
    """The attributes of a node by name, tensors and graphs as they are stored."""
    helper = require("onnx.helper")
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def literal(node: Any, folder: str) -> Value:
    """The value of a Constant node."""
    name, attributes = node.output[0], attributes_of(node)
    for key in ("value", "sparse_value"):
        if key in attributes:
            return stored(attributes[key], name, folder)
    for key, kind in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in attributes:
            array = np.asarray(attributes[key], kind)
            return Value("constant", name, partial(np.asarray, array), dims=array.shape)
    return blind(name, "it is a text")


def computed(node: Any, inputs: Sequence[Value | None], opset: int) -> list[Value]:
    """The outputs of a node of the standard operators whose inputs are all constant."""
    known = [value for value in inputs if value is not None]
    # of a weight and its scale the weight
    named = sorted((value for value in known if value.name), key=lambda value: value.dims in ((), (1,)))
    name = named[0].name if named else (node.output[0] if node.output else "")
    if node.op_type == "Concat":
        name = " + ".join(dict.fromkeys(value.name for value in known))

    def made(index: int) -> Array:
        arrays = [None if value is None else value.array() for value in inputs]
        try:
            results = _by_numpy(node, arrays) or _by_reference(node, arrays, opset)
        except (FormatError, Unevaluated):
            raise
        except Exception as error:  # numpy's of a broken model, or whatever the evaluator raises
            reason = " ".join(str(error).split())[:100]
            raise Unevaluated(f"{node.op_type} cannot be evaluated ({reason})") from error
        result = results[index]
        if not isinstance(result, np.ndarray | np.generic):
            raise Unevaluated(f"{node.op_type} gives no tensor")
        return np.asarray(result)

    return [Value("constant", name, _kept_if_small(partial(made, index))) for index in range(len(node.output))]


def _kept_if_small(make: Callable[[], Array]) -> Callable[[], Array]:
    """Shapes and scales are asked for again and again; matrices are not to pile up."""
    kept: list[Array] = []

    def made() -> Array:
        if kept:
            return kept[0]
        array = make()
        if array.size <= 1 << 16:
            kept.append(array)
        return array

    return made


def _by_reference(node: Any, arrays: Sequence[Array | None], opset: int) -> Sequence[Any]:
    evaluator = require("onnx.reference").ReferenceEvaluator
    feeds = {name: array for name, array in zip(node.input, arrays, strict=True) if name and array is not None}
    results: Sequence[Any] = evaluator(node, opsets={"": opset}).run(None, feeds)
    return results


def _by_numpy(node: Any, arrays: Sequence[Any]) -> list[Array] | None:
    """What matters most for weights, independent of the evaluator's own faults; None for other operators."""
    attributes = attributes_of(node)
    first: Any = arrays[0] if arrays else None
    result: Any = None
    match node.op_type:
        case "Cast":
            result = first.astype(require("onnx.helper").tensor_dtype_to_np_dtype(attributes["to"]))
        case "Transpose":
            result = np.transpose(first, attributes.get("perm"))
        case "Unsqueeze":
            result = np.expand_dims(first, tuple(_axes(attributes, arrays)))
        case "Squeeze":
            axes = _axes(attributes, arrays)
            result = np.squeeze(first, None if axes is None else tuple(axes))
        case "Reshape" if len(arrays) > 1:
            copied = 0 if not attributes.get("allowzero") else None
            shape = [first.shape[i] if size == copied else size for i, size in enumerate(arrays[1].tolist())]
            result = first.reshape(shape)
        case "Concat":
            result = np.concatenate(arrays, attributes["axis"])
        case "Gather":
            result = np.take(first, arrays[1], attributes.get("axis", 0))
        case "Expand":
            result = np.broadcast_to(first, np.broadcast_shapes(first.shape, tuple(arrays[1].tolist())))
        case "Mul":
            result = first * arrays[1]
        case "DequantizeLinear":
            result = dequantised(first, arrays[1], arrays[2] if len(arrays) > 2 else None, attributes)
    return None if result is None else [np.asarray(result)]


def _axes(attributes: Attributes, arrays: Sequence[Any]) -> Any:
    """An attribute before opset 13, an input since."""
    if len(arrays) > 1 and arrays[1] is not None:
        return arrays[1].reshape(-1).tolist()
    return attributes.get("axes")


def dequantised(array: Array, scale: Array, point: Array | None, attributes: Attributes) -> Array:
    """(array - point) * scale, by tensor, by axis or by blocks of one axis."""
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)

    def spread(part: Array) -> Array:
        if block and part.ndim == array.ndim:
            wide = np.repeat(part, block, axis)
            return np.take(wide, range(array.shape[axis]), axis)
        if part.size > 1 and part.ndim == 1:
            shape = [1] * array.ndim
            shape[axis] = part.size
            return part.reshape(shape)
        return part.reshape(()) if part.size == 1 else part

    wide = array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    centred: Array = wide if point is None else wide - spread(point).astype(wide.dtype)
    return centred * spread(scale).astype(wide.dtype)
