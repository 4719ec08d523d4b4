"""Questions about ONNX's messages: attributes of a call, subgraphs, shapes, and whether a function is ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsecomp.onnx.constants import attributes_of
from sparsecomp.onnx.extra import require
from sparsecomp.onnx.function import linear_function


def resolved(node: Any, given: Mapping[str, Any]) -> Any:
    """The node with the attributes its function was called with in the place of their names."""
    if not any(attribute.ref_attr_name for attribute in node.attribute):
        return node
    copy = type(node)()
    copy.CopyFrom(node)
    del copy.attribute[:]
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            copy.attribute.append(attribute)
        elif attribute.ref_attr_name in given:
            copy.attribute.append(given[attribute.ref_attr_name])
            copy.attribute[-1].name = attribute.name
    return copy


def subgraphs(node: Any) -> list[tuple[str, Any]]:
    """The graphs among the attributes of a node, with the attribute's name."""
    pairs = [
        (name, each)
        for name, value in attributes_of(node).items()
        for each in (value if isinstance(value, list) else [value])
    ]
    return [(name, each) for name, each in pairs if hasattr(each, "node") and hasattr(each, "initializer")]


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the axes of size 1 in front."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


def static_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The fixed shapes that shape inference finds; none where it fails."""
    # without the weights, of which inference needs the shapes alone; the numbers of shapes are few
    bare = type(model)(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(bare.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= 1024 and len(tensor.dims) < 2:
            bare.graph.initializer.append(tensor)
        else:
            value = require("onnx.helper").make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            bare.graph.value_info.append(value)
    try:
        inferred = require("onnx.shape_inference").infer_shapes(bare)
    except Exception:  # of a model that is broken in some other place
        return {}
    shapes = {}
    for value in [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def is_ours(function: Any, operator: str) -> bool:
    """Whether a function of our operator's name is our function, or there is none."""
    if function is None:
        return True
    opset = next((entry.version for entry in function.opset_import if entry.domain == ""), 0)

    def steps(each: Any) -> list[tuple[Any, ...]]:
        return [(node.op_type, *node.input, *node.output) for node in each.node]

    return steps(function) == steps(linear_function(opset, operator))
