"""Whether a compiled layer is ever slower than nn.Linear: random sizes, dense left alone where it wins.

``python -m bench.cpu.anyshape [--count 200] [--threads 1] [--output FILE]`` prints the slowest layers and writes
every one of them as JSON. Dense is torch's nn.Linear, which is what ``sc.compile`` replaces or leaves.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.benchmark.cores import Cores
from sparsecomp.benchmark.machine import describe
from sparsecomp.benchmark.report import EVEN
from sparsecomp.engines.base import DTYPES
from sparsecomp.engines.timing import Sampler, measure, use_threads, wait_until_idle
from sparsecomp.machine.device import detect
from sparsecomp.reporting.terminal import counted, progress, table

MOST_FEATURES, MOST_BATCH = 4096, 512
_SECONDS = 0.25
_SHOWN = 12


def sizes(count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """(out, in, batch), each uniform on a logarithmic scale: odd and tiny sizes come up as often as large ones."""
    drawn = random.Random(seed)

    def number(most: int) -> int:
        return round(math.exp(drawn.uniform(0, math.log(most))))

    return [(number(MOST_FEATURES), number(MOST_FEATURES), number(MOST_BATCH)) for _ in range(count)]


@torch.inference_mode()
def compare(out: int, columns: int, batch: int, dtype: str, counts: Callable[[], bool]) -> dict[str, Any]:
    """One layer at 2:4, compiled for its batch, beside nn.Linear, called in turn; again where it does not count."""
    linear = nn.Linear(columns, out, dtype=DTYPES[dtype])
    linear.weight.copy_(sc.prune_weight(linear.weight.float(), "2:4").weight)
    dense = nn.Sequential(linear)
    compiled = sc.compile(copy.deepcopy(dense), "2:4", batch=batch)
    x = torch.randn(batch, columns, dtype=DTYPES[dtype])
    samplers = {"dense": Sampler(partial(dense, x)), "compiled": Sampler(partial(compiled, x))}
    while True:
        timings = measure(samplers, _SECONDS)
        wait_until_idle()  # torch's threads would share a core with those that look at the cores
        if counts():
            break
    before, after = timings["dense"], timings["compiled"]
    return {
        "out": out,
        "in": columns,
        "batch": batch,
        "dtype": dtype,
        "sparse": isinstance(compiled.get_submodule("0"), sc.SparseLinear),
        "speedup": round(before.median / after.median, 3),
        "low": round(before.low / after.high, 3),
        "high": round(before.high / after.low, 3),
    }


def render(rows: list[dict[str, Any]]) -> str:
    """The slowest layers, and the whole in one sentence."""
    slowest = sorted(rows, key=lambda row: float(row["speedup"]))
    lines = [
        (
            f"{row['out']}x{row['in']}",
            row["batch"],
            row["dtype"],
            "sparse" if row["sparse"] else "dense",
            f"{row['speedup']:.2f}x",
            f"{row['low']:.2f}-{row['high']:.2f}",
        )
        for row in slowest[:_SHOWN]
    ]
    columns = (">out x in", ">batch", "dtype", "runs", ">speedup", ">low-high")
    packed = [row for row in rows if row["sparse"]]
    behind = [row for row in rows if row["speedup"] < EVEN]
    certain = [row for row in behind if row["high"] < 1]
    mean = f", geometric mean of these {geometric_mean(row['speedup'] for row in packed):.2f}x" if packed else ""
    return (
        f"{table(columns, lines, title='The slowest compiled layers, against nn.Linear')}\n\n"
        f"{counted(len(rows), 'layer')}: {len(packed)} packed{mean}; {len(rows) - len(packed)} left dense. "
        f"Below {EVEN}: {len(behind)}, {len(certain)} of them beyond their spread, "
        f"{sum(row['sparse'] for row in behind)} packed."
    )


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="random layers, compiled for this machine, against nn.Linear")
    parser.add_argument("--count", type=int, default=200, help="layers for each precision (default 200)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--output", help="write every row as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with use_threads(arguments.threads):
        cases = [(*size, dtype) for dtype in arguments.dtypes for size in sizes(arguments.count)]
        cores = Cores(arguments.threads)
        rows = [compare(*case, cores) for case in progress(cases, f"measuring, {arguments.threads} thread(s)")]
    print(render(rows))
    if arguments.output:
        result = {
            "kind": "anyshape",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": describe(detect("cpu"), [arguments.threads]),
            "threads": arguments.threads,
            "shared_cores": cores.record(),
        }
        head = json.dumps(result, indent=1)[:-2]
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        Path(arguments.output).write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
