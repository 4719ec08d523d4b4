"""Sparse training layers to test with, and their slow twin: F.linear under autograd in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn.training import SparseTrainingLinear


def layer(
    out: int = 24,
    columns: int = 36,
    pattern: str = "2:4@t",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> SparseTrainingLinear:
    linear = nn.Linear(columns, out, bias=bias)
    found = prune_weight(linear.weight.detach(), pattern, method="magnitude")
    with torch.no_grad():
        linear.weight.copy_(found.weight)
    return SparseTrainingLinear.take(linear.to(dtype), found.mask, pattern)


def assert_as_dense(sparse: nn.Module, x: Tensor, tolerance: float = 1e-4) -> None:
    """y and every gradient are those of F.linear in float64."""
    assert isinstance(sparse, SparseTrainingLinear)
    weight = sparse.weight.detach().double().requires_grad_(sparse.weight.requires_grad)
    bias = None if sparse.bias is None else sparse.bias.detach().double().requires_grad_(sparse.bias.requires_grad)
    given, twin = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    y, want = sparse(given), functional.linear(twin, weight, bias)
    assert y.shape == want.shape and y.dtype == x.dtype
    grad = torch.randn_like(y)
    for parameter in sparse.parameters():
        parameter.grad = None
    y.backward(grad)
    want.backward(grad.double())
    pairs = [(y, want), (given.grad, twin.grad), (sparse.weight.grad, weight.grad)]
    if sparse.bias is not None and bias is not None:
        pairs.append((sparse.bias.grad, bias.grad))
    for got, expected in pairs:
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * scale)
