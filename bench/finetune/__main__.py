"""Fine-tuning on real tasks, sparse beside dense at equal budget. ``python -m bench.finetune --only 'movies/*'``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import minilm
from bench.ending import ended
from bench.finetune import data
from bench.finetune.report import collect, summary
from bench.finetune.results import Results
from bench.finetune.runner import Bench, Runner
from bench.finetune.runs import chosen, registry
from sparsecomp.errors import SparsecompError

WIDTH = 384


def of_minilm() -> Bench:
    """The bench on all-MiniLM-L6-v2."""
    return Bench(
        load=data.load,
        encoder=minilm.load_model,
        width=WIDTH,
        encode=minilm.token_ids,
        only=tuple(f"encoder.{each}" for each in minilm.ENCODER),
        checkpoints=data.folder() / "checkpoints",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are asked for, or tell what they found."""
    parser = argparse.ArgumentParser(prog="python -m bench.finetune", description=__doc__)
    parser.add_argument("--only", action="append", metavar="GLOB", help="runs by name (may be repeated; default all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default 0,1,2)")
    parser.add_argument("--rates", help="comma-separated: of the rates of seed 0, only these in this sitting")
    parser.add_argument("--work", type=Path, default=Path("finetune-out"), help="folder of results")
    parser.add_argument("--list", action="store_true", help="print the names of the runs and stop")
    parser.add_argument("--report", action="store_true", help="make no run; print tables of the results there are")
    parser.add_argument("--output", type=Path, help="with --report: write the result as JSON")
    arguments = parser.parse_args(argv)
    try:
        runs = registry()
        picked = chosen(runs, arguments.only or ["*"])
        if arguments.list:
            print("\n".join(run.name for run in picked))
            return 0
        torch.set_num_threads(1)
        seeds = [int(each) for each in arguments.seeds.split(",")]
        rates = None if arguments.rates is None else [float(each) for each in arguments.rates.split(",")]
        results = Results(arguments.work)
        if arguments.report:
            asked = {run.name: run for run in picked}
            return ended(lambda: collect(results, asked, seeds), summary, arguments.output)
        Runner(of_minilm(), results, runs).complete(picked, seeds, rates)
    except SparsecompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
