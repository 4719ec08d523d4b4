"""Mask search with values to match, by how long one will wait: ``fast``, ``balanced``, ``best``; and ``admm`` alone.

Inside, solutions are in the scaled coordinates of ``Objective``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.methods.admm import admm
from sparsecomp.methods.descent import descend
from sparsecomp.methods.error import relative_error
from sparsecomp.methods.objective import Objective, objective
from sparsecomp.methods.obs import swept
from sparsecomp.methods.refit import TOLERANCE, refit
from sparsecomp.methods.registry import Problem, Solution, method
from sparsecomp.patterns import NM, VNM, Pattern, rows_together

DAMPINGS = (0.01, 0.001, 0.03)
# what another damping than the first must gain on held-out tokens: smaller gains did not last on other documents
_LEAST_GAIN = 0.002
# of conjugate gradients before a pass of descent: enough to undo most of what the first pass froze. Each is one product
# with the Gram, which is what "fast" takes its time for: twice as many gain 0.2% of the error
_SETTLING_STEPS = 6
# of the refit in "fast", which ends some steps earlier than the thorough one, 0.1% of the error short of it
_FAST_TOLERANCE = 2e-3


@method("admm", needs_gram=True, description="ADMM mask search after ALPS, then the best values for its mask")
def _admm(problem: Problem) -> Solution:
    assert problem.gram is not None
    layer = objective(problem.weight, problem.gram)
    if problem.mask is not None or problem.pattern.density == 1.0:
        return _unscaled(layer, _one_pass(layer, problem.pattern, problem.mask))
    return _unscaled(layer, _refitted(layer, _search(layer, problem.pattern)))


@method("fast", needs_gram=True, description="obs, one pass of coordinate descent, best values for the mask")
def _fast(problem: Problem) -> Solution:
    assert problem.gram is not None
    layer = objective(problem.weight, problem.gram)
    return _unscaled(layer, _one_pass(layer, problem.pattern, problem.mask))


@method("balanced", needs_gram=True, description="admm, then block coordinate descent; no row worse than in fast")
def _balanced(problem: Problem) -> Solution:
    assert problem.gram is not None
    layer = objective(problem.weight, problem.gram)
    return _unscaled(layer, _thorough(layer, problem))


@method("best", needs_gram=True, description="balanced, at the damping that serves held-out tokens best")
def _best(problem: Problem) -> Solution:
    if problem.held_out is None:
        solution = _balanced(problem)
        note = f"no held-out tokens were given, so the damping stayed at {DAMPINGS[0]:g}"
        return solution._replace(notes=(*solution.notes, note))
    assert problem.gram is not None
    tried = []
    for damping in DAMPINGS:
        layer = objective(problem.weight, problem.gram, damping)
        solution = _unscaled(layer, _thorough(layer, problem))
        pruned = torch.where(solution.mask, solution.weight, 0.0)
        tried.append((relative_error(problem.weight, pruned, problem.held_out), damping, solution))
    error, damping, solution = min(tried, key=lambda each: each[0])
    note = f"damping {damping:g} gave the least held-out error, {error:.4f}"
    if error > (1.0 - _LEAST_GAIN) * tried[0][0]:
        error, damping, solution = tried[0]
        note = f"damping {damping:g} gave a held-out error of {error:.4f}, no other 0.2% less"
    return solution._replace(notes=(*solution.notes, note))


def _unscaled(layer: Objective, solution: Solution) -> Solution:
    return Solution(layer.unscale(solution.weight), solution.mask, layer.notes + solution.notes)


def _one_pass(layer: Objective, pattern: Pattern, mask: Tensor | None) -> Solution:
    """One pass over the columns and a refit, on the user's mask if there is one.

    Where the pattern has groups, they are chosen once more in between, when nothing is frozen any longer.
    """
    fixed = mask is not None or pattern.density == 1.0
    weight, mask = swept(layer, pattern, mask)
    if not fixed and isinstance(pattern, NM | VNM):
        weight, _ = refit(layer, weight, mask, _SETTLING_STEPS)
        weight, mask = descend(layer, weight, mask, pattern, sweeps=1)
    return _refitted(layer, Solution(weight, mask), TOLERANCE if fixed else _FAST_TOLERANCE)


def _search(layer: Objective, pattern: Pattern) -> Solution:
    weight, mask, settled = admm(layer, pattern)
    notes = () if settled else ("the ADMM mask was still changing when its steps ran out",)
    return Solution(weight, mask, notes)


def _thorough(layer: Objective, problem: Problem) -> Solution:
    """ADMM and coordinate descent; each row (or tile of rows that share a choice) is the best that was met."""
    pattern = problem.pattern
    start = _one_pass(layer, pattern, problem.mask)
    if problem.mask is not None or pattern.density == 1.0:
        return start
    found = _search(layer, pattern)
    if isinstance(pattern, NM | VNM):
        weight, mask = descend(layer, found.weight, found.mask, pattern)
        found = Solution(weight, mask, found.notes)
    found = _refitted(layer, found)
    return _best_of_rows(layer, pattern, start, found)


def _refitted(layer: Objective, solution: Solution, tolerance: float = TOLERANCE) -> Solution:
    weight, converged = refit(layer, solution.weight, solution.mask, tolerance=tolerance)
    notes = () if converged else ("the refit of the kept weights had not converged when its steps ran out",)
    return Solution(weight, solution.mask, tuple(dict.fromkeys(solution.notes + notes)))


def _best_of_rows(layer: Objective, pattern: Pattern, start: Solution, found: Solution) -> Solution:
    losses = [layer.losses(each.weight) for each in (start, found)]
    rows = rows_together(pattern, len(losses[0]))
    worse = losses[1] > losses[0]
    if rows > 1 and len(worse):
        tiles = torch.arange(len(worse), device=worse.device) // rows
        change = torch.zeros(int(tiles[-1]) + 1, dtype=torch.float64, device=worse.device)
        worse = (change.index_add_(0, tiles, losses[1] - losses[0]) > 0)[tiles]
    pick = worse[:, None]
    notes = tuple(dict.fromkeys(start.notes + found.notes))
    return Solution(torch.where(pick, start.weight, found.weight), torch.where(pick, start.mask, found.mask), notes)
