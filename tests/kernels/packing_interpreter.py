"""Runs the packing kernels in Triton's interpreter, in a process of its own as ``triton_interpreter`` does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.kernels.triton_interpreter import ROOT, fenced, repair_interpreter

Packing = tuple[Tensor, Tensor]


def interpret_packing(weights: list[tuple[Tensor, str]]) -> list[tuple[Packing, Packing, bool]]:
    """For each dense weight and its pattern: fragments and metadata of the canonical form and of the dense one.

    The last entry is whether the second kernel took any block for one that breaks the pattern.
    """
    return _interpreted("fragments", weights)


def interpret_planes(weights: list[tuple[Tensor, str]]) -> list[tuple[Packing, Packing | None, Tensor]]:
    """For each dense weight and its pattern: planes and positions of the canonical form and of the dense one, and the
    canonical form unpacked. None where rows share a mask, which the second kernel does not know.
    """
    return _interpreted("planes", weights)


def _interpreted(what: str, weights: list[tuple[Tensor, str]]) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.pt"), Path(folder, "made.pt")
        torch.save(weights, given)
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.kernels.packing_interpreter", what, str(given), str(made)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(made)


def _main(what: str, given: str, made: str) -> None:
    repair_interpreter()
    from sparsecomp.packing.format import pack
    from sparsecomp.patterns import row_nm

    results = []
    for weight, pattern in torch.load(given):
        packed = pack(weight, pattern)
        nm = row_nm(packed.pattern)
        assert nm is not None
        canonical = fenced(packed.values), fenced(packed.metadata), nm, packed.shape[1]
        results.append((_fragments if what == "fragments" else _planes)(weight, canonical))
    torch.save(results, made)


def _fragments(weight: Tensor, canonical: tuple[Any, ...]) -> tuple[Packing, Packing, bool]:
    from sparsecomp.kernels.pack_fragments import pack_dense, pack_fragments

    fragments, metadata, broken = pack_dense(fenced(weight))
    return pack_fragments(*canonical), (fragments, metadata), bool(broken.any())


def _planes(weight: Tensor, canonical: tuple[Any, ...]) -> tuple[Packing, Packing | None, Tensor]:
    from sparsecomp.kernels.pack_planes import pack_planes, pack_planes_dense, unpack

    nm = canonical[2]
    dense = None
    if nm.mask_rows == 1:
        planes, octets, broken = pack_planes_dense(fenced(weight), nm)
        assert not broken.any()
        dense = planes, octets
    return pack_planes(*canonical), dense, unpack(*canonical)


if __name__ == "__main__":
    _main(*sys.argv[1:])
