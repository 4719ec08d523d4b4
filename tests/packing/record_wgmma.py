"""Record what CUTLASS's own compressor makes of the weights of ``wgmma_cases``: python -m tests.packing.record_wgmma

CUTLASS_PATH names the folder with CUTLASS's include, CUDA_HOME one with CUDA's. It needs a C++20 compiler and no GPU.
The record holds digests and the first bytes; ``test_wgmma_layout.py`` compares the packer with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.packing.wgmma_cases import RECORD, SHAPES, TYPES, digest, weight

HERE = Path(__file__).parent


def record(cutlass: Path, cuda: Path) -> dict[str, object]:
    """The record: of each type and shape, digests and first bytes of the values and of the metadata."""
    version = {}
    for line in (cutlass / "include/cutlass/version.h").read_text().splitlines():
        if line.startswith(("#define CUTLASS_M", "#define CUTLASS_PATCH")):
            _, name, value = line.split()[:3]
            version[name.removeprefix("CUTLASS_").lower()] = value
    cases: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "compressor"
        includes = [f"-I{cutlass}/include", f"-I{cuda}/include", f"-I{cuda}/include/cccl"]
        source = HERE / "cutlass_compressor.cpp"
        subprocess.run(["g++", "-std=c++20", "-O1", "-w", *includes, source, "-o", program, "-lpthread"], check=True)
        for kind in TYPES:
            for rows, columns in SHAPES:
                dense = weight(kind, rows, columns).view(torch.uint8).numpy().tobytes()
                command = [program, kind, str(rows), str(columns)]
                made = subprocess.run(command, input=dense, stdout=subprocess.PIPE, check=True).stdout
                values, metadata = made[: len(dense) // 2], made[len(dense) // 2 :]
                assert len(metadata) == rows * columns // 8
                cases[f"{kind} {rows}x{columns}"] = {
                    name: {"sha256": digest(octets), "first": octets[:32].hex()}
                    for name, octets in (("values", values), ("metadata", metadata))
                }
    return {"cutlass": f"{version['major']}.{version['minor']}.{version['patch']}", "cases": cases}


if __name__ == "__main__":
    try:
        cutlass, cuda = Path(os.environ["CUTLASS_PATH"]), Path(os.environ["CUDA_HOME"])
    except KeyError as error:
        sys.exit(f"{error.args[0]} is not set; it names the folder that holds include/")
    (HERE / RECORD).write_text(json.dumps(record(cutlass, cuda), indent=1) + "\n")
