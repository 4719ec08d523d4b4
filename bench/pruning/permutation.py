"""What "best" gains over "balanced" on all-MiniLM-L6-v2: ``python -m bench.pruning.permutation``.

"best" chooses the damping and the order of hidden channels on held-out tokens, so errors are also given on tokens of
other documents, by which nothing was chosen.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sparsecomp as sc
from bench import minilm
from bench.ending import ended
from bench.pruning.masks import TOKENS, texts_of
from sparsecomp.benchmark.machine import describe
from sparsecomp.machine.device import detect
from sparsecomp.methods.error import relative_error
from sparsecomp.models.calibration import Calibration
from sparsecomp.models.layers import find_linears
from sparsecomp.patterns import Pattern
from sparsecomp.pruning.checkpoint import Checkpoint
from sparsecomp.pruning.model import permutable
from sparsecomp.pruning.solve import Solved, make_jobs, solve
from sparsecomp.reporting.terminal import table

FORMAT = 1
BASE, CHALLENGER = "balanced", "best"
ERRORS = ("error", "held_out", "unseen")
# every fifth batch of the calibration text is held out
_HELD_OUT = 5

Row = dict[str, Any]


def run(pattern: Pattern, tokens: int, checkpoint: Path | None, only: Sequence[str] = minilm.ENCODER) -> dict[str, Any]:
    """Both methods on every encoder layer that ``only`` matches; a result as JSON values, one row a layer and method.

    Layers that are finished are kept in ``checkpoint``, so that a second run goes on from there. The model is not
    changed: each layer is solved on the dense model's activations.
    """
    model, texts = minilm.load_model(), minilm.load_texts()
    batches = minilm.batches(tuple(texts_of(texts.calibration, tokens)))
    splits = {
        "calibration": [batch for i, batch in enumerate(batches) if i % _HELD_OUT],
        "held_out": batches[::_HELD_OUT],
        "unseen": minilm.batches(tuple(texts_of(texts.held_out, tokens))),
    }
    grams = {name: sc.calibrate(model, split, only=only) for name, split in splits.items()}
    found = find_linears(model, only)
    patterns = dict.fromkeys(found, pattern)
    rows, fixed = [], {}
    for method in (BASE, CHALLENGER):
        hidden, reasons = permutable(model, batches[0], method, found, patterns, {})
        fixed.update(reasons)
        jobs = make_jobs(found, patterns, method, grams["calibration"], grams["held_out"], {})
        store = Checkpoint(None if checkpoint is None else checkpoint / method)
        solved = solve(jobs, hidden, store, method)
        rows += [_row(name, method, each, grams) for name, each in solved.items()]
    threads = torch.get_num_threads()
    return {
        "format": FORMAT,
        "kind": "permutation",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(detect("cpu"), [threads]),
        "settings": {"pattern": str(pattern), "threads": threads},
        "tokens": {name: next(iter(each.values())).tokens for name, each in grams.items()},
        "fixed": fixed,
        "rows": rows,
    }


def _row(name: str, method: str, solved: Solved, grams: Mapping[str, Calibration]) -> Row:
    weight = solved.layer.get_weight()
    if solved.rows is not None:
        weight = weight[solved.rows]
    errors = {}
    for key, split in zip(ERRORS, grams.values(), strict=True):
        gram = split[name].gram
        if solved.columns is not None:
            gram = gram[solved.columns][:, solved.columns]
        dense = weight if solved.columns is None else weight[:, solved.columns]
        errors[key] = float(f"{relative_error(dense, solved.weight, gram):.5g}")
    return {
        "layer": name,
        "method": method,
        "permuted": solved.columns is not None,
        **errors,
        "seconds": float(f"{solved.report.seconds:.3g}"),
        "notes": list(solved.report.notes),
    }


def summary(result: dict[str, Any]) -> str:
    """The errors of "best" over those of "balanced": a line a layer, then medians and the worst."""
    by_method: dict[str, dict[str, Row]] = {BASE: {}, CHALLENGER: {}}
    for row in result["rows"]:
        by_method[row["method"]][row["layer"]] = row
    base, challenger = by_method[BASE], by_method[CHALLENGER]
    ratios = {name: [challenger[name][key] / base[name][key] for key in ERRORS] for name in base}
    free = [name for name in ratios if name not in result["fixed"]]
    lines: list[tuple[str, ...]] = [
        (name, "yes" if challenger[name]["permuted"] else "", *(f"{value:.4f}" for value in values))
        for name, values in ratios.items()
    ]
    for title, names in ((f"{len(free)} free layers", free), (f"all {len(ratios)} layers", list(ratios))):
        for what, pick in (("median", statistics.median), ("worst", max)):
            if names:
                figures = [f"{pick([ratios[name][i] for name in names]):.4f}" for i in range(len(ERRORS))]
                lines.append((f"{title}, {what}", "", *figures))
    spent = ", ".join(f"{sum(row['seconds'] for row in rows.values()):.0f} {name}" for name, rows in by_method.items())
    tokens = result["tokens"]
    title = (
        f'Errors of "best" over those of "balanced", {result["settings"]["pattern"]}, on {tokens["calibration"]:,} '
        f"calibration, {tokens['held_out']:,} held-out tokens to choose by, and {tokens['unseen']:,} of other documents"
    )
    body = table(["layer", "permuted", ">calibration", ">held out", ">other documents"], lines, title=title)
    return f"{body}\nSeconds: {spent}; {result['settings']['threads']} thread(s)."


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, and write the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of each text (default {TOKENS})")
    parser.add_argument("--checkpoint", type=Path, help="folder in which finished layers are kept")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    return ended(
        lambda: run(sc.parse_pattern(arguments.pattern), arguments.tokens, arguments.checkpoint),
        summary,
        arguments.output,
    )


if __name__ == "__main__":
    sys.exit(main())
