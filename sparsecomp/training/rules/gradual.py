"""Weights that are dropped on a schedule and never come back: what such rules share, and the rule of magnitude."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsecomp.errors import MethodError
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, Rule, rule
from sparsecomp.training.schedule import Schedule
from sparsecomp.training.survivors import next_change, survivors


class Dropping(Rule):
    """A rule that keeps fewer weights each time the schedule asks for it, chosen among those it still keeps.

    A dropped weight is zero and does not learn. The default schedule is cubic: a tenth of the steps is dense, in the
    last quarter masks stay, and between them masks change some 25 times.
    """

    # whether saliency comes of gradients, so that there is none before the first step
    learns: ClassVar[bool] = True

    @abstractmethod
    def saliency(self, progress: Progress, layer: TrainedLayer) -> Tensor:
        """What dropping each weight alone costs: as stored, finite, >= 0. What is dropped already may have any."""

    def leave(self, progress: Progress, layer: TrainedLayer, mask: Tensor) -> None:
        """Called before the layer gets this mask, which is within the one it has."""

    def default(self, steps: int) -> Schedule:
        """Cubic, with a warm-up, a cool-down, and a change each fortieth of the steps."""
        return Schedule("cubic", warm_up=steps // 10, cool_down=steps // 4, every=max(1, steps // 40))

    def begin(self, progress: Progress) -> None:
        """Drop at once what a constant schedule asks for at once.

        Raises MethodError where that is before there are gradients to choose by.
        """
        if progress.schedule.curve != "constant" or progress.schedule.warm_up:
            return
        if self.learns:
            raise MethodError(
                f'method "{self.name}" sees gradients before it drops weights, and a constant schedule without warm-up '
                "asks for the goal at once; give the schedule a warm_up of 1 or more steps, or another curve"
            )
        self._drop(progress, list(progress.layers))

    def update(self, progress: Progress) -> None:
        """Drop weights of the layers that are asked to keep fewer from this step on."""
        schedule, steps, step = progress.schedule, progress.steps, progress.step
        due = [each for each in progress.layers if next_change(schedule, steps, each, step) == step]
        if due:
            self._drop(progress, due)

    def _drop(self, progress: Progress, layers: list[TrainedLayer]) -> None:
        saliency = {each.name: self.saliency(progress, each) for each in layers}
        masks = survivors(layers, saliency, progress.densities(), progress.scope)
        for each in layers:
            self.leave(progress, each, masks[each.name])
            each.set_mask(masks[each.name])


@rule
@dataclass(frozen=True)
class Gradual(Dropping):
    """Drop the smallest weights, fewer being left each time (Zhu and Gupta 2017, arXiv:1710.01878).

    N:M goes from M:M to its goal one weight of each group at a time; unstructured and block patterns by their density.
    """

    name: ClassVar[str] = "gradual"
    learns: ClassVar[bool] = False

    def saliency(self, progress: Progress, layer: TrainedLayer) -> Tensor:
        """The square of each weight."""
        return layer.weight.double().square()
