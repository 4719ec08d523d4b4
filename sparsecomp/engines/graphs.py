"""ONNX models of one dense layer, several copies of it side by side: as a Gemm, and quantised dynamically to int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsecomp.engines.base import Operands


def gemm(operands: Operands, batch: int | str, copies: int) -> bytes:
    """A serialized ONNX model with one Gemm for each copy, all on the same x [batch, in]."""
    from onnx import helper, numpy_helper

    nodes, stored = [], [numpy_helper.from_array(operands.bias.numpy(), "bias")]
    for i, weight in enumerate(operands.weights[:copies]):
        stored.append(numpy_helper.from_array(weight.numpy(), f"w{i}"))
        nodes.append(helper.make_node("Gemm", ["x", f"w{i}", "bias"], [f"y{i}"], transB=1))
    return _model(operands.weights[0], batch, ["x"], nodes, stored, copies)


def quantized_gemm(weights: Sequence[tuple[Tensor, Tensor]], bias: Tensor, batch: int | str, copies: int) -> bytes:
    """The nodes that onnxruntime's ``quantize_dynamic(per_channel=True)`` puts in the place of a Gemm, for each copy.

    ``weights`` are integers [out, in] and row scales. Each copy has an input of its own, so that none shares rounded
    activations with another.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    zeros = numpy_helper.from_array(np.zeros(bias.shape[0], np.int8), "zeros")
    nodes, stored = [], [numpy_helper.from_array(bias.numpy(), "bias"), zeros]
    for i, (integers, scales) in enumerate(weights[:copies]):
        stored.append(numpy_helper.from_array(integers.T.contiguous().numpy(), f"w{i}"))
        stored.append(numpy_helper.from_array(scales[:, 0].numpy(), f"w_scale{i}"))
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [f"x{i}"], [f"q{i}", f"x_scale{i}", f"x_zero{i}"]),
            helper.make_node("Mul", [f"x_scale{i}", f"w_scale{i}"], [f"scale{i}"]),
            helper.make_node("MatMulInteger", [f"q{i}", f"w{i}", f"x_zero{i}", "zeros"], [f"sums{i}"]),
            helper.make_node("Cast", [f"sums{i}"], [f"float{i}"], to=1),
            helper.make_node("Mul", [f"float{i}", f"scale{i}"], [f"product{i}"]),
            helper.make_node("Add", [f"product{i}", "bias"], [f"y{i}"]),
        ]
    return _model(weights[0][0], batch, [f"x{i}" for i in range(copies)], nodes, stored, copies)


def _model(
    weight: Tensor,
    batch: int | str,
    inputs: Sequence[str],
    nodes: Sequence[Any],
    stored: Sequence[Any],
    copies: int,
) -> bytes:
    import onnx
    from onnx import helper

    out, columns = weight.shape
    sources = [helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, [batch, columns]) for each in inputs]
    outputs = [helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, [batch, out]) for i in range(copies)]
    graph = helper.make_graph(nodes, "layer", sources, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialized: bytes = model.SerializeToString()
    return serialized
