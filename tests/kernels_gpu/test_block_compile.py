"""The machine code of the block-sparse kernel, and its PTX executed on the CPU. No GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from gluon_simulator import run
from gpu_cases import Case, assert_close_to_float64, random_case
from ptxsim import SimulationError
from triton_compiler import compile_block_kernel, machine_code

from sparsecomp.backends import triton_block
from sparsecomp.backends.triton_block import SIDES, TritonBlockBackend
from sparsecomp.kernels.block_sparse import choose_tile
from sparsecomp.pack.format import pack

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
MATRIX = [
    *((capability, side, side, 128, BRAIN) for capability in SHARED for side in SIDES),
    *((capability, 128, 128, tokens, HALF) for capability in SHARED for tokens in (16, 64)),
    *((capability, 128, 128, tokens, SINGLE) for capability in SHARED for tokens in (16, 64)),
]


@pytest.mark.parametrize(("capability", "rows", "columns", "tokens", "dtype"), MATRIX, ids=str)
@pytest.mark.every_triton
def test_machine_code(
    capability: int, rows: int, columns: int, tokens: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tile = choose_tile(dtype, rows, columns, tokens)
    code = machine_code(compile_block_kernel(capability, rows, columns, dtype, tile, True), tmp_path)
    assert not code.spills
    assert code.shared <= SHARED[capability]
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
        ("block128x32:0.5", 200, 100, 130, HALF),
        ("block128x128:0.5", 130, 300, 40, BRAIN),
        ("block16x64:0.5", 40, 150, 5, SINGLE),
        ("block64x16:0.5", 70, 50, 33, SINGLE),
        ("block128x32:0.5", 130, 100, 20, SINGLE),
    ],
)
def test_compiled_code_matches_float64(pattern: str, out: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    case = random_case(pattern, out, columns, tokens, dtype)
    y, races = _executed(case)
    assert races == ()
    assert_close_to_float64(y, case)


def _executed(
    case: Case, change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple, spoil: str = ""
) -> tuple[Tensor, tuple[str, ...]]:
    """y and the races, of a kernel whose weight tensors may be changed and whose PTX may lack something."""
    assert case.bias is not None
    (tokens, columns), out = case.x.shape, case.weight.shape[0]
    packed = pack(case.weight, case.pattern)
    values, starts, block_columns = change(triton_block._parts(TritonBlockBackend().prepare(packed)))
    rows, across = values.shape[1:]
    tile = choose_tile(case.x.dtype, rows, across, tokens)
    compiled = compile_block_kernel(80, rows, across, case.x.dtype, tile, columns % 16 == 0 and out % 16 == 0)
    y = torch.empty(tokens, out, dtype=case.x.dtype)
    blocks = (starts.shape[0] - 1) * -(-tokens // tile.tokens)
    arguments = (case.x, values, starts, block_columns, case.bias, y, tokens, out, columns, columns, out)
    ptx, found = re.subn(spoil, "", compiled.asm["ptx"]) if spoil else (compiled.asm["ptx"], 1)
    assert found > 0, "there is nothing to spoil"
    report = run(ptx, arguments, blocks, tile.warps, compiled.metadata.shared)
    assert (report.executed["mma"] > 0) == (case.x.dtype != SINGLE)
    return y, report.races


# --- faults that must be noticed ------------------------------------------------------------------------------------


def test_blocks_in_other_places_give_a_wrong_product() -> None:
    case = random_case("block16x16:0.5", 64, 96, 16, BRAIN)
    for change in (
        lambda tensors: (*tensors[:2], tensors[2].flip(0)),
        lambda tensors: (tensors[0].transpose(1, 2).contiguous(), *tensors[1:]),
        lambda tensors: (tensors[0].flip(0).contiguous(), *tensors[1:]),
    ):
        with pytest.raises(AssertionError, match="exceeds its bound"):
            assert_close_to_float64(_executed(case, change)[0], case)


def test_blocks_cut_short_are_out_of_bounds() -> None:
    case = random_case("block16x16:0.5", 64, 96, 16, BRAIN)
    for change in (
        lambda tensors: (tensors[0][:-1], *tensors[1:]),
        lambda tensors: (*tensors[:2], tensors[2][:-1]),
    ):
        with pytest.raises(SimulationError, match="out of bounds"):
            _executed(case, change)


@pytest.mark.parametrize("spoil", [r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\w+;"], ids=["barriers", "waits"])
def test_a_pipeline_without_them_has_races(spoil: str) -> None:
    assert _executed(random_case("block64x64:0.9", 64, 512, 40, HALF), spoil=spoil)[1] != ()
