"""The methods to choose by how long one will wait: ``fast``."""

from __future__ import annotations

from torch import Tensor

from sparsecomp.prune.objective import Objective, objective
from sparsecomp.prune.obs import swept
from sparsecomp.prune.refit import refit
from sparsecomp.prune.registry import Problem, Solution, method


@method("fast", needs_gram=True, description="obs, then the best values for its mask")
def _fast(problem: Problem) -> Solution:
    assert problem.gram is not None
    layer = objective(problem.weight, problem.gram)
    weight, mask = swept(layer, problem.pattern, problem.mask)
    return _refitted(layer, weight, mask)


def _refitted(layer: Objective, weight: Tensor, mask: Tensor) -> Solution:
    weight, converged = refit(layer, weight, mask)
    notes = () if converged else ("the refit of the kept weights was stopped before it had converged",)
    return Solution(layer.unscale(weight), mask, layer.notes + notes)
