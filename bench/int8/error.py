"""The error of int8 layer by layer on all-MiniLM-L6-v2, beside ONNX Runtime's. ``python -m bench.int8.error``.

Each linear layer of the encoder is given what it gets in the dense model on held-out text. Ours is compared with the
float product of the same pruned weight, ONNX Runtime's ``quantize_dynamic`` with that of the dense weight.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsecomp as sc
from bench import minilm
from bench.demo.embedding import quantize_int8, stock_session
from bench.ending import ended
from bench.int8.inputs import calibrate_ranges, visit_inputs
from bench.int8.ranges import BY_ROW, BY_TENSOR, CLIPPED, FIXED, Calibrated, ways
from sparsecomp.benchmark.machine import describe
from sparsecomp.errors import SparsecompError
from sparsecomp.machine.device import detect
from sparsecomp.methods.weight import prune_weight
from sparsecomp.models.layers import find_linears
from sparsecomp.reporting.terminal import table

FORMAT = 1
METHOD = "fast"
# ONNX Runtime takes one range for a whole call, so its error hangs on how many texts are in it
ALONE, TOGETHER = 1, 32
OURS, OURS_DENSE = "ours", "ours_dense"
RIVALS = tuple(f"ort{kind}_{size}" for kind in ("", "_channel") for size in (ALONE, TOGETHER))
SIMULATED = {BY_ROW: "row", BY_TENSOR: "call", FIXED: "fixed range", CLIPPED: "clipped range"}

# y [rows, out] of x [rows, in]
Product = Callable[[Tensor], Tensor]


class Error:
    """A running ||y' - y|| / ||y||, Frobenius norms over all rows, without the bias."""

    def __init__(self) -> None:
        """Of no rows."""
        self._changed = self._whole = 0.0

    def add(self, y: Tensor, other: Tensor) -> None:
        """Count rows [rows, out]."""
        self._changed += float((other - y).double().square().sum())
        self._whole += float(y.double().square().sum())

    @property
    def value(self) -> float:
        """0.0 where nothing changed, inf where only the true y is zero."""
        if self._changed == 0.0:
            return 0.0
        return math.sqrt(self._changed / self._whole) if self._whole > 0.0 else math.inf


class Layer:
    """One layer in floats and every other way, each with its running error; weights are [out, in]."""

    def __init__(self, dense: Tensor, pruned: Tensor, pattern: str, calibrated: Calibrated, folder: Path) -> None:
        """``pruned`` fits ``pattern``; ``folder`` is for ONNX Runtime's files."""
        self.shape = tuple(dense.shape)
        self._dense, self._pruned = dense, pruned
        layer = product(pruned, f"{pattern}+int8@a8")
        self._ours, self._ours_dense = layer, product(dense, "16:16+int8@a8")
        self._sessions = {kind: ort_product(dense, folder, kind == "_channel") for kind in ("", "_channel")}
        self._integers, self._ways = layer.weight.detach().clone(), ways(calibrated)
        self.errors = {name: Error() for name in (OURS, OURS_DENSE, *RIVALS, *SIMULATED)}

    def see(self, x: Tensor, real: Tensor) -> None:
        """Multiply an input [texts, tokens, in] every way; rows where ``real`` is False are padding and not judged."""
        rows = x[real]
        sparse, dense = rows @ self._pruned.T, rows @ self._dense.T
        self.errors[OURS].add(sparse, self._ours(rows))
        self.errors[OURS_DENSE].add(dense, self._ours_dense(rows))
        for name, rounded in self._ways.items():
            self.errors[name].add(sparse, rounded(rows) @ self._integers.T)
        lengths = [int(each.sum()) for each in real]
        for kind, run in self._sessions.items():
            # in a batch the padding is in the call, too
            self.errors[f"ort{kind}_{TOGETHER}"].add(dense, run(x.flatten(0, 1))[real.flatten()])
            alone = torch.cat([run(each) for each in torch.split(rows, lengths)])
            self.errors[f"ort{kind}_{ALONE}"].add(dense, alone)


