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
        together = {layer.name: units(layer, scores[layer.name]) for layer in layers}
        return largest_units(layers, together, next(iter(density.values())))
    masks = {}
    for layer in layers:
        pattern = pattern_at(layer.pattern, density[layer.name])
        if pattern is None:
            masks[layer.name] = torch.ones_like(layer.mask)
        else:
            masks[layer.name] = layer.ungrouped(project(layer.grouped(scores[layer.name]), pattern))
    return masks


def choose_signed(
    layers: Sequence[TrainedLayer], saliency: Mapping[str, Tensor], density: Mapping[str, float], scope: Scope
) -> dict[str, Tensor]:
    """As ``choose`` for saliencies of any sign, finite: one for each weight as stored, or for each block [grid].

    Where a pattern keeps or drops weights together that have a saliency each, these are summed.
    """
    shaped = {
        each.name: saliency[each.name] if isinstance(each.pattern, Block) else each.grouped(saliency[each.name])
        for each in layers
        if scope == "global" or isinstance(each.pattern, Block)
    }
    if scope == "global":
        return largest_units(layers, shaped, next(iter(density.values())))
    masks: dict[str, Tensor] = {}
    for layer in layers:
        here = density[layer.name]
        if layer.name in shaped:
            masks |= largest_units([layer], shaped, here)
        elif here >= 1.0:
            masks[layer.name] = torch.ones_like(layer.mask)
        else:
            masks |= choose([layer], {layer.name: from_saliency(saliency[layer.name])}, density, scope)
    return masks


def units(layer: TrainedLayer, stored: Tensor) -> Tensor:
    """Squares of a layer's scores, as stored, summed over what is kept or dropped together: float64, any shape."""
    return unit_sums(layer, stored.double().square())


def unit_sums(layer: TrainedLayer, stored: Tensor) -> Tensor:
    """Numbers of a layer, as stored, summed over each block [grid]; the matrix of them for other patterns."""
    matrix = layer.grouped(stored)
    pattern = layer.pattern
    if not isinstance(pattern, Block):
        return matrix
    out, columns = matrix.shape
    down, across = pattern.grid(out, columns)
    missing = (0, across * pattern.cols - columns, 0, down * pattern.rows - out)
    return functional.pad(matrix, missing).view(down, pattern.rows, across, pattern.cols).sum(dim=(1, 3))


def from_units(layer: TrainedLayer, kept: Tensor) -> Tensor:
    """The mask, as stored, that keeps these units."""
    pattern = layer.pattern
    if isinstance(pattern, Block):
        out, columns = layer.grouped(layer.mask).shape
        kept = kept.repeat_interleave(pattern.rows, dim=0).repeat_interleave(pattern.cols, dim=1)[:out, :columns]
    return layer.ungrouped(kept)


def largest_units(layers: Sequence[TrainedLayer], saliency: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """The masks of the ceil(density * units) units of largest saliency in all layers together.

    ``saliency`` is by layer name, in the shape of ``unit_sums``, finite and of any sign. Each layer first gets the
    least share of its units.
    """
    if density >= 1.0:
        return {layer.name: torch.ones_like(layer.mask) for layer in layers}
    flat = {layer.name: saliency[layer.name].flatten() for layer in layers}
    together = torch.cat(list(flat.values()))
    lengths = [len(values) for values in flat.values()]
    kept = largest_of(together, math.ceil(density * len(together) - 1e-9))
    least = [math.ceil(min(LEAST_DENSITY, density) * length - 1e-9) for length in lengths]
    parts = torch.split(kept, lengths)
    if any(int(part.count_nonzero()) < share for part, share in zip(parts, least, strict=True)):
        count = int(kept.count_nonzero())
        shares = zip(flat.values(), least, strict=True)
        kept = torch.cat([largest_of(values, share) for values, share in shares])
        kept |= largest_of(together.masked_fill(kept, -torch.inf), max(count - int(kept.count_nonzero()), 0))
        parts = torch.split(kept, lengths)
    return {
        layer.name: from_units(layer, part.view(saliency[layer.name].shape))
        for layer, part in zip(layers, parts, strict=True)
    }


def largest_of(values: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest of these numbers [n]; which of equal ones is left open."""
    kept = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    kept[values.topk(count, sorted=False).indices] = True
    return kept
