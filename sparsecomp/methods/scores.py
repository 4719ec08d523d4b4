"""Methods that keep the weights with the largest scores and change none: magnitude, Wanda and RIA.

Scores are square roots of a saliency that adds up: ``project`` sums their squares where weights are judged together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.methods.registry import Problem, Solution, method
from sparsecomp.patterns.project import project


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W_ij| [out, in]; the saliency is W_ij^2."""
    return weight.abs()


def wanda_scores(weight: Tensor, gram: Tensor) -> Tensor:
    """|W_ij| sqrt(G_jj) [out, in], float64: the saliency is W_ij^2 G_jj (Sun et al. 2023, arXiv:2306.11695).

    G_jj is the squared norm of input feature j over the calibration tokens.
    """
    return weight.abs().double() * gram.diagonal().double().sqrt()


def ria_scores(weight: Tensor, gram: Tensor) -> Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) G_jj^(1/4), float64 (RIA, Zhang et al. 2024, ICLR).

    The relative importance of a weight in its column and in its row, times the square root of the input norm.
    """
    size = weight.abs().double()
    rows, columns = size.sum(dim=1, keepdim=True), size.sum(dim=0, keepdim=True)
    smallest = torch.finfo(torch.float64).tiny  # a row or column of zeros has scores of zero
    relative = size / columns.clamp_min(smallest) + size / rows.clamp_min(smallest)
    return relative * gram.diagonal().double().pow(0.25)


@method("magnitude", needs_gram=False, only_chooses=True, description="keeps the largest |w|; needs no data")
def _magnitude(problem: Problem) -> Solution:
    if problem.mask is not None:
        return Solution(problem.weight, problem.mask)
    return Solution(problem.weight, project(magnitude_scores(problem.weight), problem.pattern))


@method(
    "wanda", needs_gram=True, only_chooses=True, description="keeps the largest |w| times input norm (Sun et al. 2023)"
)
def _wanda(problem: Problem) -> Solution:
    if problem.mask is not None:
        return Solution(problem.weight, problem.mask)
    assert problem.gram is not None
    return Solution(problem.weight, project(wanda_scores(problem.weight, problem.gram), problem.pattern))


@method(
    "ria",
    needs_gram=True,
    only_chooses=True,
    description="as Wanda, with |w| relative to its row and column (Zhang et al. 2024)",
)
def _ria(problem: Problem) -> Solution:
    if problem.mask is not None:
        return Solution(problem.weight, problem.mask)
    assert problem.gram is not None
    return Solution(problem.weight, project(ria_scores(problem.weight, problem.gram), problem.pattern))
