"""The GEMM sweep: every engine on every shape, batch, dtype and number of threads, all engines of a row in one run.

Takes settings, gives a result as JSON values (docs/results.md). Knows nothing of tables and plots.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sparsecomp as sc
from sparsecomp.benchmark.cores import Cores
from sparsecomp.benchmark.machine import describe
from sparsecomp.benchmark.sparse import SparseEngine
from sparsecomp.engines.base import DTYPES, Engine
from sparsecomp.engines.product import Product
from sparsecomp.engines.registry import float_engines
from sparsecomp.engines.timing import Timing, measure
from sparsecomp.engines.worker import Worker, ask_all, workers
from sparsecomp.errors import SparsecompError
from sparsecomp.machine.bound import bound
from sparsecomp.machine.device import Device, detect
from sparsecomp.machine.request import Request
from sparsecomp.patterns.numbers import parse_weights
from sparsecomp.reporting.terminal import progress

FORMAT = 2
# copies that together exceed the last-level cache by this much leave nothing of the first when the last is done
_BEYOND_CACHE = 1.5
# a weight smaller than this would take thousands of copies, each with buffers and a session of its own in each engine
_SMALLEST_COLD = 64 * 1024


@dataclass(frozen=True)
class Settings:
    """What is measured: ``batches`` on warm weights, ``cold_batches`` on copies that exceed the cache, in turn."""

    shapes: tuple[tuple[int, int], ...] = ((384, 384), (1536, 384), (768, 768), (3072, 768), (4096, 4096))
    batches: tuple[int, ...] = (1, 8, 32, 128)
    cold_batches: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    patterns: tuple[str, ...] = ("2:4", "8:16")
    threads: tuple[int, ...] = (1,)
    seconds: float = 0.6


def check_pattern(label: str) -> None:
    """PatternError unless the label is a pattern, such as "2:4", or one with int8 weights, such as "2:4+int8"."""
    parse_weights(label)


def sweep(*parts: Settings) -> dict[str, Any]:
    """Measure; the result holds machine, settings, what to know of engines, and a row for each timing.

    Every engine works in a process of its own, one for each number of threads: a pool made by another engine, or by
    itself for another number of threads, would take cores from it.

    Raises SparsecompError if an engine's product is wrong, or if an engine or its process fails.
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
        engines = [*float_engines(), *sparse.values()]
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
        wanted = [*float_engines(), *(sparse[pattern] for pattern in part.patterns)]
        why = {engine.name: engine.missing(dtype) for engine in wanted}
        missing.update({f"{name}, {dtype}": reason for name, reason in why.items() if reason is not None})
        ready = [engine for engine in wanted if why[engine.name] is None]
        told = {f"{each.name}, {dtype}": each.remark(dtype) for each in ready}
        remarks.update({name: text for name, text in told.items() if text is not None})
        if (reason := _too_small(part, shape, dtype)) is not None:
            missing[f"cold weights, {shape[0]}x{shape[1]}, {dtype}"] = reason
        asked = {engine.name: started[engine.name] for engine in ready}
        # weights of an earlier shape would fill the memory
        ask_all((worker for name, worker in started.items() if name not in asked), "clear")
        yield from _rows(part, device, ready, asked, shape, dtype, threads, cores)


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


def _rows(
    settings: Settings,
    device: Device,
    engines: list[Engine],
    asked: Mapping[str, Worker],
    shape: tuple[int, int],
    dtype: str,
    threads: int,
    cores: Cores,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case, a batch on warm or cold weights."""
    copies = _copies(settings, device, shape, dtype) if _too_small(settings, shape, dtype) is None else 1
    ask_all(asked.values(), "load", shape, dtype, copies)
    cases = [(batch, "warm", 1) for batch in settings.batches]
    cases += [(batch, "cold", copies) for batch in settings.cold_batches if copies > 1]
    for batch, weights, count in cases:
        errors = ask_all(asked.values(), "bind", batch, count)
        _check(errors, engines, dtype, f"{shape[0]}x{shape[1]}, batch {batch}, {threads} threads")
        samplers = {name: partial(worker.ask, "sample") for name, worker in asked.items()}
        timings = measure(samplers, settings.seconds, cores)
        found = []
        for engine in engines:
            row: dict[str, Any] = {
                "out": shape[0],
                "in": shape[1],
                "batch": batch,
                "dtype": dtype,
                "threads": threads,
                "weights": weights,
                "engine": engine.name,
                "pattern": engine.label,
                "error": float(f"{errors[engine.name]:.2g}"),
                **_times(timings[engine.name], count),
            }
            if engine.pattern is not None:
                pattern = sc.parse_pattern(engine.pattern)
                request = Request(pattern, shape, DTYPES[dtype], "cpu", batch, engine.numbers)
                limit = bound(request, device, threads, warm=weights == "warm")
                row |= {"bound": round(limit.value, 3), "bound_by": limit.limited_by}
            found.append(row)
        yield found


def _copies(settings: Settings, device: Device, shape: tuple[int, int], dtype: str) -> int:
    if not settings.cold_batches:
        return 1
    return max(2, round(_BEYOND_CACHE * device.last_level_bytes / _packed_bytes(settings, shape, dtype)))


def _packed_bytes(settings: Settings, shape: tuple[int, int], dtype: str) -> float:
    """The values of the smallest of the packed weights."""
    weights = [parse_weights(label) for label in settings.patterns]
    bits = min(pattern.density * numbers.weight_bits(DTYPES[dtype]) for pattern, numbers in weights)
    return shape[0] * shape[1] * bits / 8


def _too_small(settings: Settings, shape: tuple[int, int], dtype: str) -> str | None:
    """Why cold weights of this shape are not measured, or None if they are."""
    size = _packed_bytes(settings, shape, dtype)
    if not settings.cold_batches or size >= _SMALLEST_COLD:
        return None
    return (
        f"a weight of {size / 1024:.3g} KiB is smaller than the {_SMALLEST_COLD // 1024} KiB from which cold weights "
        "are measured: too many copies would have to fill the cache"
    )


def _check(errors: Mapping[str, float], engines: Iterable[Engine], dtype: str, where: str) -> None:
    for engine in engines:
        if not errors[engine.name] <= engine.tolerance(dtype):
            raise SparsecompError(f"{engine.name} is wrong at {where}: {engine.wrong(errors[engine.name], dtype)}")


def _times(timing: Timing, copies: int) -> dict[str, float | int]:
    return {
        "us": _digits(timing.median / copies),
        "us_low": _digits(timing.low / copies),
        "us_high": _digits(timing.high / copies),
        "samples": timing.samples,
    }


def _digits(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")
