"""``sparsecomp compile``: prune where asked, pack every layer, and save the packed model."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsecomp.cli import models

_EXAMPLE = """\
example: sparsecomp compile shop.models:build --pattern 2:4 --method magnitude -o packed.safetensors

The plan is printed first: each layer's times, dense and sparse, and whether it goes sparse. Layers in which dense is
faster stay dense, unless --everywhere. Without --method the weights must fit the pattern already. Read the file with
    sc.load("packed.safetensors", into=build())
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("compile", help="pack a model into sparse layers and save it", epilog=_EXAMPLE)
    models.add_model(parser)
    parser.add_argument("--pattern", required=True, help='such as "2:4" or "8:16"')
    parser.add_argument("--method", help="prune first: magnitude, wanda, sparsegpt, fast, balanced, ...")
    parser.add_argument("--everywhere", action="store_true", help="pack layers in which dense is faster, too")
    parser.add_argument("--batch", metavar="LIST", default="1,128", help="rows of x to plan for (default 1,128)")
    models.add_pruning(parser)
    models.add_output(parser, "safetensors")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    import sparsecomp as sc

    model = models.load_model(arguments.model, arguments.weights)
    chosen = {"only": arguments.only, "skip": arguments.skip}
    calibration = models.load_calibration(arguments, model)
    dense = models.count_bytes(model)
    prepared = {"calibration": calibration, "method": arguments.method, **chosen}
    if arguments.everywhere:
        sc.compile(model, arguments.pattern, where="everywhere", **prepared)
    else:
        plan = sc.plan(model, arguments.pattern, batch=models.numbers(arguments.batch), **chosen)
        print(plan)
        sc.compile(model, plan, **prepared)
    sc.save(model, arguments.output)
    size = Path(arguments.output).stat().st_size
    print(f"wrote {arguments.output}: {size / 1e6:.1f} MB; the dense weights take {dense / 1e6:.1f} MB")
    return 0
