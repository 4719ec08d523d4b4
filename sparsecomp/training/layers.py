"""A layer whose weight is trained under a mask: what the model computes with, and what is learned behind it.

Takes a LinearRef and a pattern. Knows no optimizer and no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsecomp.models.layers import LinearRef
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import FLOAT, Numbers
from sparsecomp.patterns.positions import cut_positions, pad_positions

Deploy = Callable[["TrainedLayer", Tensor], Tensor]


@dataclass(eq=False)
class TrainedLayer:
    """One layer under training. All tensors have the shape in which the module stores its weight.

    ``parameter`` is the module's own and always holds what the model would be deployed with: kept weights, zeros
    elsewhere. ``dense``, where a rule lets dropped weights go on learning or weights are rounded, holds all that is
    learned; the optimizer steps on it, in the place of the parameter. ``state`` has the tensors of the rule, by name;
    they are saved and resumed. ``changed`` counts the entries of the mask that the last choice changed.
    """

    name: str
    ref: LinearRef
    pattern: Pattern
    mask: Tensor
    parameter: nn.Parameter
    dense: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    changed: int = 0
    # dropped weights keep their value, whatever momentum and weight decay would make of them
    holds_dropped: bool = False
    # dropped weights become zero for good, also where the learned ones are held beside the parameter
    forgets_dropped: bool = False
    # in what numbers weights are deployed, and what makes those of the kept weights, where they are not their own
    numbers: Numbers = FLOAT
    rounding: Deploy | None = None
    # torch's count of writes to the parameter when it was last shown
    shown: int = -1

    @property
    def weight(self) -> Tensor:
        """The weight that is learned: the dense one where there is one, else the parameter, detached."""
        return self.parameter.detach() if self.dense is None else self.dense

    def matrix(self, stored: Tensor) -> Tensor:
        """A tensor of the parameter's shape as a matrix [out, in], the way patterns see it."""
        return self.ref.to_matrix(stored)

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the parameter's shape."""
        return self.ref.from_matrix(matrix)

    def grouped(self, stored: Tensor) -> Tensor:
        """``matrix`` with zeros where a group of the pattern would cross from one kernel position to the next."""
        return pad_positions(self.matrix(stored), self.ref.channels, self.pattern)

    def ungrouped(self, matrix: Tensor) -> Tensor:
        """The way back of ``grouped``, contiguous."""
        whole = cut_positions(matrix, self.ref.channels, self.pattern, self.ref.shape[1])
        return self.stored(whole).contiguous()

    def set_mask(self, mask: Tensor) -> None:
        """Another mask, as stored; what it changes is counted. The parameter follows with ``deploy``."""
        self.changed = int((mask != self.mask).sum())
        self.mask = mask

    def keep_dense(self) -> None:
        """Let dropped weights go on learning from now on."""
        if self.dense is None:
            self.dense = self.parameter.detach().clone()

    def follow(self) -> None:
        """Take mask, dense weight and state to where the parameter has gone."""
        device = self.parameter.device
        if self.mask.device == device:
            return
        self.mask = self.mask.to(device)
        self.dense = None if self.dense is None else self.dense.to(device)
        self.state = {key: value.to(device) for key, value in self.state.items()}

    def absorb(self) -> None:
        """Learn what others than the optimizer wrote into kept weights, as load_state_dict does, or into zeros.

        Where the model computes with rounded numbers, rows that are still what was shown stand for the learned ones.
        """
        if self.dense is None:
            return
        written = self.mask | (self.parameter != 0)
        if self.rounding is not None:
            if self.parameter._version == self.shown:
                return
            other = self.parameter != self.rounding(self, torch.where(self.mask, self.dense, 0.0))
            # a row has one scale, so that it is taken as a whole
            rows = self.matrix(other).any(dim=1, keepdim=True).expand(self.ref.shape)
            written &= self.stored(rows)
        self.dense.copy_(torch.where(written, self.parameter, self.dense))

    def expose(self) -> None:
        """Put the learned weight into the parameter, for the optimizer to step on."""
        if self.dense is not None:
            self.absorb()
            self.parameter.copy_(self.dense)

    def deploy(self) -> None:
        """Put what the model computes with into the parameter; what the optimizer made of it is kept first."""
        if self.dense is not None:
            learned = torch.where(self.mask, self.parameter, self.dense) if self.holds_dropped else self.parameter
            self.dense.copy_(learned)
        self.show()

    def show(self) -> None:
        """Put what the model computes with into the parameter."""
        kept = torch.where(self.mask, self.weight, 0.0)
        if self.dense is not None and self.forgets_dropped:
            self.dense.copy_(kept)
        self.parameter.copy_(kept if self.rounding is None else self.rounding(self, kept))
        self.shown = self.parameter._version

    def unround(self) -> None:
        """Put the learned numbers of kept weights into the parameter, and round them no more."""
        self.rounding = None
        self.show()

    @property
    def density(self) -> float:
        """The share of weights kept; 0.0 for an empty weight."""
        return int(self.mask.sum()) / max(self.mask.numel(), 1)
