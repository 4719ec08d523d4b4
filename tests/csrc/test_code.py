"""What no result depends on: prefetches that a compiler must not leave out, and who includes whom."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
FLAGS = {"avx2": AVX2, "avx2_near": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
INT8_FLAGS = {"avx2": AVX2, "avx2_vnni": [*AVX2, "-mavxvnni"], "avx512_vnni": [*AVX512, "-mavx512vnni"]}


def _code(source: str, *flags: str) -> str:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER} here")
    command = [COMPILER, "-O3", "-std=c++17", f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}", *flags]
    command += ["-S", "-o", "-", str(CSRC / "cpu" / source)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("source", ["nm/permute.cpp", "nm/panel.cpp", "int8/linear.cpp", "block/linear.cpp"])
def test_prefetches_are_in_the_code(source):
    """GCC drops calls of functions that do nothing else, silently; a product then waits for every line of y."""
    code = _code(source)
    assert "prefetch" in code or "prfm" in code  # x86-64 or aarch64


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
@pytest.mark.parametrize("file", FLAGS)
def test_every_kernel_that_permutes_asks_for_weights(file):
    """Weights from memory, 4096x4096 by 8 columns, are half as fast without."""
    code = _code(f"nm/x86/permute_{file}.cpp", *FLAGS[file])
    kernels = re.findall(r"^(_ZN10sparsecomp\S*micro\S*):\n(.*?)\.cfi_endproc", code, re.MULTILINE | re.DOTALL)
    assert len(kernels) > 50
    assert [name for name, body in kernels if "prefetch" not in body] == []


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
@pytest.mark.parametrize("isa", INT8_FLAGS)
def test_every_kernel_of_rounded_products_asks_for_weights(isa):
    code = _code(f"int8/x86/{isa}.cpp", *INT8_FLAGS[isa])
    functions = dict(re.findall(r"^(_ZN10sparsecomp\S*):\n(.*?)\.cfi_endproc", code, re.MULTILINE | re.DOTALL))
    kernels = [name for name in functions if "micro" in name]
    assert len(kernels) >= 40  # 8 numbers of columns by 5 of weights

    def asks(body: str) -> bool:
        called = [functions[name] for name in re.findall(r"_ZN10sparsecomp\S*", body) if name in functions]
        return "prefetch" in body or any("prefetch" in each for each in called)

    assert [name for name in kernels if not asks(functions[name])] == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for AVX-512")
def test_panels_ask_for_weights_and_for_y():
    code = _code("nm/x86/panel_avx512.cpp", *AVX512)
    assert "prefetcht0" in code  # the next weights, to L1
    assert "prefetcht1" in code  # lines of y, to L2


@pytest.mark.parametrize(
    ("folder", "strangers"),
    [("common", "nm|block|int8"), ("nm", "block"), ("block", "nm|int8"), ("int8", "nm|block")],
)
def test_families_of_kernels_do_not_include_each_other(folder, strangers):
    include = re.compile(rf'#include "({strangers})/')
    files = [path for path in (CSRC / "cpu" / folder).rglob("*") if path.suffix in (".cpp", ".hpp")]
    assert len(files) > 5
    assert [path.name for path in files if include.search(path.read_text())] == []
