"""The cores a new pool of threads may use where OpenMP has bound the thread that makes it.

With ``OMP_PROC_BIND=true`` the OpenMP of torch binds the thread that imports torch to one core, and threads of every
kind that this thread starts later inherit that core. Knows Linux, OpenMP's own functions and nothing of this package.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_RUNTIME = re.compile(r"/lib(?:gomp|omp|iomp5)\b[^/]*$")


@contextmanager
def unbound() -> Iterator[frozenset[int]]:
    """Within it, this thread may use all cores OpenMP deals out; gives those that are not this thread's own.

    Empty, with nothing changed, unless OpenMP bound this thread: cores chosen with taskset or os.sched_setaffinity
    count as the user's wish.
    """
    own = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()
    places = [place for place in _places() if place]
    everywhere = frozenset[int]().union(*places)
    if own not in places or own == everywhere:
        yield frozenset()
        return
    try:
        os.sched_setaffinity(0, everywhere)
    except OSError:  # none of them is allowed any more
        yield frozenset()
        return
    try:
        yield frozenset(os.sched_getaffinity(0)) - own
    finally:
        os.sched_setaffinity(0, own)


def _places() -> list[frozenset[int]]:
    """The places of the OpenMP runtimes in this process; none where no binding was asked for."""
    try:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines()}
    except OSError:
        return []
    found = []
    for path in sorted(path for path in mapped if _RUNTIME.search(path)):
        try:
            runtime = ctypes.CDLL(path)  # the copy that is loaded already
            for place in range(runtime.omp_get_num_places()):
                cores = (ctypes.c_int * runtime.omp_get_place_num_procs(place))()
                runtime.omp_get_place_proc_ids(place, cores)
                found.append(frozenset(cores))
        except (OSError, AttributeError):  # a runtime from before OpenMP 4.5
            continue
    return found
