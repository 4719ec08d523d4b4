"""Whether the cores of this machine compute at full rate beside each other, which those of a virtual machine may not.

For a tenth of a second or for minutes two of them may lie on one physical core, or one beside a neighbour's: two
threads are then as fast as one or one and a half, in every engine alike, and what is measured says nothing of engines.
Takes a number of threads. Knows nothing of what is timed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

from sparsecomp.machine.native import native

# of the best rate seen; cores that share a physical one get half, and the clock falls by a tenth where all are busy
_LEAST_SHARE = 0.75
_ROUND_US = 1000
_FIRST_LOOKS = 5
_PAUSE_S = 0.05
# in all: where cores stay shared, the rest is measured as it is, and the result says so
MOST_PATIENCE_S = 180.0

Rates = Callable[[Sequence[int]], list[float]]  # multiply-adds per second of each core, all at once


class Cores:
    """Called after a round of samples: whether they count. If not, it has waited until no core was shared any more."""

    def __init__(self, threads: int, rates: Rates | None = None) -> None:
        """``threads`` cores are asked for; one core, or a machine without as many, is never waited for."""
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._cores = cores if 1 < threads == len(cores) else []
        self._rates = rates or _rates
        self._best = 0.0
        self.dropped_rounds = 0
        self.waited_s = 0.0

    def __call__(self) -> bool:
        """True where every core is at its full rate, and always once the patience is used up."""
        if not self._cores or self.waited_s >= MOST_PATIENCE_S:
            return True
        if not self._best:
            self._best = max(self._rates([core])[0] for core in self._cores for _ in range(_FIRST_LOOKS))
        if self._unshared():
            return True
        self.dropped_rounds += 1
        start = time.perf_counter()
        while self.waited_s + time.perf_counter() - start < MOST_PATIENCE_S:
            time.sleep(_PAUSE_S)
            if self._unshared():
                break
        self.waited_s += time.perf_counter() - start
        return False

    def record(self) -> dict[str, float | bool]:
        """For a result: what was dropped, and whether the patience was used up, so that later samples were kept."""
        gave_up = self.waited_s >= MOST_PATIENCE_S
        return {"dropped_rounds": self.dropped_rounds, "waited_s": round(self.waited_s, 1), "gave_up": gave_up}

    def _unshared(self) -> bool:
        rates = self._rates(self._cores)
        self._best = max(self._best, *rates)
        return min(rates) >= _LEAST_SHARE * self._best


def _rates(cores: Sequence[int]) -> list[float]:
    module = native()
    if isinstance(module, str):
        return [1.0] * len(cores)
    rates = [0.0] * len(cores)
    gate = threading.Barrier(len(cores))

    def run(index: int) -> None:
        os.sched_setaffinity(0, {cores[index]})  # of this thread
        gate.wait()
        rates[index] = module.measure_flops(0, 1, _ROUND_US)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(cores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rates
