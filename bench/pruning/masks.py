"""The pruning methods layer by layer on all-MiniLM-L6-v2, beside ALPS. ``python -m bench.pruning.masks``.

Gives calibration and held-out errors and seconds for every linear layer of the encoder, and how they compare.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

import sparsecomp as sc
from bench import minilm
from bench.ending import ended
from bench.pruning.alps import alps
from sparsecomp.benchmark.machine import describe
from sparsecomp.machine.device import detect
from sparsecomp.methods.error import relative_error
from sparsecomp.methods.weight import prune_weight
from sparsecomp.models.layers import find_linears
from sparsecomp.patterns import Pattern
from sparsecomp.reporting.terminal import progress, table

FORMAT = 1
TOKENS = 30_000
METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "obs", "fast", "alps", "balanced")
REFERENCE, RIVAL = "sparsegpt", "alps"

Row = dict[str, Any]


def run(pattern: Pattern, methods: Sequence[str], layers: Sequence[str], tokens: int) -> dict[str, Any]:
    """Every method on every layer that a glob matches; a result as JSON values with one row for each pair.

    The documents of calibration and held-out text are different ones; each is cut at ``tokens`` tokens.
    """
    model, texts = minilm.load_model(), minilm.load_texts()
    used, other = (
        sc.calibrate(model, minilm.batches(tuple(texts_of(each, tokens))), only=minilm.ENCODER)
        for each in (texts.calibration, texts.held_out)
    )
    found = find_linears(model, minilm.ENCODER)
    names = [name for name in found if any(fnmatchcase(name, glob) for glob in layers)]
    rows = []
    for name in progress(names, "pruning", len(names)):
        weight = found[name].get_weight()
        for method in methods:
            rows.append(_row(name, weight, method, pattern, used[name].gram, other[name].gram))
    threads = torch.get_num_threads()
    return {
        "format": FORMAT,
        "kind": "masks",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(detect("cpu"), [threads]),
        "settings": {"pattern": str(pattern), "threads": threads},
        "tokens": {"calibration": used[names[0]].tokens, "held_out": other[names[0]].tokens},
        "rows": rows,
    }


def texts_of(texts: Iterable[str], tokens: int) -> Iterator[str]:
    """The first of ``texts`` that have no more than ``tokens`` tokens together."""
    count = 0
    for text in texts:
        count += int(minilm.tokens([text])["attention_mask"].sum())
        if count > tokens:
            return
        yield text


def _row(name: str, weight: Tensor, method: str, pattern: Pattern, gram: Tensor, held_out: Tensor) -> Row:
    begin, busy = time.perf_counter(), time.process_time()
    pruned = alps(weight, gram, pattern) if method == RIVAL else prune_weight(weight, pattern, method, gram).weight
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    return {
        "layer": name,
        "out": weight.shape[0],
        "in": weight.shape[1],
        "method": method,
        "error": float(f"{relative_error(weight, pruned, gram):.5g}"),
        "held_out": float(f"{relative_error(weight, pruned, held_out):.5g}"),
        "seconds": float(f"{seconds:.3g}"),
        "cpu_seconds": float(f"{busy:.3g}"),
    }


def summary(result: dict[str, Any]) -> str:
    """A table with a line for each method: geometric means and the worst layer against SparseGPT and ALPS, seconds."""
    by_method: dict[str, dict[str, Row]] = {}
    for row in result["rows"]:
        by_method.setdefault(row["method"], {})[row["layer"]] = row
    lines = []
    for method, rows in by_method.items():
        cells = []
        for other in (REFERENCE, RIVAL):
            against = by_method.get(other)
            for error in ("error", "held_out"):
                ratios = [rows[layer][error] / against[layer][error] for layer in rows] if against else []
                cells.append(f"{geometric_mean(ratios):.3f}" if ratios else "-")
                if error == "error":
                    cells.append(f"{max(ratios):.3f}" if ratios else "-")
        mean = geometric_mean([row["error"] for row in rows.values()])
        held_out = geometric_mean([row["held_out"] for row in rows.values()])
        times = [f"{sum(row[clock] for row in rows.values()):.1f}" for clock in ("seconds", "cpu_seconds")]
        lines.append((method, f"{mean:.4f}", f"{held_out:.4f}", *cells, *times))
    columns = ["method", ">error", ">held out"]
    for name in ("SparseGPT", "ALPS"):
        columns += [f">/ {name}", ">worst", ">held out"]
    layers = len({row["layer"] for row in result["rows"]})
    tokens, threads = result["tokens"], result["settings"]["threads"]
    title = (
        f"{result['settings']['pattern']} on {layers} layers of all-MiniLM-L6-v2, {tokens['calibration']:,} "
        f"calibration and {tokens['held_out']:,} held-out tokens, {threads} thread(s); geometric means over the layers"
    )
    return table([*columns, ">seconds", ">of CPU"], lines, title=title)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, and write the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"comma-separated (default {','.join(METHODS)})")
    parser.add_argument("--layers", default="*", help='comma-separated globs such as "*.layer.0.*"')
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of each split (default {TOKENS})")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        pattern = sc.parse_pattern(arguments.pattern)
        return run(pattern, arguments.methods.split(","), arguments.layers.split(","), arguments.tokens)

    return ended(measured, summary, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
