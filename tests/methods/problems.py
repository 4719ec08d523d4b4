"""Layers to prune, made up: correlated inputs and their Gram."""

import torch
from torch import Tensor


def layer_of(out: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """(weight [out, in], Gram [in, in]) of ``tokens`` (default 4 in) inputs whose channels are mixed."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(4 * columns if tokens is None else tokens, columns, generator=generator) @ mix
    return torch.randn(out, columns, generator=generator), x.T @ x
