"""Seconds of calls by this process's clock: of one run, and of several calls that take turns.

Takes callables, gives samples. Knows nothing of what is called; times that are kept are those of timings.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def seconds(run: Callable[[], object], place: str = "cpu") -> float:
    """Seconds of one run; those of a GPU at ``place`` ("cuda:0") end when the GPU has done its work."""
    begin = time.perf_counter()
    run()
    if place != "cpu":
        torch.cuda.synchronize(place)
    return time.perf_counter() - begin


def in_turn(
    samplers: Mapping[str, Callable[[], float]],
    budget: float,
    least: int,
    most: int,
    *,
    shift: int = 1,
    counts: Callable[[], bool] = lambda: True,
) -> dict[str, list[float]]:
    """A sample of each, round after round for ``budget`` seconds: at least ``least`` rounds, at most ``most``.

    They take turns so that a slow spell of the machine meets them all. Every round starts ``shift`` places after the
    one before, so that what one leaves in the caches does not always meet the same next one. ``counts`` is asked after
    every round and drops it with False; its time is added to the budget.
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        start = time.perf_counter()
        order = [names[(place + shift * rounds) % len(names)] for place in range(len(names))]
        taken = {name: samplers[name]() for name in order}
        if not counts():
            end += time.perf_counter() - start
            continue
        for name, sample in taken.items():
            samples[name].append(sample)
        rounds += 1
    return samples
