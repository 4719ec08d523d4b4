"""Scores of all layers -> their masks: each layer by its own pattern, or all of them by one density.

Takes layers and scores, gives masks. Knows no rule and no step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import PatternError
from sparsecomp.patterns import Block, Pattern, Unstructured
from sparsecomp.patterns.project import project
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.schedule import pattern_at

Scope = Literal["layer", "global"]
# a global choice leaves each layer at least this share of its weights, so that none is cut through
LEAST_DENSITY = 0.005


def from_saliency(saliency: Tensor) -> Tensor:
    """Scores >= 0, float64, that rank as these saliencies of any sign do, also when they are summed over equal tiles.

    ``project`` sums the squares of scores where weights are judged together: these are square roots of the saliency
    above its least.
    """
    if saliency.numel() == 0:
        return saliency.double()
    wide = saliency.double()
    return (wide - wide.min()).sqrt()


def check_scope(scope: str, patterns: Mapping[str, Pattern]) -> None:
    """Raises PatternError for a scope that is none, and for patterns that have no density to share out."""
    if scope not in ("layer", "global"):
        raise PatternError(f'scope="{scope}" is not known; use "layer", or "global" for one density over all layers')
    if scope == "layer":
        return
    for name, pattern in patterns.items():
        if not isinstance(pattern, Unstructured | Block):
            raise PatternError(
                f'{name}: "{pattern}" keeps as many in every group, so that scope="global" has nothing to share out; '
                'use "unstructured:DENSITY" or "blockRxC:DENSITY", or scope="layer"'
            )
    if len(set(patterns.values())) > 1:
        names = ", ".join(sorted({str(each) for each in patterns.values()}))
        raise PatternError(f'scope="global" takes one pattern for all layers, got {names}; give one')


def choose(
    layers: Sequence[TrainedLayer], scores: Mapping[str, Tensor], density: Mapping[str, float], scope: Scope
) -> dict[str, Tensor]:
    """The masks, as stored, that keep the largest scores (>= 0, finite, as stored) at these densities by layer name."""
    if scope == "global":
        return _choose_together(layers, scores, next(iter(density.values())))
    masks = {}
    for layer in layers:
        pattern = pattern_at(layer.pattern, density[layer.name])
        if pattern is None:
            masks[layer.name] = torch.ones_like(layer.mask)
        else:
            masks[layer.name] = layer.ungrouped(project(layer.grouped(scores[layer.name]), pattern))
    return masks


def units(layer: TrainedLayer, stored: Tensor) -> Tensor:
    """Squares of a layer's scores, as stored, summed over what is kept or dropped together: float64, any shape."""
    squares = layer.grouped(stored).double().square()
    pattern = layer.pattern
    if not isinstance(pattern, Block):
        return squares
    out, columns = squares.shape
    down, across = pattern.grid(out, columns)
    missing = (0, across * pattern.cols - columns, 0, down * pattern.rows - out)
    return functional.pad(squares, missing).view(down, pattern.rows, across, pattern.cols).sum(dim=(1, 3))


def from_units(layer: TrainedLayer, kept: Tensor) -> Tensor:
    """The mask, as stored, that keeps these units."""
    pattern = layer.pattern
    if isinstance(pattern, Block):
        out, columns = layer.grouped(layer.mask).shape
        kept = kept.repeat_interleave(pattern.rows, dim=0).repeat_interleave(pattern.cols, dim=1)[:out, :columns]
    return layer.ungrouped(kept)


def _choose_together(layers: Sequence[TrainedLayer], scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """The ceil(density * units) largest units of all layers; each layer first gets its least share."""
    each = {layer.name: units(layer, scores[layer.name]) for layer in layers}
    if density >= 1.0:
        return {layer.name: torch.ones_like(layer.mask) for layer in layers}
    flat = {name: values.flatten() for name, values in each.items()}
    for name, values in flat.items():
        least = min(len(values), math.ceil(LEAST_DENSITY * len(values)))
        if least:
            flat[name] = values.index_fill(0, values.topk(least).indices, torch.inf)
    together = torch.cat(list(flat.values()))
    count = min(len(together), math.ceil(density * len(together) - 1e-9))
    kept = torch.zeros(len(together), dtype=torch.bool, device=together.device)
    kept[together.topk(count).indices] = True
    parts = torch.split(kept, [len(values) for values in flat.values()])
    return {
        layer.name: from_units(layer, part.view(each[layer.name].shape))
        for layer, part in zip(layers, parts, strict=True)
    }
