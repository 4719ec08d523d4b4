"""The kernels of aarch64, cross-compiled and run by an emulator, where a cross compiler and qemu-user are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSROOT = "/usr/aarch64-linux-gnu"


def _tool(*names: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = next((found for name in names if (found := shutil.which(name, path=path))), None)
    return found or pytest.skip(f"needs {' or '.join(names)}")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    cmake, compiler, c_compiler = _tool("cmake"), _tool("aarch64-linux-gnu-g++"), _tool("aarch64-linux-gnu-gcc")
    _tool("qemu-aarch64", "qemu-aarch64-static")
    folder = tmp_path_factory.mktemp("aarch64")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    compilers = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_C_COMPILER={c_compiler}"]
    parts = ["-DSPARSECOMP_PYTHON=OFF", "-DSPARSECOMP_ORT=OFF", "-DSPARSECOMP_TESTS=ON"]
    _run(cmake, "-S", str(ROOT), "-B", str(folder), *target, *compilers, *parts)
    _run(cmake, "--build", str(folder), "--parallel", "2")
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("program", ["common_test", "nm_test", "int8_test", "block_test", "random_test"])
def test_neon_under_an_emulator(built, monkeypatch, program):
    monkeypatch.setenv("SPARSECOMP_ISA", "neon")
    report = _run(_tool("qemu-aarch64", "qemu-aarch64-static"), "-L", SYSROOT, str(built / program))
    assert report.startswith("common" if program == "common_test" else "neon")
    assert " 0 failures" in report
