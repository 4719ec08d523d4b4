"""What this machine is: instruction set or SM, cores, caches, and peaks measured when first asked for.

Gives a frozen Device. Creates no CUDA context unless a CUDA device is asked for.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from sparsecomp.errors import BackendError, PatternError
from sparsecomp.machine import cache
from sparsecomp.machine.clock import seconds
from sparsecomp.machine.native import DTYPE_CODES, ROUNDING_CODE, native
from sparsecomp.patterns import NM
from sparsecomp.reporting.terminal import counted

_CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}
_CACHE_INDEX = Path("/sys/devices/system/cpu/cpu0/cache")
_FLOPS_ROUND_US = 20_000
# permutes of eight columns count as fast as those of four from this part of their rate on: one processor shows 0.89,
# where whole products are a tenth apart, another 0.5
_AS_FAST = 0.8
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Device:
    """One place where a model can run.

    ``isa`` is the instruction set in use ("avx512_bf16", "avx2", ...) or the compute capability ("sm_90").
    ``cores`` are CPU cores this process may use, or multiprocessors. Cache sizes are in bytes, None if unknown.
    ``index`` is torch's number of a GPU.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    isa: str
    cores: int
    l1_bytes: int | None
    l2_bytes: int | None
    l3_bytes: int | None
    index: int = 0

    @property
    def place(self) -> str:
        """torch's name of the device: "cpu", "cuda:0", ..."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def fingerprint(self) -> str:
        """A short text equal for equal machines; measurements are kept under it."""
        facts = (self.kind, self.name, self.isa, self.cores, self.l1_bytes, self.l2_bytes, self.l3_bytes)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def last_level_bytes(self) -> int:
        """Size of the last cache before memory, 0 if unknown."""
        return self.l3_bytes or self.l2_bytes or 0

    @property
    def threads(self) -> int:
        """Threads a product uses here: torch.get_num_threads() on a CPU, 1 stream on a GPU."""
        return torch.get_num_threads() if self.kind == "cpu" else 1

    def natural_pattern(self, density: float = 0.5) -> NM:
        """The N:M pattern of that density that suits this machine: M=16 on AVX-512, 8 or 4 on AVX2, else 4.

        On AVX2 the measured rates of permutes decide: groups of 8 lose less accuracy, so they are taken unless those of
        4 are permuted faster. Raises PatternError for a density that no N of that group has.
        """
        m = self._natural_group()
        n = round(density * m)
        if not 1 <= n <= m or abs(n / m - density) > 1e-9:
            raise PatternError(f"density {density} is no N of {m}, the group of {self.isa}; use a multiple of 1/{m}")
        return NM(n, m)

    def _natural_group(self) -> int:
        if self.kind == "cpu" and self.isa.startswith("avx512"):
            return 16
        four, eight = self.pair_rate(4), self.pair_rate(8)
        return 4 if four is None or eight is None or eight < _AS_FAST * four else 8

    def pair_rate(self, columns: int) -> float | None:
        """Permutes in groups of that many columns (4, 8 or 16), each with its multiply-add, per second on one thread.

        With ``columns`` 1 multiply-adds alone, with a memory operand. By these rates the kernels of AVX2 are chosen;
        None where no kernel is.
        """
        module = native()
        if self.kind != "cpu" or not self.isa.startswith("avx2") or isinstance(module, str):
            return None
        measured = float(module.pair_rate(columns))
        return self._peak(f"pairs {columns}", lambda: measured) if measured else None

    def flops(self, dtype: torch.dtype, threads: int | None = None) -> float:
        """Measured peak of multiply-adds in ``dtype``, each counted as two operations, per second."""
        threads = threads or self.threads
        return self._peak(f"flops {dtype} {threads}", lambda: _measure_flops(self.place, dtype, threads))

    def bandwidth(self, threads: int | None = None) -> float:
        """Measured rate of reading memory beyond the caches, bytes per second."""
        threads = threads or self.threads
        return self._peak(f"bandwidth {threads}", lambda: _measure_bandwidth(self.place, threads))

    def integer_flops(self, threads: int | None = None) -> float | None:
        """Measured peak of multiply-adds of int8 by int8, each counted as two; None where no kernel multiplies them."""
        threads, module = threads or self.threads, native()
        if self.kind != "cpu" or isinstance(module, str):
            return None
        measure = partial(module.measure_flops, ROUNDING_CODE, threads, _FLOPS_ROUND_US)
        return self._peak(f"flops int8 {threads}", lambda: float(measure()))

    def _peak(self, what: str, measure: Callable[[], float]) -> float:
        key = f"{self.fingerprint} {what}"
        if key not in _peaks:
            # a busy moment shows too low a peak, so every process looks once and the highest ever seen counts
            measured, kept = measure(), cache.read("peaks").get(key)
            if isinstance(kept, float) and kept >= measured:
                _peaks[key] = kept
            else:
                _peaks[key] = measured
                cache.store("peaks", key, measured)
        return _peaks[key]

    def describe(self) -> str:
        """One line for a person."""
        caches = ((level, getattr(self, f"{level}_bytes")) for level in ("l1", "l2", "l3"))
        sizes = ", ".join(f"{level.upper()} {_size(count)}" for level, count in caches if count)
        units = (
            f"{counted(self.cores, 'core')}, {counted(self.threads, 'thread')}"
            if self.kind == "cpu"
            else f"{self.cores} SMs"
        )
        return ", ".join(filter(None, (f"{self.kind}: {self.name}", self.isa, units, sizes)))


_peaks: dict[str, float] = {}


def detect(kind: str = "auto") -> Device:
    """This machine's "cpu", its current "cuda" device or that of "cuda:1"; "auto" is cuda where there is one.

    Raises BackendError for another name, and for a cuda device that torch does not see.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return _cpu()
    if re.fullmatch(r"cuda(:\d+)?", kind):
        return _cuda(torch.device(kind).index)
    raise BackendError(f'device "{kind}" is not known; use "auto", "cpu", "cuda" or "cuda:1"')


