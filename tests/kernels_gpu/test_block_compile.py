"""The machine code of the block-sparse kernel, and its PTX executed on the CPU. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gluon_simulator import run
from gpu_cases import assert_close_to_float64, random_case
from triton_compiler import compile_block_kernel, machine_code

from sparsecomp.backends.triton_block import SIDES, TritonBlockBackend
from sparsecomp.kernels.block_sparse import choose_tile
from sparsecomp.pack.format import pack

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


MATRIX = [
    *((80, side, side, 128, BRAIN) for side in SIDES),
    *((90, side, side, 128, BRAIN) for side in SIDES),
    *((capability, 128, 128, 16, HALF) for capability in (80, 90)),
    *((capability, 128, 128, 64, HALF) for capability in (86, 90)),
    (80, 128, 128, 64, SINGLE),
]


@pytest.mark.parametrize(("capability", "rows", "columns", "tokens", "dtype"), MATRIX, ids=str)
@pytest.mark.every_triton
def test_machine_code(
    capability: int, rows: int, columns: int, tokens: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tile = choose_tile(dtype, rows, columns, tokens)
    code = machine_code(compile_block_kernel(capability, rows, columns, dtype, tile, True), tmp_path)
    assert not code.spills
    assert code.shared <= {80: 166912, 86: 101376, 90: 232448}[capability]
    assert code.instructions["LDGSTS"] > 0, "nothing is copied ahead of its use"
    tensor_core = {op for op in ("HMMA", "HGMMA") if code.instructions[op] > 0}
    if dtype == SINGLE:
        assert not tensor_core and code.instructions["FFMA"] > 0
    else:
        assert tensor_core == ({"HGMMA"} if capability == 90 and tokens >= 64 else {"HMMA"})


@pytest.mark.parametrize(
    ("pattern", "out", "columns", "tokens", "dtype"),
    [
        ("block16x16:0.5", 40, 48, 16, BRAIN),
        ("block64x64:0.5", 200, 264, 70, HALF),
        ("block32x128:0.4", 70, 256, 130, BRAIN),
    ],
)
@pytest.mark.every_triton
def test_compiled_code_matches_float64(pattern: str, out: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    case = random_case(pattern, out, columns, tokens, dtype)
    assert case.bias is not None
    packed = pack(case.weight, pattern)
    values, starts, block_columns = TritonBlockBackend().prepare(packed).tensors
    rows, across = values.shape[1:]
    tile = choose_tile(dtype, rows, across, tokens)
    compiled = compile_block_kernel(80, rows, across, dtype, tile, columns % 16 == 0 and out % 16 == 0)
    y = torch.empty(tokens, out, dtype=dtype)
    blocks = (starts.shape[0] - 1) * -(-tokens // tile.tokens)
    arguments = (case.x, values, starts, block_columns, case.bias, y, tokens, out, columns, columns, out)
    report = run(compiled.asm["ptx"], arguments, blocks, tile.warps, compiled.metadata.shared)
    assert report.races == () and report.executed["mma"] > 0
    assert_close_to_float64(y, case)
