"""The one place where kernels that tests execute on the CPU meet a GPU: a launch on torch's current stream."""

from __future__ import annotations

from typing import Any

import torch


def launch(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], grid: tuple[int, ...], warps: int
) -> None:
    """Run a Triton or Gluon kernel on the device of its first argument."""
    with torch.cuda.device(arguments[0].get_device()):
        kernel[grid](*arguments, **constants, num_warps=warps)
