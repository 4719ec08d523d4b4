"""``sparsecomp prune``: prune a model's linear layers and save the dense weights, zeros and all."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsecomp.cli import models

_EXAMPLE = """\
example: sparsecomp prune shop.models:build --pattern 2:4 --method wanda --calibration shop.data:batches \\
             -o pruned.safetensors

The file holds ordinary dense weights with zeros in them, under the model's own names. Go on with
    sparsecomp compile shop.models:build --weights pruned.safetensors --pattern 2:4 -o packed.safetensors
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("prune", help="prune a model, save dense weights with zeros", epilog=_EXAMPLE)
    models.add_model(parser)
    parser.add_argument("--pattern", required=True, help='such as "2:4", "8:16" or "2:4@v4"')
    parser.add_argument("--method", default="magnitude", help="magnitude (default) or wanda; others as registered")
    models.add_pruning(parser)
    models.add_output(parser, "safetensors")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    import sparsecomp as sc

    model = models.load_model(arguments.model, arguments.weights)
    calibration = models.load_calibration(arguments, model)
    chosen = {"only": arguments.only, "skip": arguments.skip}
    report = sc.prune(model, arguments.pattern, method=arguments.method, calibration=calibration, **chosen)
    print(report)

    from safetensors.torch import save_model

    save_model(model, arguments.output)
    print(f"wrote {arguments.output} ({Path(arguments.output).stat().st_size / 1e6:.1f} MB of dense weights)")
    return 0
