"""Small models with repeated blocks: attention and gated MLPs written the way real models write them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Result(NamedTuple):
    hidden: Tensor
    logits: Tensor


class Block(nn.Module):
    """Self-attention with heads, then an MLP, gated or not; returns a tuple as many models do."""

    def __init__(self, width: int = 16, heads: int = 2, gated: bool = False, values: int | None = None) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.value_heads = values or heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, self.value_heads * self.size)
        self.v, self.o = nn.Linear(width, self.value_heads * self.size), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, 2 * width) if gated else None
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        batch, tokens, width = hidden.shape

        def split(x: Tensor, heads: int) -> Tensor:
            x = x.view(batch, tokens, heads, self.size).transpose(1, 2)
            return x if heads == self.heads else x.repeat_interleave(self.heads // heads, dim=1)

        q, k = split(self.q(hidden), self.heads), split(self.k(hidden), self.value_heads)
        v = split(self.v(hidden), self.value_heads)
        seen = None if mask is None else mask[:, None, None, :].bool()
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        hidden = self.first(hidden + self.o(mixed.transpose(1, 2).reshape(batch, tokens, width)))
        inner = self.up(hidden)
        inner = functional.gelu(inner) if self.gate is None else functional.silu(self.gate(hidden)) * inner
        return (self.second(hidden + self.down(inner)),)


class Encoder(nn.Module):
    """An embedding, blocks, and a head; takes ids and a mask by name."""

    def __init__(self, blocks: int = 2, width: int = 16, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width, **options) for _ in range(blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Result:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden, mask=attention_mask)[0]
        return Result(hidden, self.head(hidden))


def encoder(seed: int = 0, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(**options).eval()


def token_batches(count: int = 6, texts: int = 8, tokens: int = 10, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, 50, (texts, tokens), generator=generator)
        lengths = torch.randint(3, tokens + 1, (texts, 1), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()})
    return batches
