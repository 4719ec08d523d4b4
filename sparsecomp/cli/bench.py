"""``sparsecomp bench``: a GEMM sweep against the best dense engine of the same run, each ratio beside its bound."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sparsecomp.cli.parser import (
    UsageError,
    counts,
    counts_or_none,
    output_file,
    output_folder,
    positive,
    shapes,
    words,
)
from sparsecomp.errors import SparsecompError
from sparsecomp.reporting.writing import telling

AUTO = "auto"
_EXAMPLE = """\
example: sparsecomp bench --shapes 4096x4096,3072x768 --batches 1,8 \\
             --dtypes fp32 --output result.json

Engines multiply in turn within one run, each in its own process; each row is checked against float64 first. Dense int8
engines are among them: patterns such as 8:16+int8@a8 are compared with the best of these, the others with the best
floating one. docs/results.md explains the table. The default sweep takes about ten minutes; close other programs first.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("bench", help="measure sparse against dense on this machine", epilog=_EXAMPLE)
    parser.add_argument("--shapes", type=shapes, metavar="LIST", help="out x in, such as 4096x4096,3072x768")
    parser.add_argument("--batches", type=counts, metavar="LIST", help="rows of the input, such as 1,8,32,128")
    parser.add_argument(
        "--cold", type=counts_or_none, metavar="LIST", help="batches also measured on cold weights; 0: none"
    )
    parser.add_argument("--dtypes", type=words, metavar="LIST", help="of fp32,bf16")
    parser.add_argument(
        "--patterns",
        type=words,
        metavar="LIST",
        help="such as 2:4,8:16,2:4+int8 (int8 weights),8:16+int8@a8 (int8 activations, too)",
    )
    parser.add_argument("--no-int8", action="store_true", help="leave the dense int8 engines out")
    parser.add_argument(
        "--goals", action="store_true", help="measure what the kernels are held to, and say where each goal stands"
    )
    parser.add_argument("--threads", type=counts, metavar="LIST", help="default: 1 and all cores")
    parser.add_argument("--seconds", type=positive, metavar="S", help="time for all engines of a row (0.6; goals: 1)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=_result_file,
        help="write the result, a .json file; auto: bench/results/DATE-CPU-gemm.json",
    )
    parser.add_argument("--plot", metavar="SVG", type=output_file(".svg"), help="limit plot of the largest shape")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from sparsecomp.benchmark import goals, plot, report, sweep
    from sparsecomp.benchmark.settings import Settings

    cores = len(os.sched_getaffinity(0))
    chosen = {
        "shapes": arguments.shapes,
        "batches": arguments.batches,
        "cold_batches": arguments.cold,
        "dtypes": arguments.dtypes,
        "patterns": arguments.patterns,
        "threads": arguments.threads or tuple(dict.fromkeys((1, cores))),
        "seconds": arguments.seconds,
    }
    if arguments.goals:
        if (
            given := [
                name for name in ("shapes", "batches", "cold_batches", "dtypes", "patterns") if chosen[name] is not None
            ]
            + ["no-int8"] * arguments.no_int8
        ):
            options = ", ".join("cold" if name == "cold_batches" else name for name in given)
            raise UsageError(f"--goals sets {options} itself; leave either out")
        parts = goals.parts(chosen["threads"], goals.kinds_here(), arguments.seconds)
    else:
        parts = [
            Settings(**{name: value for name, value in chosen.items() if value is not None}, int8=not arguments.no_int8)
        ]
    used = {dtype for part in parts for dtype in part.dtypes}
    if unknown := used - {"fp32", "bf16"}:
        raise UsageError(f"--dtypes got {', '.join(sorted(unknown))}; allowed are fp32 and bf16")
    for pattern in dict.fromkeys(pattern for part in parts for pattern in part.patterns):
        try:
            sweep.check_pattern(pattern)
        except SparsecompError as error:
            raise UsageError(f"argument --patterns: {error}") from error
    if too_many := [count for count in chosen["threads"] if not 1 <= count <= cores]:
        raise UsageError(f"--threads got {too_many[0]}; this process may use 1 to {cores} cores")
    result = sweep.sweep(*parts)
    print(report.render(result))
    if arguments.goals:
        print(f"\n{goals.render(result)}")
    if arguments.output:
        path = Path(arguments.output)
        path = sweep.default_path(result, Path("bench/results")) if arguments.output == AUTO else path
        with telling(path):
            sweep.write(result, path)
        print(f"\nwrote {path}")
    if arguments.plot:
        shape = max(parts[0].shapes, key=lambda each: each[0] * each[1])
        with telling(Path(arguments.plot)):
            Path(arguments.plot).write_text(plot.limit_plot(result, shape, parts[0].dtypes[0], parts[0].threads[0]))
        print(f"wrote {arguments.plot}")
    return 0


def _result_file(text: str) -> str:
    if text != AUTO:
        return output_file(".json")(text)
    output_folder("bench/results")
    return text
