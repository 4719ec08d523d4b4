"""Every instruction set this machine can run, each in a process of its own, passes the cases of isa_cases.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_native = pytest.importorskip("sparsecomp._native", reason="the compiled kernels are not installed")

from tests.csrc.isa_cases import LISTED  # noqa: E402 - needs the extension

CASES = Path(__file__).with_name("isa_cases.py")
CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
PRINT_THE_LIST = """
#include <cstdio>
#include "nm/kernel_list.hpp"
int main() {
  for (const auto& line : sparsecomp::kKernelList)
    for (std::size_t i = 0; i < line.count(); ++i) std::printf("%d:%d\\n", line.patterns[i].n, line.patterns[i].m);
}
"""
DIGEST = """
import hashlib, torch
from tests.csrc.native_weight import Layout, random_weight
from sparsecomp.packing.format import pack

digest = hashlib.sha256()
generator = torch.Generator().manual_seed(1)
for pattern in ("1:4", "2:4", "5:8", "8:16", "12:16", "15:16", "16:16"):
    for out, columns, batch in ((37, 123, 5), (64, 256, 1), (48, 1100, 19), (160, 640, 33)):
        weight = random_weight(pattern, out, columns, torch.int8, generator)
        layout = Layout.of(pack(weight, pattern), rounding=True)
        x, bias = torch.randn(batch, columns, generator=generator), torch.randn(out, generator=generator)
        scales = torch.rand(out, generator=generator) / 4096
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for activation in range(5):
                y = torch.empty(batch, out, dtype=dtype)
                layout.linear(x.to(dtype), bias.to(dtype), y, 2, activation=activation, scales=scales)
                digest.update(y.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def _run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    # more threads than cores are tested too: workers must not spin while they wait
    environment = os.environ | {"SPARSECOMP_ISA": isa, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", _native.isa_available().split(","))
def test_isa(isa):
    done = _run(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_products_that_round_activations_are_the_same_bits_everywhere():
    """Of every instruction set but the scalar reference, which rounds once more before it adds the bias."""
    runs = [_run(isa, "-c", DIGEST) for isa in _native.isa_available().split(",") if isa != "reference"]
    assert [run.stderr for run in runs] == [""] * len(runs)
    assert len({run.stdout for run in runs}) <= 1


def test_an_unknown_isa_is_an_error_that_names_the_choices():
    done = _run("avx1024", "-c", "from sparsecomp import _native; _native.isa()")
    assert done.returncode != 0
    assert "SPARSECOMP_ISA=avx1024 cannot run on this machine" in done.stderr
    assert _native.isa_available() in done.stderr


def test_an_unknown_isa_still_computes():
    program = (
        "import torch, sparsecomp; from sparsecomp import _native\n"
        "y = torch.zeros(2, 3); b = torch.ones(3)\n"
        "_native.nm_linear(3, 0, 2, 4, 1, 0, 0, 0, 0, 0, 0, 2, 0, b.data_ptr(), 0, y.data_ptr(), 3, 1)\n"
        "assert y.equal(torch.ones(2, 3))\n"
    )
    assert _run("avx1024", "-c", program).returncode == 0


def test_the_cases_are_the_list_of_kernels(tmp_path):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER} here")
    source, program = tmp_path / "list.cpp", tmp_path / "list"
    source.write_text(PRINT_THE_LIST)
    includes = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}"]
    subprocess.run([COMPILER, "-std=c++17", *includes, str(source), "-o", str(program)], check=True)
    listed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert set(listed) == set(LISTED)
