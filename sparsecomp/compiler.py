"""Wires plan -> solve -> pack -> swap. Takes a model and a Plan or pattern, gives it with SparseLinears in place.

Has no logic of its own: the plan decides, ``pruning`` solves weights, pack refuses those that do not fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from sparsecomp.backends.choice import Choice
from sparsecomp.errors import ModelError, naming
from sparsecomp.methods.registry import get_method
from sparsecomp.models.batches import eager
from sparsecomp.models.calibration import Calibration, LayerStatistics
from sparsecomp.models.convolutions import RUNS_DENSE
from sparsecomp.models.layers import Globs, LayerTable, LinearRef, find_linears, require_layers
from sparsecomp.modules.snapshot import outside_inference_mode
from sparsecomp.nn import SparseConv2d, SparseLinear
from sparsecomp.nn.linear import check_linear
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.check import check_weight
from sparsecomp.planning.planner import Patterns, Plan, plan
from sparsecomp.planning.rounding import MOST_ROUNDING, borne, require_most
from sparsecomp.planning.selection import choices_of, choose_weights, made_elsewhere
from sparsecomp.planning.summary import Summary, summarise
from sparsecomp.pruning.checkpoint import Checkpoint
from sparsecomp.pruning.model import check_calibration
from sparsecomp.pruning.report import LayerReport
from sparsecomp.pruning.solve import Solved, make_jobs, solve_each, warn_of_notes, warn_of_thin
from sparsecomp.reporting.terminal import counted, progress
from sparsecomp.swap import share_bias, swap

_PLAN = "_sparsecomp_plan"


def compile(
    model: nn.Module,
    plan_or_pattern: Plan | Patterns = "2:4",
    *,
    calibration: Calibration | None = None,
    method: str | None = None,
    only: Globs = None,
    skip: Globs = None,
    batch: int | Sequence[int] = (1, 128),
    where: Literal["faster", "everywhere"] = "faster",
    max_error: float | None = None,
    quantize: str | None = None,
    activations: str | None = None,
    max_rounding: float = MOST_ROUNDING,
) -> nn.Module:
    """Replace linear layers of ``model`` by packed SparseLinears, in place, and return the model.

    Convolutions of 1x1 without padding become SparseConv2d, with B*Hout*Wout rows; others stay as they are, pruned or
    not, and ``report(model)`` names them.

    With a Plan its decisions are followed; a UserWarning tells of one that another machine made. With a pattern a plan
    is made first (``batch`` and ``max_error`` as in ``plan``), and layers in which dense torch is faster stay dense,
    untouched; ``where="everywhere"`` packs every layer without measuring. A mapping from names and globs on names to
    patterns is read as ``prune`` reads it: layers that none matches stay dense. ``report(model)`` gives the plan,
    ``summary(model)`` the result. Where nothing was packed a UserWarning says so, with the reason.

    Weights must fit their pattern already (PatternError names the layer and group that do not, also for layers that
    turn out to stay dense, so that the answer does not depend on a measurement), unless ``method`` names a pruning
    method. It then prunes exactly as ``prune(model, ..., method, calibration)`` would, and a UserWarning tells what
    that would report: notes of the method, and layers with few calibration rows. For held-out statistics, an example
    batch, masks or a checkpoint call ``prune`` first and ``compile`` without a method.

    ``quantize="int8"`` stores the packed weights as integers, ``activations="int8"`` beside it rounds the inputs of
    these layers in the product; "8:16+int8@a8" says both, and "16:16+int8@a8" prunes nothing. A layer whose output
    rounding would move by more than ``max_rounding`` on the inputs of ``calibration`` steps back as ``plan`` tells:
    with ``where="everywhere"`` by the weight that is packed, and a UserWarning names these layers.

    Of a model that torch.compile wrapped, the layers of the eager model are replaced; it is compiled again when called.

    Raises the errors of ``plan`` and ``prune``, and ModelError for a plan of another model. The model is
    untouched if anything is raised.
    """
    require_most(max_rounding)
    given, model = model, eager(model)
    found = require_layers(find_linears(model, only, skip))
    if method is not None:  # before a plan is measured
        check_calibration(get_method(method), [], calibration)
    if isinstance(plan_or_pattern, Plan):
        if quantize is not None or activations is not None:
            raise ModelError("the plan has decided in what numbers layers are stored; give quantize= to sc.plan")
        decided: Plan | None = plan_or_pattern
        if (warning := made_elsewhere(plan_or_pattern)) is not None:
            warnings.warn(warning, stacklevel=2)
    elif where == "faster":
        decided = plan(
            model,
            plan_or_pattern,
            batch=batch,
            only=only,
            skip=skip,
            calibration=calibration,
            max_error=max_error,
            quantize=quantize,
            activations=activations,
            max_rounding=max_rounding,
        )
    elif where == "everywhere":
        decided = None
    else:
        raise ModelError(f'where="{where}" is not known; use "faster" or "everywhere"')
    choices = _choices(decided, plan_or_pattern, found, (quantize, activations))
    # what was planned is followed; without a plan each weight is asked what it bears
    rounding = _Rounding(calibration or {}, max_rounding if decided is None else None)
    if method is None and decided is not None and isinstance(plan_or_pattern, str | Pattern | Mapping):
        _check_dense(decided, found)
    for name, choice in choices.items():
        with naming(name):
            check_linear(found[name].as_linear(), choice.pattern)
    if method is None:
        made = {
            name: _packed(found[name], None, choice, rounding)
            for name, choice in progress(list(choices.items()), "packing")
        }
    else:
        made, reports = _pruned(found, choices, method, calibration, rounding)
        warn_of_thin(reports)
        warn_of_notes(reports)
    layers = {name: layer for name, layer in made.items() if layer is not None}
    swap(model, layers)
    if decided is not None:
        model.__dict__[_PLAN] = decided  # past a __setattr__ of the model's own, which might refuse it
    if not layers:
        warnings.warn(_nothing_packed(decided, found, rounding), stacklevel=2)
    elif rounding.told:
        warnings.warn(rounding.in_words(), stacklevel=2)
    return given


def _nothing_packed(decided: Plan | None, found: LayerTable, rounding: _Rounding) -> str:
    reasons = rounding.told if decided is None else {**decided.stayed_dense, **decided.skipped}
    why = next(iter(reasons.values()), "")
    report = "" if decided is None else ", and sparsecomp.compiler.report(model) holds every reason"
    return (
        f"compile packed 0 of {len(found)} layers{f', the first because {why}' if why else ''}; the model runs dense, "
        f"as before{report}"
    )


@dataclass
class _Rounding:
    """What weights bear that no plan has decided about; ``told`` collects by layer why some are stored otherwise."""

    statistics: Mapping[str, LayerStatistics]
    most: float | None
    told: dict[str, str] = field(default_factory=dict)

    def bears(self, name: str, weight: Tensor, asked: Choice) -> Choice | None:
        """How to store a weight [out, in] that fits its pattern; None where the layer is left as it is."""
        if self.most is None or not asked.numbers.has_scales:
            return asked
        way = next(borne(weight, asked, self.statistics.get(name), self.most))
        if way.refused:
            stored = "it stays dense" if way.choice is None else f"it is stored as {way.choice.weights}"
            self.told[name] = f"{' and '.join(way.refused)}, so {stored}"
        return way.choice

    def in_words(self) -> str:
        """A sentence on the layers that are stored otherwise than asked for."""
        name, why = next(iter(self.told.items()))
        first = f', the first of them "{name}"' if len(self.told) > 1 else f', "{name}"'
        return (
            f"{counted(len(self.told), 'layer')} did not bear the integers asked for{first}: {why}; raise max_rounding "
            "to store it so all the same"
        )


def report(model: nn.Module) -> Plan | None:
    """The plan that ``compile`` followed for this model, or None if it followed none."""
    found = getattr(model, _PLAN, None)
    return found if isinstance(found, Plan) else None


def summary(model: nn.Module, batch: Sequence[int] = (1, 32)) -> Summary:
    """Every sparse layer of ``model`` with bytes, kernel, measured times, speedup and bound at these batch sizes.

    Times come from the cache of measurements where they are known. Raises ModelError for a model without sparse layers.
    """
    model = eager(model)
    followed = report(model)
    if followed is not None:
        return summarise(model, batch, {**followed.stayed_dense, **followed.skipped})
    every = find_linears(model).skipped
    return summarise(model, batch, {name: reason for name, reason in every.items() if reason == RUNS_DENSE})


def _choices(
    decided: Plan | None, pattern: Plan | Patterns, found: LayerTable, stored: tuple[str | None, str | None]
) -> dict[str, Choice]:
    """How each layer to be packed is to run."""
    if decided is not None:
        return choices_of(decided, found)
    if isinstance(pattern, Plan) or (isinstance(pattern, Sequence) and not isinstance(pattern, str)):
        raise ModelError('where="everywhere" packs every layer in one pattern; give one, or use where="faster"')
    if "auto" in (pattern.values() if isinstance(pattern, Mapping) else (pattern,)):
        raise ModelError('where="everywhere" takes named patterns; pattern "auto" needs where="faster"')
    return choose_weights(found, pattern, *stored)[0]


def _check_dense(decided: Plan, found: LayerTable) -> None:
    """PatternError for a layer that was tried, stays dense and would not have fitted."""
    for layer in decided:
        if layer.choice is None and layer.tried is not None:
            with naming(layer.name):
                check_weight(found[layer.name].get_weight(), layer.tried.pattern)


def _pruned(
    found: LayerTable,
    choices: Mapping[str, Choice],
    method: str,
    calibration: Calibration | None,
    rounding: _Rounding,
) -> tuple[dict[str, SparseLinear | None], list[LayerReport]]:
    """Layers of what ``prune`` would write, and its reports; of dense results one lives at a time, none is written."""
    patterns = {name: choice.pattern for name, choice in choices.items()}
    reports: list[LayerReport] = []

    def pack(solved: Solved) -> SparseLinear | None:
        reports.append(solved.report)
        return _packed(solved.layer, solved.weight, choices[solved.layer.name], rounding)

    with outside_inference_mode():
        check_calibration(get_method(method), list(patterns), calibration)
        jobs = make_jobs(found, patterns, method, calibration or {}, {}, {})
        return solve_each(jobs, (), Checkpoint(None), f"pruning ({method}) and packing", pack), reports


def _packed(ref: LinearRef, weight: Tensor | None, asked: Choice, rounding: _Rounding) -> SparseLinear | None:
    with naming(ref.name), torch.no_grad():
        linear = ref.as_linear(weight)
        choice = rounding.bears(ref.name, linear.weight.detach(), asked)
        if choice is None:
            return None
        if isinstance(ref.module, nn.Conv2d):
            layer: SparseLinear = SparseConv2d.following(linear, choice)
            assert isinstance(layer, SparseConv2d)
            layer.read_as(ref.module)
        else:
            layer = SparseLinear.following(linear, choice)
    share_bias(linear, layer)
    return layer
