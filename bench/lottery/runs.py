"""The list of runs: which net, which optimizer, and how it is sparse.

Knows nothing of data and training.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sparsecomp.errors import SparsecompError
from sparsecomp.training.choice import Scope
from sparsecomp.training.rewind import GoBack

EPOCHS: Mapping[str, int] = {"mlp": 10, "conv": 8}
# of each round of a ticket, of its controls, and of what they are compared with
ROUND_EPOCHS: Mapping[str, int] = {"mlp": 6, "conv": 5}
# the classifier stays dense, and so does a convolution of one channel, which has no groups
SKIP: Mapping[str, tuple[str, ...]] = {"mlp": ("5",), "conv": ("0", "7")}
# peaks of the learning rate, of which the dense net's validation on one seed chooses for all runs of the net
RATES: Mapping[str, tuple[float, ...]] = {"sgd": (0.05, 0.1, 0.2), "adam": (1e-3, 2e-3, 4e-3)}
# a tenth of the weights is left after the last round; a round drops about a fifth of what is left
ROUNDS, LEFT, EARLY = 10, 0.1, 100
KERNEL_IMAGES = 200


@dataclass(frozen=True)
class Run:
    """One training, or the rounds of one ticket.

    ``kind`` is "rate" (dense, at ``rate``, on one seed), "plain" (``pattern`` by ``method`` from ``start``; dense
    without a pattern), "ticket" (rounds that rewind ``to``) or "kernel" (of the ticket that the run ``needs`` found and
    of its controls, before they are trained). ``every`` is how many steps lie between changes of masks, 0: they never
    change. ``short`` has the epochs of a round.
    """

    name: str
    kind: Literal["rate", "plain", "ticket", "kernel"]
    net: str
    optimizer: str = "sgd"
    rate: float | None = None
    pattern: str | None = None
    method: str = "fixed"
    start: str | None = None
    to: GoBack = "weights"
    scope: Scope = "layer"
    every: int | None = None
    short: bool = False
    needs: str | None = None

    @property
    def epochs(self) -> int:
        """Epochs of a training."""
        return (ROUND_EPOCHS if self.short else EPOCHS)[self.net]


def rate_name(net: str, optimizer: str, rate: float) -> str:
    """The run that tries a rate."""
    return f"{net}/{optimizer}/rate/{rate:g}"


def registry() -> dict[str, Run]:
    """All runs by name, those first that others need."""
    runs: list[Run] = []
    for net in EPOCHS:
        runs += [
            Run(rate_name(net, optimizer, rate), "rate", net, optimizer, rate)
            for optimizer, rates in RATES.items()
            for rate in rates
        ]
        runs += [
            Run(f"{net}/sgd/dense", "plain", net),
            Run(f"{net}/sgd/2:4-fixed", "plain", net, pattern="2:4", start="magnitude"),
            Run(f"{net}/sgd/2:4-sr-ste", "plain", net, pattern="2:4", method="sr-ste"),
            Run(f"{net}/sgd/4:8-sr-ste", "plain", net, pattern="4:8", method="sr-ste"),
            Run(f"{net}/adam/dense", "plain", net, "adam"),
            Run(f"{net}/adam/2:4-sr-ste", "plain", net, "adam", pattern="2:4", method="sr-ste"),
            Run(f"{net}/adam/2:4-step", "plain", net, "adam", pattern="2:4", method="step"),
            Run(f"{net}/ticket/weights", "ticket", net, short=True),
            Run(f"{net}/ticket/learning-rate", "ticket", net, to="learning-rate", short=True),
            Run(f"{net}/ticket/kernel", "kernel", net, needs=f"{net}/ticket/weights"),
        ]
        # both have the layers' densities of RigL's paper; the masks of one never change
        runs += [
            Run(
                f"{net}/grown/{kind}-{left}",
                "plain",
                net,
                pattern=f"unstructured:{left}",
                method="rigl",
                start="random",
                scope="global",
                every=every,
                short=True,
            )
            for left in (0.1, 0.05)
            for kind, every in (("static", 0), ("rigl", 20))
        ]
    return {run.name: run for run in runs}


def chosen(runs: Mapping[str, Run], globs: Iterable[str]) -> list[Run]:
    """The runs whose names match one of the globs, in the order of the list; SparsecompError if one matches none."""
    wanted: set[str] = set()
    for glob in globs:
        found = fnmatch.filter(runs, glob)
        if not found:
            raise SparsecompError(f'no run matches "{glob}"; --list prints the names')
        wanted.update(found)
    return [run for name, run in runs.items() if name in wanted]