def _cpu() -> Device:
    module = native()
    # torch's own view of the instruction set, where the extension is not there to ask
    capability = _CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "reference")
    isa = capability if isinstance(module, str) else module.isa()
    sizes = _cache_sizes()
    return Device("cpu", _cpu_name(), isa, len(os.sched_getaffinity(0)), sizes.get(1), sizes.get(2), sizes.get(3))


def _cuda(index: int | None) -> Device:
    if not torch.cuda.is_available():
        raise BackendError('device "cuda" was asked for but torch sees no CUDA GPU; use device="cpu"')
    index = torch.cuda.current_device() if index is None else index
    if index >= torch.cuda.device_count():
        raise BackendError(f'device "cuda:{index}" is not there; torch sees {torch.cuda.device_count()} CUDA devices')
    facts = torch.cuda.get_device_properties(index)
    isa = f"sm_{facts.major}{facts.minor}"
    return Device("cuda", facts.name, isa, facts.multi_processor_count, None, facts.L2_cache_size, None, index)


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cache_sizes(root: Path = _CACHE_INDEX) -> dict[int, int]:
    """Bytes of the data or unified cache of each level, as the kernel reports them for the first core."""
    sizes: dict[int, int] = {}
    for index in sorted(root.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            found = re.fullmatch(r"(\d+)([KMG]?)", size)
            if kind in ("Data", "Unified") and found:
                sizes[int(level)] = int(found[1]) * _UNITS[found[2]]
        except (OSError, ValueError):
            continue
    return sizes


def _size(count: int) -> str:
    return f"{count / (1 << 20):g} MB" if count >= 1 << 20 else f"{count / (1 << 10):g} KB"


def _measure_flops(place: str, dtype: torch.dtype, threads: int) -> float:
    module = native()
    if place == "cpu" and isinstance(module, ModuleType) and dtype in DTYPE_CODES:
        return float(module.measure_flops(DTYPE_CODES[dtype], threads, _FLOPS_ROUND_US))
    side = 1024 if place == "cpu" else 8192
    a, b = (torch.ones(side, side, device=place, dtype=dtype) for _ in range(2))
    return 2.0 * side**3 / _best_seconds(lambda: a @ b, place)


def _measure_bandwidth(place: str, threads: int) -> float:
    module = native()
    if place == "cpu" and isinstance(module, ModuleType):
        return float(module.measure_read_bandwidth(threads))
    data = torch.ones((1 << 28 if place == "cpu" else 1 << 30) // 4, device=place, dtype=torch.float32)
    return data.nbytes / _best_seconds(data.sum, place)


def _best_seconds(call: Callable[[], object], place: str, repeats: int = 8) -> float:
    """Shortest time of one call; the shortest, because a peak is asked for."""
    return min(seconds(call, place) for _ in range(repeats))
