"""The GPU sweep: every engine on every case, all engines of a case in one run, each product checked against fp32.

``python -m bench.gpu.sweep --output DIR`` writes gpu.json and gpu.txt there and prints the latter. A process that
is watched does the measuring: an engine that brings it down or hangs is named and left out of the rest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import MODELS, TOKENS, Case, cases, copies
from bench.gpu.engine import Call, GpuEngine
from bench.gpu.engines import engines
from bench.gpu.machine import describe, watch
from bench.gpu.packing import packing_rows
from bench.gpu.report import Row, summary
from bench.gpu.sampler import GpuSampler
from bench.gpu.supervise import Journal, supervise
from sparsecomp.engines.timing import Timing, measure

FORMAT = 1
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
    "int8": torch.bfloat16,
    "tf32": torch.float32,
}
"""Of x and y before any rounding, by what the tensor cores multiply."""

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp8": 6e-2, "int8": 3e-2, "tf32": 2e-3}
"""Relative Frobenius distance to the fp32 product above which a time is that of something else."""

_REFERENCE_ROWS = 512
_FINISHING_S = 20.0  # a case under way, and the report
_SPOILED = 3


class SpoiledError(Exception):
    """A fault after which the process cannot use the GPU any more."""


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
    """Relative Frobenius distance of rows from all over y to the product in fp32; NaN counts as infinite."""
    rows = min(_REFERENCE_ROWS, x.shape[0])
    taken = torch.linspace(0, x.shape[0] - 1, rows, device=x.device).long()
    exact = x[taken].float() @ weight.float().T
    found = float(torch.linalg.norm(y[taken].float() - exact) / torch.linalg.norm(exact))
    # the rest must at least be numbers
    return found if found == found and bool(torch.isfinite(y).all()) else float("inf")


def measure_case(
    case: Case, dtype: str, available: Sequence[GpuEngine], l2_bytes: int, seconds: float, journal: Journal
) -> None:
    """Record a row for each engine that runs the case, and the reason for each that does not, in ``journal``.

    Raises SpoiledError where an engine's fault leaves nothing of the GPU to go on with.
    """
    operands = random_operands(case, DTYPES[dtype], copies(case, l2_bytes))
    samplers: dict[str, GpuSampler] = {}
    errors: dict[str, float] = {}
    for engine in available:
        reason = engine.refuses(case, DTYPES[dtype])
        if reason is not None:
            journal.add(refused=f"{engine.name}, {case}: {reason}")
            continue
        journal.add(at=[engine.name, str(case)])
        try:
            calls = [engine.prepare(weight, x) for weight, x in operands]
            errors[engine.name] = _worst(calls, operands)
            sampler = GpuSampler(calls)
        except Exception as error:
            # one library that fails at one shape must not cost the others their figures; it is named
            journal.add(failed=f"{engine.name}, {case}: {type(error).__name__}: {str(error)[:200]}")
            _require_context(error)
            continue
        if errors[engine.name] > TOLERANCE[dtype]:
            journal.add(failed=f"{engine.name}, {case}: relative error {errors[engine.name]:.2e}; not timed")
        else:
            samplers[engine.name] = sampler
    if samplers:
        journal.add(at=["", str(case)])
        timings = measure(samplers, seconds)
        for engine in available:
            if (name := engine.name) in timings:
                note, graph = engine.note(case), samplers[name].captured
                found = row(case, dtype, name, engine.sparse, note, timings[name], errors[name], graph)
                journal.add(row=found)


def row(case: Case, dtype: str, engine: str, sparse: bool, note: str, timing: Timing, error: float, graph: bool) -> Row:
    """What is kept of one engine's time for a case, as JSON values; times are microseconds of one call."""
    operations = 2 * case.out * case.columns * case.tokens
    return {
        "out": case.out,
        "in": case.columns,
        "tokens": case.tokens,
        "where": case.where,
        "dtype": dtype,
        "engine": engine,
        "sparse": sparse,
        "note": note,
        "us": _digits(timing.median * 1e6),
        "us_low": _digits(timing.low * 1e6),
        "us_high": _digits(timing.high * 1e6),
        "samples": timing.samples,
        "dense_tflops": _digits(operations / timing.median / 1e12),
        "error": float(f"{error:.2g}"),
        "graph": graph,
    }


