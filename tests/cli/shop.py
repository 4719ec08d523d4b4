"""Factories that the command-line tests name: a small model, its batches and an example input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))


def batches() -> list[Tensor]:
    return [torch.randn(20, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def example() -> Tensor:
    return batches()[0][:2]


def broken() -> nn.Module:
    raise ValueError("the shop is closed")


def number() -> int:
    return 3
