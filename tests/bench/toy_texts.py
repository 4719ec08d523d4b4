"""Made-up texts of words by number, and a tiny encoder for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor, nn

from bench.finetune.data import Part

WORDS, WIDTH = 50, 16


class Tiny(nn.Module):
    """An encoder with the names and outputs of a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.inner(self.word_embeddings(input_ids)).relu())


def made_up(count: int, seed: int) -> Part:
    """Texts of words by number; label 1 where more of them lie in the upper half."""
    chance = random.Random(seed)
    texts = [[chance.randrange(1, WORDS) for _ in range(chance.randrange(1, 12))] for _ in range(count)]
    labels = tuple(int(sum(word > WORDS // 2 for word in text) * 2 > len(text)) for text in texts)
    return Part(tuple(" ".join(map(str, text)) for text in texts), labels)


def encode(texts: Sequence[str], longest: int) -> list[list[int]]:
    return [[int(word) for word in text.split()][:longest] for text in texts]
