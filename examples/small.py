"""A small classifier and the data it learns, for the examples: gives a trained model and batches, needs no download.

The task is made up: 32 noisy measurements of one of ten shapes, which lie on curved surfaces. Training takes seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES, MEASURED, WIDTH, BLOCKS = 10, 32, 128, 3


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, WIDTH] to the same."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """[batch, MEASURED] to scores of each class [batch, CLASSES]."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.embed = nn.Linear(MEASURED, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores before softmax."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data(seed: int, rows: int = 2048) -> tuple[Tensor, Tensor]:
    """``rows`` inputs [rows, MEASURED] and their classes [rows]; another seed gives other rows of the same task."""
    task, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    first = torch.randn(CLASSES, 6, 24, generator=task)
    second = torch.randn(24, MEASURED, generator=task)
    classes = torch.randint(CLASSES, (rows,), generator=draw)
    place = 0.5 * torch.randn(rows, 1, 6, generator=draw)
    x = torch.sin(place @ first[classes]).squeeze(1) @ second
    return x + 0.3 * torch.randn(rows, MEASURED, generator=draw), classes


def trained(steps: int = 150) -> Classifier:
    """A model that has learned the task."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        x, classes = data(step, rows=512)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), classes).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def accuracy(model: nn.Module) -> float:
    """Share of 4096 unseen rows that the model puts into their class."""
    x, classes = data(seed=1_000_000, rows=4096)
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == classes).float().mean())
