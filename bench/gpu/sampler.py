"""Seconds of a call on a GPU, from CUDA events around a captured graph of calls that rotate over several operands.

Gives samplers for ``sparsecomp.engines.timing.measure``. Knows nothing of linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

SAMPLE_S = 2e-3
"""One sample lasts about this long, so that launching it does not matter."""

_MOST_CALLS = 512
# above this a call takes much longer than its launch, and capturing it gains nothing
GRAPH_BELOW_S = 2e-4


def repetitions(seconds: float, count: int) -> int:
    """Calls of one sample: about ``SAMPLE_S`` of them, whole rounds over ``count`` operands."""
    wanted = max(1, min(_MOST_CALLS, round(SAMPLE_S / max(seconds, 1e-9))))
    return -(-wanted // count) * count


class GpuSampler:
    """Times a family of equal calls on different operands; each call of this object gives seconds per call.

    Short calls are captured in a CUDA graph, so that the speed of Python is not measured; where that fails ``captured``
    is False and they are launched one by one.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], graphs: bool = True) -> None:
        """Warms up, which compiles and tunes, and captures; without ``graphs`` every call is launched by itself."""
        self._calls = calls
        for call in calls:
            call()
        torch.cuda.synchronize()
        estimate = self._timed(lambda: [call() for call in calls]) / len(calls)
        self._count = repetitions(estimate, len(calls))
        self._graph = self._capture() if graphs and estimate < GRAPH_BELOW_S else None
        self.captured = self._graph is not None

    def __call__(self) -> float:
        """Seconds of one call."""
        run = self._graph.replay if self._graph is not None else self._launch
        return self._timed(run) / self._count

    def _launch(self) -> None:
        for index in range(self._count):
            self._calls[index % len(self._calls)]()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._launch()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        graph.replay()
        torch.cuda.synchronize()
        return graph

    @staticmethod
    def _timed(run: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3
