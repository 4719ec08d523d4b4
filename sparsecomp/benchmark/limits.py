"""The bound of a row by bytes and counted products, and how many copies of a weight keep it cold.

Takes settings, a shape and a device, gives numbers. Knows nothing of engines' times.
"""

from __future__ import annotations

from sparsecomp.benchmark.settings import Settings
from sparsecomp.engines.base import DTYPES, Engine
from sparsecomp.machine.bound import Bound, bound, packed_nbytes
from sparsecomp.machine.device import Device
from sparsecomp.machine.request import Request
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8_A8, parse_weights

# copies that together exceed the last-level cache by this much leave nothing of the first when the last is done
_BEYOND_CACHE = 1.5
# a weight smaller than this would take hundreds of copies, each with buffers and a session of its own in each engine
_SMALLEST_COLD = 128 * 1024


def limit_of(
    engine: Engine, shape: tuple[int, int], dtype: str, batch: int, device: Device, threads: int, warm: bool
) -> Bound:
    """The bound of one of our engines against dense in the same numbers: floating, or int8 with int8 activations.

    Of int8 both do their products at the measured peak of int8, with x and y in ``dtype``. What finding and shuffling
    kept values costs is not counted.
    """
    pattern = parse(engine.pattern or "")
    request = Request(pattern, shape, DTYPES[dtype], "cpu", batch, engine.numbers)
    beside = FLOAT if engine.numbers.activation_bits is None else INT8_A8
    return bound(request, device, threads, warm, beside)


def copies_of(settings: Settings, device: Device, shape: tuple[int, int], dtype: str) -> int:
    """How many copies of a weight exceed the last-level cache in its smallest packed form; 1 where none is cold."""
    if not settings.cold_batches:
        return 1
    return max(2, round(_BEYOND_CACHE * device.last_level_bytes / _packed_bytes(settings, shape, dtype)))


def too_small(settings: Settings, shape: tuple[int, int], dtype: str) -> str | None:
    """Why cold weights of this shape are not measured, or None if they are."""
    size = _packed_bytes(settings, shape, dtype)
    if not settings.cold_batches or size >= _SMALLEST_COLD:
        return None
    return (
        f"a weight of {size / 1024:.3g} KiB is smaller than the {_SMALLEST_COLD // 1024} KiB from which cold weights "
        "are measured: hundreds of copies would have to fill the cache"
    )


def _packed_bytes(settings: Settings, shape: tuple[int, int], dtype: str) -> int:
    """The smallest of the packed weights."""
    weights = [parse_weights(label) for label in settings.patterns]
    return min(packed_nbytes(pattern, shape, DTYPES[dtype], numbers) for pattern, numbers in weights)
