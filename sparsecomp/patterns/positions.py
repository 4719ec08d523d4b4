"""The padding that keeps groups of a pattern within one kernel position of a convolution: put on, and cut off again.

Takes matrices [rows, positions*channels] whose columns lie in runs of ``channels``, one run for each kernel position.
Where the groups of a pattern do not fill a run, columns of zeros complete it. Knows nothing of models and methods.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns.grammar import NM, VNM, Block, Pattern, Unstructured


def group_columns(pattern: Pattern) -> int:
    """Columns that a pattern judges side by side: the width of a group, tile or block; 1 where each stands alone."""
    match pattern:
        case NM() | VNM():
            return pattern.m
        case Block():
            return pattern.cols
        case Unstructured():
            return 1


def missing(pattern: Pattern, channels: int, columns: int) -> int:
    """Columns to add to each run of ``channels`` of ``columns`` so that no group crosses from one to the next."""
    return 0 if columns == channels else -channels % group_columns(pattern)


def pad_positions(matrix: Tensor, channels: int, pattern: Pattern) -> Tensor:
    """[rows, positions*channels] with zeros (False in a mask) behind each run; the matrix itself if none are needed."""
    extra = missing(pattern, channels, matrix.shape[1])
    if not extra:
        return matrix
    runs = matrix.reshape(matrix.shape[0], matrix.shape[1] // channels, channels)
    return functional.pad(runs, (0, extra)).flatten(1)


def cut_positions(matrix: Tensor, channels: int, pattern: Pattern, columns: int) -> Tensor:
    """The way back of ``pad_positions`` to ``columns`` columns: what stands behind each run is left out."""
    extra = missing(pattern, channels, columns)
    if not extra:
        return matrix
    return matrix.reshape(matrix.shape[0], columns // channels, channels + extra)[..., :channels].flatten(1)


def pad_gram(gram: Tensor, channels: int, pattern: Pattern) -> Tensor:
    """X^T X [in, in] of inputs that are zero in the columns which ``pad_positions`` adds."""
    rows = pad_positions(gram, channels, pattern)
    return pad_positions(rows.T, channels, pattern).T
