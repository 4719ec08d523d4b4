"""What differs between the versions of Triton that run the kernels; for Gluon's names see ``gluon_compat``."""

from __future__ import annotations

import re

import torch
import triton

WARPGROUPS = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2]) >= (3, 7)
"""Whether the kernels' ``tl.dot`` may become wgmma on sm_90, as it does from 64 rows of the left operand on.

Triton 3.6 cannot compile a right operand that was computed and transposed, and leaves out the fence between writing a
block of weights to shared memory and wgmma reading it.
"""

REGISTERS_SUFFICE = WARPGROUPS
"""Whether the largest tiles that decompress spill nothing, which they do with Triton 3.6."""


def narrow_tiles(capability: int) -> bool:
    """Whether tiles for sm_``capability`` must stay below 64 rows of x, for mma.sync to multiply them."""
    return capability >= 90 and not WARPGROUPS


def narrow_tiles_for(x: torch.Tensor) -> bool:
    """``narrow_tiles`` for the GPU that ``x`` is on."""
    if WARPGROUPS or not x.is_cuda:
        return False
    major, minor = torch.cuda.get_device_capability(x.device)
    return narrow_tiles(10 * major + minor)
