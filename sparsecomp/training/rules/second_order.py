"""Masks by the curvature of the loss: the empirical Fisher matrix, its diagonal or blocks of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecomp.errors import MethodError, PatternError
from sparsecomp.patterns import NM, VNM, Pattern
from sparsecomp.patterns.positions import group_columns
from sparsecomp.training.choice import Scope
from sparsecomp.training.fisher import Fisher, block_width, fold, from_blocks, to_blocks
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, rule
from sparsecomp.training.rules.gradual import Dropping
from sparsecomp.training.schedule import Schedule
from sparsecomp.training.survivors import next_change

# gradients that wait before they are added to a sum of outer products, which is read and written as a whole each time
_WAITING = 16


class _Collecting(Dropping):
    """Looks at the last ``gradients`` steps before each change of masks, and forgets them after it."""

    gradients: int

    def __post_init__(self) -> None:
        """Refuse a window without a gradient."""
        super().__post_init__()
        if self.gradients < 1:
            raise MethodError(f"gradients={self.gradients} sees none; give 1 or more steps before each change of masks")

    def default(self, steps: int) -> Schedule:
        """As for others, with a change each twentieth of the steps: each needs gradients of its own."""
        return Schedule("cubic", warm_up=steps // 10, cool_down=steps // 4, every=max(1, steps // 20))

    @abstractmethod
    def collect(self, layer: TrainedLayer, gradient: Tensor, count: int) -> None:
        """Take this dense gradient, as stored, into the layer's state; ``count`` were taken before."""

    def gradient(self, progress: Progress, layer: TrainedLayer, gradient: Tensor) -> Tensor:
        """Collect it if masks change soon; what is dropped does not learn."""
        step = progress.step + 1
        change = next_change(progress.schedule, progress.steps, layer, step)
        if change is not None and change - step < self.gradients:
            count = self.count(progress, layer)
            self.collect(layer, gradient, count)
            progress.extra[_counter(layer)] = count + 1
        return super().gradient(progress, layer, gradient)

    def leave(self, progress: Progress, layer: TrainedLayer, mask: Tensor) -> None:
        """Forget the gradients: they were those of other weights."""
        layer.state.clear()
        progress.extra.pop(_counter(layer), None)

    def count(self, progress: Progress, layer: TrainedLayer) -> int:
        """How many gradients are collected."""
        count = progress.extra.get(_counter(layer), 0)
        assert not isinstance(count, Tensor)
        return int(count)


def _counter(layer: TrainedLayer) -> str:
    return f"gradients of {layer.name}"


@rule
@dataclass(frozen=True)
class Obd(_Collecting):
    """Drop the weights of the smallest w^2 F / 2, F the diagonal empirical Fisher (LeCun et al. 1989).

    F is the mean of g^2 over the last ``gradients`` steps before each change of masks; ``state["fisher"]`` holds the
    sum, fp32. It costs what magnitude costs.

    Raises MethodError if ``gradients`` is below 1.
    """

    name: ClassVar[str] = "obd"
    gradients: int = 64

    def collect(self, layer: TrainedLayer, gradient: Tensor, count: int) -> None:
        """Add its square to the sum."""
        square = gradient.float().square()
        layer.state["fisher"] = layer.state["fisher"].add_(square) if count else square

    def saliency(self, progress: Progress, layer: TrainedLayer) -> Tensor:
        """w^2 F / 2; zero everywhere if the layer has had no gradient."""
        count = self.count(progress, layer)
        if not count:
            return torch.zeros_like(layer.weight)
        return layer.weight.double().square() * layer.state["fisher"].double() / (2 * count)


