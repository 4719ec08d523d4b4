"""``sparsecomp plan``: what this machine could turn into speed, layer by layer; nothing is pruned or written."""

from __future__ import annotations

import argparse
import json

from sparsecomp.cli import choices, hub, models
from sparsecomp.cli.compile import BATCHES
from sparsecomp.cli.parser import UsageError, counts, output_file
from sparsecomp.reporting.terminal import wrap

_EXAMPLE = """\
example: sparsecomp plan shop.models:build --pattern 2:4 --batch 1,32

Dense torch and the sparse kernel are timed at every batch, once for all layers of one shape and dtype; a layer of less
than float32 is timed dense in float32 as well, and the faster of the two counts. A layer goes sparse if sparse is
slower at no batch and faster in the mean of them. --engines times ONNX Runtime, OpenVINO and int8 as well, which takes
seconds for each shape and decides nothing. "bound" is what the measured peaks of this
machine allow at most. Weights need not be pruned yet. --output writes the plan as a file, which "sparsecomp compile
--plan FILE" and sparsecomp.Plan.load(FILE) follow without measuring again. Times are kept in a cache for the next run;
SPARSECOMP_CACHE=off measures anew. --json prints the plan as JSON, all times in seconds.
With --calibration, layers that do not bear the integers of a pattern such as "8:16+int8@a8" step back.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("plan", help="measure which layers of a model are worth making sparse", epilog=_EXAMPLE)
    models.add_model(parser)
    choices.add_pattern(parser, False, "; default auto")
    parser.add_argument("--batch", metavar="LIST", type=counts, help="rows of x to plan for (default 1,128)")
    models.add_pruning(parser)
    parser.add_argument("--engines", action="store_true", help="time the other dense engines of this machine beside it")
    parser.add_argument("--all", action="store_true", help="a row for each layer, where equal ones share one else")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=output_file(".json"), help="write the plan as well, for compile --plan"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: a row for each layer, and totals")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    import sparsecomp as sc
    from sparsecomp.models.layers import find_linears, require_layers

    given = choices.read_patterns(arguments.pattern or [choices.AUTO])
    model = models.load_model(arguments.model, arguments.weights, arguments.auto_class)
    found = require_layers(find_linears(model, arguments.only, arguments.skip))
    chosen = choices.by_layer(found, choices.without_auto(given, model), None)
    choices.check_use(None, arguments.calibration, choices.rounds(chosen))
    if arguments.batch_item is not None and arguments.calibration is None:
        raise UsageError("--batch-item is the part of a calibration batch; give --calibration as well")
    with hub.without_cache(model):
        plan = sc.plan(
            model,
            choices.exactly(chosen),
            batch=arguments.batch or BATCHES,
            only=arguments.only,
            skip=arguments.skip,
            engines=arguments.engines,
            calibration=models.load_calibration(arguments, model),
        )
    if arguments.output is not None:
        plan.save(arguments.output)
    if arguments.json:
        facts = {"sparsecomp": sc.__version__, "model": arguments.model, "class": type(model).__name__}
        print(json.dumps({**facts, **plan.to_dict(), "totals": plan.totals()}, indent=1, allow_nan=False))
        return 0
    print(plan.text(every=arguments.all))
    print(wrap(choices.times_note()))
    if arguments.output is not None:
        print(f'wrote {arguments.output}, which "sparsecomp compile --plan {arguments.output}" follows')
    thinned = choices.thinned({name: chosen[name] for name in plan.sparse})
    choices.say(choices.router_note(model, thinned))
    choices.say(choices.head_note(model, thinned, None, False))
    return 0
