"""The quality of whole models in int8 on all-MiniLM-L6-v2, beside ONNX Runtime's. ``python -m bench.int8.quality``.

All 36 layers of the encoder are pruned by ``fast``, in one shot, and judged by the embeddings of held-out paragraphs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsecomp as sc
from bench import minilm
from bench.demo.embedding import of_session, quantize_int8, stock_session
from bench.demo.job import export_embedder
from bench.ending import ended
from bench.int8.inputs import calibrate_ranges
from bench.int8.ranges import BY_ROW, BY_TENSOR, CLIPPED, FIXED, Calibrated, Rounding, ways
from sparsecomp.benchmark.machine import describe
from sparsecomp.machine.device import detect
from sparsecomp.models.layers import find_linears
from sparsecomp.reporting.terminal import table

FORMAT = 1
METHOD = "fast"
PATTERNS = ("16:16", "14:16", "12:16", "10:16", "8:16")
NUMBERS = "int8@a8"
_SIMULATED = {BY_ROW: "row", BY_TENSOR: "call", FIXED: "fixed range", CLIPPED: "fixed, clipped range"}

Row = dict[str, Any]


class Judge:
    """Rows of a result: names of models, with their agreement with the dense one on the same texts."""

    def __init__(self, dense: nn.Module, texts: Sequence[str]) -> None:
        """``texts`` are what all are judged on."""
        self.texts, self._reference = texts, minilm.embed(dense, texts)
        self.rows: list[Row] = []

    def add(self, name: str, embedded: Tensor, note: str = "") -> None:
        """Judge embeddings of ``texts``; ``note`` says what a reader has to know of this model."""
        quality = minilm.compare(self._reference, embedded)
        self.rows.append({"name": name, **dataclasses.asdict(quality), "note": note})
        print(f"- {name}: {quality}", file=sys.stderr, flush=True)


def run(patterns: Sequence[str], texts: int) -> Row:
    """Dense, ONNX Runtime's int8, every pattern in floats and integers; ranges are simulated for the last pattern."""
    dense, paragraphs = minilm.load_model(), minilm.load_texts()
    judge = Judge(dense, paragraphs.held_out[:texts])
    judge.add("dense fp32", minilm.embed(dense, judge.texts))
    _rivals(judge, dense)
    calibration = sc.calibrate(dense, minilm.batches(paragraphs.calibration), only=minilm.ENCODER)
    model = dense
    for pattern in patterns:
        model = copy.deepcopy(dense)
        if not _keeps_all(pattern):
            sc.prune(model, pattern, METHOD, calibration, only=minilm.ENCODER)
            judge.add(pattern, minilm.embed(model, judge.texts))
        _in_integers(judge, copy.deepcopy(model), pattern, calibration)
    ranges = calibrate_ranges(dense, paragraphs.calibration)
    for way, words in _SIMULATED.items():
        name = f"{patterns[-1]}+{NUMBERS}, simulated, by {words}"
        judge.add(name, minilm.embed(_rounding(model, patterns[-1], ranges, way), judge.texts))
    threads = torch.get_num_threads()
    return {
        "format": FORMAT,
        "kind": "int8 quality",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(detect("cpu"), [threads]),
        "settings": {"method": METHOD, "threads": threads},
        "paragraphs": {"calibration": len(paragraphs.calibration), "judged": len(judge.texts)},
        "rows": judge.rows,
    }


def _keeps_all(pattern: str) -> bool:
    kept, _, of = pattern.partition(":")
    return kept == of


def _rivals(judge: Judge, dense: nn.Module) -> None:
    """ONNX Runtime's quantize_dynamic of the whole model, in batches of 32 texts and one by one."""
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
        export_embedder(dense, minilm.tokens(judge.texts[:2]), source, "dense")
        for name, per_channel in (("ORT int8", False), ("ORT int8 by channel", True)):
            quantize_int8(source, path, per_channel)
            ask = partial(_asked, partial(of_session, stock_session(path)))
            for size in (32, 1):
                calls = "32 texts a call" if size == 32 else "one text a call"
                judge.add(f"{name}, {calls}", minilm.embed_with(ask, judge.texts, size))


def _asked(of: Callable[[Mapping[str, Any]], Callable[[], Any]], batch: minilm.Batch) -> Tensor:
    return torch.from_numpy(of({name: value.numpy() for name, value in batch.items()})())


def _in_integers(judge: Judge, model: nn.Module, pattern: str, calibration: sc.Calibration) -> None:
    """As a user gets it: layers that do not bear the integers step back, and the note says so."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sc.compile(model, f"{pattern}+{NUMBERS}", only=minilm.ENCODER, where="everywhere", calibration=calibration)
    note = "; ".join(str(each.message) for each in told)
    judge.add(f"{pattern}+{NUMBERS}", minilm.embed(model, judge.texts), note)


def _rounding(model: nn.Module, pattern: str, ranges: Mapping[str, Calibrated], way: str) -> nn.Module:
    """A copy whose layers, in floats, multiply integers times scales with x rounded one way."""
    copied = copy.deepcopy(model)
    for name in find_linears(copied, minilm.ENCODER):
        linear = copied.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(
            sc.SparseLinear.from_linear(linear, f"{pattern}+{NUMBERS}").weight.detach().clone(), requires_grad=False
        )
        linear.register_forward_pre_hook(partial(_rounded, ways(ranges[name])[way]))
    return copied


def _rounded(rounding: Rounding, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounding(args[0].flatten(0, -2)).view(args[0].shape), *args[1:])


def summary(result: Mapping[str, Any]) -> str:
    """A line for each model, and the notes."""
    lines = [
        (row["name"], f"{row['cosine']:.4f}", f"{row['rank']:.4f}", f"{row['neighbour']:.3f}") for row in result["rows"]
    ]
    judged, cpu = result["paragraphs"]["judged"], result["machine"]["cpu"]
    title = f"Embeddings of {judged} held-out paragraphs against the dense model's, {cpu}, {result['date']}"
    notes = [f"{row['name']}: {row['note']}" for row in result["rows"] if row["note"]]
    return "\n".join([table(["model", ">cosine", ">rank", ">neighbour"], lines, title=title), *notes])


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, and write the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--patterns", default=",".join(PATTERNS), help=f"comma-separated (default {','.join(PATTERNS)})"
    )
    parser.add_argument("--texts", type=int, default=451, help="held-out paragraphs (default 451, which is all)")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    return ended(lambda: run(arguments.patterns.split(","), arguments.texts), summary, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
