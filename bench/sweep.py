"""The GEMM sweep: every engine on every shape, batch, dtype and number of threads, all engines of a row in one run.

Takes settings, gives a result as JSON values (docs/results.md). Knows nothing of tables and plots.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsecomp as sc
from sparsecomp.backends.registry import Request
from sparsecomp.cost import bound
from sparsecomp.device import Device, detect
from sparsecomp.display import progress
from sparsecomp.errors import SparsecompError

from .engines import DTYPES, Engine, Operands, Runner, SparseEngine, dense_engines
from .harness import Timing, measure, use_threads
from .machine import describe

FORMAT = 1
# relative Frobenius distance to float64 above which a figure would be the speed of something else
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
# seconds between two engines, by whether they have worker threads
_PAUSE = {False: 0.0, True: 0.005}
# copies that together exceed the last-level cache by this much leave nothing of the first when the last is done
_BEYOND_CACHE = 1.5


@dataclass(frozen=True)
class Settings:
    """What is measured. ``cold_batches`` are also measured on rotating copies larger than the last-level cache."""

    shapes: tuple[tuple[int, int], ...] = ((384, 384), (1536, 384), (768, 768), (3072, 768), (4096, 4096))
    batches: tuple[int, ...] = (1, 8, 32, 128)
    cold_batches: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    patterns: tuple[str, ...] = ("2:4", "8:16")
    threads: tuple[int, ...] = (1,)
    seconds: float = 0.6


def sweep(settings: Settings) -> dict[str, Any]:
    """Measure; the result holds machine, settings, engines left out with the reason, and a row for each timing.

    Raises SparsecompError if an engine's product is wrong.
    """
    # peaks are those of this run, not of another day
    os.environ["SPARSECOMP_CACHE"] = "off"
    device = detect("cpu")
    machine = describe(device, list(settings.threads))
    engines = [*dense_engines(), *(SparseEngine(pattern) for pattern in settings.patterns)]
    missing = {
        f"{engine.name}, {dtype}": reason
        for engine in engines
        for dtype in settings.dtypes
        if (reason := engine.missing(dtype)) is not None
    }
    groups = [(shape, dtype) for shape in settings.shapes for dtype in settings.dtypes]
    rows: list[dict[str, Any]] = []
    for shape, dtype in progress(groups, "measuring"):
        ready = [engine for engine in engines if f"{engine.name}, {dtype}" not in missing]
        with torch.inference_mode():
            rows.extend(_rows(settings, device, ready, shape, dtype))
    return {
        "format": FORMAT,
        "kind": "gemm",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine,
        "settings": asdict(settings),
        "missing": missing,
        "rows": rows,
    }


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
    settings: Settings, device: Device, engines: list[Engine], shape: tuple[int, int], dtype: str
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(shape[0] * 31 + shape[1])
    copies = _copies(settings, device, shape, dtype)
    # values that the dtype holds exactly, so that all engines multiply the same numbers
    weights = [_random(shape, dtype, generator, shape[1] ** -0.5) for _ in range(copies)]
    bias = _random(shape[:1], dtype, generator, 1.0)
    fitting = {engine.name: _fit(weights, engine.pattern) for engine in engines}
    loaded = {engine.name: engine.load(Operands(fitting[engine.name], bias, dtype)) for engine in engines}
    for threads in settings.threads:
        with use_threads(threads):
            for batch in settings.batches:
                x = _random((batch, shape[1]), dtype, generator, 1.0)
                for weights_are in ("warm", "cold") if batch in settings.cold_batches else ("warm",):
                    count = copies if weights_are == "cold" else 1
                    runners = {name: each.bind(x, threads, count) for name, each in loaded.items()}
                    errors = {
                        name: _relative_error(_product(runner), fitting[name][count - 1], x, bias)
                        for name, runner in runners.items()
                    }
                    _check(errors, dtype, f"{shape[0]}x{shape[1]}, batch {batch}, {threads} threads")
                    timings = measure(
                        {name: runner.call for name, runner in runners.items()}, settings.seconds, _PAUSE[threads > 1]
                    )
                    for engine in engines:
                        row: dict[str, Any] = {
                            "out": shape[0],
                            "in": shape[1],
                            "batch": batch,
                            "dtype": dtype,
                            "threads": threads,
                            "weights": weights_are,
                            "engine": engine.name,
                            "pattern": engine.pattern,
                            "error": float(f"{errors[engine.name]:.2g}"),
                            **_times(timings[engine.name], count),
                        }
                        if engine.pattern is not None:
                            request = Request(sc.parse_pattern(engine.pattern), shape, DTYPES[dtype], "cpu", batch)
                            limit = bound(request, device, threads, warm=weights_are == "warm")
                            row |= {"bound": round(limit.value, 3), "bound_by": limit.limited_by}
                        yield row


def _copies(settings: Settings, device: Device, shape: tuple[int, int], dtype: str) -> int:
    if not settings.cold_batches:
        return 1
    packed = min(sc.parse_pattern(pattern).density for pattern in settings.patterns)
    size = shape[0] * shape[1] * DTYPES[dtype].itemsize * packed
    return max(2, round(_BEYOND_CACHE * device.last_level_bytes / size))


def _random(shape: tuple[int, ...], dtype: str, generator: torch.Generator, scale: float) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(DTYPES[dtype]).float()


def _fit(weights: list[Tensor], pattern: str | None) -> list[Tensor]:
    return weights if pattern is None else [sc.prune_weight(weight, pattern).weight for weight in weights]


def _product(runner: Runner) -> Tensor:
    runner.call()
    return runner.result()


def _relative_error(y: Tensor, weight: Tensor, x: Tensor, bias: Tensor) -> float:
    truth = x.double() @ weight.double().T + bias.double()
    return float((y.double() - truth).norm() / truth.norm())


def _check(errors: dict[str, float], dtype: str, where: str) -> None:
    for name, error in errors.items():
        if not error <= TOLERANCE[dtype]:
            raise SparsecompError(
                f"{name} is wrong at {where}: relative error {error:.2e} against float64, at most {TOLERANCE[dtype]:g} "
                f"in {dtype}; its time would mean nothing"
            )


def _times(timing: Timing, copies: int) -> dict[str, float | int]:
    return {
        "us": _digits(timing.median / copies),
        "us_low": _digits(timing.low / copies),
        "us_high": _digits(timing.high / copies),
        "samples": timing.samples,
    }


def _digits(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")
