"""Methods that keep the weights with the largest scores and change none: magnitude and Wanda.

Scores are square roots of a saliency that adds up: ``project`` sums their squares where weights are judged together.
"""

from __future__ import annotations

from torch import Tensor

from sparsecomp.prune.project import project
from sparsecomp.prune.registry import Problem, method


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W_ij| [out, in]; the saliency is W_ij^2."""
    return weight.abs()


def wanda_scores(weight: Tensor, gram: Tensor) -> Tensor:
    """|W_ij| sqrt(G_jj) [out, in], float64: the saliency is W_ij^2 G_jj (Sun et al. 2023, arXiv:2306.11695).

    G_jj is the squared norm of input feature j over the calibration tokens.
    """
    return weight.abs().double() * gram.diagonal().double().sqrt()


@method("magnitude", needs_gram=False, description="keeps the largest |w|; needs no data")
def _magnitude(problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.mask is not None:
        return problem.weight, problem.mask
    return problem.weight, project(magnitude_scores(problem.weight), problem.pattern)


@method("wanda", needs_gram=True, description="keeps the largest |w| times input norm (Sun et al. 2023)")
def _wanda(problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.mask is not None:
        return problem.weight, problem.mask
    assert problem.gram is not None
    return problem.weight, project(wanda_scores(problem.weight, problem.gram), problem.pattern)
