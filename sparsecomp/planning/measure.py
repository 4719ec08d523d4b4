"""Measures the ways to run one product on this machine, and remembers the result across processes.

Takes a Request, gives a Measurement. Decides nothing: the plan does.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice

import torch
from torch import nn
from torch.nn import functional

from sparsecomp.backends import registry
from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.machine import clock
from sparsecomp.machine.device import Device, detect
from sparsecomp.machine.request import Request
from sparsecomp.machine.timings import DENSE, SPARSE, UNPACKED, WIDENED, Measurement, keep, lookup, widens
from sparsecomp.nn import SparseLinear
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns import Pattern, rows_together
from sparsecomp.patterns.project import project

_BUDGET = 0.04  # seconds of measuring, per request
_SAMPLE = 1e-4  # seconds one timed sample should last, far above the clock's resolution
_LEAST_SAMPLES, _MOST_SAMPLES = 3, 41
_COPIES_BYTES = 128 << 20  # dense bytes of weights to rotate over, at most
_MOST_COPIES = 64
_HOPELESS = 3.0  # a candidate this many times slower than another is not measured further
_DISTINCT_ROWS = 256


def measure(
    request: Request, *, budget: float = _BUDGET, again: bool = False, backend: str | None = None
) -> Measurement:
    """The measurement of a request with a bias, from the cache where it is known.

    ``budget`` is in seconds; ``again`` measures even so; ``backend`` names another than the first that runs it. Modules
    are called as a model calls them, so that the cost of a call counts. Raises BackendError where no backend runs the
    request, ModelError where the named one does not, and what its library raises where it cannot prepare a weight.
    """
    device = detect(request.device)
    backend = backend or registry.choose(request)
    if not again and (known := lookup(request, backend, device)) is not None:
        return known
    copies, cold = rotation(request, device)
    weight = in_numbers(random_weight(request.pattern, request.shape, request.dtype), request.numbers)
    weight = weight.to(request.device)
    bias = torch.zeros(request.shape[0], dtype=request.dtype, device=request.device)
    sparse = [SparseLinear.from_packed(weight, bias, backend=backend)]
    sparse += [copy.deepcopy(sparse[0]) for _ in range(copies - 1)]
    dense = [sparse[0].to_linear()]
    dense += [copy.deepcopy(dense[0]) for _ in range(copies - 1)]
    kernel = sparse[0].kernel
    calls: dict[str, Sequence[Callable[[torch.Tensor], object]]] = {SPARSE: sparse, DENSE: dense}
    if widens(request):
        calls[WIDENED] = [partial(_widened, copy.deepcopy(layer).float()) for layer in dense]
    if kernel.backend != "dense":
        calls[UNPACKED] = [
            partial(_unpacked, registry.backends()[kernel.backend], layer.kernel, bias) for layer in sparse
        ]
    x = torch.randn(request.batch, request.shape[1], device=request.device, dtype=torch.float32).to(request.dtype)
    with torch.inference_mode():
        samples = _interleaved(calls, x, budget)
    measurement = Measurement(
        kernel.backend,
        {name: statistics.median(times) for name, times in samples.items()},
        {name: _spread(times) for name, times in samples.items()},
        cold,
    )
    keep(measurement, request, device)
    return measurement


def random_weight(pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> PackedWeight:
    """A packed weight [out, in] on the CPU with random values at random positions; every slot is used."""
    out, columns = shape
    generator = torch.Generator("cpu").manual_seed(seed)
    # choosing positions is the costly part, so rows repeat; blocks are counted over the whole weight
    tile = rows_together(pattern, out)
    rows = min(out, -(-_DISTINCT_ROWS // tile) * tile)
    mask = project(torch.rand(rows, columns, generator=generator, device="cpu", dtype=torch.float32), pattern)
    values = torch.empty(out, columns, device="cpu", dtype=torch.float32).uniform_(0.5, 1.0, generator=generator)
    values *= mask.repeat(-(-out // max(rows, 1)), 1)[:out]
    return pack(values.to(dtype), pattern)


def _unpacked(backend: Backend, kernel: Kernel, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, backend.dense(kernel), bias)


def _widened(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x.float(), layer.weight, layer.bias).to(x.dtype)


def rotation(request: Request, device: Device) -> tuple[int, bool]:
    """How many weights to rotate over, and whether their packed form then exceeds the last-level cache."""
    weight = max(request.shape[0] * request.shape[1] * request.dtype.itemsize, 1)
    bits = request.numbers.weight_bits(request.dtype)
    packed = weight * request.pattern.density * bits / (8 * request.dtype.itemsize)
    wanted = int(1.5 * device.last_level_bytes // max(packed, 1)) + 1
    copies = max(1, min(wanted, _MOST_COPIES, _COPIES_BYTES // weight))
    return copies, copies * packed > device.last_level_bytes


def _interleaved(
    calls: Mapping[str, Sequence[Callable[[torch.Tensor], object]]], x: torch.Tensor, budget: float
) -> dict[str, list[float]]:
    """Seconds per call of each candidate; candidates take turns, so that a slow spell of the machine meets them all."""
    for copies in calls.values():
        copies[0](x)
    first = {name: _sampler([copies[1 % len(copies)]], x, 1)() for name, copies in calls.items()}
    best = min(first.values())
    running = [name for name in calls if name in (SPARSE, DENSE) or first[name] < _HOPELESS * best]
    repeats = {name: max(1, round(_SAMPLE / max(first[name], 1e-9))) for name in running}
    samplers = {name: _sampler(calls[name], x, repeats[name]) for name in running}
    samples = clock.in_turn(samplers, budget, _LEAST_SAMPLES, _MOST_SAMPLES, shift=0)
    return samples | {name: [first[name]] for name in calls if name not in running}


def _sampler(copies: Sequence[Callable[[torch.Tensor], object]], x: torch.Tensor, repeats: int) -> Callable[[], float]:
    """Gives seconds of one call, as so many calls take that rotate over the copies."""
    rotating = cycle(copies)

    def run() -> None:
        for call in islice(rotating, repeats):
            call(x)

    return lambda: clock.seconds(run, str(x.device)) / repeats


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle
