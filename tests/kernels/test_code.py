"""What a compiler must not leave out of the kernels, though no result depends on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
# x86-64, and aarch64
PREFETCHES = ("prefetch", "prfm")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} here")
@pytest.mark.parametrize("source", ["linear.cpp", "block_linear.cpp", "panel.cpp"])
def test_prefetches_are_in_the_code(source):
    """GCC drops calls of functions that do nothing else, silently; a product then waits for every line of y."""
    command = [COMPILER, "-O3", "-std=c++17", f"-I{CSRC / 'include'}", "-S", "-o", "-", str(CSRC / "cpu" / source)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert any(name in code for name in PREFETCHES)
