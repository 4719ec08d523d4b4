"""Dense products of fp32 matrices by the faster of the two libraries that torch has for them.

Takes and gives tensors. Knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from sparsecomp.machine.device import detect

Product = Callable[[Tensor, Tensor], Tensor]


def dense_product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times the transpose of b [n, k]: [m, n], contiguous, of any strides; gradients are not recorded.

    By oneDNN in place of MKL for fp32 on AMD processors with AVX-512, where MKL keeps to AVX2 and half the speed.
    """
    if a.dtype == torch.float32 and a.numel() and b.numel() and torch.backends.mkldnn.enabled:
        product = onednn()
        if product is not None:
            return product(a, b)
    return a @ b.t()


@lru_cache(maxsize=1)
def onednn() -> Product | None:
    """oneDNN's a b^T where MKL holds this processor back and this torch has it, else None; asked once."""
    device = detect("cpu")
    if "AMD" not in device.name or not device.isa.startswith("avx512"):
        return None
    try:
        product = _product
        a, b = (torch.arange(count, dtype=torch.float32, device="cpu").view(-1, 3) for count in (6, 12))
        return product if torch.equal(product(a, b), a @ b.t()) else None
    except (AttributeError, RuntimeError, TypeError):  # another torch may lack it, or call it in another way
        return None


def _product(a: Tensor, b: Tensor) -> Tensor:
    # no activation, without its numbers and its kind
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return y
