"""Times of products on this machine: as values, looked up, and kept for other processes. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsecomp.machine import cache
from sparsecomp.machine.device import Device, detect
from sparsecomp.machine.native import native
from sparsecomp.machine.request import Request
from sparsecomp.machine.sources import digest, file_digest, gpu_folders

SPARSE, DENSE, UNPACKED = "sparse", "dense", "unpacked"
# a dense product in float32 of a layer of less, x and y converted in the call
WIDENED = "dense float32"
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

_STEADY = 0.25  # spread up to which a measurement is kept for other processes; a busy machine shows more


@dataclass(frozen=True)
class Measurement:
    """Medians of one request on this machine.

    ``seconds`` by candidate: "sparse" (the layer's kernel, named by ``kernel``), "dense" (nn.Linear in the layer's
    dtype), "dense float32" (nn.Linear in float32 between conversions of x and y, for a layer of less on a CPU),
    "unpacked" (the weight unpacked at every call, then a dense product). ``spread`` is the interquartile range over the
    median. ``cold`` tells whether the weights were rotated over more memory than the last-level cache holds.
    """

    kernel: str
    seconds: Mapping[str, float]
    spread: Mapping[str, float]
    cold: bool

    @property
    def dense(self) -> float:
        """Seconds of the fastest dense product of this process."""
        return min(self.seconds[DENSE], self.seconds.get(WIDENED, self.seconds[DENSE]))

    @property
    def speedup(self) -> float:
        """Dense time over sparse time."""
        return self.dense / self.seconds[SPARSE]

    def baseline(self, dtype: torch.dtype) -> str:
        """The name of the dense product that ``dense`` is the time of, in a layer of ``dtype``: "torch bf16"."""
        ways = self.dense_ways(dtype)
        return min(ways, key=lambda way: ways[way])

    def dense_ways(self, dtype: torch.dtype) -> dict[str, float]:
        """Seconds of each dense product of this process by its name, that of a layer of ``dtype`` as it is first."""
        own = f"torch {_SHORT[dtype]}"
        widened = {"torch fp32": self.seconds[WIDENED]} if WIDENED in self.seconds else {}
        return {own: self.seconds[DENSE], **widened}


_known: dict[str, Measurement] = {}


def lookup(request: Request, backend: str, device: Device | None = None) -> Measurement | None:
    """What is already known of a request by that backend on this machine, without measuring."""
    device = device or detect(request.device)
    key = _key(request, device, backend)
    if key not in _known:
        found = _from_json(cache.read("tune").get(key))
        if found is None:
            return None
        _known[key] = found
    return _known[key]


def keep(measurement: Measurement, request: Request, device: Device) -> None:
    """Remember a measurement of the backend it names, where it is steady also for other processes."""
    key = _key(request, device, measurement.kernel)
    if max(measurement.spread.values()) <= _STEADY:
        cache.store("tune", key, _as_json(measurement))
    _known[key] = measurement


def widens(request: Request) -> bool:
    """Whether its dense layer could also run in float32, which a CPU may multiply faster than what is narrower."""
    return request.device == "cpu" and request.dtype in (torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def _versions() -> str:
    try:
        own = version("sparsecomp")
    except PackageNotFoundError:
        own = "source"
    module = native()
    kernels = "none" if isinstance(module, str) else file_digest(Path(str(module.__file__)))
    return f"{own} kernels {kernels} torch {torch.__version__}"


@lru_cache(maxsize=1)
def _gpu_versions() -> str:
    """What the kernels of a GPU are made of besides: Triton, which compiles them, and their sources."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"triton {triton} sources {digest(gpu_folders())}"


def _key(request: Request, device: Device, backend: str) -> str:
    out, columns = request.shape
    numbers = request.numbers
    dtype = f"{request.dtype} of {numbers} weights" if numbers.has_scales else request.dtype
    what = f"{request.pattern} {out}x{columns} {dtype} batch {request.batch} threads {device.threads}"
    versions = _versions() if device.kind == "cpu" else f"{_versions()} {_gpu_versions()}"
    beside = " beside float32" if widens(request) else ""
    return f"{device.fingerprint} {versions} {what}{beside} by {backend}"


def _as_json(measurement: Measurement) -> dict[str, Any]:
    return {
        "kernel": measurement.kernel,
        "seconds": dict(measurement.seconds),
        "spread": dict(measurement.spread),
        "cold": measurement.cold,
    }


def _from_json(entry: Any) -> Measurement | None:
    """The measurement of a cache entry, or None for one that was not written by ``_as_json``."""
    if not isinstance(entry, dict):
        return None
    kernel, seconds, spread, cold = (entry.get(name) for name in ("kernel", "seconds", "spread", "cold"))
    if not isinstance(kernel, str) or not isinstance(seconds, dict) or not isinstance(spread, dict):
        return None
    times = [seconds.get(SPARSE), seconds.get(DENSE), *seconds.values()]
    if not all(isinstance(value, float) and value > 0 for value in times):
        return None
    return Measurement(kernel, seconds, spread, bool(cold))
