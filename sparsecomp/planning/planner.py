"""Which layers of a model go sparse, in which pattern, and why: measured on this machine, no weight touched.

Takes a model and candidate patterns, gives a Plan. Prunes nothing in the model, packs nothing, swaps nothing.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsecomp.backends import registry
from sparsecomp.backends.choice import Choice
from sparsecomp.engines.peers import Peers
from sparsecomp.errors import ModelError, PatternError, naming
from sparsecomp.machine.bound import Bound, known_bounds
from sparsecomp.machine.device import Device, detect
from sparsecomp.machine.request import Request
from sparsecomp.machine.timings import SPARSE, UNPACKED, Measurement, lookup
from sparsecomp.models.batches import eager
from sparsecomp.models.calibration import Calibration, LayerStatistics, require_statistics
from sparsecomp.models.layers import Globs, LayerTable, LinearRef, find_linears, require_layers
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.check import breach
from sparsecomp.patterns.numbers import FLOAT_DTYPES, parse_weights
from sparsecomp.planning import measure as measuring
from sparsecomp.planning.plan import LayerPlan, Plan
from sparsecomp.planning.rounding import MOST_ROUNDING, Borne, borne, require_most
from sparsecomp.planning.selection import choose_weights, too_narrow
from sparsecomp.planning.summary import taken_seconds
from sparsecomp.reporting.terminal import progress

if TYPE_CHECKING:
    from sparsecomp.methods.weight import PrunedWeight

# one pattern, candidates of which the fastest is taken, or what each layer gets by its name or a glob on names
Patterns = str | Pattern | Sequence[str | Pattern] | Mapping[str, str | Pattern]

__all__ = ["LayerPlan", "Patterns", "Plan", "plan"]

# a ratio this close to 1 is within what two measurements of the same code differ by
NOISE = 0.97
# a layer that is slower than this, dense being 1, stays dense
TOLERATED = 0.98
# ratios around TOLERATED that noise alone may have put on their side of it are measured again, for longer
_DOUBTFUL = (0.96, 1.0)
_LONGER = 0.16


@dataclass(frozen=True)
class _Trial:
    """One pattern in its numbers tried on one shape, with the fastest backend.

    ``rounding`` is the error that these numbers make in one layer, where a calibration tells, and ``why`` says why it
    has not those that were asked for.
    """

    choice: Choice
    dense: Mapping[int, float]
    sparse: Mapping[int, float]
    bound: Mapping[int, Bound]
    mean: float
    refusal: str | None
    others: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    rounding: float | None = None
    why: tuple[str, ...] = ()
    ways: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def plan(
    model: nn.Module,
    pattern: Patterns = "2:4",
    *,
    device: str = "auto",
    batch: int | Sequence[int] = (1, 128),
    only: Globs = None,
    skip: Globs = None,
    calibration: Calibration | None = None,
    max_error: float | None = None,
    min_speedup: float = 1.0,
    measure: bool = True,
    quantize: str | None = None,
    activations: str | None = None,
    max_rounding: float = MOST_ROUNDING,
    engines: bool = False,
) -> Plan:
    """Decide layer by layer what this machine can turn into speed. No weight is touched.

    ``pattern`` is one pattern, "auto" (the machine's natural group at density 1/2), or several candidates of which the
    fastest whose error stays within ``max_error`` is taken. A mapping from names and globs on names to patterns is read
    as ``prune`` reads it: a layer's own name wins, then the first glob that matches, and layers that none matches stay
    dense and are named in ``skipped``. The error is that of plain pruning, whatever method prunes later: Wanda's on the
    Gram matrices of ``calibration`` if given, else magnitude's on the weight. ``batch`` counts rows (tokens) of x, of
    a 1x1 convolution B*Hout*Wout; it is measured as a linear layer, without what a copy of its input takes.
    ``device`` is "auto" (where the model is), "cpu" or "cuda". Layers whose weight the model read during calibration,
    beside calling the layer, stay dense: packed they would keep a dense copy, and those reads would gain nothing.

    Patterns may name numbers, as "8:16+int8@a8" does; ``quantize="int8", activations="int8"`` says the same of all. A
    layer whose output rounding to integers would move by more than ``max_rounding``, relative to the output in floats
    on the inputs that ``calibration`` saw, steps back to int8 weights alone and then to floats; of dense groups
    ("16:16+int8@a8") it stays dense. The reason tells. The error is that of the weight as it is where it fits the
    pattern already, else of a plain pruning. Without a calibration inputs count as normal, so that no outlier is seen.

    Dense is the fastest product of the dense weight that this process can call: torch in the layer's dtype, and on a
    CPU, for a layer of less than float32, torch in float32 with x and y converted in the call, which is what
    ``model.float()`` would give. The plan names which it was at each batch. ``engines=True`` measures the other dense
    engines of this machine beside it, ONNX Runtime, OpenVINO and torch's int8, each in a process of its own; that takes
    seconds for each shape, and their times decide nothing.
    A layer goes sparse if at no batch it is slower than 0.98 of dense, and if the geometric mean of its speedups
    exceeds ``min_speedup``; otherwise it stays dense, and the plan holds both times. Nothing is promised of batches
    that are not named. Where several backends run it, as on a GPU, each is measured, and the layer gets the fastest;
    those that round activations are left out. With ``measure=False`` the bound stands in for the measured speedup, and
    the reason says so.

    Raises PatternError for a pattern that cannot be packed, ModelError for a model without linear layers, for batches
    that are no sizes, a ``max_rounding`` below 0 and for engines on a GPU, BackendError for a device that is not there.
    """
    batches = _batches(batch)
    require_most(max_rounding)
    require_statistics("calibration", calibration)
    read = calibration.read if isinstance(calibration, Calibration) else ()
    found = require_layers(find_linears(eager(model), only, skip))
    where = detect(str(next(iter(found.values())).device) if device == "auto" else device)
    if engines and where.kind != "cpu":
        raise ModelError(
            f"engines=True measures dense engines of the CPU, and the plan is for {where.place}; leave it out"
        )
    named, skipped = _by_layer(found, pattern, where, (quantize, activations))
    tried: dict[tuple[Choice, tuple[int, int], torch.dtype], _Trial | str] = {}
    layers = []
    for name, candidates in progress(list(named.items()), "measuring layers"):
        ref = found[name]
        if name in read:
            layers.append(LayerPlan(name, ref.shape, None, _READ, None, {}, {}, {}))
            continue
        trials: list[_Trial] = []
        refusals: list[str] = []
        known = calibration[name] if calibration is not None and name in calibration else None
        for each in candidates:
            before: list[str] = []
            for way in _bearable(name, ref, each, known, max_rounding):
                if way.choice is None:
                    refusals += way.refused
                    break
                key = (way.choice, ref.shape, ref.dtype)
                if key not in tried:
                    tried[key] = _try(way.choice, ref, where, batches, min_speedup, measure)
                trial = tried[key]
                if isinstance(trial, str):
                    refusals.append(trial)
                    before.append(trial)
                    continue
                why = (*before, *way.refused)
                trials.append(replace(trial, rounding=None if known is None else way.error, why=why))
                if trial.refusal is None:
                    break
                before.append(trial.refusal)
        gram = None if known is None else known.gram
        layers.append(_decide(name, ref, trials, refusals, gram, max_error, measure))
    weights = sum(each.numel() for each in model.parameters() if not isinstance(each, nn.UninitializedParameter))
    beside, absent = _beside(layers, found, where, batches) if engines else ({}, {})
    decided = tuple(replace(layer, engines=beside.get(layer.name, {})) for layer in layers)
    return Plan(where, batches, decided, skipped, weights, absent)


_READ = "the model reads its weight beside calling it; packed, it would hold a dense copy for that as well"


def _beside(
    layers: Sequence[LayerPlan], found: LayerTable, device: Device, batches: tuple[int, ...]
) -> tuple[dict[str, dict[str, dict[int, float]]], dict[str, str]]:
    """Seconds of the other engines by layer, engine and batch, and the reason for each engine that gave none."""
    alike: dict[tuple[tuple[int, int], torch.dtype, int], list[str]] = {}
    for layer in layers:
        if layer.tried is not None:
            dtype = found[layer.name].dtype
            request = Request(layer.tried.pattern, layer.shape, dtype, device.place, batches[0], layer.tried.numbers)
            copies, _ = measuring.rotation(request, device)
            alike.setdefault((layer.shape, dtype, copies), []).append(layer.name)
    beside: dict[str, dict[str, dict[int, float]]] = {}
    with Peers(device) as peers:
        for (shape, dtype, copies), names in progress(list(alike.items()), "measuring other engines"):
            beside |= dict.fromkeys(names, peers.seconds(shape, dtype, batches, copies))
        return beside, peers.missing


def _by_layer(
    found: LayerTable, pattern: Patterns, device: Device, stored: tuple[str | None, str | None]
) -> tuple[dict[str, list[Choice]], dict[str, str]]:
    """The candidates of each layer, and the reason for each layer that has none."""
    if not isinstance(pattern, Mapping):
        every, skipped = _candidates(pattern, device, stored), dict(found.skipped)
        named: dict[str, list[Choice]] = {}
        for name, ref in found.items():
            why = [too_narrow(ref, each.pattern) for each in every]
            named[name] = [each for each, reason in zip(every, why, strict=True) if reason is None]
            if not named[name]:
                del named[name]
                skipped[name] = str(why[0])
        return named, skipped

    known = {glob: device.natural_pattern() if each == "auto" else each for glob, each in pattern.items()}
    for each in known.values():
        _candidates(each, device, stored)
    chosen, skipped = choose_weights(found, known, *stored)
    if not chosen:
        raise PatternError("the patterns by layer give no layer one; name at least one layer or glob in them")
    return {name: [each] for name, each in chosen.items()}, skipped


def _batches(batch: int | Sequence[int]) -> tuple[int, ...]:
    batches = tuple(batch) if isinstance(batch, Iterable) else (batch,)
    if not batches or not all(isinstance(size, int) and size >= 1 for size in batches):
        raise ModelError(f"batch={batch!r} names no batch sizes; use one or more numbers of rows, each at least 1")
    return tuple(sorted({int(size) for size in batches}))  # True is 1, and becomes it


def _bearable(name: str, ref: LinearRef, asked: Choice, known: LayerStatistics | None, most: float) -> Iterator[Borne]:
    """How the layer can be stored; of a weight that does not fit its pattern yet, by a plain pruning of it."""
    if not asked.numbers.has_scales or ref.dtype not in FLOAT_DTYPES or ref.get_weight().is_meta:
        yield Borne(asked, 0.0)
        return
    with naming(name):
        weight = ref.get_weight()
        if breach(weight != 0, asked.pattern) is not None:
            weight = _plainly_pruned(ref, asked.pattern, None if known is None else known.gram).weight
        yield from borne(weight, asked, known, most)


def _candidates(
    pattern: str | Pattern | Sequence[str | Pattern], device: Device, stored: tuple[str | None, str | None]
) -> list[Choice]:
    single = isinstance(pattern, str) or not isinstance(pattern, Sequence)
    names: Sequence[str | Pattern] = [pattern] if single else pattern  # type: ignore[list-item,assignment]
    natural = (device.natural_pattern() if name == "auto" else name for name in names)
    choices = [Choice(*parse_weights(each, *stored)) for each in natural]
    if not choices:
        raise PatternError('no pattern was given; use one such as "2:4", a list of them, or "auto"')
    for each in choices:
        if each.pattern.mask_only:
            raise PatternError(
                f'"{each.pattern}" is a mask-only pattern that no kernel runs; choose N:M or block patterns'
            )
    return choices


def _try(
    asked: Choice, ref: LinearRef, device: Device, batches: tuple[int, ...], min_speedup: float, measure: bool
) -> _Trial | str:
    """One pattern in its numbers on one shape: its times and whether it is fast enough, or why it cannot run at all."""
    facts = asked.pattern, ref.shape, ref.dtype, device.place
    requests = {size: Request(*facts, size, asked.numbers) for size in batches}
    if 0 in ref.shape:
        return "the layer has no weights"
    first = requests[batches[0]]
    names = registry.sparse_backends(first)
    if not names:
        if ref.dtype not in FLOAT_DTYPES:
            dtype = str(ref.dtype).removeprefix("torch.")
            return f"{dtype} has no sparse kernel; convert the model to float32 or bfloat16"
        return f"no sparse kernel for {asked.weights} here ({registry.why_no_kernel(first)})"
    if not measure:
        bounds = known_bounds(requests, device, dict.fromkeys(batches, True))
        if len(bounds) < len(batches):
            return "the bound is unknown: measuring the peaks of the device needs more memory than is free"
        mean = statistics.geometric_mean([each.value for each in bounds.values()])
        refusal = None if mean > min_speedup else f"even the bound is only {mean:.2f}x"
        return _Trial(replace(asked, backend=names[0]), {}, {}, bounds, mean, refusal)
    trials: list[_Trial] = []
    failures: list[str] = []
    for name in names:
        try:
            trials.append(_measured(name, asked, requests, device, min_speedup))
        except Exception as error:
            # what cannot be measured on this machine is no candidate; with one backend the error is the caller's
            if len(names) == 1 or not registry.of_a_library(error):
                raise
            failures.append(f"{name} could not be measured: {registry.first_line(error)}")
    if not trials:
        return "; ".join(failures)
    for failure in failures:
        warnings.warn(f"{asked.weights}: {failure}; the layer is planned without it", stacklevel=2)
    best = max(trials, key=lambda trial: (trial.refusal is None, trial.mean))
    return replace(best, others={str(trial.choice.backend): trial.sparse for trial in trials if trial is not best})


def _measured(name: str, asked: Choice, requests: Mapping[int, Request], device: Device, min_speedup: float) -> _Trial:
    """The times of one backend. Raises what its library raises if it cannot prepare a weight."""
    new = [size for size, request in requests.items() if lookup(request, name, device) is None]
    measured = {size: measuring.measure(request, backend=name) for size, request in requests.items()}
    above = _dense_above(measured)
    for size in new:
        ratio = measured[size].dense / taken_seconds(measured[size], size, above)
        if _DOUBTFUL[0] <= ratio < _DOUBTFUL[1]:
            measured[size] = measuring.measure(requests[size], backend=name, again=True, budget=_LONGER)
    above = _dense_above(measured)
    bounds = known_bounds(requests, device, {size: not value.cold for size, value in measured.items()})
    dense = {size: value.dense for size, value in measured.items()}
    ways: dict[str, dict[int, float]] = {}
    for size, value in measured.items():
        for way, seconds in value.dense_ways(requests[size].dtype).items():
            ways.setdefault(way, {})[size] = seconds
    sparse = {size: taken_seconds(value, size, above) for size, value in measured.items()}
    ratios = {size: dense[size] / sparse[size] for size in measured}
    mean = statistics.geometric_mean(ratios.values())
    worst = min(ratios, key=lambda size: ratios[size])
    refusal = None
    if ratios[worst] < TOLERATED:
        own, fastest = next(iter(ways)), min(ways, key=lambda way: ways[way].get(worst, math.inf))
        how = "" if fastest == own else f" in {fastest}, to be had with model.float()"
        refusal = f"dense is faster at batch {worst}{how}: {asked.weights} reaches {ratios[worst]:.2f}x"
    elif mean <= min_speedup:
        refusal = f"{asked.weights} reaches {mean:.2f}x in the mean, not above {min_speedup:g}x"
    choice = replace(asked, backend=name, dense_above=above)
    return _Trial(choice, dense, sparse, bounds, mean, refusal, ways=ways)


def _dense_above(measured: Mapping[int, Measurement]) -> int | None:
    """The smallest batch from which unpacking and a dense product was faster at every measured batch, or None."""
    above = None
    for size in sorted(measured, reverse=True):
        seconds = measured[size].seconds
        if UNPACKED not in seconds or seconds[UNPACKED] > NOISE * seconds[SPARSE]:
            break
        above = size
    return above


def _decide(
    name: str,
    ref: LinearRef,
    trials: list[_Trial],
    refusals: list[str],
    gram: Tensor | None,
    max_error: float | None,
    measured: bool,
) -> LayerPlan:
    fast = sorted((trial for trial in trials if trial.refusal is None), key=lambda trial: -trial.mean)
    reasons = [*refusals, *(trial.refusal for trial in trials if trial.refusal is not None)]
    for trial in fast:
        error = None if max_error is None else _plainly_pruned(ref, trial.choice.pattern, gram).error
        if max_error is not None and error is not None and error > max_error:
            reasons.append(f"{trial.choice.pattern} has an error of {error:.3f}, above {max_error:g}")
            continue
        how = "in the mean" if measured else "at most, by its bound; not measured"
        told = "; ".join([*trial.why, f"{trial.mean:.2f}x {how}"])
        return _layer_plan(name, ref, trial, trial.choice, told, error)
    reasons += (reason for trial in trials for reason in trial.why)
    reason = "; ".join(dict.fromkeys(reasons))
    if not trials:
        return LayerPlan(name, ref.shape, None, reason, None, {}, {}, {})
    best = max(trials, key=lambda trial: trial.mean)
    return _layer_plan(name, ref, best, None, reason, None)


def _layer_plan(
    name: str, ref: LinearRef, trial: _Trial, choice: Choice | None, reason: str, error: float | None
) -> LayerPlan:
    times = trial.dense, trial.sparse, trial.bound
    rounding = trial.rounding if trial.choice.numbers.has_scales else None
    kept = trial.others, rounding, trial.ways
    return LayerPlan(name, ref.shape, choice, reason, trial.choice, *times, error, *kept)


def _plainly_pruned(ref: LinearRef, pattern: Pattern, gram: Tensor | None) -> PrunedWeight:
    from sparsecomp.methods.weight import prune_weight

    return prune_weight(ref.get_weight(), pattern, "magnitude" if gram is None else "wanda", gram)
