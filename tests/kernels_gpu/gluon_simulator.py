"""Compiles the mma.sp kernel for a GPU that need not be there, and runs its PTX on the CPU, on torch tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import ptxsim
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from sparsecomp.kernels import sparse_mma

_SIZES = ("row_tiles", "depth_blocks", "chunks", "stride_chunks", "out_units", "tokens")


def compile_kernel(capability: int, constants: dict[str, Any], warps: int) -> Any:
    """The variant for ``sm_<capability>``, compiled as a launch would: only pointers are known to be aligned."""
    return _compile(capability, tuple(constants.items()), warps)


@lru_cache(maxsize=256)
def _compile(capability: int, constants: tuple[tuple[str, Any], ...], warps: int) -> Any:
    given = dict(constants)
    pointer = "*bf16" if given["BF16"] else "*fp16"
    types = {"fragments": "*i32", "metadata": "*i32", "x": "*i32", "bias": pointer, "y": pointer}
    names = sparse_mma.sparse_mma_kernel.arg_names
    signature = {name: "constexpr" if name in given else types.get(name, "i32") for name in names}
    assert {name for name, kind in signature.items() if kind == "i32"} == set(_SIZES)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types and name != "bias"}
    source = GluonASTSource(sparse_mma.sparse_mma_kernel, signature, given, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


class Simulator:
    """Takes the place of ``sparse_mma.launch``; keeps what the last launch did."""

    def __init__(self, capability: int = 80) -> None:
        self.capability = capability
        self.report: ptxsim.Report | None = None

    def launch(self, arguments: tuple[Any, ...], constants: dict[str, Any], blocks: int, warps: int) -> None:
        """Compile, run, and copy back what was written; a race fails."""
        compiled = compile_kernel(self.capability, constants, warps)
        self.report = run(compiled.asm["ptx"], arguments, blocks, warps, compiled.metadata.shared)
        assert self.report.races == ()


def run(ptx: str, arguments: tuple[Any, ...], blocks: int, warps: int, shared_bytes: int) -> ptxsim.Report:
    """Run a compiled kernel on CPU tensors, strided ones included, and integers."""
    memory = ptxsim.GlobalMemory()
    places: dict[int, tuple[torch.Tensor, int]] = {}
    given = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if argument.data_ptr() not in places:
                places[argument.data_ptr()] = (argument, memory.place(_bytes(argument)))
            given.append(places[argument.data_ptr()][1])
        else:
            given.append(argument)
    report = ptxsim.simulate(ptxsim.parse(ptx), (blocks, 1, 1), 32 * warps, given, memory, shared_bytes)
    for tensor, address in places.values():
        _bytes(tensor)[:] = memory.fetch(address)
    return report


def _bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes from the first element to the last, without a copy."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    flat = tensor.as_strided((span,), (1,))
    return flat.view(torch.uint8).numpy()
