"""The GPU sweep: every engine on every case, all engines of a case in one run, each product checked against fp32.

``python -m sparsecomp.bench.gpu --output DIR`` writes gpu.json and gpu.txt there and prints the latter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gpu_cases import MODELS, TOKENS, Case, cases, copies
from .gpu_engines import Call, GpuEngine, engines
from .gpu_machine import describe, watch
from .gpu_packing import packing_rows
from .gpu_report import Row, summary
from .gpu_timing import GpuSampler
from .harness import Timing, measure

FORMAT = 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16, "tf32": torch.float32}
"""Of x and y, by what the tensor cores multiply."""

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "int8": 3e-2, "tf32": 2e-3}
"""Relative Frobenius distance to the fp32 product above which a time is that of something else."""

_REFERENCE_ROWS = 512


def random_operands(case: Case, dtype: torch.dtype, count: int, device: str = "cuda") -> list[tuple[Tensor, Tensor]]:
    """``count`` pairs of a weight [out, in], 2:4 at random places (fp32: 1:2), and x [tokens, in], all random data."""
    found, group = [], 2 if dtype == torch.float32 else 4
    for _ in range(count):
        weight = torch.randn(case.out, case.columns // group, group, device=device)
        kept = torch.rand_like(weight).argsort(dim=2) < group // 2
        x = torch.randn(case.tokens, case.columns, device=device).to(dtype)
        found.append(((weight * kept).flatten(1).to(dtype), x))
    return found


def distance(y: Tensor, weight: Tensor, x: Tensor) -> float:
    """Relative Frobenius distance of the first rows of y to the product in fp32; NaN counts as infinite."""
    rows = min(_REFERENCE_ROWS, x.shape[0])
    exact = x[:rows].float() @ weight.float().T
    found = float(torch.linalg.norm(y[:rows].float() - exact) / torch.linalg.norm(exact))
    # the rest must at least be numbers
    return found if found == found and bool(torch.isfinite(y).all()) else float("inf")


def measure_case(
    case: Case, dtype: str, available: Sequence[GpuEngine], l2_bytes: int, seconds: float, result: dict[str, Any]
) -> None:
    """Append a row for each engine that runs the case, and the reason for each that does not, to ``result``."""
    operands = random_operands(case, DTYPES[dtype], copies(case, l2_bytes))
    samplers: dict[str, GpuSampler] = {}
    errors: dict[str, float] = {}
    for engine in available:
        reason = engine.refuses(case, DTYPES[dtype])
        if reason is not None:
            result["refused"].append(f"{engine.name}, {case}: {reason}")
            continue
        try:
            calls = [engine.prepare(weight, x) for weight, x in operands]
            errors[engine.name] = _worst(calls, operands)
            samplers[engine.name] = GpuSampler(calls)
        except Exception as error:
            # one library that fails at one shape must not cost the others their figures; it is named
            result["failed"].append(f"{engine.name}, {case}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if errors[engine.name] > TOLERANCE[dtype]:
            result["failed"].append(f"{engine.name}, {case}: relative error {errors[engine.name]:.2e}; not timed")
            del samplers[engine.name]
    if samplers:
        timings = measure(samplers, seconds)
        result["rows"] += rows(case, dtype, available, timings, errors, {n: s.captured for n, s in samplers.items()})


def rows(
    case: Case,
    dtype: str,
    timed: Sequence[GpuEngine],
    timings: Mapping[str, Timing],
    errors: Mapping[str, float],
    captured: Mapping[str, bool],
) -> list[Row]:
    """One row for each engine that was timed."""
    operations = 2 * case.out * case.columns * case.tokens
    return [
        {
            "out": case.out,
            "in": case.columns,
            "tokens": case.tokens,
            "where": case.where,
            "dtype": dtype,
            "engine": engine.name,
            "sparse": engine.sparse,
            "note": engine.note(case),
            "us": _digits(timings[engine.name].median * 1e6),
            "us_low": _digits(timings[engine.name].low * 1e6),
            "us_high": _digits(timings[engine.name].high * 1e6),
            "samples": timings[engine.name].samples,
            "dense_tflops": _digits(operations / timings[engine.name].median / 1e12),
            "error": float(f"{errors[engine.name]:.2g}"),
            "graph": captured[engine.name],
        }
        for engine in timed
        if engine.name in timings
    ]


def sweep(wanted: Sequence[Case], dtype: str, deadline: float, seconds: float) -> dict[str, Any]:
    """Measure until ``deadline`` (time.monotonic()); cases that were not reached are named."""
    machine = describe()
    l2_bytes = machine["l2_mib"] << 20
    offered = engines(dtype)
    missing = {engine.name: reason for engine in offered if (reason := engine.missing()) is not None}
    result: dict[str, Any] = {
        "format": FORMAT,
        "kind": "gpu gemm",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine,
        "missing": [f"{name}: {reason}" for name, reason in missing.items()],
        "refused": [],
        "failed": [],
        "not measured": [],
        "rows": [],
    }
    available = [engine for engine in offered if engine.name not in missing]
    during: dict[str, tuple[float, float]] = {}
    with watch(during), torch.inference_mode():
        for case in wanted:
            if time.monotonic() > deadline:
                result["not measured"].append(str(case))
                continue
            measure_case(case, dtype, available, l2_bytes, seconds, result)
            print(f"{case}: {len(result['rows'])} rows", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
        result["packing"] = packing_rows()
    machine["during"] = during
    return result


def write(result: dict[str, Any], folder: Path) -> str:
    """gpu.json (one row to a line) and gpu.txt in ``folder``; the text."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in result.items() if name != "rows"}
    lines = ",\n  ".join(json.dumps(row) for row in result["rows"])
    (folder / "gpu.json").write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
    text = summary(result)
    (folder / "gpu.txt").write_text(text)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where there is no GPU or an engine of ours failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of gpu.json and gpu.txt")
    parser.add_argument("--minutes", type=float, default=6.0, help="cases not begun by then are left out")
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing for each case")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; run this where there is one", file=sys.stderr)
        return 1
    deadline = time.monotonic() + 60 * given.minutes
    result = sweep(cases(given.models, given.tokens), given.dtype, deadline, given.seconds)
    print(write(result, given.output))
    return int(any(entry.startswith("sparsecomp ") for entry in result["failed"]))


def _worst(calls: Sequence[Call], operands: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest distance of the first and the last copy; all copies are alike."""
    ends = {0, len(calls) - 1}
    return max(distance(calls[index](), *operands[index]) for index in ends)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