def product(weight: Tensor, name: str) -> sc.SparseLinear:
    """The layer of a weight [out, in] that fits the pattern of ``name``, without a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return sc.SparseLinear.from_linear(linear, name)


def ort_product(weight: Tensor, folder: Path, per_channel: bool) -> Product:
    """x W^T by ONNX Runtime, of a MatMul with that weight [out, in] that quantize_dynamic turned into int8."""
    import onnx
    from onnx import helper, numpy_helper

    out, columns = weight.shape
    value = helper.make_tensor_value_info
    x, y = value("x", onnx.TensorProto.FLOAT, ["rows", columns]), value("y", onnx.TensorProto.FLOAT, ["rows", out])
    stored = numpy_helper.from_array(weight.T.contiguous().numpy(), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], "layer", [x], [y], [stored])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "dense.onnx")
    quantize_int8(folder / "dense.onnx", folder / "int8.onnx", per_channel)
    session = stock_session(folder / "int8.onnx")

    def run(rows: Tensor) -> Tensor:
        (found,) = session.run(None, {"x": np.ascontiguousarray(rows.numpy())})
        return torch.from_numpy(found)

    return run


def run(pattern: str, texts: int, only: Sequence[str]) -> dict[str, Any]:
    """Every layer that a glob matches, on the first ``texts`` held-out paragraphs; a result as JSON values.

    A row holds relative errors: ``ours``, ``ours_dense`` at 16:16, ``ort_1`` and ``ort_32`` by the texts of a call,
    ``ort_channel_1`` and so on, and of ``pattern`` simulated in floats with activations rounded by row, by tensor (a
    call of 32 texts), within a range from calibration text, and within the best part of it.
    """
    model, paragraphs = minilm.load_model(), minilm.load_texts()
    judged = paragraphs.held_out[:texts]
    calibration = sc.calibrate(model, minilm.batches(paragraphs.calibration), only=minilm.ENCODER)
    ranges = calibrate_ranges(model, paragraphs.calibration)
    found = find_linears(model, minilm.ENCODER)
    layers: dict[str, Layer] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in found:
            if any(fnmatchcase(name, glob) for glob in only):
                weight = found[name].get_weight().detach()
                pruned = prune_weight(weight, pattern, METHOD, calibration[name].gram).weight
                layers[name] = Layer(weight, pruned, pattern, ranges[name], Path(folder))
    if not layers:
        raise SparsecompError(f"no layer of the encoder matches {', '.join(only)}; take globs such as *.layer.0.*")
    tokens = 0

    def visit(name: str, x: Tensor, real: Tensor) -> None:
        nonlocal tokens
        if name in layers:
            layers[name].see(x, real)
            tokens += int(real.sum())

    visit_inputs(model, judged, visit, TOGETHER)
    threads = torch.get_num_threads()
    return {
        "format": FORMAT,
        "kind": "int8 error",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(detect("cpu"), [threads]),
        "settings": {"pattern": pattern, "method": METHOD, "threads": threads},
        "tokens": {"calibration": calibration[next(iter(layers))].tokens, "held_out": tokens // len(layers)},
        "rows": [_row(name, layer, ranges[name]) for name, layer in layers.items()],
    }


def _row(name: str, layer: Layer, calibrated: Calibrated) -> dict[str, Any]:
    errors = {way: float(f"{error.value:.5g}") for way, error in layer.errors.items()}
    extremes = {"low": float(f"{calibrated.low:.4g}"), "high": float(f"{calibrated.high:.4g}")}
    return {"layer": name, "out": layer.shape[0], "in": layer.shape[1], **errors, **extremes}


def summary(result: Mapping[str, Any]) -> str:
    """A table with a line for each way, and a sentence on the layers in which ours is larger than a rival."""
    rows, pattern = result["rows"], result["settings"]["pattern"]
    names = {OURS: f"ours, {pattern}+int8@a8", OURS_DENSE: "ours, 16:16+int8@a8"}
    for rival in RIVALS:
        *kind, size = rival.removeprefix("ort").strip("_").split("_")
        names[rival] = f"ORT {'by channel' if kind else 'default'}, {'one text' if size == '1' else f'{size} texts'}"
    names |= {way: f"by {words}, simulated" for way, words in SIMULATED.items()}
    lines = []
    for way, words in names.items():
        errors = [row[way] for row in rows]
        larger = sum(row[OURS] > row[way] for row in rows) if way in RIVALS else "-"
        worst = max(rows, key=lambda row: row[way])["layer"].removeprefix("encoder.layer.")
        lines.append((words, f"{geometric_mean(errors):.4f}", f"{max(errors):.4f}", worst, larger))
    tokens, cpu = result["tokens"], result["machine"]["cpu"]
    title = (
        f"Relative error of the output of {len(rows)} layers, {tokens['held_out']:,} held-out tokens, {cpu}, "
        f"{result['date']}"
    )
    drawn = table(["int8", ">mean", ">largest", "of layer", ">less"], lines, title=title)
    return f"{drawn}\n\nless: in how many layers its error is less than ours. {_verdict(rows)}"


def _verdict(rows: Iterable[Mapping[str, Any]]) -> str:
    larger = [row["layer"] for row in rows if row[OURS] > min(row[rival] for rival in RIVALS)]
    if not larger:
        return "In every layer ours is not larger than the least of ONNX Runtime's."
    return f"Ours is larger than the least of ONNX Runtime's in {len(larger)}: {', '.join(larger)}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, and write the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="8:16", help="of the pruned weight (default 8:16)")
    parser.add_argument("--texts", type=int, default=451, help="held-out paragraphs (default 451, which is all)")
    parser.add_argument("--layers", default="*", help='comma-separated globs such as "*.layer.0.*"')
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    return ended(
        lambda: run(arguments.pattern, arguments.texts, arguments.layers.split(",")), summary, arguments.output
    )


if __name__ == "__main__":
    sys.exit(main())
