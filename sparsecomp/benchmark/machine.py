"""What a measurement was made on: processor, peaks, versions. Everything a reader needs to judge a figure."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sparsecomp
from sparsecomp.machine.device import Device

_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("torch", "onnxruntime", "openvino", "numpy")


def describe(device: Device, threads: list[int]) -> dict[str, Any]:
    """The machine as JSON values; peaks are measured for each number of threads."""
    integers = {count: device.integer_flops(count) for count in threads}
    return {
        "cpu": device.name,
        "isa": device.isa,
        "vnni": vnni(),
        "cores": device.cores,
        "caches": {"l1": device.l1_bytes, "l2": device.l2_bytes, "l3": device.l3_bytes},
        "os": platform.system(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "sparsecomp": sparsecomp.__version__,
        "commit": commit(),
        "peaks": {
            str(count): {
                "fp32_gflops": round(device.flops(torch.float32, count) / 1e9, 1),
                "bf16_gflops": round(device.flops(torch.bfloat16, count) / 1e9, 1),
                "int8_gops": None if (peak := integers[count]) is None else round(peak / 1e9, 1),
                "read_gb_s": round(device.bandwidth(count) / 1e9, 1),
            }
            for count in threads
        },
    }


def vnni() -> bool:
    """Whether the processor multiplies and adds four pairs of bytes in one instruction, whatever the kernels use."""
    try:
        return re.search(r"\b(avx512_vnni|avx_vnni)\b", _CPUINFO.read_text()) is not None
    except OSError:
        return False


def package_version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout this file lies in, or None where it is no checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
