"""An ONNX file -> for each weight its products read, whether it fits an N:M pattern, and why not.

Reads any ONNX file and names what it could not judge. Knows patterns; must not know torch models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsecomp.errors import FormatError, PatternError
from sparsecomp.onnx.constants import Unevaluated
from sparsecomp.onnx.extra import require
from sparsecomp.onnx.walk import Packed, Unseen, Weight, places
from sparsecomp.patterns import GROUP_SIZES, NM, parse
from sparsecomp.patterns.check import breach, group_counts
from sparsecomp.reporting.terminal import table


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
    """All weights of a file, in the order of its nodes, and the places that may hold others which were not judged."""

    path: Path
    pattern: str
    weights: tuple[VerifiedWeight, ...]
    unseen: tuple[Unseen, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there are weights, every one fits the pattern, and there is no place that was not judged."""
        return bool(self.weights) and all(weight.fits for weight in self.weights) and not self.unseen

    def __str__(self) -> str:
        """A table of the weights, and one of the places that were not judged."""
        fitting, count = sum(w.fits for w in self.weights), len(self.weights)
        title = f"{self.path}: {fitting} of {count} weights that were judged fit {self.pattern}"
        if not self.unseen:
            title = f"{self.path}: {fitting} of {count} weights fit {self.pattern}"
            if not count:
                title += ", as no product in it reads a stored weight"
        rows = [
            (w.name, w.operator, "x".join(map(str, w.shape)), f"{w.density:.3f}", "yes" if w.fits else "no", w.reason)
            for w in self.weights
        ]
        columns = ("weight", "operator", ">shape", ">density", self.pattern, "why")
        shown = table(columns, rows, title=title)
        if not self.unseen:
            return shown
        others = [(u.name or "-", u.operator, u.node, u.reason) for u in self.unseen]
        were = "place was" if len(others) == 1 else "places were"
        head = f"{len(others)} {were} not judged, so the file as a whole is not said to fit:"
        return "\n\n".join([shown, table(("stored value", "operator", "node", "why not judged"), others, title=head)])


def verify(path: str | Path, pattern: str = "2:4") -> VerifyReport:
    """Check every weight of an ONNX file against an N:M pattern along its reduced axis.

    Weights are the constant operands of MatMul, Gemm, Conv, ConvTranspose, Einsum, RNN, LSTM and GRU, of their
    quantised forms and of ONNX Runtime's fused ones: initialisers, dense or sparse, defaults of inputs, Constant nodes,
    and what constant nodes make of them, in the graph, in subgraphs (If, Loop, Scan) and in model-local functions, once
    for each call. A quantised weight is zero where it equals its zero point. Packed layers of this package are judged
    by their attributes. Whatever else may multiply by a stored matrix is named in ``unseen``.

    Products of two values that both come from the inputs, such as attention scores, have no weight.
    Raises FormatError for a file that is no ONNX model or lacks its external data, PatternError for a pattern
    that is not N:M.
    """
    wanted = parse(pattern)
    if not isinstance(wanted, NM) or wanted.mask_rows != 1 or wanted.transposable:
        raise PatternError(f'verify takes an N:M pattern such as "2:4" or "8:16", got "{pattern}"')
    onnx = require("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors, or a missing file
        raise FormatError(f"{path} cannot be read as an ONNX model ({error}); check the path") from error
    weights: list[VerifiedWeight] = []
    unseen: list[Unseen] = []

    def judged(weight: Weight | Packed) -> VerifiedWeight:
        return _judge(weight, wanted) if isinstance(weight, Weight) else _packed(weight, wanted)

    for place in places(model, str(Path(path).parent), judged):
        if isinstance(place, Unseen):
            unseen.append(place)
        else:
            weights.append(place)
    return VerifyReport(Path(path), str(wanted), tuple(weights), tuple(unseen))


def _judge(weight: Weight, wanted: NM) -> VerifiedWeight:
    rows = weight.rows
    used = rows != 0
    tightest = tuple(f"{max(1, int(group_counts(used, m).max(initial=0)))}:{m}" for m in GROUP_SIZES)
    reason = breach(used, wanted, "nonzeros", "inputs") or ""
    fits = not reason
    others = [text for text in tightest if int(text.split(":")[0]) < int(text.split(":")[1])]
    if reason and others:
        reason += f"; it fits {' and '.join(others)}"
    density = float(np.count_nonzero(rows)) / max(1, rows.size)
    return VerifiedWeight(weight.name, weight.operator, weight.node, weight.shape, density, tightest, fits, reason)


def _packed(layer: Packed, wanted: NM) -> VerifiedWeight:
    attributes = layer.attributes
    try:
        nm = NM(attributes["n"], attributes["m"], attributes["mask_rows"])
        shape = layer.shape[0], int(attributes["in_features"])
    except (KeyError, PatternError) as error:
        raise Unevaluated("its attributes describe no N:M weight") from error
    if layer.shape != (shape[0], nm.groups(shape[1]) * nm.n):
        raise Unevaluated(f"its values are {'x'.join(map(str, layer.shape))}, which its attributes do not describe")
    # n of m consecutive inputs, so every wider group of whole groups has the same density
    fits = wanted.m % nm.m == 0 and nm.n * (wanted.m // nm.m) <= wanted.n
    reason = f"packed {nm}" + ("" if fits else f" does not imply {wanted}; export with form='dense' to have it counted")
    return VerifiedWeight(layer.name, layer.operator, layer.node, shape, nm.density, (str(nm),), fits, reason)
