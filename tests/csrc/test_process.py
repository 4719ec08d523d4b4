"""What the kernels owe the process they live in: its forks, its threads, its environment, machines without AVX."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_native = pytest.importorskip("sparsecomp._native", reason="the compiled kernels are not installed")

ROOT = Path(__file__).parents[2]
SETUP = f"""
import os, sys, threading, torch
sys.path.insert(0, {str(ROOT)!r})
from tests.csrc.native_weight import Layout, random_weight
from sparsecomp import _native
from sparsecomp.packing.format import pack

def layer(out, columns):
    weight = random_weight("2:4", out, columns, torch.float32, torch.Generator().manual_seed(0))
    return Layout.of(pack(weight, "2:4")), torch.randn(8, columns), torch.empty(8, out)

layout, x, y = layer(1024, 768)
layout.linear(x, None, y, 1)
"""


def _run(program: str, **environment: str | bytes) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _passes(body: str) -> None:
    done = _run(SETUP + body)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_computes():
    _passes(
        "layout.linear(x, None, y, 2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    z = torch.empty_like(y); layout.linear(x, None, z, 2); os._exit(0 if z.equal(y) else 3)\n"
        "import time; end = time.monotonic() + 20; done = (0, 0)\n"
        "while done[0] == 0 and time.monotonic() < end: done = os.waitpid(child, os.WNOHANG); time.sleep(0.01)\n"
        "if done[0] == 0: os.kill(child, 9)\n"
        "assert done == (child, 0), done\n"
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads through /proc")
def test_products_of_few_tasks_keep_the_workers_of_torch():
    _passes(
        "few = layer(64, 8192)\n"
        "def workers(): return sorted(os.listdir('/proc/self/task'))\n"
        "layout.linear(x, None, y, 6); before = workers()\n"
        "few[0].linear(few[1], None, few[2], 6); layout.linear(x, None, y, 6)\n"
        "assert workers() == before\n"
    )


def test_calls_from_several_threads_at_once():
    _passes(
        "want = y.clone(); wrong = []\n"
        "def work():\n"
        "    z = torch.empty_like(y)\n"
        "    for i in range(50):\n"
        "        z.zero_(); layout.linear(x, None, z, 1 + i % 2)\n"
        "        if not z.equal(want): wrong.append(i)\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "for t in threads: t.start()\n"
        "for t in threads: t.join()\n"
        "assert not wrong\n"
    )


@pytest.mark.parametrize("threads", [2**31 - 1, 2**62, -(2**62)])
def test_absurd_thread_counts_compute(threads):
    _passes(f"z = torch.empty_like(y); layout.linear(x, None, z, {threads}); assert z.equal(y)\n")


def test_any_bytes_in_the_environment_give_a_runtime_error():
    done = _run("from sparsecomp import _native; _native.isa()", SPARSECOMP_ISA=os.fsdecode(b"\xffavx\n"))
    assert "RuntimeError: SPARSECOMP_ISA=?avx? cannot run" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is one instruction set")
def test_nothing_compiled_for_one_instruction_set_runs_elsewhere(tmp_path):
    """No inline function the linker could hand to other files, and no code that runs when the library is loaded."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, nm = shutil.which("cmake", path=path), shutil.which("nm", path=path)
    if cmake is None or nm is None:
        pytest.skip("needs cmake and nm")
    off = ["-DSPARSECOMP_PYTHON=OFF", "-DSPARSECOMP_ORT=OFF", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (["-S", str(ROOT), "-B", str(tmp_path), *off], ["--build", str(tmp_path), "--parallel", "2"]):
        subprocess.run([cmake, *command], check=True, capture_output=True)
    objects = [file for file in tmp_path.rglob("*.o") if file.parent.name == "x86"]
    assert len(objects) == len(list((ROOT / "csrc/cpu").glob("*/x86/*.cpp")))
    for file in objects:
        listing = subprocess.run([nm, "--defined-only", str(file)], check=True, capture_output=True, text=True).stdout
        shared = [line for line in listing.splitlines() if line.split()[-2] in "WVu" or "_GLOBAL__sub_I" in line]
        assert not shared, (file.name, shared)
