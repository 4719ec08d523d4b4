"""What predictions are worth: accuracy, macro-F1, and McNemar's paired test of one model against another."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of texts that are right."""
    return float((predicted == labels).double().mean())


def macro_f1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN); a class that is neither predicted nor there counts 0."""
    scores = []
    for label in range(classes):
        said, true = predicted == label, labels == label
        both = int((said & true).sum())
        scores.append(2 * both / max(int(said.sum()) + int(true.sum()), 1))
    return sum(scores) / classes


def packed(right: Tensor) -> str:
    """A bool vector as hexadecimal digits, its first entry the highest bit; ``unpacked`` needs the length, too."""
    bits = "".join("1" if each else "0" for each in right.tolist())
    return f"{int(bits or '0', 2):0{max(1, -(-len(bits) // 4))}x}"


def unpacked(digits: str, count: int) -> Tensor:
    """The bool vector [count] that ``packed`` was given."""
    bits = f"{int(digits, 16):0{count}b}"
    return torch.tensor([bit == "1" for bit in bits[:count]], dtype=torch.bool, device="cpu")


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Texts that only the first model has right, those that only the second has, and the exact two-sided p-value.

    ``first`` and ``second`` are bool [texts], True where right. Under the null hypothesis each of the n texts on which
    they differ falls to either with probability 1/2: p = min(1, 2 P(X <= min)), X ~ Binomial(n, 1/2)
    (McNemar, Psychometrika 12, 1947).
    """
    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    total, fewer = one + other, min(one, other)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    # integers are divided exactly; 2^total alone would overflow a float
    return one, other, min(1.0, 2 * tail / 2**total)
