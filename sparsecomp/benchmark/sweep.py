"""The GEMM sweep: every engine on every shape, batch, dtype and number of threads, all engines of a row in one run.

Takes settings, gives a result as JSON values (docs/results.md). Knows nothing of tables and plots.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparsecomp.benchmark.cores import Cores
from sparsecomp.benchmark.limits import copies_of, limit_of, too_small
from sparsecomp.benchmark.machine import describe
from sparsecomp.benchmark.settings import Settings
from sparsecomp.benchmark.sparse import SparseEngine
from sparsecomp.engines.base import Engine
from sparsecomp.engines.product import Product
from sparsecomp.engines.pytorch import TorchWidenedEngine
from sparsecomp.engines.registry import given
from sparsecomp.engines.timing import Timing, measure
from sparsecomp.engines.worker import Worker, answers, workers
from sparsecomp.errors import SparsecompError
from sparsecomp.machine.device import Device, detect
from sparsecomp.patterns.numbers import parse_weights
from sparsecomp.reporting.terminal import progress

FORMAT = 2


def check_pattern(label: str) -> None:
    """PatternError unless the label is a pattern such as "2:4", or one with numbers such as "8:16+int8@a8"."""
    parse_weights(label)


def sweep(*parts: Settings) -> dict[str, Any]:
    """Measure; the result holds machine, settings, what to know of engines, and a row for each timing.

    Every engine works in a process of its own, one for each number of threads: a pool made by another engine, or by
    itself for another number of threads, would take cores from it.

    A dense engine whose product is wrong, or that fails, is left out with the reason. Raises SparsecompError if ours is
    or does, and where no dense engine is left.
    """
    # peaks are those of this run, not of another day
    os.environ["SPARSECOMP_CACHE"] = "off"
    device = detect("cpu")
    counts = list(dict.fromkeys(count for part in parts for count in part.threads))
    machine = describe(device, counts)
    missing: dict[str, str] = {}
    remarks: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    cores: dict[int, Cores] = {}
    for threads in counts:
        groups = [
            (part, shape, dtype)
            for part in parts
            if threads in part.threads
            for shape in part.shapes
            for dtype in part.dtypes
        ]
        patterns = dict.fromkeys(pattern for part, _, _ in groups for pattern in part.patterns)
        sparse = {pattern: SparseEngine(pattern) for pattern in patterns}
        dense = {engine.name: engine for part, _, _ in groups for engine in part.dense()}
        engines = [*dense.values(), *sparse.values()]
        makes = {engine.name: partial(Product, engine, threads) for engine in engines}
        cores[threads] = Cores(threads)
        with workers(makes, threads, [engine.name for engine in engines if engine.openmp]) as started:
            notes = missing, remarks
            cases = _measured(groups, sparse, started, device, threads, cores[threads], notes)
            count = sum(len(part.batches) + len(part.cold_batches) for part, _, _ in groups)
            for measured in progress(cases, f"measuring, {threads} thread(s)", count):
                rows.extend(measured)
    return {
        "format": FORMAT,
        "kind": "gemm",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine,
        "settings": [asdict(part) for part in parts],
        "missing": missing,
        "remarks": remarks,
        "shared_cores": {str(threads): each.record() for threads, each in cores.items() if each.dropped_rounds},
        "rows": rows,
    }


def _measured(
    groups: list[tuple[Settings, tuple[int, int], str]],
    sparse: Mapping[str, SparseEngine],
    started: Mapping[str, Worker],
    device: Device,
    threads: int,
    cores: Cores,
    notes: tuple[dict[str, str], dict[str, str]],
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case once it is measured; ``notes`` gain what is missing and what to know of engines."""
    missing, remarks = notes
    for part, shape, dtype in groups:
        wanted: list[Engine] = [*part.dense(), *(sparse[pattern] for pattern in part.patterns)]
        ready: dict[str, tuple[Engine, str]] = {}
        for engine in wanted:
            taken = given(engine, dtype) if engine.pattern is None else dtype
            if (reason := engine.missing(taken)) is None:
                ready[engine.name] = engine, taken
                told = engine.remark(taken)
                remarks.update({} if told is None else {f"{engine.name}, {dtype}": told})
            elif dtype != "fp32" or not isinstance(engine, TorchWidenedEngine):
                missing[f"{engine.name}, {dtype}"] = reason
        if (reason := too_small(part, shape, dtype)) is not None:
            missing[f"cold weights, {shape[0]}x{shape[1]}, {dtype}"] = reason
        # weights of an earlier shape would fill the memory
        answers({name: (worker, ()) for name, worker in started.items() if name not in ready}, "clear")
        case = _Case(part, shape, dtype, threads)
        yield from _rows(case, device, ready, {name: started[name] for name in ready}, cores, missing)


