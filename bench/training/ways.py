"""The ways a model can make a training step: torch's dense products, those of the faster library, sparse kernels."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn.eager.dense import dense_product, onednn
from sparsecomp.nn.training import SparseTrainingLinear
from sparsecomp.training import sparsify

DENSE, LIBRARY, SPARSE, Y_ONLY, UNMASKED = "torch", "library", "2:4@t", "2:4", "no masks"


class Stack(nn.Module):
    """A transformer of ``depth`` blocks without embeddings: [texts, tokens, width] to the same."""

    def __init__(self, depth: int, width: int) -> None:
        """Of random weights."""
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """The last hidden state."""
        y: Tensor = self.blocks(x)
        return y


class Block(nn.Module):
    """Attention and an MLP of four times the width, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        """Of random weights."""
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The next hidden state."""
        row = self.before(x)
        heads = [
            each(row).unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*heads)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(functional.gelu(self.up(self.between(x))))
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        x_grad = dense_product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return x_grad, dense_product(grad.t(), x.t()), grad.sum(0)


class LibraryLinear(nn.Linear):
    """nn.Linear whose three products are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out]."""
        y: Tensor = _Product.apply(input.reshape(-1, self.in_features), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y.view(*input.shape[:-1], self.out_features)


@lru_cache(maxsize=16)
def mask_of(out: int, columns: int, pattern: str) -> Tensor:
    """A mask bool [out, columns] in the pattern, of random weights."""
    return prune_weight(torch.randn(out, columns), pattern, method="magnitude").mask


def masked(layer: nn.Linear, pattern: str = SPARSE) -> Tensor:
    """The mask that now lies on the layer."""
    mask = mask_of(layer.out_features, layer.in_features, pattern)
    with torch.no_grad():
        layer.weight.mul_(mask)
    return mask


def use_library(model: nn.Module) -> None:
    """Have linear layers multiply by oneDNN."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = LibraryLinear


def ways(layer: nn.Linear) -> dict[str, nn.Linear]:
    """Copies of ``layer``, masked by "2:4@t" or, for the last, by "2:4", which run one of the ways each."""
    found = {way: copy.deepcopy(layer) for way in (DENSE, LIBRARY, SPARSE, Y_ONLY)}
    if onednn() is None:
        del found[LIBRARY]
    for way, each in found.items():
        pattern = Y_ONLY if way == Y_ONLY else SPARSE
        mask = masked(each, pattern)
        if way == LIBRARY:
            use_library(each)
        elif way in (SPARSE, Y_ONLY):
            SparseTrainingLinear.take(each, mask, pattern)
    return found


class Training:
    """A copy of a model with AdamW and, but for UNMASKED, the masks that ``sparsify`` keeps."""

    def __init__(self, model: nn.Module, way: str) -> None:
        """Of a way."""
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        if way != UNMASKED:
            for each in self.model.modules():
                if isinstance(each, nn.Linear):
                    masked(each)
            self.handle = sparsify(
                self.model, SPARSE, self.optimizer, steps=10**6, start="zeros", kernels=way == SPARSE
            )
        if way == LIBRARY:
            use_library(self.model)

    def step(self, x: Tensor) -> None:
        """Forward, backward and the optimizer's step."""
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()


def trainings(model: nn.Module) -> dict[str, Training]:
    """A training for each way."""
    kinds = (DENSE, LIBRARY, SPARSE, UNMASKED) if onednn() is not None else (DENSE, SPARSE, UNMASKED)
    return {way: Training(model, way) for way in kinds}
