"""The list of runs: what each trains, from which dense checkpoint, for how long and beside which dense run."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsecomp.errors import SparsecompError

# rates of the first seed, of which validation chooses one for all seeds
RATES = (2e-5, 3e-5, 5e-5)
AGAIN_RATES = (3e-5, 1e-4, 3e-4)
# sparse runs of two epochs take the rate that one epoch chose; the dense run beside them still tries all
LONGER_RATES = (3e-4,)
_TASKS = ("movies", "r8")
# far from dense: one density over all layers, by percent of weights kept and method, in so many epochs
_FAR = ((3, "gradual"), (3, "movement"), (3, "soft-movement"), (10, "obs"), (3, "obs"))
_LONG = 4
_FAR_RATES = (1e-4, 3e-4)
# one shot by second order: gradients before each change of masks, and how often these are computed anew
_GRADIENTS, _RECOMPUTATIONS = 64, (1, 16)


@dataclass(frozen=True)
class Sparse:
    """How a run is sparse: what ``sc.sparsify`` is given, but for model, optimizer, steps and calibration.

    A ``pattern`` with numbers, such as "8:16+int8@a8", is also what the trained model is compiled to. ``rule`` holds
    settings of the method's own, ``schedule`` those of a Schedule, where a float is a share of all steps.
    """

    pattern: str
    method: str = "fixed"
    start: str | None = None
    scope: str = "layer"
    rule: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training: from the pre-trained model, or from the dense checkpoint that the run ``base`` left.

    From a checkpoint all learn with it as their teacher. ``sparse`` is None for a dense run. ``beside`` is the dense
    run at equal budget that this one is compared with. ``checks`` is how often in an epoch validation is looked at.
    With ``keep`` the trained model is kept. ``steps`` are there in the place of epochs where no epoch is meant.
    """

    name: str
    task: str
    epochs: float
    rates: tuple[float, ...]
    base: str | None = None
    sparse: Sparse | None = None
    beside: str | None = None
    checks: int = 0
    keep: bool = False
    steps: int | None = None


def base_name(task: str) -> str:
    """The dense run that all others start from."""
    return f"{task}/dense"


def again_name(task: str, epochs: int) -> str:
    """The dense run with the budget and the teacher of sparse ones."""
    return f"{task}/dense-again/{epochs}"


def registry() -> dict[str, Run]:
    """All runs by name, those first that others need."""
    runs: list[Run] = []
    for task in _TASKS:
        runs.append(Run(base_name(task), task, 2, RATES, keep=True))
        runs += [_again(task, epochs) for epochs in (1, 2)]
        runs += [
            _sparse(task, f"{pattern}-fast", epochs, Sparse(pattern, start="fast"), checks=8 * (pattern == "2:4"))
            for pattern in ("2:4", "8:16", "2:4+int8@a8", "8:16+int8@a8")
            for epochs in (1, 2)
        ]
    runs += [
        _sparse("movies", "2:4-magnitude", epochs, Sparse("2:4", start="magnitude"), checks=8) for epochs in (1, 2)
    ]
    runs.append(_again("movies", _LONG))
    runs += [_far(kept, method) for kept, method in _FAR]
    runs += [_once(count) for count in _RECOMPUTATIONS]
    return {run.name: run for run in runs}


def _again(task: str, epochs: int) -> Run:
    return Run(again_name(task, epochs), task, epochs, AGAIN_RATES, base_name(task), keep=epochs == 2)


def _sparse(task: str, what: str, epochs: int, sparse: Sparse, checks: int = 0) -> Run:
    # what is compiled and timed end to end, beside the dense run of equal budget
    keep = epochs == 2 and "int8" in sparse.pattern
    return Run(
        f"{task}/{what}/{epochs}",
        task,
        epochs,
        LONGER_RATES if epochs == 2 else AGAIN_RATES,
        base_name(task),
        sparse,
        again_name(task, epochs),
        checks,
        keep,
    )


def _far(kept: int, method: str) -> Run:
    sparse = Sparse(f"unstructured:{kept / 100}", method, scope="global")
    made = _sparse("movies", f"{100 - kept}%-{method}", _LONG, sparse)
    return dataclasses.replace(made, rates=_FAR_RATES)


def _once(recomputations: int) -> Run:
    """80% dropped without training: a rate of 0 leaves what is kept to the method."""
    schedule = {"curve": "exponential", "every": _GRADIENTS}
    sparse = Sparse("unstructured:0.2", "obs", scope="global", rule={"gradients": _GRADIENTS}, schedule=schedule)
    name, base = f"movies/80%-obs-once/{recomputations}", base_name("movies")
    return Run(name, "movies", 0, (0.0,), base, sparse, base, steps=recomputations * _GRADIENTS)


def chosen(runs: Mapping[str, Run], globs: Iterable[str]) -> list[Run]:
    """The runs whose names match one of the globs, and the bases they start from, in the order of the list.

    Raises SparsecompError for a glob that matches none.
    """
    names: set[str] = set()
    for glob in globs:
        found = fnmatch.filter(runs, glob)
        if not found:
            raise SparsecompError(f'no run matches "{glob}"; the runs are {", ".join(runs)}')
        names.update(found)
    names |= {base for name in names for base in [runs[name].base] if base is not None}
    return [run for run in runs.values() if run.name in names]
