"""The machine code of the block-sparse kernel, and its PTX executed on the CPU. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.activations import ACTIVATIONS
from sparsecomp.backends.gpu import triton_block
from sparsecomp.backends.gpu.triton_block import SIDES, TritonBlockBackend
from sparsecomp.kernels.block_sparse import choose_tile
from sparsecomp.kernels.triton_compat import WARPGROUPS, narrow_tiles
from sparsecomp.packing.format import pack
from tests.kernels.gluon_simulator import run
from tests.kernels.gpu_cases import Case, assert_close_to_float64, random_case, with_every_triton
from tests.kernels.ptxsim import Report, SimulationError
from tests.kernels.triton_compiler import compile_block_kernel, machine_code

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
SHAPES = [*((side, side) for side in SIDES), (128, 16), (16, 128)]
MATRIX = [
    *((rows, columns, 128, BRAIN, True) for rows, columns in SHAPES),
    *((side, side, 128, BRAIN, False) for side in (16, 128)),
    *((128, 128, tokens, HALF, True) for tokens in (1, 64)),
    *((128, 128, tokens, SINGLE, True) for tokens in (1, 64)),
    (128, 128, 1, BRAIN, False),
    (128, 16, 1, SINGLE, False),
]


def _widest(rows: int, columns: int, tokens: int, dtype: torch.dtype, aligned: bool) -> bool:
    return rows == columns >= 64 and tokens > 1


@pytest.mark.parametrize(
    ("capability", "rows", "columns", "tokens", "dtype", "aligned"),
    with_every_triton(
        # of sm_86 what takes the most registers: it is sm_89 without FP8
        ((capability, *case) for case in MATRIX for capability in SHARED if capability != 86 or _widest(*case)),
        lambda capability, *case: _widest(*case),
    ),
    ids=str,
)
def test_machine_code(
    capability: int, rows: int, columns: int, tokens: int, dtype: torch.dtype, aligned: bool, tmp_path: Path
) -> None:
    tile = choose_tile(dtype, rows, columns, tokens, aligned, narrow_tiles(capability))
    # the activation with the most temporaries
    compiled = compile_block_kernel(capability, rows, columns, dtype, tile, aligned, "gelu")
    code = machine_code(compiled, tmp_path)
    assert not code.spills
    assert code.shared <= SHARED[capability]
    # cp.async copies no single 16-bit elements
    assert code.instructions["LDGSTS"] > 0 or not aligned, "nothing is copied ahead of its use"
    tensor_core = {op for op in ("HMMA", "HGMMA") if code.instructions[op] > 0}
    if dtype == SINGLE:
        assert not tensor_core and code.instructions["FFMA"] > 0
    else:
        assert tensor_core == ({"HGMMA"} if capability == 90 and tile.tokens >= 64 else {"HMMA"})


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("tokens", [1, 64])
def test_machine_code_without_an_activation(tokens: int, capability: int, tmp_path: Path) -> None:
    # ptxas takes fewer registers for it, and once took too few
    tile = choose_tile(SINGLE, 128, 128, tokens, True, narrow_tiles(capability))
    assert not machine_code(compile_block_kernel(capability, 128, 128, SINGLE, tile, True), tmp_path).spills


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("pattern", "out", "columns", "tokens", "dtype"),
    [
        ("block16x16:0.5", 40, 48, 16, BRAIN),
        ("block64x64:0.5", 200, 264, 70, HALF),
        ("block32x128:0.4", 70, 256, 130, BRAIN),
        ("block128x128:0.5", 200, 300, 64, HALF),
        ("block16x16:0.5", 40, 48, 128, HALF),
        ("block128x32:0.3", 256, 160, 128, BRAIN),
        ("block16x64:0.5", 40, 150, 5, SINGLE),
        ("block64x16:0.5", 70, 50, 33, SINGLE),
    ],
)
@pytest.mark.every_triton
def test_compiled_code_matches_float64(
    capability: int, pattern: str, out: int, columns: int, tokens: int, dtype: torch.dtype
) -> None:
    report = _executed(random_case(pattern, out, columns, tokens, dtype), capability)
    warpgroups = capability == 90 and tokens >= 64 and dtype != SINGLE and WARPGROUPS
    assert (report.executed["wgmma"] > 0) == warpgroups
    assert (report.executed["mma"] > 0) == (dtype != SINGLE and not warpgroups)


@pytest.mark.parametrize(("capability", "tokens"), [(80, 20), (90, 70)])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_in_compiled_code(activation: str, capability: int, tokens: int) -> None:
    case = replace(random_case("block32x32:0.5", 70, 140, tokens, HALF), activation=activation)
    _executed(case, capability)


FAULTS = {
    "no barriers": (80, "bar.sync", "// bar.sync"),
    "too weak a wait for copies": (80, "cp.async.wait_group", "cp.async.wait_group 9; //"),
    "no wait for products": (90, "wgmma.wait_group", "// wgmma.wait_group"),
    "no fence of memory": (90, "fence.proxy.async", "// fence.proxy.async"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str) -> None:
    capability, before, after = FAULTS[fault]

    def spoil(ptx: str) -> str:
        assert before in ptx, "there is nothing to spoil"
        return ptx.replace(before, after)

    with pytest.raises((AssertionError, SimulationError)):
        _executed(random_case("block64x64:0.9", 128, 512, 64, HALF), capability, spoil)


def test_blocks_in_other_places_give_a_wrong_product() -> None:
    case = random_case("block16x16:0.5", 64, 96, 16, BRAIN)
    for change in (
        lambda tensors: (*tensors[:2], tensors[2].flip(0)),
        lambda tensors: (tensors[0].transpose(1, 2).contiguous(), *tensors[1:]),
        lambda tensors: (tensors[0].flip(0).contiguous(), *tensors[1:]),
    ):
        with pytest.raises(AssertionError, match="exceeds its bound"):
            _executed(case, 80, change=change)


def test_blocks_cut_short_are_out_of_bounds() -> None:
    case = random_case("block16x16:0.5", 64, 96, 16, BRAIN)
    for change in (
        lambda tensors: (tensors[0][:-1], *tensors[1:]),
        lambda tensors: (*tensors[:2], tensors[2][:-1]),
    ):
        with pytest.raises(SimulationError, match="out of bounds"):
            _executed(case, 80, change=change)


def _executed(
    case: Case,
    capability: int,
    spoil: Callable[[str], str] = lambda ptx: ptx,
    change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple,
) -> Report:
    """What the simulator reports of the compiled kernel, whose result was compared with float64.

    The weight's tensors and the PTX may be changed first.
    """
    dtype, (tokens, columns), out = case.x.dtype, case.x.shape, case.weight.shape[0]
    kernel = TritonBlockBackend().prepare(pack(case.weight, case.pattern))
    values, starts, block_columns = change(triton_block._parts(kernel))
    rows, across = values.shape[1:]
    aligned = columns % 16 == 0 and out % 16 == 0
    tile = choose_tile(dtype, rows, across, tokens, aligned, narrow_tiles(capability))
    compiled = compile_block_kernel(capability, rows, across, dtype, tile, aligned, case.activation)
    y = torch.empty(tokens, out, dtype=dtype)
    blocks = (starts.shape[0] - 1) * -(-tokens // tile.tokens)
    # tensors of their own, since the simulator takes buffers by their first address
    index = starts.clone(), block_columns.clone()
    arguments = (case.x, values, *index, case.bias, y, tokens, out, columns, columns, out)
    report = run(spoil(compiled.asm["ptx"]), arguments, blocks, tile.warps, compiled.metadata.shared)
    assert report.races == ()
    assert_close_to_float64(y, case)
    return report
