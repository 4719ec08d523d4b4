"""What the other engines of this machine take for dense layers, each in a process of its own; known times are kept.

Takes a shape, a dtype and batches, gives seconds by engine and the reason for each that gave none. Decides nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

import torch

from sparsecomp.engines.base import DTYPES, Engine, titled
from sparsecomp.engines.product import Product
from sparsecomp.engines.pytorch import TorchEngine
from sparsecomp.engines.registry import dense_engines, given
from sparsecomp.engines.worker import Worker, answers, workers
from sparsecomp.machine import cache, clock
from sparsecomp.machine.device import Device

_BUDGET = 0.15  # seconds of measuring, for all engines of a shape and batch
_LEAST_SAMPLES, _MOST_SAMPLES = 5, 41
_STEADY = 0.25  # spread up to which a time is kept for other processes
_PACKAGES = ("torch", "onnxruntime", "openvino")


class Peers:
    """The engines beside torch's own product; their processes start when the first layer is not known, and end with it.

    ``missing`` gains the engines that gave no times, each with the reason.
    """

    def __init__(self, device: Device, engines: Sequence[Engine] | None = None) -> None:
        """Those of ``device``, which is a CPU; ``engines`` are all there is code for, unless given."""
        self.missing: dict[str, str] = {}
        self._device = device
        self._engines = [each for each in engines or dense_engines() if not isinstance(each, TorchEngine)]
        self._stack = ExitStack()
        self._started: dict[str, Worker] = {}

    def __enter__(self) -> Peers:
        """Nothing starts yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        self._stack.close()

    def seconds(
        self, shape: tuple[int, int], dtype: torch.dtype, batches: Sequence[int], copies: int
    ) -> dict[str, dict[int, float]]:
        """Seconds of one call by engine and batch, over ``copies`` weights [out, in] in turn.

        An engine that does not take ``dtype`` gets fp32, as its user would give it.
        """
        ready = self._ready(dtype)
        known = {batch: _known(self._key(shape, dtype, batch, copies), ready) for batch in batches}
        asked = [batch for batch in batches if known[batch] is None]
        if asked and ready:
            known |= self._measured(ready, shape, dtype, asked, copies)
        found: dict[str, dict[int, float]] = {}
        for batch in batches:
            for name, taken in (known[batch] or {}).items():
                found.setdefault(name, {})[batch] = taken
        return found

    def _ready(self, dtype: torch.dtype) -> dict[str, tuple[Engine, str]]:
        """The engines that run here by what they are called, each with the dtype that it is given."""
        own = next((name for name, each in DTYPES.items() if each == dtype), "fp32")
        found = {}
        for engine in self._engines:
            taken = given(engine, own)
            reason = engine.missing(taken)
            if reason is None:
                found[engine.title(taken)] = engine, taken
            else:
                self.missing[titled(engine.name)] = reason
        return {name: each for name, each in found.items() if name not in self.missing}

    def _measured(
        self,
        ready: Mapping[str, tuple[Engine, str]],
        shape: tuple[int, int],
        dtype: torch.dtype,
        batches: Sequence[int],
        copies: int,
    ) -> dict[int, dict[str, float] | None]:
        self._start(ready)
        running = {name: self._started[name] for name in ready if name in self._started}
        calls = {name: (shape, ready[name][1], copies) for name in running}
        self._ask(running, "load", calls)
        found: dict[int, dict[str, float] | None] = {}
        for batch in batches:
            errors = self._ask(running, "bind", dict.fromkeys(running, (batch, copies)))
            for name, error in errors.items():
                engine, taken = ready[name]
                if not error <= engine.tolerance(taken):
                    self.missing[name] = engine.wrong(error, taken)
                    del running[name]
            self._ask(running, "sample", dict.fromkeys(running, ()))
            samplers = {name: partial(worker.ask, "sample") for name, worker in running.items()}
            samples = clock.in_turn(samplers, _BUDGET, _LEAST_SAMPLES, _MOST_SAMPLES) if samplers else {}
            found[batch] = times = {name: statistics.median(each) / copies for name, each in samples.items()}
            if all(_spread(each) <= _STEADY for each in samples.values()):
                cache.store("engines", self._key(shape, dtype, batch, copies), times)
        return found

    def _start(self, ready: Mapping[str, tuple[Engine, str]]) -> None:
        threads = self._device.threads
        new = {name: engine for name, (engine, _) in ready.items() if name not in self._started}
        if new:
            makes = {name: partial(Product, engine, threads) for name, engine in new.items()}
            openmp = [name for name, engine in new.items() if engine.openmp]
            self._started |= self._stack.enter_context(workers(makes, threads, openmp))

    def _ask(self, running: dict[str, Worker], method: str, arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """What each answers; those that fail are missing from then on."""
        found, failed = answers({name: (running[name], arguments[name]) for name in running}, method)
        for name, reason in failed.items():
            self.missing[name] = reason
            del running[name]
        return found

    def _key(self, shape: tuple[int, int], dtype: torch.dtype, batch: int, copies: int) -> str:
        threads = self._device.threads
        what = f"dense {shape[0]}x{shape[1]} {dtype} batch {batch} threads {threads} copies {copies}"
        return f"{self._device.fingerprint} {' '.join(f'{name} {_version(name)}' for name in _PACKAGES)} {what}"


def _known(key: str, ready: Mapping[str, object]) -> dict[str, float] | None:
    """The times of a cache entry if they are those of all the engines that are ready now."""
    entry = cache.read("engines").get(key)
    if not isinstance(entry, dict) or entry.keys() != ready.keys():
        return None
    return entry if all(isinstance(value, float) and value > 0 for value in entry.values()) else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _spread(times: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle
