"""``sparsecomp prune``: prune a model's linear layers and save the dense weights, zeros and all."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sparsecomp.cli import choices, hub, models, pruned
from sparsecomp.cli.parser import UsageError, number, output_file, output_folder, output_path, whole
from sparsecomp.errors import CalibrationError, FormatError, ModelError, SparsecompError
from sparsecomp.reporting.writing import telling, whole_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from sparsecomp.pruning import PruneReport, Tuning

_EXAMPLE = """\
example: sparsecomp prune shop.models:build --pattern 2:4 --method balanced \\
             --calibration shop.data:batches --blocks --tune 100 --distill 500 \\
             --checkpoint work --report report.html -o pruned.safetensors

The file holds ordinary dense weights with zeros in them, under the model's own names, and notes which layer was
pruned to which pattern. The integers of a pattern such as "8:16+int8@a8" are noted
too; compile rounds to them. Go on with
    sparsecomp compile shop.models:build --weights pruned.safetensors \\
        -o packed.safetensors

A Hugging Face model is written as a folder, its tokenizer with it, where -o ends in a slash or is a folder:
    sparsecomp prune bert/ --pattern 2:4 -o bert-pruned/

Patterns by layer: --pattern 'encoder.*=2:4' --pattern 8:16; a layer's full name counts before any glob, then the first
glob that matches; the pattern without a glob is that of all other layers.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("prune", help="prune a model, save dense weights with zeros", epilog=_EXAMPLE)
    models.add_model(parser)
    choices.add_pattern(parser, True)
    parser.add_argument("--method", default="magnitude", help="magnitude (default), wanda, fast, balanced, ...")
    models.add_pruning(parser)
    parser.add_argument(
        "--blocks", action="store_true", help="prune block by block, each seeing the pruned ones before"
    )
    parser.add_argument(
        "--tune", type=whole(), default=0, metavar="STEPS", help="with --blocks: tune each block so long"
    )
    parser.add_argument("--distill", type=whole(), default=0, metavar="STEPS", help="then tune the whole model so long")
    parser.add_argument("--learning-rate", type=number, metavar="RATE", help="of tuning (default 3e-4)")
    parser.add_argument(
        "--held-out",
        type=number,
        metavar="SHARE",
        help="of the batches, to judge by (default 0.1, without --blocks or --distill only for best)",
    )
    parser.add_argument("--seed", type=whole(), default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        type=output_folder,
        help="keep finished work there; a second call goes on from it",
    )
    parser.add_argument("--masks", metavar="FILE", help="use these masks (safetensors, by layer name; nonzero = kept)")
    parser.add_argument("--save-masks", metavar="FILE", type=output_file(), help="write the masks (safetensors, bool)")
    parser.add_argument(
        "--report",
        metavar="FILE",
        action="append",
        type=output_file(".json", ".csv", ".html"),
        help="write the report: .json, .csv or .html (may be repeated)",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        type=output_path,
        help="safetensors file to write, or FOLDER/ for a Hugging Face model",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from safetensors.torch import save_file

    from sparsecomp.models.layers import find_layers, require_layers
    from sparsecomp.planning.selection import choose_weights
    from sparsecomp.pruning.model import check_masks

    given = choices.read_patterns(arguments.pattern)
    choices.check_method(arguments.method, arguments.calibration)
    settings = _check(arguments)
    masks = _load_masks(arguments.masks)
    model = models.load_model(arguments.model, arguments.weights, arguments.auto_class)
    pruned.check_output(arguments.output, model, arguments.model)
    pattern = choices.plain(choices.without_auto(given, model))
    found = require_layers(find_layers(model, arguments.only, arguments.skip))
    chosen, _ = choose_weights(found, pattern)
    check_masks(masks, chosen, found)
    choices.check_finite(found, list(chosen))
    with hub.without_cache(model):
        dense = copy.deepcopy(model) if arguments.distill else None
        report = _prune(arguments, settings, model, dense, pattern, masks)
    # prune_blocks leaves heads alone, so the note is on what was pruned
    done = {name: layer.pattern for name, layer in report.layers.items()}
    choices.say(choices.router_note(model, done))
    choices.say(choices.head_note(model, done, arguments.method, arguments.calibration is not None))
    # the work first: a report that cannot be written or printed must not cost it
    patterns = {name: chosen[name].weights for name in done}
    size = pruned.save(model, arguments.output, patterns, arguments.model)
    if arguments.save_masks:
        with whole_file(Path(arguments.save_masks)) as partial:
            save_file({name: mask.contiguous() for name, mask in report.masks.items()}, partial)
    for path in map(Path, arguments.report or []):
        with telling(path):
            report.save(path)
    print(report)
    print(f"wrote {arguments.output} ({size / 1e6:.1f} MB of dense weights)")
    return 0


def _check(arguments: argparse.Namespace) -> Tuning:
    """Refuse, before any work, options that do not go together; what tuning has beside its steps."""
    from sparsecomp.pruning import Tuning

    if arguments.tune and not arguments.blocks:
        raise UsageError("--tune tunes block after block and needs --blocks; to tune the whole model use --distill")
    if arguments.batch_item is not None and arguments.calibration is None:
        raise UsageError("--batch-item is the part of a calibration batch; give --calibration as well")
    if arguments.learning_rate is not None and not (arguments.tune or arguments.distill):
        raise UsageError("--learning-rate is that of --tune and --distill; add one of them or leave it out")
    needs = [name for name in ("blocks", "distill", "held_out") if getattr(arguments, name)]
    if needs and arguments.calibration is None:
        flag = needs[0].replace("_", "-")
        raise UsageError(f"--{flag} needs batches; name a factory: --calibration module:function")
    given = {"learning_rate": arguments.learning_rate, "held_out": arguments.held_out}
    try:
        base = Tuning(seed=arguments.seed, **{key: value for key, value in given.items() if value is not None})
        for steps in filter(None, (arguments.tune, arguments.distill)):
            dataclasses.replace(base, steps=steps)
    except SparsecompError as error:
        raise UsageError(str(error)) from error
    return base


def _prune(
    arguments: argparse.Namespace,
    settings: Tuning,
    model: nn.Module,
    dense: nn.Module | None,
    pattern: str | Mapping[str, str],
    masks: dict[str, Tensor] | None,
) -> PruneReport:
    import sparsecomp as sc
    from sparsecomp.pruning import distill, prune_blocks

    shared: dict[str, Any] = {
        "only": arguments.only,
        "skip": arguments.skip,
        "masks": masks,
        "checkpoint": arguments.checkpoint,
        "seed": arguments.seed,
    }
    train, held_out = _batches(arguments, settings)
    if arguments.blocks:
        tuning = dataclasses.replace(settings, steps=arguments.tune) if arguments.tune else None
        report = prune_blocks(model, train, pattern, arguments.method, tuning=tuning, held_out=held_out, **shared)
    else:
        known, unseen = (
            sc.calibrate(model, batches, only=arguments.only, skip=arguments.skip) if batches else None
            for batches in (train, held_out)
        )
        example = train[0] if train else None
        report = sc.prune(model, pattern, arguments.method, known, held_out=unseen, example=example, **shared)
    counted = {"batches": len(train) or None, "held_out_batches": len(held_out) or None}
    report = report.with_command(arguments.command, data=arguments.calibration, **counted)
    if dense is None:
        return report
    settings = dataclasses.replace(settings, steps=arguments.distill)
    tuned = distill(model, dense, train, held_out=held_out, masks=report.masks, output=_whole_output, tuning=settings)
    return dataclasses.replace(report, tunings=(*report.tunings, tuned))


def _batches(arguments: argparse.Namespace, settings: Tuning) -> tuple[list[Any], list[Any]]:
    """The batches to learn from, and those to judge by where something asks for them."""
    from sparsecomp.models.batches import split

    if arguments.calibration is None:
        return [], []
    batches = list(models.load_batches(arguments.calibration, arguments.batch_item))
    if not batches:
        raise CalibrationError(f'"{arguments.calibration}" gave no batches; it must give at least one')
    judged = arguments.blocks or arguments.distill or arguments.held_out is not None
    if not judged and (arguments.method != "best" or len(batches) == 1):
        return batches, []
    every, train, held_out = split(batches, None, settings.held_out)
    return [every[i] for i in train], [every[i] for i in held_out]


def _whole_output(result: Any, batch: Any) -> Tensor:
    """What the model returns: the tensor, the logits, or the last hidden states."""
    from torch import Tensor

    for value in (result, getattr(result, "logits", None), getattr(result, "last_hidden_state", None)):
        if isinstance(value, Tensor):
            return value
    if isinstance(result, tuple | list) and result and isinstance(result[0], Tensor):
        return result[0]
    raise ModelError(
        f"--distill cannot tell what a {type(result).__name__} holds; use sparsecomp.distill(..., output=...)"
    )


def _load_masks(path: str | None) -> dict[str, Tensor] | None:
    from safetensors.torch import load_file

    if path is None:
        return None
    try:
        return {name: mask != 0 for name, mask in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise FormatError(f'masks "{path}" cannot be read as safetensors: {" ".join(str(error).split())}') from error
