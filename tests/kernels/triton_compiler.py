"""Compiles kernels for a GPU that need not be there, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsecomp.kernels import block_sparse, nm_decompress, vnm_gather
from sparsecomp.patterns import NM, VNM

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made: how often each instruction occurs, and registers, stack and shared memory in bytes."""

    instructions: Counter[str]
    registers: int
    stack: int
    shared: int
    order: tuple[str, ...]

    @property
    def spills(self) -> bool:
        """Whether anything of a thread lives in local memory."""
        return self.stack > 0 or self.instructions["LDL"] + self.instructions["STL"] > 0

    def spills_among(self, opcode: str) -> bool:
        """Whether local memory is used between the first and the last instruction of that kind, that is in a loop."""
        found = [i for i, each in enumerate(self.order) if each == opcode]
        return any(each in ("LDL", "STL") for each in self.order[found[0] : found[-1]])


def compile_kernel(
    capability: int,
    nm: NM,
    dtype: torch.dtype,
    tile: nm_decompress.Tile,
    aligned: bool,
    quantized: bool = False,
    activation: str = "none",
) -> Any:
    """The kernel for ``sm_<capability>``; ``aligned`` is what a launch finds when every size is a multiple of 16."""
    kernel = nm_decompress.nm_linear_kernel
    constants = {
        "N": nm.n,
        "M": nm.m,
        "BITS": nm_decompress.plane_bits(nm),
        "MASK_ROWS": nm.mask_rows,
        "HAS_SCALES": quantized,
        "HAS_BIAS": True,
        "ACTIVATION": activation,
        "TILE_OUT": tile.out,
        "TILE_BATCH": tile.batch,
        "TILE_COLUMNS": tile.columns,
    }
    types = {"positions": "*u8", "scales": "*fp32", **({"values": "*i8"} if quantized else {})}
    return _compile(kernel, capability, dtype, types, constants, aligned, tile.warps, tile.stages)


def compile_block_kernel(
    capability: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    tile: block_sparse.Tile,
    aligned: bool,
    activation: str = "none",
) -> Any:
    """The block-sparse kernel, compiled likewise."""
    constants = {
        "ROWS": rows,
        "COLUMNS": columns,
        "HAS_BIAS": True,
        "ACTIVATION": activation,
        "TILE_TOKENS": tile.tokens,
        "TILE_COLUMNS": tile.columns,
    }
    types = {"starts": "*i32", "block_columns": "*i32"}
    kernel = block_sparse.block_linear_kernel
    return _compile(kernel, capability, dtype, types, constants, aligned, tile.warps, tile.stages)


def compile_vnm_kernel(
    capability: int,
    pattern: VNM,
    dtype: torch.dtype,
    tile: vnm_gather.Tile,
    aligned: bool,
    activation: str = "none",
) -> Any:
    """The V:N:M kernel, compiled likewise."""
    constants = {
        "V": pattern.v,
        "M": pattern.m,
        "HAS_BIAS": True,
        "ACTIVATION": activation,
        "TILE_OUT": tile.out,
        "TILE_BATCH": tile.batch,
        "TILE_COLUMNS": tile.columns,
    }
    types = {"positions": "*u8", "kept": "*u8"}
    kernel = vnm_gather.vnm_linear_kernel
    return _compile(kernel, capability, dtype, types, constants, aligned, tile.warps, tile.stages)


def _compile(
    kernel: Any,
    capability: int,
    dtype: torch.dtype,
    own_types: dict[str, str],
    constants: dict[str, Any],
    aligned: bool,
    warps: int,
    stages: int,
) -> Any:
    pointer = "*" + _NAMES[dtype]
    types = {"x": pointer, "values": pointer, "bias": pointer, "y": pointer, **own_types}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    multiples = {*types, "out_features", "in_features", "stride_x", "stride_y"} if aligned else {*types}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in multiples}
    return triton.compile(
        ASTSource(kernel, signature, constants, divisible),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def machine_code(compiled: Any, folder: Path) -> MachineCode:
    """What is in a compiled Triton or Gluon kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    listing = _output("nvdisasm", "-c", str(cubin))
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _output("cuobjdump", "-res-usage", str(cubin)))
    assert usage is not None
    # a line is /*address*/ [@predicate] OPCODE.modifiers operands; of the modifiers only "sparse" counts
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.SP\b)?)", listing, re.MULTILINE)
    return MachineCode(Counter(opcodes), int(usage[1]), int(usage[2]), compiled.metadata.shared, tuple(opcodes))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
