"""The CUTLASS kernels as machine code: for sm_90a, where nvcc and CUTLASS are installed; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from sparsecomp.backends.cutlass_build import Toolchain, compile_library, toolchain
from sparsecomp.backends.cutlass_config import Config, configs

triton = pytest.importorskip("triton", reason="triton, whose wheel carries cuobjdump, is not installed")

pytestmark = pytest.mark.slow

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP8 = configs("float8_e4m3fn", "bfloat16")
KINDS = [*configs("bfloat16", "bfloat16"), configs("float16", "float16")[0], FP8[0], FP8[4]]


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
