"""The machine code of every tile the kernel may choose, and its PTX executed on the CPU. No GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from gluon_simulator import run
from gpu_cases import Case, assert_close_to_float64, quantized_case, random_case
from ptxsim import SimulationError
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
        ("2:4", 70, 100, 33, SINGLE),
        ("64:2:8", 70, 133, 40, BRAIN),
        ("64:2:8", 130, 96, 1, HALF),
        ("16:2:16", 33, 100, 20, HALF),
    ],
)
@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@pytest.mark.every_triton
def test_compiled_code_matches_float64(
    pattern: str, out: int, columns: int, batch: int, dtype: torch.dtype, quantized: bool
) -> None:
    case = (quantized_case if quantized else random_case)(pattern, out, columns, batch, dtype)
    y, races = _executed(case)
    assert races == ()
    assert_close_to_float64(y, case)


def _executed(
    case: Case, change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple, spoil: tuple[str, str] = ("", "")
) -> tuple[Tensor, tuple[str, ...]]:
    """y and the races, of a kernel whose weight tensors and PTX may be changed first."""
    packed = pack(case.weight, case.pattern)
    nm = row_nm(packed.pattern)
    assert nm is not None and case.bias is not None
    (batch, columns), out = case.x.shape, case.weight.shape[0]
    kernel = TritonBackend().prepare(quantize(packed) if case.quantized else packed)
    values, positions, *scales = change(kernel.tensors)
    tile = choose_tile(case.x.dtype, batch)
    compiled = compile_kernel(80, nm, case.x.dtype, tile, out % 16 == 0 and columns % 16 == 0, case.quantized)
    y = torch.empty(batch, out, dtype=case.x.dtype)
    blocks = -(-out // tile.out) * -(-batch // tile.batch)
    sizes = (batch, out, columns, kernel.tensors[0].shape[2] // GROUP_BLOCK, columns, out)
    arguments = (case.x, values, positions, scales[0] if scales else torch.empty(1), case.bias, y, *sizes)
    ptx = compiled.asm["ptx"]
    assert not spoil[0] or re.search(spoil[0], ptx), "there is nothing to spoil"
    ptx = re.sub(spoil[0], spoil[1], ptx) if spoil[0] else ptx
    report = run(ptx, arguments, blocks, tile.warps, compiled.metadata.shared)
    return y, report.races


def test_all_six_pairs_of_positions_occur() -> None:
    used = (random_case("2:4", 96, 160, 16, BRAIN).weight != 0).view(-1, 4)
    assert len(torch.unique(used[used.sum(1) == 2], dim=0)) == 6


# --- faults that must be noticed ------------------------------------------------------------------------------------

WRONG = {
    "positions of other rows": lambda tensors: (tensors[0], tensors[1].flip(0), *tensors[2:]),
    "planes in the other order": lambda tensors: (tensors[0].flip(1).contiguous(), *tensors[1:]),
    "scales of other rows": lambda tensors: (*tensors[:2], tensors[2].flip(0)),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("pattern", ["2:4", "64:2:8"])
def test_wrong_weights_give_a_wrong_product(fault: str, pattern: str) -> None:
    case = quantized_case(pattern, 128, 160, 5, HALF)
    with pytest.raises(AssertionError, match="exceeds its bound"):
        assert_close_to_float64(_executed(case, WRONG[fault])[0], case)


def test_weights_cut_short_are_out_of_bounds() -> None:
    case = random_case("2:4", 96, 160, 16, BRAIN)
    for change in (lambda tensors: (tensors[0][:-1], tensors[1]), lambda tensors: (tensors[0], tensors[1][:-1])):
        with pytest.raises(SimulationError, match="out of bounds"):
            _executed(case, change)


@pytest.mark.parametrize(
    "spoil", [(r"bar\.sync\s+0;", ""), (r"cp\.async\.wait_group\s+\w+;", "")], ids=["barriers", "waits"]
)
def test_a_pipeline_without_them_has_races(spoil: tuple[str, str]) -> None:
    assert _executed(random_case("2:4", 96, 512, 16, BRAIN), spoil=spoil)[1] != ()