@rule
@dataclass(frozen=True)
class Obs(_Collecting):
    """Gradual second-order pruning with blocks of the empirical Fisher matrix (oBERT, Kurtic et al. 2022, 2203.07259).

    F of each ``block`` consecutive weights of a row is ``damp`` * mean(g^2) * I + the mean of g g^T over the last
    ``gradients`` steps before each change of masks, of the weights that are kept. A weight costs w^2 / (2 [F^-1]_ii);
    the unit of a block pattern costs the sum of its weights. When weights S of a block go, those left, K, become
    w_K + F_KK^-1 F_KS w_S. ``damp`` is relative to the mean over the layer, so that the scale of the loss does not
    matter. Blocks are made equal and no wider than ``block``, which must be a multiple of M for N:M.

    Memory: in the window before a change, a layer of n weights holds n * gradients floats, or n * (block + 16) if
    ``gradients`` exceeds ``block``. Between windows it holds none. A ``state_dict`` saves them as well.

    Without training it prunes in one shot, in as many recomputations of F as there are periods: an optimizer that
    moves nothing (``torch.optim.SGD(parameters, lr=0.0)``: no momentum, no decay), ``steps = recomputations *
    gradients`` and ``schedule=Schedule("exponential", every=gradients)``.

    Raises MethodError if ``gradients`` or ``block`` is below 1 or ``damp`` not above 0, and, at a change of masks, if
    ``damp`` is too small to invert F.
    """

    name: ClassVar[str] = "obs"
    gradients: int = 32
    block: int = 64
    damp: float = 0.01

    def __post_init__(self) -> None:
        """Refuse settings that make no matrix."""
        super().__post_init__()
        if self.block < 1:
            raise MethodError(f"block={self.block} holds no weight; give 1 or more, as 64")
        if not self.damp > 0.0:
            raise MethodError(f"damp={self.damp} leaves matrices singular; give a number above 0, as 0.01")

    def require(self, patterns: Mapping[str, Pattern], scope: Scope) -> None:
        """Raises PatternError for groups of N:M that would lie in two blocks."""
        for name, pattern in patterns.items():
            if isinstance(pattern, NM | VNM) and self.block % pattern.m:
                raise PatternError(
                    f'{name}: block={self.block} cuts groups of "{pattern}"; give a multiple of {pattern.m}'
                )

    def collect(self, layer: TrainedLayer, gradient: Tensor, count: int) -> None:
        """Keep it, or add its outer products to the sum with others that wait."""
        blocks = self._blocks(layer, gradient)
        room = self.gradients if self.gradients <= self.block else _WAITING
        if not count:
            layer.state["gradients"] = torch.zeros(room, *blocks.shape, dtype=torch.float32, device=blocks.device)
        waiting = layer.state["gradients"]
        place = count % room
        if count and not place:
            if "folded" not in layer.state:
                size = (*blocks.shape, blocks.shape[1])
                layer.state["folded"] = torch.zeros(size, dtype=torch.float32, device=blocks.device)
            fold(layer.state["folded"], waiting)
            waiting.zero_()
        waiting[place] = blocks

    def saliency(self, progress: Progress, layer: TrainedLayer) -> Tensor:
        """w^2 / (2 [F^-1]_ii); where the layer has had no gradient, nearly zero and by w^2."""
        weight = self._blocks(layer, layer.weight)
        return self._stored(layer, self._fisher(progress, layer).saliency(weight))

    def leave(self, progress: Progress, layer: TrainedLayer, mask: Tensor) -> None:
        """Have the weights that are left make up for those that go; forget the gradients."""
        weight = self._blocks(layer, layer.weight)
        left = self._fisher(progress, layer).without(weight, self._blocks(layer, mask))
        layer.weight.copy_(self._stored(layer, left))
        super().leave(progress, layer, mask)

    def _fisher(self, progress: Progress, layer: TrainedLayer) -> Fisher:
        kept = self._blocks(layer, layer.mask)
        waiting, folded = layer.state.get("gradients"), layer.state.get("folded")
        if waiting is None:
            waiting = torch.zeros(0, *kept.shape, dtype=torch.float32, device=kept.device)
        count = self.count(progress, layer)
        # of what was folded, zeros are left here
        return Fisher(waiting[:count], folded, count, kept, self.damp)

    def _blocks(self, layer: TrainedLayer, stored: Tensor) -> Tensor:
        matrix = layer.grouped(stored)
        return to_blocks(matrix, self._width(layer, matrix.shape[1]))

    def _stored(self, layer: TrainedLayer, blocks: Tensor) -> Tensor:
        out, columns = layer.grouped(layer.mask).shape
        return layer.ungrouped(from_blocks(blocks, out, columns))

    def _width(self, layer: TrainedLayer, columns: int) -> int:
        group = group_columns(layer.pattern)
        return block_width(columns, self.block, group if self.block % group == 0 else 1)
