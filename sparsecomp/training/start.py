"""The masks a training starts from: made by any of the pruning methods, given, read off the zeros, or at random.

Takes layers and patterns, writes start weights and gives masks as stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsecomp.errors import MethodError, ModelError, naming
from sparsecomp.methods.registry import methods
from sparsecomp.models.calibration import LayerStatistics
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.check import check_mask
from sparsecomp.pruning.model import prune
from sparsecomp.training.choice import Scope, choose
from sparsecomp.training.layers import TrainedLayer

# beside the pruning methods: the masks that zeros make, and masks of no merit to compare with
ZEROS, RANDOM = "zeros", "random"
Start = str | Mapping[str, Tensor] | None


def start_masks(
    model: nn.Module,
    layers: Mapping[str, TrainedLayer],
    start: Start,
    calibration: Mapping[str, LayerStatistics] | None,
    scope: Scope,
    generator: torch.Generator,
    shares: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """The mask of each layer, as stored. A solver's repaired weights are written into the model.

    ``shares`` has the density of each layer, by name, where the rule shares out what the global scope asks for.

    Raises MethodError for a start that is none, ModelError and PatternError for masks that do not fit.
    """
    if start is None:
        start = "magnitude" if calibration is None else "fast"
    if not isinstance(start, str | Mapping):
        raise MethodError(f"start is a {type(start).__name__}; give a method's name, or masks (bool) by layer name")
    if not isinstance(start, str):
        return _given(layers, start, scope)
    if start == ZEROS:
        return _given(layers, {name: each.matrix(each.weight) != 0 for name, each in layers.items()}, scope)
    if start != RANDOM and start not in methods():
        raise MethodError(
            f'start="{start}" is not known; use a pruning method ({", ".join(methods())}), "{ZEROS}" for the zeros '
            f'that the weights have, "{RANDOM}", or masks by layer name'
        )
    if start == RANDOM or scope == "global":
        if start not in (RANDOM, "magnitude"):
            raise MethodError(f'start="{start}" chooses within each layer; with scope="global" use "magnitude"')
        scores = {name: _scores(each, start, generator) for name, each in layers.items()}
        if scope == "global" and shares is not None:
            return {n: choose([e], scores, {n: shares[n]}, scope)[n] for n, e in layers.items()}
        return choose(list(layers.values()), scores, {n: e.pattern.density for n, e in layers.items()}, scope)
    patterns: dict[str, str | Pattern] = {name: each.pattern for name, each in layers.items()}
    report = prune(model, patterns, start, calibration, only=list(layers), show_progress=False)
    return {name: each.stored(report.masks[name]).contiguous() for name, each in layers.items()}


def _scores(layer: TrainedLayer, start: str, generator: torch.Generator) -> Tensor:
    if start != RANDOM:
        return layer.weight.abs()
    return torch.rand(layer.weight.shape, generator=generator, device="cpu", dtype=torch.float32).to(
        layer.weight.device
    )


def _given(layers: Mapping[str, TrainedLayer], masks: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
    for name in masks:
        if name not in layers:
            raise ModelError(f'a mask is given for "{name}", which is not trained sparse; take it out of start')
    found = {}
    for name, layer in layers.items():
        if name not in masks:
            raise ModelError(f'start has no mask for "{name}"; give one, or leave the layer out with skip=')
        mask = masks[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ModelError(f'the mask of "{name}" is {got}; give a torch.bool tensor, True where a weight is kept')
        if tuple(mask.shape) != layer.ref.shape:
            raise ModelError(
                f'the mask of "{name}" has shape {tuple(mask.shape)}; its weight has {layer.ref.shape}, and the mask '
                "must too"
            )
        mask = mask.detach().to(layer.parameter.device)
        stored = layer.stored(mask).clone(memory_format=torch.contiguous_format)
        if scope == "layer":
            with naming(name):
                check_mask(layer.grouped(stored), layer.pattern)
        found[name] = stored
    return found
