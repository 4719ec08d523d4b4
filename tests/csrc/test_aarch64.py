"""The kernels of aarch64, cross-compiled and run by an emulator, where a cross compiler and qemu-user are installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSROOT = "/usr/aarch64-linux-gnu"
# An instruction set, and a processor that has it and nothing above. `neon` and `neon_dotprod` differ in int8 alone.
PROCESSORS = {"neon": "cortex-a53", "neon_dotprod": "cortex-a76"}
PROGRAMS = {
    "neon": ["common_test", "nm_test", "int8_test", "block_test", "random_test"],
    "neon_dotprod": ["int8_test", "random_test"],
}


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


def _emulated(isa: str, processor: str, *command: str) -> subprocess.CompletedProcess[str]:
    emulator = _tool("qemu-aarch64", "qemu-aarch64-static")
    return subprocess.run(
        [emulator, "-L", SYSROOT, "-cpu", processor, *command],
        env=os.environ | {"SPARSECOMP_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(("isa", "program"), [(isa, each) for isa in PROGRAMS for each in PROGRAMS[isa]])
def test_kernels_under_an_emulator(built, isa, program):
    done = _emulated(isa, PROCESSORS[isa], str(built / program))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("common:" if program == "common_test" else f"{isa}:")
    assert " 0 failures" in done.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("isa", PROCESSORS)
def test_the_processor_decides(built, isa):
    done = _emulated("", PROCESSORS[isa], str(built / "random_test"), "--count", "1")
    assert done.stdout.startswith(f"{isa}:"), done.stdout + done.stderr


@pytest.mark.exhaustive
def test_dot_products_are_refused_where_there_are_none(built):
    done = _emulated("neon_dotprod", PROCESSORS["neon"], str(built / "random_test"), "--count", "1")
    assert (
        "SPARSECOMP_ISA=neon_dotprod cannot run on this machine; it can run neon,reference" in done.stdout + done.stderr
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(("isa", "own", "foreign"), [("neon", "smull", "sdot"), ("neon_dotprod", "sdot", "smull")])
def test_int8_kernels_hold_their_own_instruction_and_prefetches(built, isa, own, foreign):
    """GCC drops calls of functions that only prefetch."""
    (compiled,) = built.rglob(f"int8/arm/{isa}.cpp.o")
    code = _run(_tool("aarch64-linux-gnu-objdump"), "--disassemble", "--no-show-raw-insn", str(compiled))
    functions = re.findall(r"^\w+ <(\S+)>:\n(.*?)(?:\n\n|\Z)", code, re.MULTILINE | re.DOTALL)
    # the probe of the peak multiplies as well, and reads nothing
    kernels = {name: body for name, body in functions if f"\t{own}\tv" in body and "operations" not in name}
    assert len(kernels) >= 40
    assert [name for name, body in kernels.items() if "\tprfm" not in body] == []
    assert f"\t{foreign}\tv" not in code
