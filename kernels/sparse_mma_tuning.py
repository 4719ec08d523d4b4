"""Which configuration of the mma.sp kernel is fastest here, found out once for each product and remembered.

Imports no triton; knows nothing of the kernel but that it can be called with a configuration.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

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

    One that cannot run here (too much shared memory, no code for this GPU) is left out; if none can, the first one's
    error is raised. While a CUDA graph is captured nothing can be timed: the first option is then taken, and nothing
    is remembered. Run a product once before capturing it.
    """
    known = _best.get(key)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return options[0]
    found: dict[Config, float] = {}
    errors: list[Exception] = []
    for option in options:
        try:
            found[option] = seconds(partial(run, option))
        except Exception as error:  # compilers and drivers share no type of error
            errors.append(error)
    if not found:
        raise errors[0]
    _best[key] = min(found, key=lambda option: found[option])
    return _best[key]


def known(key: Key) -> Config | None:
    """What was found for ``key``, or None if it was never measured."""
    return _best.get(key)


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the current CUDA stream, compilation left out.

    The L2 cache is overwritten before each, because a model's next product finds another layer's weight there.
    """
    call()
    flush = _flush_buffer()
    times = []
    for _ in range(_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        if flush is not None:
            flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) * 1e-3)
    return float(statistics.median(times))


def _flush_buffer() -> torch.Tensor | None:
    """Twice the memory of the L2 cache, or None on a GPU that is too full for it."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    try:
        return torch.empty(2 * size, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return None
