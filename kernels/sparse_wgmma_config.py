"""Which tiles the experimental wgmma.sp kernel is compiled for. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

DEPTH = 128
"""Columns of a step: two rows of 128 bytes of x."""


@dataclass(frozen=True)
class WgmmaConfig:
    """A block of 128 ``groups`` threads computes 64 ``groups`` outputs of ``tokens`` tokens; ``stages`` steps of x.

    ``tokens`` is at least 32: a lane's registers of one step of the weight are laid over its accumulators.
    """

    groups: int
    tokens: int
    stages: int

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return 4 * self.groups

    @property
    def shared_bytes(self) -> int:
        """Bytes of x in shared memory."""
        return self.stages * self.tokens * DEPTH * 2

    def __str__(self) -> str:
        """Such as "128x256, 3 stages"."""
        return f"{64 * self.groups}x{self.tokens}, {self.stages} stages"


CONFIGS = (WgmmaConfig(2, 128, 4), WgmmaConfig(2, 256, 3), WgmmaConfig(1, 64, 4), WgmmaConfig(1, 32, 4))
"""Every configuration that may be chosen; the tests compile and execute each."""
