"""The CUTLASS kernels as machine code: for sm_90a, where nvcc and CUTLASS are installed; no GPU is needed."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from sparsecomp.backends.gpu.cutlass.build import Toolchain, compile_library, prebuilt, toolchain
from sparsecomp.backends.gpu.cutlass.config import Config, configs
from sparsecomp.backends.gpu.cutlass.library import ABI, Arguments

triton = pytest.importorskip("triton", reason="triton, whose wheel carries cuobjdump, is not installed")

pytestmark = pytest.mark.slow

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP8, FAST = (configs("float8_e4m3fn", "bfloat16", fast) for fast in (False, True))
KINDS = [*configs("bfloat16", "bfloat16"), configs("float16", "float16")[0], FP8[0], FP8[4], FAST[1]]


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_machine_code(config: Config, tmp_path: Path) -> None:
    tools = toolchain()
    if not isinstance(tools, Toolchain):
        pytest.skip(f"this machine {tools}")
    path = tmp_path / "library.so"
    messages = compile_library(config, tools, path)
    # C7510: ptxas waits for every wgmma before the next
    assert "C7510" not in messages and "serialized" not in messages, messages
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", messages)
    assert spills and all(set(numbers) == {"0"} for numbers in spills), messages
    assembly = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
    kind, columns, name = {
        "float16": ("HGMMA", 32, "F32"),
        "bfloat16": ("HGMMA", 32, r"F32\.BF16"),
        "float8_e4m3fn": ("QGMMA", 64, r"F32\.E4M3\.E4M3"),
    }[config.element]
    wide = re.findall(rf"{kind}\.SP\.64x{config.tokens}x{columns}\.{name}", assembly)
    tiles = config.out // (64 if config.pingpong else 128)  # two groups of warps share a tile unless they take turns
    assert len(wide) >= 128 // columns * tiles
    assert not re.findall(r"[HQ]GMMA\.64x", assembly), "dense products"
    assert not re.findall(r"\b(?:LDL|STL)\b", assembly), "local memory"
    # x goes to every block of a cluster at once, and y leaves by the copy engine
    assert ("UTMALDG.3D.MULTICAST" in assembly) == (config.cluster_out * config.cluster_tokens > 1)
    assert "UTMASTG" in assembly
    refusals(path, config)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_what_was_built_with_the_package_loads(config: Config) -> None:
    path = prebuilt(config)
    if path is None:
        pytest.skip("this package was built without it; -C cmake.define.SPARSECOMP_CUTLASS=ON builds it")
    refusals(path, config)


def refusals(path: Path, config: Config) -> None:
    """The library, loaded without a GPU, refuses operands before it asks the driver for anything."""
    library = ctypes.CDLL(str(path))
    library.sparsecomp_wgmma_sp_error.restype = ctypes.c_char_p
    assert library.sparsecomp_wgmma_sp_abi() == ABI
    memory = torch.zeros(4096, dtype=torch.int8)
    pointers = dict.fromkeys(("values", "metadata", "x", "y", "weight_scales", "x_scales"), memory.data_ptr())
    sizes = {"x_stride": 128, "y_stride": 64, "out": 64, "tokens": 4, "columns": 128, "multiprocessors": 132}
    wrong = {
        "16 bytes": [{"x": memory.data_ptr() + 2}, {"x_stride": 132}, {"y_stride": 60}, {"values": None}],
        "out of range": [{"out": 0}, {"tokens": 0}, {"columns": 129}, {"swizzle": 0}, {"multiprocessors": 0}],
        "activation": [{"activation": 5}, {"activation": -1}],
        "scales": [{"weight_scales": None}, {"x_scales": None}] if config.scaled else [],
    }
    for reason, cases in wrong.items():
        for case in cases:
            result = library.sparsecomp_wgmma_sp(
                ctypes.byref(Arguments(**{**pointers, **sizes, "swizzle": 1, **case})), None
            )
            assert result != 0 and reason in library.sparsecomp_wgmma_sp_error(result).decode()
