"""Sparse training from scratch on Fashion-MNIST. ``python -m bench.lottery --only 'mlp/*'``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.ending import ended
from bench.lottery import data
from bench.lottery.report import collect, default_path, summary
from bench.lottery.results import Results
from bench.lottery.runner import Runner
from bench.lottery.runs import chosen, registry
from sparsecomp.errors import SparsecompError

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are asked for, or tell what they found."""
    parser = argparse.ArgumentParser(prog="python -m bench.lottery", description=__doc__)
    parser.add_argument("--only", action="append", metavar="GLOB", help="runs by name (may be repeated; default all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default 0,1,2)")
    parser.add_argument("--work", type=Path, default=Path("lottery-out"), help="folder of results")
    parser.add_argument("--list", action="store_true", help="print the names of the runs and stop")
    parser.add_argument("--report", action="store_true", help="make no run; print tables of the results there are")
    parser.add_argument("--output", type=Path, help='with --report: a file, or "auto" for one in bench/results')
    arguments = parser.parse_args(argv)
    try:
        picked = chosen(registry(), arguments.only or ["*"])
        if arguments.list:
            print("\n".join(run.name for run in picked))
            return 0
        torch.set_num_threads(1)
        seeds = [int(each) for each in arguments.seeds.split(",")]
        if arguments.report:
            result = collect(Results(arguments.work), {run.name: run for run in picked}, seeds)
            automatic = arguments.output == Path("auto")
            output = default_path(result, RESULTS) if automatic else arguments.output
            return ended(lambda: result, summary, output)
        Runner(data.load(), Results(arguments.work)).complete(picked, seeds)
    except SparsecompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
