"""A running Gram matrix: rows [tokens, in] -> X^T X [in, in], accurate however many times rows are added.

Beside it what rounding those rows to 8 bits would move, which no Gram tells: the step of a row hangs on its extremes.

Knows nothing of models and layers.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from sparsecomp.patterns.rounding import rounding_energy

_COLUMNS = 256
# rows in one product
ROWS = 2048


class GramSum:
    """A running X^T X of a fixed size in float32 pairs, or in float64, and the ``rounding_energy`` [in] of the rows.

    Only block rows up to the diagonal are computed. In float32 the block [i, j] below the diagonal holds the sum and
    the block [j, i] above it, transposed, what the rounding of that sum left over; diagonal blocks keep theirs apart.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """A sum of no rows; ``size`` is the number of input features."""
        self.total = torch.zeros(size, size, dtype=dtype, device=device)
        self.blocks = [(start, min(start + _COLUMNS, size)) for start in range(0, size, _COLUMNS)]
        self.diagonal = [self.total.new_zeros(end - start, end - start) for start, end in self.blocks]
        self.rounding = torch.zeros(size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add_rows(self, rows: Tensor) -> GramSum:
        """Add the product of rows [tokens, in]; autocast, if on, does not touch it."""
        with torch.autocast(rows.device.type, enabled=False):
            for chunk in torch.split(rows, ROWS):
                x = chunk.to(self.total.dtype)
                self.rounding += rounding_energy(chunk)
                for block, (start, end) in enumerate(self.blocks):
                    self._add(block, x[:, start:end].T @ x[:, :end])
        self.tokens += rows.shape[0]
        return self

    def add_sum(self, other: GramSum) -> None:
        """Add another sum of the same size."""
        for block in range(len(self.blocks)):
            self._add(block, other._panel(block))
        self.rounding += other.rounding
        self.tokens += other.tokens

    def _panel(self, block: int) -> Tensor:
        """Block row ``block`` up to its diagonal block, in float64."""
        start, end = self.blocks[block]
        panel = self.total[start:end, :end].double()
        if self.total.dtype == torch.float32:
            panel[:, :start] += self.total[:start, start:end].T
            panel[:, start:] += self.diagonal[block]
        return panel

    def _add(self, block: int, product: Tensor) -> None:
        start, end = self.blocks[block]
        high = self.total[start:end, :end]
        if self.total.dtype == torch.float64:
            high += product
            return
        exact = self._panel(block).add_(product)
        high.copy_(exact)
        rest = exact.sub_(high)
        self.total[:start, start:end] = rest[:, :start].T
        self.diagonal[block].copy_(rest[:, start:])

    def clone(self) -> GramSum:
        """An independent copy."""
        return copy.deepcopy(self)

    def finish(self) -> Tensor:
        """The symmetric matrix [in, in]; nothing can be added afterwards."""
        for start, end in self.blocks:
            self.total[:start, start:end] = self.total[start:end, :start].T
            corner = self.total[start:end, start:end]
            corner.copy_(corner.tril() + corner.tril(-1).T)
        self.diagonal = []
        return self.total
