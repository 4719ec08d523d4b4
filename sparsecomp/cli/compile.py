"""``sparsecomp compile``: prune where asked, pack every layer, and save the packed model."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecomp.cli import choices, hub, models, pruned
from sparsecomp.cli.parser import UsageError, counts
from sparsecomp.errors import ModelError
from sparsecomp.reporting.terminal import listed, wrap

if TYPE_CHECKING:
    from torch import nn

    from sparsecomp.models.layers import LayerTable
    from sparsecomp.planning.planner import Plan

_EXAMPLE = """\
example: sparsecomp compile shop.models:build --pattern 2:4 \\
             --method magnitude -o packed.safetensors

The plan is printed first: each layer's times, in dense torch and sparse, and whether it goes sparse. Layers in which
dense torch is faster stay dense, unless --everywhere. Times are kept in a cache; SPARSECOMP_CACHE=off measures anew.
--plan follows a plan that "sparsecomp plan --output" wrote: it says which layers go sparse, in which patterns and by
which kernels, and nothing is measured.
Without --method the weights must fit the pattern already. For
weights that "sparsecomp prune" wrote, --pattern may be left out: the layers it pruned are packed, in the patterns it
noted, and the layers it left dense stay dense. Read the file with
    sc.load("packed.safetensors", into=build())

Patterns by layer: --pattern 'encoder.*=2:4' --pattern 8:16; a layer's full name counts before any glob, then the first
glob that matches; the pattern without a glob is that of all other layers. "auto" is the pattern that suits this
machine.

