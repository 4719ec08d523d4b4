"""Times several ways of computing one thing in turn, so that a ratio between them means something.

Takes callables, gives medians with their spread. Knows nothing of linear layers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MIN_REPETITIONS = 7
MAX_REPETITIONS = 2000
# a sample shorter than this is made of several calls, so that the clock does not matter
SHORTEST_SAMPLE_S = 100e-6


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the 10% and 90% quantiles, and how many samples there were."""

    median: float
    low: float
    high: float
    samples: int


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Run with that many torch threads; one thread is also pinned to one core, as are the pools made inside."""
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(threads)
    if threads == 1:
        # the last core: the first one serves most interrupts
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)


def measure(calls: Mapping[str, Callable[[], object]], seconds: float, pause: float = 0.0) -> dict[str, Timing]:
    """Time every call in turn, again and again, for about ``seconds`` in all.

    ``pause`` seconds pass between two of them: worker threads of one engine spin for some milliseconds when their work
    is done, and would take a core from the next.

    One round runs each call once (a short one several times), and every round starts with another of them, so that
    drift of the clock and what a neighbour leaves in the caches fall on all alike.
    """
    names = list(calls)
    repeats = {name: _warm_up(calls[name]) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_REPETITIONS or (rounds < MAX_REPETITIONS and time.perf_counter() < end):
        for i in range(len(names)):
            name = names[(i + rounds) % len(names)]
            call, count = calls[name], repeats[name]
            time.sleep(pause)
            # what the one before left in the caches is not part of this one's time
            call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count)
        rounds += 1
    return {name: _timing(taken) for name, taken in samples.items()}


def _warm_up(call: Callable[[], object]) -> int:
    call()
    call()
    start = time.perf_counter()
    call()
    return max(1, min(50, round(SHORTEST_SAMPLE_S / max(time.perf_counter() - start, 1e-7))))


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        median=ordered[last // 2],
        low=ordered[round(0.1 * last)],
        high=ordered[round(0.9 * last)],
        samples=len(ordered),
    )
