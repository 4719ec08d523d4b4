"""What is trained and how: a small MLP and a small convolutional net, SGD or Adam, a warm-up and a cosine.

Takes data and settings, gives a trained net and its accuracy. Knows nothing of sparsity: a run hands in what is to
happen to the optimizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.lottery.data import Data, Part

BATCH = 256
_WARM_UP = 0.05
_MOMENTUM, _WEIGHT_DECAY = 0.9, 5e-4
CLASSES = 10


@dataclass(frozen=True)
class Recipe:
    """The net ("mlp" or "conv"), the optimizer ("sgd" or "adam"), the peak of its learning rate, and how long."""

    net: str
    optimizer: str
    rate: float
    epochs: int

    def steps(self, part: Part) -> int:
        """Optimizer steps of the whole training; what does not fill a batch waits for the next epoch's order."""
        return self.epochs * max(1, len(part) // BATCH)


@dataclass(frozen=True)
class Trained:
    """Accuracy, in [0, 1], and seconds of the processor in training."""

    validation: float
    test: float
    seconds: float


def made(net: str, seed: int, pixels: int = 28) -> nn.Module:
    """A net with weights drawn by the seed, for images of ``pixels`` x ``pixels``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if net == "mlp":
            return nn.Sequential(
                nn.Flatten(),
                *(nn.Linear(pixels * pixels, 300), nn.ReLU()),
                *(nn.Linear(300, 100), nn.ReLU()),
                nn.Linear(100, CLASSES),
            )
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(32 * math.ceil(pixels / 4) ** 2, 64), nn.ReLU()),
            nn.Linear(64, CLASSES),
        )


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum and decay, or Adam without decay."""
    parameters = list(model.parameters())
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.rate, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY, fused=True)
    return torch.optim.Adam(parameters, lr=recipe.rate, fused=True)


def rate_at(step: int, steps: int) -> float:
    """The share of the peak rate at a step of 0 to steps - 1: linear up, then half a cosine down."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    seed: int,
    attach: Callable[[torch.optim.Optimizer, int], Any] | None = None,
    first: int = 0,
) -> Trained:
    """Train in place from step ``first`` on; ``attach(optimizer, steps)`` is called before it.

    The seed makes the order of images, which is the same at a step whatever the first step is. The accuracy is that of
    the weights after the last step.
    """
    steps = recipe.steps(data.train)
    optimizer = optimizer_of(model, recipe)
    if attach is not None:
        attach(optimizer, steps - first)
    each_epoch = steps // recipe.epochs
    begin = time.process_time()
    model.train()
    order: Tensor | None = None
    for step in range(first, steps):
        if order is None or step % each_epoch == 0:
            generator = torch.Generator(device="cpu").manual_seed(seed * 1000 + step // each_epoch)
            order = torch.randperm(len(data.train), generator=generator, device="cpu")
        place = step % each_epoch * BATCH
        rows = order[place : place + BATCH]
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate_at(step, steps)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data.train.images[rows]), data.train.labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    seconds = time.process_time() - begin
    return Trained(accuracy(model, data.validation), accuracy(model, data.test), round(seconds, 1))


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """The share of images whose class is right; the model is put into eval mode."""
    model.eval()
    right = 0
    for start in range(0, len(part), 1000):
        rows = slice(start, start + 1000)
        right += int((model(part.images[rows]).argmax(dim=1) == part.labels[rows]).sum())
    return right / max(len(part), 1)
