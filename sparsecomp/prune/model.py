"""Prune the linear layers of a model in place: all of them or, if one fails, none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from sparsecomp.calibration import LayerStatistics
from sparsecomp.display import progress
from sparsecomp.errors import CalibrationError, SparsecompError
from sparsecomp.layers import Globs, LayerTable, check_globs, find_linears, require_layers
from sparsecomp.patterns import Pattern, parse
from sparsecomp.prune.registry import Method, get_method
from sparsecomp.prune.report import LayerReport, PruneReport
from sparsecomp.prune.weight import PrunedWeight, prune_weight


def prune(
    model: nn.Module,
    pattern: str | Pattern | Mapping[str, str | Pattern],
    method: str = "magnitude",
    calibration: Mapping[str, LayerStatistics] | None = None,
    only: Globs = None,
    skip: Globs = None,
    show_progress: bool = True,
) -> PruneReport:
    """Prune every linear layer of ``model`` to ``pattern``, in place; print the report to see what happened.

    ``pattern`` is one pattern or a mapping from globs on layer names to patterns: the first match wins, and layers
    that none matches stay dense and are named in the report. ``only`` and ``skip`` are globs as in ``find_linears``.
    Parameters keep their identity, dtype and requires_grad; nothing is written before every layer has been solved.

    Raises what ``prune_weight`` raises, with the layer's name; CalibrationError naming the layers whose statistics are
    missing when the method needs them; ModelError if no layer can be sparse or a glob matches none.
    """
    chosen = get_method(method)
    found = require_layers(find_linears(model, only, skip))
    patterns, skipped = _patterns(found, pattern)
    grams = calibration or {}
    _check_calibration(chosen, list(patterns), calibration)
    solved: dict[str, PrunedWeight] = {}
    layers: dict[str, LayerReport] = {}
    names = list(patterns)
    for name in progress(names, f"pruning ({method})", len(names)) if show_progress else names:
        begin = time.perf_counter()
        gram = grams[name].gram if name in grams else None
        try:
            pruned = prune_weight(found[name].get_weight(), patterns[name], method, gram)
        except SparsecompError as error:
            raise type(error)(f"{name or 'the model'}: {error}") from error
        seconds = time.perf_counter() - begin
        solved[name] = pruned
        layers[name] = LayerReport(
            name, found[name].shape, pruned.pattern, method, pruned.density, pruned.error, pruned.measured_on, seconds
        )
    for name, pruned in solved.items():
        found[name].set_weight(pruned.weight)
    return PruneReport(method, layers, skipped)


def _patterns(
    found: LayerTable, pattern: str | Pattern | Mapping[str, str | Pattern]
) -> tuple[dict[str, Pattern], dict[str, str]]:
    skipped = dict(found.skipped)
    if not isinstance(pattern, Mapping):
        one = parse(pattern)
        return dict.fromkeys(found, one), skipped
    check_globs(pattern, [*found, *found.skipped], "pattern for")
    parsed = {glob: parse(each) for glob, each in pattern.items()}
    patterns: dict[str, Pattern] = {}
    for name, layer in found.items():
        reached = (name, *layer.aliases)
        glob = next((glob for glob in parsed if any(fnmatchcase(each, glob) for each in reached)), None)
        if glob is None:
            skipped[name] = "no pattern was given for it"
        else:
            patterns[name] = parsed[glob]
    return patterns, skipped


def _check_calibration(method: Method, names: list[str], calibration: Mapping[str, LayerStatistics] | None) -> None:
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
            f"({listed}); calibrate with batches that reach them, or exclude them with skip=[...]"
        )
