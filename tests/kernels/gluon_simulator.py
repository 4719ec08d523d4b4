"""Compiles Triton and Gluon kernels for a GPU that need not be there, and runs their PTX on the CPU."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from sparsecomp.kernels import sparse_mma
from tests.kernels import ptxsim

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def compile_kernel(kernel: Any, capability: int, types: tuple[str, ...], constants: dict[str, Any], warps: int) -> Any:
    """The variant for ``sm_<capability>``, compiled as a launch would: only pointers are known to be aligned.

    ``types`` are those of the arguments that are no constants, such as "*bf16" and "i32".
    """
    return _compile(kernel, capability, types, tuple(constants.items()), warps)


@lru_cache(maxsize=256)
def _compile(
    kernel: Any, capability: int, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], warps: int
) -> Any:
    given = dict(constants)
    arguments = [parameter for parameter in kernel.params if parameter.name not in given]
    found = dict(zip((parameter.name for parameter in arguments), types, strict=True))
    signature = {parameter.name: found.get(parameter.name, "constexpr") for parameter in kernel.params}
    # a launch would specialise on numbers otherwise, and compile again for other sizes
    assert all(parameter.do_not_specialize for parameter in arguments if found[parameter.name] == "i32")
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in arguments
        if found[parameter.name].startswith("*") and not parameter.do_not_specialize_on_alignment
    }
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(kernel, signature, given, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def compile_sparse_mma(
    capability: int, constants: dict[str, Any], warps: int, out: torch.dtype = torch.bfloat16
) -> Any:
    """The mma.sp kernel for outputs of that dtype."""
    pointer = _POINTERS[out]
    types = ("*i32", "*i32", "*i32", pointer, "*fp32", "*fp32", pointer, *["i32"] * 6)
    return compile_kernel(sparse_mma.sparse_mma_kernel, capability, types, constants, warps)


class Simulator:
    """Takes the place of ``launching.launch``; ``reports`` keeps what each kernel did last, by its name."""

    def __init__(self, capability: int = 80) -> None:
        self.capability = capability
        self.reports: dict[str, ptxsim.Report] = {}

    def launch(
        self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], grid: tuple[int, ...], warps: int
    ) -> None:
        """Compile, run, and copy back what was written; a race fails."""
        report = self.executed(kernel, arguments, constants, grid, warps)
        assert report.races == ()

    def executed(
        self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], grid: tuple[int, ...], warps: int
    ) -> ptxsim.Report:
        """``launch`` without the assertion."""
        types = tuple(_POINTERS[each.dtype] if isinstance(each, torch.Tensor) else "i32" for each in arguments)
        compiled = compile_kernel(kernel, self.capability, types, constants, warps)
        name = kernel.__name__
        self.reports[name] = run(self.ptx(name, compiled), arguments, grid, warps, compiled.metadata.shared)
        return self.reports[name]

    def ptx(self, name: str, compiled: Any) -> str:
        """What is run of a compiled kernel; tests that spoil it override this."""
        text: str = compiled.asm["ptx"]
        return text


class SpoilingSimulator(Simulator):
    """A simulator whose kernels are changed before they run; races are kept in the reports and fail nothing."""

    def __init__(self, pattern: str, replacement: str, kernel: str = "sparse_mma_kernel") -> None:
        super().__init__()
        self.change = (pattern, replacement, kernel)

    def launch(
        self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], grid: tuple[int, ...], warps: int
    ) -> None:
        """Compile, spoil, run, and copy back what was written."""
        self.executed(kernel, arguments, constants, grid, warps)

    def ptx(self, name: str, compiled: Any) -> str:
        """The text with every match of the pattern replaced, in the kernel of that name."""
        pattern, replacement, kernel = self.change
        text = super().ptx(name, compiled)
        if name != kernel:
            return text
        spoiled, found = re.subn(pattern, replacement, text)
        assert found > 0, "there is nothing to spoil"
        return spoiled


def run(
    ptx: str, arguments: tuple[Any, ...], grid: int | tuple[int, ...], warps: int, shared_bytes: int
) -> ptxsim.Report:
    """Run a compiled kernel on CPU tensors, strided ones included, and integers; ``grid`` is in blocks."""
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
    sides = (grid,) if isinstance(grid, int) else grid
    across, down, deep = (*sides, 1, 1)[:3]
    report = ptxsim.simulate(ptxsim.parse(ptx), (across, down, deep), 32 * warps, given, memory, shared_bytes)
    for tensor, address in places.values():
        _bytes(tensor)[:] = memory.fetch(address)
    return report


def _bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes from the first element to the last, without a copy."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    flat = tensor.as_strided((span,), (1,))
    return flat.view(torch.uint8).numpy()
