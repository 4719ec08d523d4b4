"""A sparse training step beside a dense one: layers and a small transformer. ``python -m bench.training.step``.

Every repetition runs each way in turn, on a weight that was just written, so that sparse ways fetch its values anew.
A ratio is that of two times of one repetition. Besides torch's own dense products stand those of the fastest dense
library of this process, which torch does not take by itself on some processors.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.ending import ended
from bench.training.ways import DENSE, LIBRARY, SPARSE, UNMASKED, Y_ONLY, Stack, trainings, ways
from sparsecomp.benchmark.machine import describe
from sparsecomp.machine.clock import in_turn, seconds
from sparsecomp.machine.device import detect
from sparsecomp.nn.eager.dense import dense_product
from sparsecomp.nn.following import Layouts
from sparsecomp.nn.training import SparseTrainingLinear
from sparsecomp.reporting.terminal import table, wrap

FORMAT = 1
SHAPES = ((3072, 768), (768, 3072), (4096, 1024))
TOKENS, TEXTS, DEPTH = 1024, 8, 2
GOAL, GOAL_OF_STEP = 1.24, 1.06


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, 10% and 90% of samples."""
    low, high = np.quantile(samples, [0.1, 0.9])
    return {"median": round(median(samples), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def compared(samples: Mapping[str, Sequence[float]], repeats: int) -> dict[str, Any]:
    """Milliseconds of each way, and ratios of dense over sparse, taken repetition by repetition."""
    milliseconds = {way: spread([1e3 * each for each in taken]) for way, taken in samples.items()}
    ratios = {
        f"{dense} / {sparse}": spread([a / b for a, b in zip(samples[dense], samples[sparse], strict=True)])
        for dense in (DENSE, LIBRARY, UNMASKED)
        for sparse in (SPARSE, Y_ONLY)
        if dense in samples and sparse in samples
    }
    return {"repeats": repeats, "milliseconds": milliseconds, "ratios": ratios}


def layer_row(out: int, columns: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Forward and backward of one layer of so many rows, and the parts that the sparse way consists of."""
    x, grad = torch.randn(tokens, columns, requires_grad=True), torch.randn(tokens, out)
    kinds = ways(nn.Linear(columns, out))

    def once(layer: nn.Module) -> float:
        written(layer)
        for each in (x, *layer.parameters()):
            each.grad = None
        return seconds(lambda: layer(x).backward(grad))

    samplers: dict[str, Callable[[], float]] = {way: partial(once, layer) for way, layer in kinds.items()}
    parts = parts_of(kinds[SPARSE], x.detach(), grad)
    samplers |= {name: partial(seconds, torch.no_grad()(part)) for name, part in parts.items()}
    samples = timed(samplers, repeats)
    row = compared({way: samples[way] for way in kinds}, repeats)
    spent = {name: spread([1e3 * each for each in samples[name]]) for name in parts}
    cost = {name: each["median"] for name, each in spent.items()}
    sparse = cost["y"] + cost["grad x"] + cost["grad W"]
    bounds = {DENSE: row["milliseconds"][DENSE]["median"] / sparse}
    bounds[LIBRARY] = (cost["dense y"] + cost["dense grad x"] + cost["grad W"]) / sparse
    rounded = {name: round(each, 3) for name, each in bounds.items()}
    return {"what": "layer", "out": out, "in": columns, **row, "parts": spent, "bounds": rounded}


def parts_of(layer: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """Each product of a sparse layer, fetching its values, and dense products in their place."""
    assert isinstance(layer, SparseTrainingLinear)
    layouts, weight = layer.layouts(), layer.weight.detach()
    assert isinstance(layouts, Layouts)
    forward, backward = layouts.filled()
    assert backward is not None  # of a transposable mask

    def fetch() -> None:
        forward.fill(weight)
        backward.fill(weight)

    return {
        "fetch": fetch,
        "y": lambda: forward.run(x, layer.bias),
        "grad x": lambda: backward.run(grad),
        "grad W": lambda: dense_product(grad.t(), x.t()),
        "grad b": lambda: grad.sum(0),
        "dense y": lambda: dense_product(x, weight),
        "dense grad x": lambda: dense_product(grad, weight.t()),
    }


def stack_row(depth: int, width: int, tokens: int, repeats: int) -> dict[str, Any]:
    """A whole step of a transformer that ``sparsify`` keeps sparse: forward, backward, AdamW, masks."""
    x = torch.randn(TEXTS, tokens // TEXTS, width)
    stack = Stack(depth, width)
    samplers = {way: partial(seconds, partial(each.step, x)) for way, each in trainings(stack).items()}
    layers = sum(isinstance(each, nn.Linear) for each in stack.modules())
    return {"what": "step", "layers": layers, **compared(timed(samplers, repeats), repeats)}


def written(layer: nn.Module) -> None:
    """Count a write to every parameter, as an optimizer makes it."""
    with torch.no_grad():
        for each in layer.parameters():
            each.mul_(1.0)


def timed(samplers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in turn, after one round that does not count."""
    samples = in_turn(samplers, 0.0, repeats + 1, repeats + 1)
    return {name: taken[1:] for name, taken in samples.items()}


def run(
    threads: Sequence[int],
    repeats: int,
    depth: int = DEPTH,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    width: int = 768,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """Every layer, and the step of a model of so many blocks unless ``depth`` is 0, at every number of threads."""
    rows = []
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            torch.manual_seed(0)
            rows += [{"threads": count, **layer_row(*shape, tokens, repeats)} for shape in shapes]
            if depth:
                rows.append({"threads": count, **stack_row(depth, width, tokens, repeats)})
    finally:
        torch.set_num_threads(before)
    return {
        "format": FORMAT,
        "kind": "training step",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(detect("cpu"), list(threads)),
        "settings": {"tokens": tokens, "texts": TEXTS, "depth": depth, "width": width, "dtype": "torch.float32"},
        "rows": rows,
    }


def summary(result: Mapping[str, Any]) -> str:
    """Times, then ratios with their spread, then whether the goals are met."""
    rows = result["rows"]
    title = f"Training in fp32, {result['settings']['tokens']} tokens, {result['machine']['cpu']}, {result['date']}"
    kinds = [
        each for each in (DENSE, LIBRARY, SPARSE, Y_ONLY, UNMASKED) if any(each in r["milliseconds"] for r in rows)
    ]
    times = [
        (_name(row), row["threads"], *(_of(row["milliseconds"], each, "{median:.1f}") for each in kinds), _fetch(row))
        for row in rows
    ]
    pairs = [(dense, sparse) for sparse in (SPARSE, Y_ONLY) for dense in (DENSE, LIBRARY, UNMASKED)]
    ratios = [
        (
            _name(row),
            row["threads"],
            pair,
            "{median:.2f}".format(**found),
            "{low:.2f}-{high:.2f}".format(**found),
            bound,
        )
        for row in rows
        for dense, sparse in pairs
        if (found := row["ratios"].get(pair := f"{dense} / {sparse}")) is not None
        for bound in [_of(row.get("bounds", {}), dense, "{:.2f}") if sparse == SPARSE else "-"]
    ]
    first = table(
        ["what", ">threads", *(f">{each}" for each in kinds), ">fetch"], times, title=f"{title}: milliseconds"
    )
    second = table(["what", ">threads", "ratio", ">median", ">10%-90%", ">bound"], ratios, title="Times faster")
    return f"{first}\n\n{second}\n\n{_verdict(rows)}"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['out']}x{row['in']}" if row["what"] == "layer" else f"{row['layers']} layers"


def _of(values: Mapping[str, Any], key: str, form: str) -> str:
    """One value in that form, or a dash where there is none."""
    if key not in values:
        return "-"
    return form.format(**values[key]) if isinstance(values[key], Mapping) else form.format(values[key])


def _fetch(row: Mapping[str, Any]) -> str:
    return f"{row['parts']['fetch']['median'] / row['milliseconds'][SPARSE]['median']:.0%}" if "parts" in row else "-"


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    missed = [
        f"{_name(row)} at {row['threads']} threads"
        for row in rows
        if row["ratios"][f"{DENSE} / {SPARSE}"]["median"] < (GOAL if row["what"] == "layer" else GOAL_OF_STEP)
    ]
    goals = f"{GOAL} for a layer and {GOAL_OF_STEP} for a step, against torch"
    return wrap(f"Goals missed ({goals}): {', '.join(missed)}." if missed else f"All goals are met: {goals}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, and write the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, with commas (default 1,2)")
    parser.add_argument("--repeats", type=int, default=15, help="repetitions of each way (default 15)")
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"blocks of the model, or 0 (default {DEPTH})")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    threads = [int(each) for each in arguments.threads.split(",")]
    return ended(lambda: run(threads, arguments.repeats, arguments.depth), summary, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