"8:16+int8@a8" multiplies integers: int8 weights, and inputs rounded to int8. With --calibration, layers whose output
that would move by more than 5% step back to int8 weights alone, then to floats. "16:16+int8@a8" prunes nothing.
"""
BATCHES = (1, 128)


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("compile", help="pack a model into sparse layers and save it", epilog=_EXAMPLE)
    models.add_model(parser)
    choices.add_pattern(parser, False, "; needed unless prune wrote the weights")
    parser.add_argument("--method", help="prune first: magnitude, wanda, sparsegpt, fast, balanced, ...")
    parser.add_argument("--everywhere", action="store_true", help="pack layers in which dense is faster, too")
    parser.add_argument("--batch", metavar="LIST", type=counts, help="rows of x to plan for (default 1,128)")
    parser.add_argument("--plan", metavar="FILE", help='follow this plan, of "sparsecomp plan --output FILE"')
    parser.add_argument("--all", action="store_true", help="a row for each layer, where equal ones share one else")
    parser.add_argument(
        "--require-sparse", action="store_true", help="fail, with exit code 1 and no file, if no layer is packed"
    )
    models.add_pruning(parser)
    models.add_output(parser, "safetensors", ".safetensors", ".st")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    import sparsecomp as sc
    from sparsecomp.models.convolutions import RUNS_DENSE
    from sparsecomp.models.layers import find_linears, require_layers
    from sparsecomp.planning.selection import choices_of

    given = choices.read_patterns(arguments.pattern or [])
    choices.check_method(arguments.method, arguments.calibration)
    if arguments.plan is not None and (unused := _beside_a_plan(arguments)):
        raise UsageError(f"{unused} decides what --plan has decided; leave one of them out")
    followed = None if arguments.plan is None else sc.Plan.load(arguments.plan)
    if arguments.everywhere and (arguments.batch or arguments.all):
        option = "--batch" if arguments.batch else "--all"
        raise UsageError(f"{option} is for the plan, which --everywhere does without; leave one of them out")
    if arguments.batch_item is not None and arguments.calibration is None:
        raise UsageError("--batch-item is the part of a calibration batch; give --calibration as well")
    model = models.load_model(arguments.model, arguments.weights, arguments.auto_class)
    every = find_linears(model)
    found = require_layers(find_linears(model, arguments.only, arguments.skip))
    noted = pruned.recorded(arguments.model, arguments.weights)
    recorded = noted
    # who names a method and a pattern wants them everywhere
    noted = None if given and arguments.method else noted
    if followed is None and not given and noted is None:
        raise UsageError("--pattern is missing, and the weights do not note any; give one, such as --pattern 2:4")
    if followed is None:
        chosen = choices.by_layer(found, choices.without_auto(given, model), noted)
    else:
        chosen = {name: choice.weights for name, choice in choices_of(followed, found).items()}
    choices.check_use(arguments.method, arguments.calibration, followed is None and choices.rounds(chosen))
    if "" in chosen:
        raise ModelError(
            f'"{arguments.model}" is one linear layer itself, which cannot be replaced in place; return it inside '
            "another module, such as nn.Sequential(layer)"
        )
    choices.check_finite(found, list(chosen))
    choices.say(choices.override_note(chosen, recorded, "--pattern" if followed is None else "--plan"))
    if arguments.method is None:
        choices.check_fit(found, chosen)
    else:
        choices.say(choices.router_note(model, choices.thinned(chosen)))
        choices.say(
            choices.head_note(model, choices.thinned(chosen), arguments.method, arguments.calibration is not None)
        )
    dense = models.count_bytes(model)
    with hub.without_cache(model):
        calibration = models.load_calibration(arguments, model)
        choices.check_calibration(arguments.method, calibration, list(chosen))
        prepared: dict[str, Any] = {"calibration": calibration, "method": arguments.method}
        prepared |= {"only": arguments.only, "skip": arguments.skip}
        plan = None if followed is None else _of_model(followed, found)
        if plan is not None:
            print(plan.text(every=arguments.all))
            print(wrap(f"the plan and its times are those of {arguments.plan}"))
        elif not arguments.everywhere:
            plan = sc.plan(
                model,
                choices.exactly(chosen),
                batch=arguments.batch or BATCHES,
                only=arguments.only,
                skip=arguments.skip,
                calibration=calibration,
            )
            plan = _name_dense(plan, found, noted is not None)
            print(plan.text(every=arguments.all))
            print(wrap(choices.times_note()))
        with warnings.catch_warnings():
            # said below, in a line of the output
            warnings.filterwarnings("ignore", message="compile packed 0 of")
            sc.compile(model, choices.exactly(chosen) if plan is None else plan, where="everywhere", **prepared)
    packed = _packed(model)
    if arguments.require_sparse and not packed:
        reasons = () if plan is None else (*plan.stayed_dense.values(), *plan.skipped.values())
        why = next(iter(reasons), "none could be")
        raise ModelError(
            f"none of {len(every)} layers is packed ({why}), and --require-sparse wants one; wrote no file"
        )
    sc.save(model, arguments.output)
    if plan is None and (left := [name for name in found if name not in packed]):
        print(f"left dense{' by prune' if noted is not None else ''}: {listed(left)}")
    if plan is None and (larger := [name for name, reason in every.skipped.items() if reason == RUNS_DENSE]):
        print(wrap(f"{listed(larger)}: {RUNS_DENSE}"))
    size = Path(arguments.output).stat().st_size
    print(f"packed {len(packed)} of {len(every)} layers{'' if packed else ': the model runs dense, as before'}")
    print(f"wrote {arguments.output}: {size / 1e6:.1f} MB; the dense weights take {dense / 1e6:.1f} MB")
    return 0


def _beside_a_plan(arguments: argparse.Namespace) -> str | None:
    """The option that decides what a plan has decided, None where there is none."""
    given = {"--pattern": arguments.pattern, "--batch": arguments.batch, "--everywhere": arguments.everywhere}
    return next((option for option, value in given.items() if value), None)


def _of_model(plan: Plan, found: LayerTable) -> Plan:
    """The plan of a file, without layers that are left out here; layers that it does not have say so."""
    layers = tuple(layer for layer in plan if layer.name in found)
    decided = {layer.name for layer in plan}
    left = {name: "the plan does not have it" for name in found if name not in decided}
    skipped = {layer.name: found.skipped[layer.name] for layer in plan if layer.name in found.skipped}
    return dataclasses.replace(plan, layers=layers, skipped={**left, **plan.skipped, **skipped})


def _name_dense(plan: Plan, found: LayerTable, noted: bool) -> Plan:
    """The plan, in which layers that have no pattern because prune left them dense say so."""
    if not noted:
        return plan
    decided = {layer.name for layer in plan}
    left = {name: "prune left it dense" for name in found if name not in decided}
    return dataclasses.replace(plan, skipped={**plan.skipped, **left})


def _packed(model: nn.Module) -> set[str]:
    from sparsecomp.nn import SparseLinear

    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
