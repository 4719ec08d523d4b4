"""In which order the input columns of a layer lose least to an N:M pattern: a search by swaps of two columns.

Takes a weight and its Gram, gives an order of columns. Whether the model allows it is for ``graph`` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeGuard

import torch
from torch import Tensor

from sparsecomp.methods.objective import objective
from sparsecomp.patterns import NM, Pattern

_SWEEPS = 6
_LEAST_GAIN = 1e-4
# rows are sampled where the scores would take more than this many values
_MOST_VALUES = 1 << 22


def search(weight: Tensor, gram: Tensor, pattern: Pattern, segments: Sequence[int]) -> Tensor:
    """The order of the columns of ``weight`` [out, in] that keeps most by the saliency w_ij^2 / [H^-1]_jj: int64 [in].

    Column j of the permuted weight is column order[j]. ``segments`` are the lengths of runs of columns that must not
    mix, and add up to ``in``. Patterns whose mask no order of columns changes, or that are not N:M, give the identity.

    The saliency is what removing w_ij alone costs when the other weights make up for it (Hassibi and Stork 1993), with
    H the damped Gram. Each column in turn is swapped with the one that gains most, in sweeps that end when one gains
    less than 0.01%. A swap is priced exactly: a group's best N of M with one column replaced by x is its best N-1 of
    the others plus max(x, their N-th).
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device="cpu")
    if not order_matters(pattern) or weight.numel() == 0:
        return order
    scores = _scores(weight, gram, pattern)
    groups = torch.arange(columns, device="cpu") // pattern.m
    # the last group, if it is cut short, keeps its columns
    movable = groups < columns // pattern.m
    owner = [place for place, length in enumerate(segments) for _ in range(length)]
    ends = list(accumulate(segments, initial=0))
    state = _Swaps(scores, pattern.n, pattern.m)
    total = float(state.kept.sum())
    for _ in range(_SWEEPS):
        gained = 0.0
        for i in range(columns):
            if not bool(movable[i]):
                continue
            start, stop = ends[owner[i]], ends[owner[i] + 1]
            gains = state.gains(i, start, stop)
            gains[(groups[start:stop] == groups[i]) | ~movable[start:stop]] = -torch.inf
            best = int(gains.argmax())
            gain = float(gains[best])
            if gain > 1e-7 * total:
                state.swap(i, start + best)
                order[[i, start + best]] = order[[start + best, i]]
                gained += gain
        if gained < _LEAST_GAIN * total:
            break
    return order


def order_matters(pattern: Pattern) -> TypeGuard[NM]:
    """Whether the order of columns matters to the pattern, as far as the search goes."""
    return isinstance(pattern, NM) and pattern.n < pattern.m and not pattern.transposable


def _scores(weight: Tensor, gram: Tensor, pattern: NM) -> Tensor:
    """w_ij^2 / [H^-1]_jj [rows, in], float32 on the CPU, summed over rows that share a mask, of a sample of rows."""
    layer = objective(weight if weight.dtype == torch.float64 else weight.float(), gram)
    # H^-1 is that of the scaled problem, whose weight is scaled as well: the quotient is the same
    squares = layer.weight.double().square() / layer.inverse_factor.double().square().sum(dim=0)
    rows = pattern.mask_rows
    if rows > 1:
        squares = torch.nn.functional.pad(squares, (0, 0, 0, -squares.shape[0] % rows))
        squares = squares.view(-1, rows, squares.shape[1]).sum(dim=1)
    step = max(1, -(-squares.numel() // _MOST_VALUES))
    chosen = squares[::step].cpu()
    # in float32 what counts is the relative size
    return (chosen / chosen.max().clamp_min(torch.finfo(torch.float64).tiny)).float()


class _Swaps:
    """The scores in the order of now, with what each column's group keeps and the N-th best of its other columns."""

    def __init__(self, scores: Tensor, n: int, m: int) -> None:
        self.scores, self.n, self.m = scores.clone(), n, m
        self.rival = torch.zeros_like(scores)
        self.kept = scores.new_zeros(scores.shape[1])
        for group in range(scores.shape[1] // m):
            self._refresh(group)

    def _refresh(self, group: int) -> None:
        columns = slice(group * self.m, (group + 1) * self.m)
        values = self.scores[:, columns]
        ranked = values.sort(dim=1, descending=True).values
        last, next_ = ranked[:, self.n - 1 : self.n], ranked[:, self.n : self.n + 1]
        self.rival[:, columns] = torch.where(values >= last, next_, last)
        self.kept[columns] = torch.maximum(values, self.rival[:, columns]).sum(dim=0)

    def gains(self, i: int, start: int, stop: int) -> Tensor:
        """What swapping column i with each of the columns start to stop - 1 would add to what is kept."""
        others = slice(start, stop)
        here = torch.maximum(self.scores[:, others], self.rival[:, i : i + 1]).sum(dim=0) - self.kept[i]
        there = torch.maximum(self.rival[:, others], self.scores[:, i : i + 1]).sum(dim=0) - self.kept[others]
        return here + there

    def swap(self, i: int, j: int) -> None:
        self.scores[:, [i, j]] = self.scores[:, [j, i]]
        self._refresh(i // self.m)
        self._refresh(j // self.m)
