"""The C++ test program of the kernels, under AddressSanitizer and UndefinedBehaviorSanitizer, on every ISA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _tool(*names: str) -> str | None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_kernels_under_sanitizers(tmp_path):
    cmake, ctest, compiler = _tool("cmake"), _tool("ctest"), _tool("c++", "g++", "clang++")
    if cmake is None or ctest is None or compiler is None:
        pytest.skip("building the kernel test program needs cmake and a C++ compiler")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    link = [compiler, "-fsanitize=address,undefined", str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(link, capture_output=True, check=False).returncode != 0:
        pytest.skip("this compiler has no sanitizer libraries")
    _run(cmake, "--preset", "sanitize", "-S", str(ROOT), "-B", str(tmp_path))
    _run(cmake, "--build", str(tmp_path), "--parallel", "2")
    report = _run(ctest, "--test-dir", str(tmp_path), "--output-on-failure")
    assert "100% tests passed" in report
