"""Runs the packing kernels in Triton's interpreter, in a process of its own as ``triton_interpreter`` does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from triton_interpreter import fenced, repair_interpreter

Packing = tuple[Tensor, Tensor]


def interpret_packing(weights: list[tuple[Tensor, str]]) -> list[tuple[Packing, Packing, bool]]:
    """For each dense weight and its pattern: fragments and metadata of the canonical form and of the dense one.

    The last entry is whether the second kernel took any block for one that breaks the pattern.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.pt"), Path(folder, "made.pt")
        torch.save(weights, given)
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(given), str(made)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(made)


def _main(given: str, made: str) -> None:
    repair_interpreter()
    from sparsecomp.kernels.pack_fragments import pack_dense, pack_fragments
    from sparsecomp.pack.format import pack
    from sparsecomp.patterns import row_nm

    results = []
    for weight, pattern in torch.load(given):
        packed = pack(weight, pattern)
        nm = row_nm(packed.pattern)
        assert nm is not None
        canonical = pack_fragments(fenced(packed.values), fenced(packed.metadata), nm, packed.shape[1])
        fragments, metadata, broken = pack_dense(fenced(weight))
        results.append((canonical, (fragments, metadata), bool(broken.any())))
    torch.save(results, made)


if __name__ == "__main__":
    _main(*sys.argv[1:])
