"""A fine-tuned sparse int8 model, compiled, beside the dense one. ``python -m bench.finetune.endtoend``.

Both models were trained by ``python -m bench.finetune`` at equal budget. All engines run in one sitting, each in its
own process: accuracy on the whole test, seconds of one call on texts of middling length, bytes of the file.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparsecomp as sc
from bench.ending import ended
from bench.finetune.__main__ import of_minilm
from bench.finetune.batches import Batch, Encoded
from bench.finetune.engines import Engine, dense_engines, packed_engines
from bench.finetune.judging import accuracy, mcnemar, packed, unpacked
from bench.finetune.results import Results, Row
from bench.finetune.runner import Runner
from bench.finetune.runs import registry
from sparsecomp.benchmark.machine import describe
from sparsecomp.engines.timing import measure
from sparsecomp.engines.worker import Worker, ask_all, workers
from sparsecomp.errors import SparsecompError
from sparsecomp.machine.device import detect
from sparsecomp.reporting.terminal import table

FORMAT = 1
BATCHES = (1, 32)
RUN = "movies/8:16+int8@a8-fast/2"
# dense int8 in our own kernel: what sparsity adds to integers
_DENSE_INT8 = "16:16+int8@a8"
_SECONDS = {1: 8.0, 32: 18.0}
# engines with the same weights differ by rounding alone
_SAME_LOGITS = 0.01


def run(work: Path, name: str, seed: int, threads: int) -> dict[str, Any]:
    """Compile, save, export, judge and time."""
    bench, runs = of_minilm(), registry()
    if name not in runs or runs[name].sparse is None or not runs[name].keep:
        kept = ", ".join(each.name for each in runs.values() if each.keep and each.sparse is not None)
        raise SparsecompError(f'"{name}" is no sparse run whose model is kept; those are {kept}')
    sparse_run = runs[name]
    assert sparse_run.sparse is not None and sparse_run.beside is not None
    torch.set_num_threads(threads)
    runner = Runner(bench, Results(work), runs)
    test = runner.parts(sparse_run.task).test
    labels = len(runner.parts(sparse_run.task).task.labels)
    example = test.batch(range(2)).inputs
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dense = runner.trained(runs[sparse_run.beside], seed)
        found = dense_engines(dense, labels, example, folder)
        for model, pattern in (
            (copy.deepcopy(dense), _DENSE_INT8),
            (runner.trained(sparse_run, seed), sparse_run.sparse.pattern),
        ):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                sc.compile(model, pattern, only=bench.only, where="everywhere")
            notes += [f"{pattern}: {each.message}" for each in told if issubclass(each.category, UserWarning)]
            found += packed_engines(model, pattern, labels, example, folder)
        rows = _asked(found, test)
    return {
        "format": FORMAT,
        "kind": "finetune end to end",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(detect("cpu"), [threads]),
        "settings": {"run": name, "beside": sparse_run.beside, "seed": seed, "threads": threads},
        "tests": len(test),
        "tokens": {str(size): int(middling(test, size).inputs["input_ids"].shape[1]) for size in BATCHES},
        "notes": notes,
        "rows": rows,
    }


def middling(test: Encoded, size: int) -> Batch:
    """So many texts around the median of length."""
    order = [i for batch in test.in_order() for i in batch.index.tolist()]
    start = max(0, (len(order) - size) // 2)
    return test.batch(order[start : start + size])


def _asked(found: Sequence[Engine], test: Encoded) -> list[Row]:
    """A row for each engine: bytes, which texts are right, times."""
    rows: dict[str, Row] = {
        each.name: {"name": each.name, "weights": each.weights, "bytes": each.file.stat().st_size, "times": {}}
        for each in found
    }
    makes = {each.name: each.make for each in found}
    with workers(makes, torch.get_num_threads(), [each.name for each in found if each.openmp]) as started:
        firsts: dict[str, str] = {}
        for each in found:
            rows[each.name] |= _judged(started[each.name], started.get(firsts.get(each.weights, "")), test)
            if each.weights in firsts:
                rows[each.name] |= {key: rows[firsts[each.weights]][key] for key in ("test", "right")}
            firsts.setdefault(each.weights, each.name)
        for size in BATCHES:
            ask_all(started.values(), "bind", _arrays(middling(test, size)))
            samplers = {name: partial(worker.ask, "sample") for name, worker in started.items()}
            for name, timing in measure(samplers, seconds=_SECONDS[size]).items():
                rows[name]["times"][str(size)] = dataclasses.asdict(timing)
    return list(rows.values())


def _judged(worker: Worker, twin: Worker | None, test: Encoded) -> Row:
    """Which texts an engine has right; of one with the weights of a ``twin``, only that its logits are the same."""
    if twin is not None:
        arrays = _arrays(middling(test, 32))
        apart = float(np.abs(worker.ask("embed", arrays) - twin.ask("embed", arrays)).max())
        if apart > _SAME_LOGITS:
            raise SparsecompError(f"{worker.name} gives logits that are {apart:.3f} off those of {twin.name}")
        return {"apart": apart}
    batches = test.in_order()
    logits = np.concatenate([worker.ask("embed", _arrays(batch)) for batch in batches])
    order = torch.cat([batch.index for batch in batches]).argsort()
    predicted = torch.from_numpy(logits).argmax(dim=1)[order]
    return {"test": accuracy(predicted, test.labels), "right": packed(predicted == test.labels)}


def _arrays(batch: Batch) -> dict[str, Any]:
    return {name: value.numpy() for name, value in batch.inputs.items()}


def summary(result: Mapping[str, Any]) -> str:
    """A line for each engine, and the notes."""
    rows = result["rows"]
    first = unpacked(rows[0]["right"], result["tests"])
    fastest = {
        size: min(row["times"][size]["median"] for row in rows if row["weights"] == "dense")
        for size in rows[0]["times"]
    }
    lines = []
    for row in rows:
        p = mcnemar(unpacked(row["right"], result["tests"]), first)[2]
        cells = [row["name"], f"{row['bytes'] / 1e6:.1f}", f"{100 * row['test']:.2f}", f"{p:.2f}"]
        for size, best in fastest.items():
            median = row["times"][size]["median"]
            cells += [f"{1e3 * median:.2f}", f"{best / median:.2f}x"]
        lines.append(cells)
    columns = ["engine", ">MB", ">test %", ">p", *(each for size in fastest for each in (f">ms, {size}", ">ratio"))]
    settings, tokens = result["settings"], result["tokens"]
    title = (
        f"{settings['run']} beside {settings['beside']}, seed {settings['seed']}, {settings['threads']} thread(s), "
        f"{result['machine']['cpu']}, {result['date']}; ms of {' and '.join(tokens)} texts of "
        f"{' and '.join(str(each) for each in tokens.values())} tokens, ratios to the fastest dense fp32"
    )
    return "\n".join([table(columns, lines, title=title), *result["notes"]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, and write the result if asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.finetune.endtoend", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("finetune-out"), help="folder of the runs' results")
    parser.add_argument("--run", default=RUN, help=f"the sparse run (default {RUN})")
    parser.add_argument("--seed", type=int, default=0, help="of the run (default 0)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    return ended(
        lambda: run(arguments.work, arguments.run, arguments.seed, arguments.threads), summary, arguments.output
    )


if __name__ == "__main__":
    sys.exit(main())
