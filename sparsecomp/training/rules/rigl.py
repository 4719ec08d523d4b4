"""RigL: sparse all along, a few small weights dropped now and then and others grown where the gradient is largest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import MethodError, PatternError
from sparsecomp.patterns import NM, VNM, Block, Pattern, Unstructured
from sparsecomp.training.choice import Scope, from_units, unit_sums
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, Rule, rule
from sparsecomp.training.schedule import Schedule

_GRADIENT = "gradient"
# what torch's optimizers remember of each weight's past gradients
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg")


@rule
@dataclass(frozen=True)
class RigL(Rule):
    """RigL (Evci et al. 2020, arXiv:1911.11134): drop by |w|, grow by |dense gradient|, keep as many.

    At each change a layer drops the share ``alpha`` of its kept weights, those of smallest |w|, and grows as many among
    all that are then dropped, those of largest |dL/dw| at that step. ``alpha`` falls to 0 along half a cosine until the
    last change. Grown weights begin at 0, and the optimizer's moments of them too. A weight that is dropped and grown
    again at once stays as it is.

    The count of each group never changes, and no group drops more than its own share, rounded up. A group is the M
    columns of N:M (rows that share a mask count as one, by sums), a row for "unstructured:D", and a whole layer for
    blocks and with ``scope="global"``. There the layers' densities are those of Erdos-Renyi-Kernel for the whole
    training: proportional to sum(dims) / product(dims) of the weight, at most 1. By default masks change every 100
    steps, or every tenth of a short training, until 75% of the steps.
    """

    name: ClassVar[str] = "rigl"
    starts_sparse: ClassVar[bool] = True
    alpha: float = 0.3

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        super().__post_init__()
        if not 0.0 < self.alpha <= 1.0:
            raise MethodError(f"alpha={self.alpha} is no share of weights to drop; give a number above 0, at most 1")

    def default(self, steps: int) -> Schedule:
        """Every 100 steps or tenth of the training, until 75% of it."""
        return Schedule("constant", cool_down=int(0.25 * steps), every=max(1, min(100, steps // 10)))

    def require(self, patterns: Mapping[str, Pattern], scope: Scope) -> None:
        """Raises PatternError for patterns in which one weight cannot change places with another of its group."""
        for name, pattern in patterns.items():
            if isinstance(pattern, VNM) or (isinstance(pattern, NM) and pattern.transposable):
                raise PatternError(
                    f'{name}: "rigl" drops and grows within groups, which "{pattern}" ties to one another; use N:M, '
                    'N:M@vR, blocks or unstructured, or the method "movement"'
                )

    def shares(self, layers: Sequence[TrainedLayer], scope: Scope) -> Mapping[str, float] | None:
        """Erdos-Renyi-Kernel densities for the global scope."""
        if scope == "layer" or not layers:
            return None
        return erdos_renyi({each.name: each.parameter.shape for each in layers}, layers[0].pattern.density)

    def begin(self, progress: Progress) -> None:
        """Raises MethodError for a schedule whose density changes."""
        if progress.schedule.curve != "constant":
            raise MethodError(
                f'"rigl" keeps as many weights all along, and a schedule "{progress.schedule.curve}" asks for fewer '
                'by and by; leave schedule out, or give Schedule("constant", ...)'
            )

    def gradient(self, progress: Progress, layer: TrainedLayer, gradient: Tensor) -> Tensor:
        """The masked gradient; the dense one is remembered where masks change after this step."""
        if self._share(progress, progress.step + 1) > 0.0:
            layer.state[_GRADIENT] = gradient.abs()
        return gradient.mul_(layer.mask)

    def update(self, progress: Progress) -> None:
        """Drop and grow."""
        share = self._share(progress, progress.step)
        for layer in progress.layers:
            gradient = layer.state.pop(_GRADIENT, None)
            if gradient is None:
                continue
            before = layer.mask
            kept = to_groups(layer, before, progress.scope) > 0
            real = to_groups(layer, torch.ones_like(before), progress.scope) > 0
            sizes = to_groups(layer, layer.weight.abs().float(), progress.scope)
            slopes = to_groups(layer, gradient.float(), progress.scope)
            layer.set_mask(from_groups(layer, exchanged(kept, real, sizes, slopes, share), progress.scope))
            _forget(progress.optimizer, layer, layer.mask & ~before)

    def _share(self, progress: Progress, step: int) -> float:
        """What to drop after this step, 0.0 where masks stay."""
        last = progress.schedule.last(progress.steps)
        if not progress.schedule.acts(step, progress.steps) or step >= last:
            return 0.0
        return self.alpha / 2.0 * (1.0 + math.cos(math.pi * step / last))


def erdos_renyi(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Densities by name, proportional to sum(dims) / product(dims), at most 1, that keep ``density`` of all entries."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / max(sizes[name], 1) for name, shape in shapes.items()}
    whole: set[str] = set()
    while len(whole) < len(shapes):
        room = density * sum(sizes.values()) - sum(sizes[name] for name in whole)
        scale = room / max(sum(raw[name] * sizes[name] for name in shapes if name not in whole), 1e-30)
        over = {name for name in shapes if name not in whole and scale * raw[name] >= 1.0}
        if not over:
            return {name: 1.0 if name in whole else scale * raw[name] for name in shapes}
        whole |= over
    return dict.fromkeys(shapes, 1.0)


def exchanged(kept: Tensor, real: Tensor, sizes: Tensor, slopes: Tensor, share: float) -> Tensor:
    """Masks [groups, units] after dropping the ``share`` of kept units of least size and growing those of most slope.

    Each group keeps its count and drops at most its own share, rounded up. Units that are not ``real`` are no units.
    """
    if not kept.numel():
        return kept
    most = (share * kept.sum(dim=1, keepdim=True)).ceil()
    may_go = kept & (_ranks(sizes.masked_fill(~kept, torch.inf), descending=False) < most)
    count = min(int(share * int(kept.sum())), int(may_go.sum()))
    going = sizes.masked_fill(~may_go, torch.inf).flatten().argsort(stable=True)[:count]
    left = kept.flatten().index_fill(0, going, False).view(kept.shape)
    missing = (kept & ~left).sum(dim=1, keepdim=True)
    candidates = slopes.masked_fill(left | ~real, -1.0)
    return left | (_ranks(candidates, descending=True) < missing)


def _ranks(values: Tensor, descending: bool) -> Tensor:
    """The place of each number in its row's order, ties to the lower column."""
    order = values.argsort(dim=1, descending=descending, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def to_groups(layer: TrainedLayer, stored: Tensor, scope: Scope) -> Tensor:
    """Numbers as stored, summed over each unit, in rows of the units that keep one count: [groups, units]."""
    pattern = layer.pattern
    sums = unit_sums(layer, stored.float())
    if isinstance(pattern, NM):
        rows, columns = sums.shape
        padded = functional.pad(sums, (0, -columns % pattern.m, 0, -rows % pattern.mask_rows))
        tiles = padded.view(padded.shape[0] // pattern.mask_rows, pattern.mask_rows, padded.shape[1])
        return tiles.sum(dim=1).view(-1, pattern.m)
    return sums if isinstance(pattern, Unstructured) and scope == "layer" else sums.reshape(1, -1)


def from_groups(layer: TrainedLayer, kept: Tensor, scope: Scope) -> Tensor:
    """The mask, as stored, that keeps these units: the way back of ``to_groups``."""
    pattern = layer.pattern
    rows, columns = layer.grouped(layer.mask).shape
    if isinstance(pattern, NM):
        tiles = kept.view(-(-rows // pattern.mask_rows), pattern.groups(columns) * pattern.m)
        return layer.ungrouped(tiles.repeat_interleave(pattern.mask_rows, dim=0)[:rows, :columns])
    shape = pattern.grid(rows, columns) if isinstance(pattern, Block) else (rows, columns)
    return from_units(layer, kept.view(shape))


def _forget(optimizer: torch.optim.Optimizer, layer: TrainedLayer, grown: Tensor) -> None:
    held = optimizer.state.get(layer.parameter, {})
    for name in _MOMENTS:
        if isinstance(held.get(name), Tensor):
            held[name].masked_fill_(grown, 0.0)
