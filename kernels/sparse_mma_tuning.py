"""Which configuration of the mma.sp kernel is fastest here, found out once for each product and remembered.

Imports no triton; knows nothing of the kernel but that it can be called with a configuration.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from sparsecomp.kernels.sparse_mma_config import Config

_ROUNDS = 5

Key = tuple[int, ...]

_best: dict[Key, Config] = {}


def bucket(tokens: int) -> int:
    """Batches that share a measurement: up to the next power of two."""
    return 1 << max(tokens - 1, 0).bit_length()


def tuned(key: Key, options: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """The fastest of ``options`` under ``key``, measured at the first call by running each of them.

    While a CUDA graph is captured nothing can be timed: the first option is then taken, and nothing is remembered. Run
    a product once before capturing it.
    """
    known = _best.get(key)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return options[0]
    _best[key] = min(options, key=lambda option: seconds(lambda: run(option)))
    return _best[key]


def known(key: Key) -> Config | None:
    """What was found for ``key``, or None if it was never measured."""
    return _best.get(key)


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the current CUDA stream, compilation left out."""
    call()
    times = []
    for _ in range(_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) * 1e-3)
    return float(statistics.median(times))
