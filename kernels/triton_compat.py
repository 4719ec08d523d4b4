"""What differs between the versions of Triton that run the kernels; for Gluon's names see ``gluon_compat``."""

from __future__ import annotations

import re

import triton

WARPGROUPS = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2]) >= (3, 7)
"""Whether ``tl.dot`` may become wgmma on sm_90, as it does from 64 rows of the left operand on.

Triton 3.6 cannot compile a right operand that was computed and transposed, and leaves out the fence between writing a
block of weights to shared memory and wgmma reading it. Tiles of 32 rows are multiplied by mma.sync.
"""
