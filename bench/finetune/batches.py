"""Texts as token ids, once, and batches of texts of like length, shuffled anew in every epoch.

Takes a part of a task, gives batches as a model takes them, with the places of their texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.finetune.data import Part

SIZE = 32
# texts are sorted by length within so many batches: little padding, and still other batches in every epoch
_POOL = 20
_PADDING = 0

Encode = Callable[[Sequence[str], int], list[list[int]]]


@dataclass(frozen=True)
class Batch:
    """``inputs``: input_ids and attention_mask, int64 [texts, tokens]; ``labels`` and ``index`` int64 [texts]."""

    inputs: dict[str, Tensor]
    labels: Tensor
    index: Tensor


class Encoded:
    """A part of a task, tokenised."""

    def __init__(self, part: Part, encode: Encode, longest: int) -> None:
        """``encode(texts, longest)`` gives the ids of each text, at most ``longest``."""
        self._ids = encode(part.texts, longest)
        self.labels = torch.tensor(part.labels, dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        """How many texts."""
        return len(self._ids)

    def batch(self, index: Sequence[int]) -> Batch:
        """The texts at these places, padded to the longest of them."""
        rows = [torch.tensor(self._ids[i], dtype=torch.int64, device="cpu") for i in index]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PADDING)
        lengths = torch.tensor([len(row) for row in rows], device="cpu")
        mask = (torch.arange(ids.shape[1], device="cpu") < lengths[:, None]).to(torch.int64)
        places = torch.tensor(list(index), dtype=torch.int64, device="cpu")
        return Batch({"input_ids": ids, "attention_mask": mask}, self.labels[places], places)

    def in_order(self, size: int = 2 * SIZE) -> list[Batch]:
        """All texts by length: the cheapest way to judge."""
        order = sorted(range(len(self)), key=lambda i: len(self._ids[i]))
        return [self.batch(order[start : start + size]) for start in range(0, len(order), size)]

    def steps(self, size: int = SIZE) -> int:
        """Batches of an epoch; the last may be smaller."""
        return -(-len(self) // size)

    def epoch(self, seed: int, number: int, size: int = SIZE) -> Iterator[Batch]:
        """Every text once, in batches of like length; seed and number of the epoch make the order."""
        chance = random.Random(f"{seed} {number}")
        order = list(range(len(self)))
        chance.shuffle(order)
        parts = []
        for start in range(0, len(order), size * _POOL):
            pool = sorted(order[start : start + size * _POOL], key=lambda i: len(self._ids[i]))
            parts += [pool[i : i + size] for i in range(0, len(pool), size)]
        chance.shuffle(parts)
        return (self.batch(part) for part in parts)
