"""Layers to test with, and their slow twin: the dense weight with its zeros, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import SparseLinear
from sparsecomp.packing.format import pack

PATTERNS = ["2:4", "8:16", "1:4", "4:8", "16:16", "1:2", "2:4@v4", "4:2:8", "block4x4:0.5"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make(
    out: int = 24,
    columns: int = 40,
    pattern: str = "2:4",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    backend: str | None = None,
) -> SparseLinear:
    weight = prune_weight(torch.randn(out, columns), pattern).weight.to(dtype)
    return SparseLinear.from_packed(pack(weight, pattern), torch.randn(out) if bias else None, backend=backend)


def expected(layer: SparseLinear, x: Tensor) -> Tensor:
    """The slow twin: the dense weight with its zeros, in float64."""
    y = x.double() @ layer.packed().unpack().double().T
    return y if layer.bias is None else y + layer.bias.detach().double()


def assert_right(layer: SparseLinear, x: Tensor) -> None:
    want = expected(layer, x)
    with torch.no_grad():
        got = layer(x)
    assert got.dtype == layer.dtype and got.shape == want.shape
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[layer.dtype] * scale)
