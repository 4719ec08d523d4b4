"""What the backends of this machine answer about every pattern, numbers and dtype: a matrix to print.

Takes a device, gives each backend's own answers, a row for each kind of weight. Knows nothing of models and of tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsecomp.backends.base import Backend
from sparsecomp.backends.registry import backends
from sparsecomp.machine.request import Request
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import COMPUTED, LAYER_DTYPES, integers_why_not

# one of each kind of pattern, those with kernels of their own above all
PATTERNS = ("1:4", "2:4", "4:8", "8:16", "2:4@v4", "64:2:8", "block16x16:0.5")
SHAPE, BATCH = (1024, 1024), 16  # of the product that is asked about; fits every rule of divisibility


@dataclass(frozen=True)
class Row:
    """What one backend says of weights stored in ``numbers``, where x has any of ``dtypes``.

    ``answers`` holds, for each of ``PATTERNS``, None if it runs, else the reason why not. ``by_name_only`` holds, for
    each, why nobody gets the backend there without naming it, or None.
    """

    backend: str
    numbers: str
    dtypes: tuple[str, ...]
    answers: tuple[str | None, ...]
    by_name_only: tuple[str | None, ...]


def support(place: str) -> list[Row]:
    """The rows of a device ("cpu", "cuda:0") in order of preference; backends that are missing have none."""
    return [row for backend in backends().values() if backend.missing() is None for row in _rows(backend, place)]


def _rows(backend: Backend, place: str) -> Iterator[Row]:
    """Dtypes that are answered alike share a row."""
    for numbers in COMPUTED:
        alike: dict[tuple[tuple[str | None, ...], tuple[str | None, ...]], list[str]] = {}
        for dtype in LAYER_DTYPES:
            requests = [Request(parse(pattern), SHAPE, dtype, place, BATCH, numbers) for pattern in PATTERNS]
            answers = tuple(integers_why_not(each.pattern, each.numbers) or backend.supports(each) for each in requests)
            by_name = tuple(backend.by_name_only(each) for each in requests)
            alike.setdefault((answers, by_name), []).append(str(dtype).removeprefix("torch."))
        for (answers, by_name), dtypes in alike.items():
            yield Row(backend.name, str(numbers), tuple(dtypes), answers, by_name)
