"""What a GPU sweep ran on: GPU, driver, versions, and clocks and power during the run where nvidia-smi is there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparsecomp.benchmark.machine import commit, package_version

_PACKAGES = ("torch", "triton", "nvidia-cusparselt-cu13", "nvidia-cublas", "cupy-cuda13x", "sparsecomp")
_WATCHED = {
    "clocks.sm": "SM clock, MHz",
    "clocks.mem": "memory clock, MHz",
    "power.draw": "power, W",
    "temperature.gpu": "temperature, C",
}
_EVERY_MS = 500


def describe() -> dict[str, Any]:
    """The current CUDA device and the software on it, as JSON values."""
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / (1 << 30), 1),
        "l2_mib": facts.L2_cache_size >> 20,
        "driver": _ask("driver_version"),
        "power limit, W": _ask("power.limit"),
        "cuda": torch.version.cuda,
        "packages": {name: package_version(name) for name in _PACKAGES},
        # a copy without its history is told by whoever copied it
        "commit": commit() or os.environ.get("SPARSECOMP_COMMIT") or "unknown; SPARSECOMP_COMMIT names it",
    }


@contextmanager
def watch(found: dict[str, tuple[float, float]]) -> Iterator[None]:
    """Fill ``found`` with the lowest and highest of each watched figure while the block runs."""
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_WATCHED)}",
        "--format=csv,noheader,nounits",
        f"--loop-ms={_EVERY_MS}",
    ]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "watched.csv"
        with path.open("w") as file:
            try:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
            except OSError:
                process = None
            try:
                yield
            finally:
                if process is not None:
                    process.terminate()
                    process.wait()
        # a run too short for the loop, or output that was lost with it, is seen as it ends
        found.update(ranges(path.read_text().splitlines()) or ranges([_ask(",".join(_WATCHED)) or ""]))


def ranges(lines: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Lowest and highest of each column that nvidia-smi printed; cut lines and figures it lacks are passed over."""
    columns: list[list[float]] = [[] for _ in _WATCHED]
    for line in lines:
        cells = line.split(",")
        if len(cells) != len(columns):
            continue
        for column, cell in zip(columns, cells, strict=True):
            try:
                column.append(float(cell))
            except ValueError:
                continue
    names = _WATCHED.values()
    return {name: (min(column), max(column)) for name, column in zip(names, columns, strict=True) if column}


def _ask(field: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
