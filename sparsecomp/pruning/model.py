"""Prune the linear layers and convolutions of a model in place, each on its own: all of them or, if one fails, none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsecomp.errors import CalibrationError, ModelError
from sparsecomp.methods.order import order_matters
from sparsecomp.methods.registry import Method, get_method
from sparsecomp.models.batches import eager
from sparsecomp.models.calibration import LayerStatistics, require_statistics
from sparsecomp.models.graph import Hidden, find_hidden
from sparsecomp.models.layers import Globs, LayerTable, find_layers, require_layers
from sparsecomp.modules.snapshot import outside_inference_mode
from sparsecomp.patterns import Pattern, rows_together
from sparsecomp.planning.plan import Plan
from sparsecomp.planning.selection import choose_patterns
from sparsecomp.pruning.checkpoint import Checkpoint
from sparsecomp.pruning.provenance import describe
from sparsecomp.pruning.refilled import warn_where_refilled
from sparsecomp.pruning.report import PruneReport
from sparsecomp.pruning.solve import Solved, make_jobs, solve, warn_of_thin

# the method that also permutes input channels
PERMUTING = "best"


def prune(
    model: nn.Module,
    pattern: str | Pattern | Mapping[str, str | Pattern] | Plan,
    method: str = "magnitude",
    calibration: Mapping[str, LayerStatistics] | None = None,
    only: Globs = None,
    skip: Globs = None,
    show_progress: bool = True,
    *,
    masks: Mapping[str, Tensor] | None = None,
    held_out: Mapping[str, LayerStatistics] | None = None,
    example: Any = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
) -> PruneReport:
    """Prune the linear layers and convolutions of ``model`` to ``pattern``, in place; print the report to see how.

    Of nn.Conv2d those of one group are pruned, as matrices [out, kh*kw*in] with the input channels of each kernel
    position side by side: groups run along input channels, none crosses from one position to the next, and masks are in
    this order. A convolution with fewer input channels than a group has columns stays dense.

    ``pattern`` is one pattern, a mapping from names and globs on names to patterns (a layer's own name wins over any
    glob, and the first glob that matches over later ones; layers that none matches stay dense and are named in the
    report), or a Plan, whose decisions are followed. Numbers in a name, as in "8:16+int8@a8", are for ``compile``: the
    weights that are written here are floats. ``only`` and ``skip`` are globs on layer names. ``masks`` (bool [out, in],
    of a convolution also [out, in, kh, kw], True = kept) by exact layer name replace the method's choice; the masks of
    all layers are in the report. ``held_out`` is the calibration on other batches: errors on it are reported, and
    "best" chooses by it. With ``method="best"`` and an ``example`` batch, hidden channels that the graph of the model
    lets move are permuted where the solved layer gets better; the model's function before pruning does not change by
    it.

    ``checkpoint`` is a folder in which finished layers are kept; a second call with equal input goes on from there.
    ``seed`` is that of torch's generator while methods run; the caller's generator is left as it was.
    Parameters keep their identity, dtype and requires_grad; nothing is written before every layer has been solved.

    Raises what ``prune_weight`` raises, with the layer's name; CalibrationError naming the layers whose statistics are
    missing when the method needs them; ModelError if no layer can be sparse, a glob matches none or only what a
    broader one before it gives another pattern, or a mask has no layer.
    """
    model = eager(model)
    # what is made in inference mode could not be trained on later
    with outside_inference_mode():
        chosen = get_method(method)
        found = require_layers(find_layers(model, only, skip))
        patterns, skipped = choose_patterns(found, pattern)
        check_calibration(chosen, list(patterns), calibration, held_out)
        given = check_masks(masks, patterns, found)
        hidden, unpermuted = permutable(model, example, method, found, patterns, given)
        jobs = make_jobs(found, patterns, method, calibration or {}, held_out or {}, given)
        solved = solve(jobs, hidden, Checkpoint(checkpoint), f"pruning ({method})", show_progress, seed)
        report = write(method, solved, skipped, unpermuted)
    warn_of_thin(report.layers.values())
    return replace(report, provenance=describe(model, skipped, seed=seed))


def write(
    method: str, solved: Mapping[str, Solved], skipped: dict[str, str], unpermuted: dict[str, str]
) -> PruneReport:
    """Write the solved layers into the model and report on them."""
    for each in solved.values():
        each.write()
    warn_where_refilled(each.layer.parameter for each in solved.values())
    layers = {name: each.report for name, each in solved.items()}
    return PruneReport(method, layers, skipped, {name: each.mask for name, each in solved.items()}, unpermuted)


def check_masks(
    masks: Mapping[str, Tensor] | None, patterns: Mapping[str, object], found: LayerTable
) -> dict[str, Tensor]:
    """The user's masks as matrices; ModelError for one whose layer is not pruned."""
    for name in masks or {}:
        if name not in patterns:
            why = found.skipped.get(name, "the model has no such layer" if name not in found else "it has no pattern")
            raise ModelError(f'a mask is given for "{name}", which is not pruned ({why}); take it out of masks')
    return {
        name: found[name].to_matrix(mask) if isinstance(mask, Tensor) and mask.ndim == 4 else mask
        for name, mask in (masks or {}).items()
    }


def permutable(
    model: nn.Module,
    example: Any,
    method: str,
    found: LayerTable,
    patterns: Mapping[str, Pattern],
    masks: Mapping[str, Tensor],
    no_example: str = "no example batch was given to follow the graph with; pass example=batch",
) -> tuple[Sequence[Hidden], dict[str, str]]:
    """The hidden channels to permute with this method, and for each other layer why its inputs stay in order."""
    if method != PERMUTING:
        return (), {}
    if example is None:
        return (), dict.fromkeys(patterns, no_example)
    hidden, reasons = find_hidden(model, example, found)
    kept = []
    for each in hidden:
        why = _why_not(each, patterns, masks)
        if why is None:
            kept.append(each)
        elif each.consumer in patterns:
            reasons[each.consumer] = why
    return kept, {name: reason for name, reason in reasons.items() if name in patterns}


def _why_not(hidden: Hidden, patterns: Mapping[str, Pattern], masks: Mapping[str, Tensor]) -> str | None:
    for name in (hidden.consumer, *hidden.producers):
        if name not in patterns:
            return f'"{name}" is not pruned and stays as it is'
        if name in masks:
            return f'the mask of "{name}" was given'
    pattern = patterns[hidden.consumer]
    if not order_matters(pattern):
        return f"{pattern} gains nothing from another order"
    for name in hidden.producers:
        if rows_together(patterns[name], 2) > 1:
            return f'rows of "{name}" share their masks in {patterns[name]}, and would have to stay in order'
    return None


def check_calibration(
    method: Method,
    names: list[str],
    calibration: Mapping[str, LayerStatistics] | None,
    held_out: Mapping[str, LayerStatistics] | None = None,
) -> None:
    """CalibrationError for what is no statistics by layer, and naming the layers that lack those the method needs."""
    for what, statistics in (("calibration", calibration), ("held_out", held_out)):
        require_statistics(what, statistics)
    if not method.needs_gram:
        return
    if calibration is None:
        raise CalibrationError(
            f'method "{method.name}" needs calibration data and got none; pass calibration=sc.calibrate(model, batches)'
        )
    missing = [name for name in names if name not in calibration]
    if missing:
        listed = ", ".join(name or "the model" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CalibrationError(
            f'method "{method.name}" needs calibration data for {len(missing)} of {len(names)} layers that have none '
            f"({listed}), as no batch called them; calibrate with batches that do, or exclude with skip=[...] what the "
            "model never calls, such as layers whose weight it reads"
        )
