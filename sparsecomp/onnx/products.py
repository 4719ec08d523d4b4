"""The operators that multiply by a weight: which of their inputs may be one, and how it lies.

Takes a node's operator and attributes and gives its operands; takes an operand's array and gives its rows along the
reduced axis. Knows nothing of graphs or patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sparsecomp.onnx.constants import Array, Attributes, Unevaluated

STANDARD = ("", "ai.onnx")
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Operand:
    """Input ``index`` of a product; ``zero_point`` is the input that holds what counts as zero in it.

    "left" [..., rows, reduced] and "right" [..., reduced, columns] are those of MatMul, with the last two axes swapped
    if ``turned``. The others are the layouts of the operators of that name.
    """

    index: int
    layout: Literal["left", "right", "conv", "conv_transpose", "recurrent", "einsum", "blocks"]
    zero_point: int | None = None
    turned: bool = False


def operands(domain: str, operator: str, attributes: Attributes, inputs: int) -> tuple[Operand, ...]:
    """The operands of a product with ``inputs`` inputs that may hold a weight; none for any other operator."""
    turned = {index: bool(attributes.get(name, 0)) for index, name in ((0, "transA"), (1, "transB"))}
    pair = (Operand(0, "left", turned=turned[0]), Operand(1, "right", turned=turned[1]))
    by_name: dict[str, tuple[Operand, ...]] = {}
    if domain in STANDARD:
        by_name = {
            "MatMul": pair,
            "Gemm": pair,
            "Conv": (Operand(1, "conv"),),
            "DeformConv": (Operand(1, "conv"),),
            "ConvTranspose": (Operand(1, "conv_transpose"),),
            "MatMulInteger": (Operand(0, "left", 2), Operand(1, "right", 3)),
            "QLinearMatMul": (Operand(0, "left", 2), Operand(3, "right", 5)),
            "ConvInteger": (Operand(1, "conv", 3),),
            "QLinearConv": (Operand(3, "conv", 5),),
            "Einsum": tuple(Operand(index, "einsum") for index in range(inputs) if _reduces(index, attributes)),
            **dict.fromkeys(("RNN", "GRU", "LSTM"), (Operand(1, "recurrent"), Operand(2, "recurrent"))),
        }
    elif domain == MICROSOFT:
        right = (Operand(1, "right"),)
        by_name = {
            "FusedMatMul": pair,
            "TransposeMatMul": pair,
            "FusedGemm": pair,
            "GemmFloat8": pair,
            "FusedConv": (Operand(1, "conv"),),
            "MatMulInteger16": (Operand(0, "left"), Operand(1, "right")),
            "MatMulIntegerToFloat": (Operand(0, "left", 4), Operand(1, "right", 5)),
            "DynamicQuantizeMatMul": (Operand(0, "left"), Operand(1, "right", 3)),
            "QGemm": (Operand(0, "left", 2, turned[0]), Operand(3, "right", 5, turned[1])),
            "GemmFastGelu": (Operand(0, "left"), Operand(1, "right")),
            "Attention": right,
            "PackedAttention": right,
            "DecoderMaskedSelfAttention": right,
            "QAttention": (Operand(1, "right", 7),),
            "MatMulNBits": (Operand(1, "blocks"),),
        }
        if operator == "QLinearConv" and not attributes.get("channels_last"):
            by_name["QLinearConv"] = (Operand(3, "conv", 5),)
    return by_name.get(operator, ())


# Operators of ONNX Runtime without a weight of their own, whatever constants they read: norms, caches of sines, tables.
WITHOUT_WEIGHTS = frozenset(
    [
        "BiasAdd",
        "BiasGelu",
        "BiasSplitGelu",
        "BiasSoftmax",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "EmbedLayerNormalization",
        "FastGelu",
        "GatherBlockQuantized",
        "Gelu",
        "GroupNorm",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "QEmbedLayerNormalization",
        "QLinearAdd",
        "QLinearMul",
        "QLinearConcat",
        "QuantizeLinear",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipGroupNorm",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    ]
)
# Models of their own, whose coefficients are attributes.
CLASSICAL = frozenset(["LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor"])


def rows(
    operand: Operand, attributes: Attributes, weight: Array, point: Array | None, others: list[Array | None]
) -> Array:
    """The weight as [rows, reduced axis], its zero point subtracted.

    ``others`` are the constant inputs of the node, None for those that are not. Raises Unevaluated for a geometry
    that is not understood.
    """
    if weight.ndim == 0:
        raise Unevaluated("it is a scalar")
    if operand.layout == "blocks":
        return _blocks(attributes, weight, others)
    if operand.layout == "einsum":
        return _einsum(operand.index, attributes, weight)
    if operand.layout == "recurrent":
        return weight.reshape(-1, weight.shape[-1])
    if operand.layout in ("conv", "conv_transpose"):
        return _convolution(operand.layout, attributes, _minus(weight, point, 0))
    if attributes.get("transBatchA" if operand.index == 0 else "transBatchB"):
        raise Unevaluated("its batch axes are transposed")
    if weight.ndim == 1:
        return _minus(weight, point, 0).reshape(1, -1)
    if operand.turned:
        weight = np.swapaxes(weight, -1, -2)
    # one zero point for each row on the left, for each column on the right
    weight = _minus(weight, point, -2 if operand.layout == "left" else -1)
    if operand.layout == "right":
        weight = np.swapaxes(weight, -1, -2)
    return weight.reshape(-1, weight.shape[-1])


def _minus(weight: Array, point: Array | None, axis: int) -> Array:
    """Nonzero where the weight differs from its zero point, which may be one for each index of ``axis``."""
    if point is None or not np.any(point):
        return weight
    if point.size > 1 and point.ndim == 1:
        shape = [1] * weight.ndim
        shape[axis] = point.size
        point = point.reshape(shape)
    elif point.size == 1:
        point = point.reshape(())
    difference: Array = weight.astype(np.int32) - point.astype(np.int32)
    return difference


def _convolution(layout: str, attributes: Attributes, weight: Array) -> Array:
    """A row is an output channel at one kernel position, the reduced axis is the input channels of its group."""
    if layout == "conv_transpose":
        group = attributes.get("group", 1)
        # [in, out / group, ...] -> [group, in / group, out / group, ...]
        weight = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    moved = np.moveaxis(weight, 1, -1)
    return moved.reshape(-1, moved.shape[-1])


def _labels(index: int, attributes: Attributes) -> tuple[str, str]:
    """The labels of one operand of an Einsum and those of its result."""
    equation = attributes.get("equation", b"")
    text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    terms, arrow, result = text.partition("->")
    if not arrow:
        result = "".join(sorted(label for label in set(terms) - {",", "."} if terms.count(label) == 1))
    return (terms.split(",") + [""] * (index + 1))[index], result


def _reduces(index: int, attributes: Attributes) -> bool:
    labels, result = _labels(index, attributes)
    return any(label not in result for label in labels.replace(".", ""))


def _einsum(index: int, attributes: Attributes, weight: Array) -> Array:
    """The axes that the result lacks are the reduced one, in the order they lie in."""
    labels, result = _labels(index, attributes)
    if "..." in labels:
        before, after = labels.split("...")
        labels = before + "\0" * (weight.ndim - len(before) - len(after)) + after
    named = labels.replace("\0", "")
    if len(set(named)) != len(named):
        raise Unevaluated("its Einsum takes a diagonal")
    reduced = [axis for axis, label in enumerate(labels) if label != "\0" and label not in result]
    kept = [axis for axis in range(weight.ndim) if axis not in reduced]
    columns = int(np.prod([weight.shape[axis] for axis in reduced], dtype=np.int64))
    return np.transpose(weight, kept + reduced).reshape(-1, columns)


def _blocks(attributes: Attributes, packed: Array, others: list[Array | None]) -> Array:
    """MatMulNBits: [out, blocks, bytes] of 2, 4 or 8 bits, low bits first, and zero points packed alike."""
    bits, columns, size = attributes.get("bits", 4), attributes["K"], attributes["block_size"]
    if bits not in (2, 4, 8) or (len(others) > 4 and others[4] is not None):
        raise Unevaluated(f"MatMulNBits of {bits} bits" + (" with g_idx" if bits in (2, 4, 8) else ""))
    out, blocks = attributes["N"], -(-columns // size)
    numbers = _unpacked(packed.reshape(out, -1), bits)[:, : blocks * size].reshape(out, blocks, size)
    point: Any = 1 << (bits - 1)
    given = others[3] if len(others) > 3 else None
    if given is not None:
        whole = given.dtype == np.uint8
        point = _unpacked(given.reshape(out, -1), bits)[:, :blocks] if whole else given.reshape(out, blocks)
        point = point[..., None]
    scales = others[2]
    if scales is None:
        raise Unevaluated("its scales are computed from the inputs")
    nonzero: Array = (numbers != point) & (scales.reshape(out, blocks, 1) != 0)
    return nonzero.reshape(out, -1)[:, :columns]


def _unpacked(packed: Array, bits: int) -> Array:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(len(packed), -1)