def work(wanted: Sequence[Case], dtype: str, deadline: float, seconds: float, journal: Journal) -> None:
    """What the watched process does: measure, until ``deadline`` (time.monotonic()), what is not in the journal yet.

    Raises SpoiledError as ``measure_case`` does.
    """
    machine = describe()
    l2_bytes = machine["l2_mib"] << 20
    banned, done = set(journal.of("banned")), set(journal.of("done"))
    offered = engines(dtype)
    missing = {engine.name: reason for engine in offered if (reason := engine.missing()) is not None}
    if not journal.of("machine"):
        journal.add(machine=machine)
        for name, reason in missing.items():
            journal.add(missing=f"{name}: {reason}")
        journal.add(at=["packing", "packing"])
        if dtype == "bf16" and "packing" not in banned:
            journal.add(packing=packing_rows())
    available = [engine for engine in offered if engine.name not in missing and engine.name not in banned]
    with torch.inference_mode():
        for case in wanted:
            if time.monotonic() > deadline:
                return
            if str(case) not in done:
                measure_case(case, dtype, available, l2_bytes, seconds, journal)
                journal.add(done=str(case))
                torch.cuda.empty_cache()


def gathered(journal: Journal, wanted: Sequence[Case], during: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The result of a sweep from what its processes recorded; cases that were not reached are named."""
    machine: dict[str, Any] = next(iter(journal.of("machine")), {})
    done = set(journal.of("done"))
    measured: dict[tuple[Any, ...], Row] = {}
    for row in journal.of("row"):
        # a case that was begun again is measured as a whole again
        measured[row["out"], row["in"], row["tokens"], row["engine"]] = row
    return {
        "format": FORMAT,
        "kind": "gpu gemm",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": {**machine, "during": dict(during)},
        **{name: journal.of(name) for name in ("missing", "refused", "failed")},
        "not measured": [str(case) for case in wanted if str(case) not in done],
        "packing": next(iter(journal.of("packing")), []),
        "rows": list(measured.values()),
    }


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
    parser.add_argument(
        "--limit", type=float, default=360.0, help="seconds in all; cases not begun by then are left out"
    )
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing for each case")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--journal", type=Path, help="be the watched process, and record here what is found")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; run this where there is one", file=sys.stderr)
        return 1
    wanted = cases(given.models, given.tokens)
    deadline = time.monotonic() + max(0.0, given.limit - _FINISHING_S)
    if given.journal is not None:
        try:
            work(wanted, given.dtype, deadline, given.seconds, Journal(given.journal))
        except SpoiledError as error:
            print(error, file=sys.stderr)
            # the destructors of a spoiled context may hang
            os._exit(_SPOILED)
        return 0
    given.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(given.output / "journal.jsonl")
    journal.path.unlink(missing_ok=True)
    during: dict[str, tuple[float, float]] = {}
    command = [sys.executable, "-m", "bench.gpu.sweep", *(arguments if arguments is not None else sys.argv[1:])]
    with watch(during):
        supervise([*command, "--journal", str(journal.path)], journal, deadline)
    result = gathered(journal, wanted, during)
    print(write(result, given.output))
    return int(any(entry.startswith(("sparsecomp ", "the measuring")) for entry in result["failed"]))


def _require_context(error: Exception) -> None:
    """Raise SpoiledError if the GPU answers nothing any more, as after an illegal access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as spoiled:
        raise SpoiledError(f"the CUDA context is lost: {spoiled}") from error


def _worst(calls: Sequence[Call], operands: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest distance of the first and the last copy; all copies are alike."""
    ends = {0, len(calls) - 1}
    return max(distance(calls[index](), *operands[index]) for index in ends)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
