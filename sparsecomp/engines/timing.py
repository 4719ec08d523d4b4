"""Times several ways of computing one thing in turn, so that a ratio between them means something.

Takes callables that give seconds, gives medians with their spread. Knows nothing of linear layers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sparsecomp.machine import clock

MIN_REPETITIONS = 11
MAX_REPETITIONS = 2000
# a sample shorter than this is made of several calls, so that the clock does not matter
SHORTEST_SAMPLE_S = 500e-6
# after their threads have slept, engines need so long to be at full speed again: in the first millisecond a product on
# two threads takes 1.1 to 2 times as long as from the fifth to tenth on
AFTER_SLEEP_S = 0.01
# and then give so many samples at a time, of which the middle one counts, unless that takes longer than this
_SAMPLES_AWAKE = 5
_LONGEST_AWAKE_S = 0.005
_MOST_CALLS = 200
_STEP_S = 0.002
_QUIET_STEPS = 2
# share of a step that a process without running threads may use: it looks at the clock
_IDLE = 0.15
_LONGEST_SPIN_S = 0.1


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


class Sampler:
    """Times one callable: each call of this object gives the seconds of one call of it, after as many untimed ones."""

    def __init__(self, call: Callable[[], object], after_sleep: bool = False) -> None:
        """How many calls make a sample is found out at the first.

        ``after_sleep``: threads sleep between samples (``wait_until_idle``), so that more calls are untimed, and the
        sample is the median of several.
        """
        self._call = call
        self._untimed_s = AFTER_SLEEP_S if after_sleep else 0.0
        self._samples = _SAMPLES_AWAKE if after_sleep else 1
        self._count = 0

    def __call__(self) -> float:
        """Seconds of one call."""
        if not self._count:
            self._count = _warm_up(self._call)
        # waking the worker threads, and what the one before left in the caches, are not part of this one's time
        end = time.perf_counter() + self._untimed_s
        self._run()
        while time.perf_counter() < end:
            self._call()
        times: list[float] = []
        while len(times) < self._samples and sum(times) < _LONGEST_AWAKE_S:
            times.append(clock.seconds(self._run))
        return sorted(times)[len(times) // 2] / self._count

    def _run(self) -> None:
        for _ in range(self._count):
            self._call()


def wait_until_idle() -> None:
    """Sleep until no thread of this process runs any more, for a tenth of a second at most.

    Engines' worker threads spin for 1 to 40 ms after their work, and would take a core from whatever is timed next.
    """
    quiet, deadline = 0, time.perf_counter() + _LONGEST_SPIN_S
    while quiet < _QUIET_STEPS and time.perf_counter() < deadline:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(_STEP_S)
        used, passed = time.process_time() - used, time.perf_counter() - start
        quiet = quiet + 1 if used < _IDLE * passed else 0


def measure(
    samplers: Mapping[str, Callable[[], float]], seconds: float, counts: Callable[[], bool] = lambda: True
) -> dict[str, Timing]:
    """Take a sample (seconds of one call) of each in turn, again and again, for about ``seconds`` in all.

    The first sample of each is not counted. ``counts`` is asked after every round and drops it with False; its time is
    added.
    """
    for sampler in samplers.values():
        sampler()
    samples = clock.in_turn(samplers, seconds, MIN_REPETITIONS, MAX_REPETITIONS, counts=counts)
    return {name: _timing(taken) for name, taken in samples.items()}


def _warm_up(call: Callable[[], object]) -> int:
    call()
    call()
    return max(1, min(_MOST_CALLS, round(SHORTEST_SAMPLE_S / max(clock.seconds(call), 1e-7))))


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        median=ordered[last // 2],
        low=ordered[round(0.1 * last)],
        high=ordered[round(0.9 * last)],
        samples=len(ordered),
    )
