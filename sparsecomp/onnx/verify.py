"""An ONNX file -> for each weight of MatMul, Gemm and Conv, whether it fits an N:M pattern, and why not.

Reads any ONNX file. Knows patterns; must not know torch models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecomp.display import table
from sparsecomp.errors import FormatError, PatternError
from sparsecomp.onnx.extra import require
from sparsecomp.onnx.function import DOMAIN, OPERATORS
from sparsecomp.patterns import GROUP_SIZES, NM, parse

_PASSED_THROUGH = ("Identity", "Cast", "Transpose", "DequantizeLinear")


@dataclass(frozen=True)
class VerifiedWeight:
    """One weight as a matrix [rows, reduced axis]. ``tightest`` are the smallest N that fit for M = 2, 4, 8, 16.

    For a Conv the reduced axis is the input channel and a row is an output channel at one kernel position.
    """

    name: str
    operator: str
    node: str
    shape: tuple[int, ...]
    density: float
    tightest: tuple[str, ...]
    fits: bool
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """All weights of a file, in the order of its nodes."""

    path: Path
    pattern: str
    weights: tuple[VerifiedWeight, ...]

    @property
    def fits(self) -> bool:
        """Whether there are weights and every one fits the pattern."""
        return bool(self.weights) and all(weight.fits for weight in self.weights)

    def __str__(self) -> str:
        """A table of the weights."""
        rows = [
            (w.name, w.operator, "x".join(map(str, w.shape)), f"{w.density:.3f}", "yes" if w.fits else "no", w.reason)
            for w in self.weights
        ]
        columns = ("weight", "operator", ">shape", ">density", self.pattern, "why")
        fitting = sum(w.fits for w in self.weights)
        return table(columns, rows, title=f"{self.path}: {fitting} of {len(self.weights)} weights fit {self.pattern}")


def verify(path: str | Path, pattern: str = "2:4") -> VerifyReport:
    """Check every MatMul, Gemm and Conv weight of an ONNX file against an N:M pattern along its reduced axis.

    Weights are found through Identity, Cast, Transpose and DequantizeLinear. Packed layers of this package are
    judged by their attributes. Raises FormatError for a file that is no ONNX model, PatternError for a pattern
    that is not N:M.
    """
    wanted = parse(pattern)
    if not isinstance(wanted, NM) or wanted.mask_rows != 1 or wanted.transposable:
        raise PatternError(f'verify takes an N:M pattern such as "2:4" or "8:16", got "{pattern}"')
    onnx = require("onnx")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's own errors, or a missing file
        raise FormatError(f"{path} cannot be read as an ONNX model ({error}); check the path") from error
    weights = tuple(_weights(model.graph, wanted, str(Path(path).parent)))
    return VerifyReport(Path(path), str(wanted), weights)


def _weights(graph: Any, wanted: NM, folder: str) -> Iterator[VerifiedWeight]:
    helper, numpy_helper = require("onnx.helper"), require("onnx.numpy_helper")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def attributes(node: Any) -> dict[str, Any]:
        return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}

    def constant(name: str) -> tuple[str, npt.NDArray[Any]] | None:
        """The initialiser behind a value and its array, transposed as the graph transposes it."""
        if name in stored:
            return name, numpy_helper.to_array(stored[name], base_dir=folder)
        node = makers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            value = attributes(node).get("value")
            return None if value is None else (name, numpy_helper.to_array(value))
        if node.op_type not in _PASSED_THROUGH or (found := constant(node.input[0])) is None:
            return None
        if node.op_type == "Transpose":
            return found[0], np.transpose(found[1], attributes(node).get("perm"))
        if node.op_type == "DequantizeLinear":
            return found[0], _centred(found[1], node, constant)
        return found

    for node in graph.node:
        if node.domain == DOMAIN and node.op_type in OPERATORS.values():
            yield _packed(node, attributes(node), stored, wanted)
            continue
        for operand in _operands(node):
            if (found := constant(node.input[operand])) is not None and found[1].ndim >= 2:
                rows = _rows(node.op_type, operand, found[1], attributes(node))
                yield _judge(found[0], node, tuple(found[1].shape), rows, wanted)


def _operands(node: Any) -> tuple[int, ...]:
    if node.domain not in ("", "ai.onnx"):
        return ()
    return {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (1,)}.get(node.op_type, ())


def _centred(quantised: npt.NDArray[Any], node: Any, constant: Any) -> npt.NDArray[Any]:
    """Zero where the dequantised weight is zero: a nonzero zero point moves it."""
    point = constant(node.input[2]) if len(node.input) > 2 else None
    if point is None or not np.any(point[1]):
        return quantised
    shape = [1] * quantised.ndim
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if point[1].size > 1:
        shape[axis] = point[1].size
    centred: npt.NDArray[Any] = quantised.astype(np.int32) - point[1].astype(np.int32).reshape(shape)
    return centred


def _rows(operator: str, operand: int, weight: npt.NDArray[Any], attributes: dict[str, Any]) -> npt.NDArray[Any]:
    """The weight as [rows, reduced axis]."""
    if operator == "Conv":
        moved = np.moveaxis(weight, 1, -1)
        return moved.reshape(-1, moved.shape[-1])
    if operator == "Gemm":
        transposed = bool(attributes.get("transA" if operand == 0 else "transB", 0))
        return weight if transposed == (operand == 1) else weight.T
    last = weight if operand == 0 else np.swapaxes(weight, -1, -2)
    return last.reshape(-1, last.shape[-1])


def _counts(rows: npt.NDArray[Any], m: int) -> npt.NDArray[np.int64]:
    """Nonzeros of each group of m along the reduced axis, [rows, groups]."""
    used = np.pad(rows != 0, ((0, 0), (0, -rows.shape[1] % m)))
    counts: npt.NDArray[np.int64] = used.reshape(len(rows), -1, m).sum(axis=2)
    return counts


def _judge(name: str, node: Any, shape: tuple[int, ...], rows: npt.NDArray[Any], wanted: NM) -> VerifiedWeight:
    tightest = tuple(f"{max(1, int(_counts(rows, m).max(initial=0)))}:{m}" for m in GROUP_SIZES)
    counts = _counts(rows, wanted.m)
    over = np.argwhere(counts > wanted.n)
    reason = ""
    if len(over):
        row, group = (int(i) for i in over[0])
        last = min((group + 1) * wanted.m, rows.shape[1]) - 1
        others = [text for text in tightest if int(text.split(":")[0]) < int(text.split(":")[1])]
        reason = (
            f"row {row}, inputs {group * wanted.m} to {last}: {int(counts[row, group])} nonzeros, at most "
            f"{wanted.n} allowed; {len(over)} of {counts.size} groups break it"
            + (f"; it fits {' and '.join(others)}" if others else "")
        )
    density = float(np.count_nonzero(rows)) / max(1, rows.size)
    return VerifiedWeight(name, node.op_type, node.name, shape, density, tightest, not len(over), reason)


def _packed(node: Any, attributes: dict[str, Any], stored: dict[str, Any], wanted: NM) -> VerifiedWeight:
    nm = NM(attributes["n"], attributes["m"], attributes["mask_rows"])
    out = stored[node.input[1]].dims[0] if node.input[1] in stored else 0
    # n of m consecutive inputs, so every wider group of whole groups has the same density
    fits = wanted.m % nm.m == 0 and nm.n * (wanted.m // nm.m) <= wanted.n
    reason = f"packed {nm}" + ("" if fits else f" does not imply {wanted}; export with form='dense' to have it counted")
    return VerifiedWeight(
        node.input[1],
        node.op_type,
        node.name,
        (int(out), int(attributes["in_features"])),
        nm.density,
        (str(nm),),
        fits,
        reason,
    )
