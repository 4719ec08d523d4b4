"""Masks that only ever lose weights: what is left is judged by what dropping it costs, and nothing comes back.

Takes layers and saliencies, gives masks. Knows no rule and no optimizer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns import NM
from sparsecomp.training.choice import Scope, choose
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.schedule import Schedule, changes

# above zero, also as a square: the score of a weight that costs nothing and yet ranks above what is dropped already
_FREE = 1e-100


def next_change(schedule: Schedule, steps: int, layer: TrainedLayer, step: int) -> int | None:
    """The first step, ``step`` or later, after which the layer shall keep fewer weights; None if there is none."""
    found = changes(schedule, steps, layer.pattern)
    index = bisect_left(found, step)
    return found[index] if index < len(found) else None


def survivors(
    layers: Sequence[TrainedLayer], saliency: Mapping[str, Tensor], density: Mapping[str, float], scope: Scope
) -> dict[str, Tensor]:
    """The masks, as stored, that keep the most saliency (>= 0, finite, as stored) of what the layers keep now.

    ``density`` and ``scope`` are those of ``choose``. The saliency of a tile, block or shared column is the sum of that
    of its weights. Each mask is within that of now: where a pattern would rather bring a weight back, it keeps fewer.
    """
    scores = {each.name: _scores(each, saliency[each.name]) for each in layers}
    return {name: mask & _of(layers, name).mask for name, mask in choose(layers, scores, density, scope).items()}


def _of(layers: Sequence[TrainedLayer], name: str) -> TrainedLayer:
    return next(each for each in layers if each.name == name)


def _scores(layer: TrainedLayer, saliency: Tensor) -> Tensor:
    squares = torch.where(layer.mask, saliency.double().clamp_min(_FREE * _FREE), 0.0)
    if isinstance(layer.pattern, NM) and layer.pattern.transposable:
        # a tile may keep a dropped weight for the sake of two others: what is left counts more than any saliency
        grouped, kept = layer.grouped(squares), layer.grouped(layer.mask)
        squares = layer.ungrouped(grouped + kept * _sum_of_tile(grouped, layer.pattern.m))
    return squares.sqrt()


def _sum_of_tile(squares: Tensor, side: int) -> Tensor:
    """For each entry [out, in] the sum over its tile of ``side`` x ``side``."""
    out, columns = squares.shape
    padded = functional.pad(squares, (0, -columns % side, 0, -out % side))
    tiles = padded.view(padded.shape[0] // side, side, padded.shape[1] // side, side).sum(dim=(1, 3))
    return tiles.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)[:out, :columns]