def default_path(result: dict[str, Any], folder: Path) -> Path:
    """<folder>/<date>-<cpu>-gemm.json."""
    cpu = re.sub(r"[^a-z0-9]+", "-", str(result["machine"]["cpu"]).lower()).strip("-")
    return folder / f"{result['date']}-{cpu}-gemm.json"


def write(result: dict[str, Any], path: Path) -> None:
    """One row to a line, so that two results can be compared line by line."""
    head = {name: value for name, value in result.items() if name != "rows"}
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


@dataclass(frozen=True)
class _Case:
    settings: Settings
    shape: tuple[int, int]
    dtype: str
    threads: int


def _rows(
    case: _Case,
    device: Device,
    ready: dict[str, tuple[Engine, str]],
    asked: dict[str, Worker],
    cores: Cores,
    missing: dict[str, str],
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case, a batch on warm or cold weights; engines that fail are taken out of ``asked``."""
    settings, shape, dtype, threads = case.settings, case.shape, case.dtype, case.threads
    copies = copies_of(settings, device, shape, dtype) if too_small(settings, shape, dtype) is None else 1
    loads = {name: (asked[name], (shape, ready[name][1], copies)) for name in asked}
    _, failed = answers(loads, "load")
    _leave_out(failed, asked, ready, dtype, missing)
    cases = [(batch, "warm", 1) for batch in settings.batches]
    cases += [(batch, "cold", copies) for batch in settings.cold_batches if copies > 1]
    for batch, weights, count in cases:
        where = f"{shape[0]}x{shape[1]}, batch {batch}, {threads} threads"
        errors, failed = answers({name: (worker, (batch, count)) for name, worker in asked.items()}, "bind")
        wrong = {
            name: f"{name} is wrong at {where}: {ready[name][0].wrong(error, ready[name][1])}"
            for name, error in errors.items()
            if not error <= ready[name][0].tolerance(ready[name][1])
        }
        _leave_out(failed | wrong, asked, ready, dtype, missing)
        samplers = {name: partial(worker.ask, "sample") for name, worker in asked.items()}
        timings = measure(samplers, settings.seconds, cores)
        found = []
        for name in asked:
            engine, taken = ready[name]
            row: dict[str, Any] = {
                "out": shape[0],
                "in": shape[1],
                "batch": batch,
                "dtype": dtype,
                "threads": threads,
                "weights": weights,
                "engine": name,
                "pattern": engine.label,
                "numbers": engine.computes(taken),
                "error": float(f"{errors[name]:.2g}"),
                **_times(timings[name], count),
            }
            if engine.pattern is not None:
                limit = limit_of(engine, shape, dtype, batch, device, threads, weights == "warm")
                row |= {"bound": round(limit.value, 3), "bound_by": limit.limited_by}
            found.append(row)
        yield found


def _leave_out(
    failed: Mapping[str, str],
    asked: dict[str, Worker],
    ready: Mapping[str, tuple[Engine, str]],
    dtype: str,
    missing: dict[str, str],
) -> None:
    """Take engines that failed out of those asked. Raises SparsecompError for ours, and where no dense one is left."""
    for name, reason in failed.items():
        if ready[name][0].pattern is not None:
            raise SparsecompError(reason)
        missing[f"{name}, {dtype}"] = reason
        del asked[name]
    if all(ready[name][0].pattern is not None for name in asked):
        raise SparsecompError(f"no dense engine is left to compare with in {dtype}: {'; '.join(failed.values())}")


def _times(timing: Timing, copies: int) -> dict[str, float | int]:
    return {
        "us": _digits(timing.median / copies),
        "us_low": _digits(timing.low / copies),
        "us_high": _digits(timing.high / copies),
        "samples": timing.samples,
    }


def _digits(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")
