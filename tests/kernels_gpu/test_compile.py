"""The machine code of every tile the kernel may choose, and its PTX executed on the CPU. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gluon_simulator import run
from gpu_cases import assert_close_to_float64, quantized_case, random_case
from triton_compiler import MachineCode, compile_kernel, machine_code

from sparsecomp.backends.triton import TritonBackend
from sparsecomp.kernels.nm_decompress import GROUP_BLOCK, Tile, choose_tile
from sparsecomp.pack.format import pack
from sparsecomp.pack.quantize import quantize
from sparsecomp.patterns import NM, row_nm

pytestmark = pytest.mark.usefixtures("own_cache")

CAPABILITIES = (80, 86, 89, 90)
# bytes of shared memory that one block may have
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
MATRIX = [
    *((NM(n, m), BRAIN, batch, True) for n, m in ((2, 4), (8, 16)) for batch in (1, 32, 128)),
    *((NM(n, m), BRAIN, 1, True) for n, m in ((1, 4), (4, 8), (5, 16))),
    *((NM(2, 4), HALF, batch, False) for batch in (1, 128)),
    *((NM(2, 4), SINGLE, batch, True) for batch in (1, 32)),
    (NM(8, 16), SINGLE, 1, False),
]


def _compile(
    capability: int, nm: NM, dtype: torch.dtype, tile: Tile, aligned: bool, folder: Path, quantized: bool = False
) -> MachineCode:
    code = machine_code(compile_kernel(capability, nm, dtype, tile, aligned, quantized), folder)
    assert code.instructions["EXIT"] > 0, "the listing was not read"
    return code


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("nm", "dtype", "batch", "aligned"), MATRIX, ids=str)
@pytest.mark.every_triton
def test_machine_code(capability: int, nm: NM, dtype: torch.dtype, batch: int, aligned: bool, tmp_path: Path) -> None:
    tile = choose_tile(dtype, batch)
    code = _compile(capability, nm, dtype, tile, aligned, tmp_path)
    assert not code.spills
    assert code.shared <= SHARED[capability]
    assert code.instructions["LDGSTS"] > 0, "nothing is copied ahead of its use"
    tensor_core = {op for op in ("HMMA", "HGMMA") if code.instructions[op] > 0}
    if dtype == SINGLE:
        # tf32 would round the weights to 10 bits
        assert not tensor_core and code.instructions["FFMA"] > 0
    elif capability == 90 and tile.out >= 64:
        assert tensor_core == {"HGMMA"}
    else:
        assert tensor_core == {"HMMA"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("nm", "dtype", "batch"), [(NM(2, 4), BRAIN, 1), (NM(2, 4), HALF, 128), (NM(8, 16), BRAIN, 32)]
)
@pytest.mark.every_triton
def test_machine_code_of_int8_weights(capability: int, nm: NM, dtype: torch.dtype, batch: int, tmp_path: Path) -> None:
    code = _compile(capability, nm, dtype, choose_tile(dtype, batch), True, tmp_path, quantized=True)
    assert not code.spills and code.shared <= SHARED[capability]
    assert code.instructions["HMMA"] + code.instructions["HGMMA"] > 0


def test_spills_are_noticed(tmp_path: Path) -> None:
    assert _compile(80, NM(2, 4), BRAIN, Tile(256, 128, 64, 4, 2), True, tmp_path).spills


@pytest.mark.parametrize(
    ("pattern", "out", "columns", "batch", "dtype"),
    [
        ("2:4", 96, 160, 16, BRAIN),
        ("2:4", 70, 133, 3, HALF),
        ("8:16", 80, 176, 70, BRAIN),
        ("5:16", 40, 70, 20, HALF),
        ("1:4", 33, 128, 1, BRAIN),
        ("2:4@v4", 64, 64, 5, HALF),
        ("4:8", 40, 72, 9, SINGLE),
    ],
)
@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@pytest.mark.every_triton
def test_compiled_code_matches_float64(
    pattern: str, out: int, columns: int, batch: int, dtype: torch.dtype, quantized: bool
) -> None:
    case = (quantized_case if quantized else random_case)(pattern, out, columns, batch, dtype)
    packed = pack(case.weight, pattern)
    nm = row_nm(packed.pattern)
    assert nm is not None and case.bias is not None
    values, positions, *scales = TritonBackend().prepare(quantize(packed) if quantized else packed).tensors
    tile = choose_tile(dtype, batch)
    compiled = compile_kernel(80, nm, dtype, tile, out % 16 == 0 and columns % 16 == 0, quantized)
    y = torch.empty(batch, out, dtype=dtype)
    blocks = -(-out // tile.out) * -(-batch // tile.batch)
    sizes = (batch, out, columns, values.shape[2] // GROUP_BLOCK, columns, out)
    arguments = (case.x, values, positions, scales[0] if scales else torch.empty(1), case.bias, y, *sizes)
    report = run(compiled.asm["ptx"], arguments, blocks, tile.warps, compiled.metadata.shared)
    assert report.races == ()
    assert_close_to_float64(y, case)
