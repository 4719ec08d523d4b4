"""A model of two layers, batches for it, and the checks that every loop is put through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.patterns.check import check_mask, check_weight

IN, HIDDEN, OUT = 16, 24, 8


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT))


def batches(count: int, seed: int = 1, rows: int = 12) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(rows, IN, generator=draw), torch.randn(rows, OUT, generator=draw)


def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(network(x).float(), y)


def obeys(handle: sc.SparseTraining) -> None:
    """Masks and weights fit, and what is dropped is zero."""
    for name, pattern in handle.patterns.items():
        weight = handle.model.get_submodule(name).weight.detach()
        check_mask(handle.masks[name], pattern)
        check_weight(weight, pattern)
        assert not bool(weight[~handle.masks[name]].any())
        assert bool(torch.isfinite(weight).all())


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, its = a.state_dict(), b.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


def made(
    method: str = "fixed", steps: int = 8, **options: Any
) -> tuple[nn.Sequential, torch.optim.Optimizer, sc.SparseTraining]:
    """The model in training to 2:4, under AdamW."""
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    return network, optimizer, sc.sparsify(network, "2:4", optimizer, method, steps=steps, **options)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> None:
    for batch in batches(count, seed):
        optimizer.zero_grad()
        loss_of(network, batch).backward()
        optimizer.step()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a state, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for part in parts for tensor in tensors(part)]
