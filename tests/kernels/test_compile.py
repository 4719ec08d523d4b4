"""The machine code of every tile the kernel may choose, and its PTX executed on the CPU. No GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.activations import ACTIVATIONS
from sparsecomp.backends.gpu.triton import TritonBackend
from sparsecomp.kernels.nm_decompress import GROUP_BLOCK, Tile, choose_tile
from sparsecomp.kernels.triton_compat import WARPGROUPS
from sparsecomp.packing.format import pack
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import NM, row_nm
from tests.kernels.gluon_simulator import run
from tests.kernels.gpu_cases import Case, assert_close_to_float64, quantized_case, random_case, with_every_triton
from tests.kernels.ptxsim import Report, SimulationError
from tests.kernels.triton_compiler import MachineCode, compile_kernel, machine_code

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
    *((NM(8, 16), SINGLE, batch, False) for batch in (1, 32)),
    (NM(8, 16), BRAIN, 128, False),
]


def _widest(nm: NM, dtype: torch.dtype, batch: int, aligned: bool) -> bool:
    return batch > 1 and nm == NM(8, 16)


def _compile(
    capability: int, nm: NM, dtype: torch.dtype, tile: Tile, aligned: bool, folder: Path, quantized: bool = False
) -> MachineCode:
    code = machine_code(compile_kernel(capability, nm, dtype, tile, aligned, quantized), folder)
    assert code.instructions["EXIT"] > 0, "the listing was not read"
    return code


@pytest.mark.parametrize(
    ("capability", "nm", "dtype", "batch", "aligned"),
    with_every_triton(
        # of sm_86 what takes the most registers: it is sm_89 without FP8
        ((capability, *case) for case in MATRIX for capability in CAPABILITIES if capability != 86 or _widest(*case)),
        lambda capability, *case: _widest(*case),
    ),
    ids=str,
)
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
    elif capability == 90 and tile.batch >= 64:
        assert tensor_core == {"HGMMA"}
    else:
        assert tensor_core == {"HMMA"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("nm", "dtype", "batch"),
    [(NM(2, 4), BRAIN, 1), (NM(2, 4), HALF, 128), pytest.param(NM(8, 16), BRAIN, 32, marks=pytest.mark.every_triton)],
)
def test_machine_code_of_int8_weights(capability: int, nm: NM, dtype: torch.dtype, batch: int, tmp_path: Path) -> None:
    tile = choose_tile(dtype, batch)
    code = _compile(capability, nm, dtype, tile, True, tmp_path, quantized=True)
    assert not code.spills and code.shared <= SHARED[capability]
    assert code.instructions["HMMA"] + code.instructions["HGMMA"] > 0


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("dtype", [BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_machine_code_of_activations(capability: int, dtype: torch.dtype, aligned: bool, tmp_path: Path) -> None:
    # the pattern and the activation with the most registers
    tile = choose_tile(dtype, 128)
    compiled = compile_kernel(capability, NM(8, 16), dtype, tile, aligned, False, "gelu")
    assert not machine_code(compiled, tmp_path).spills


def test_spills_are_noticed(tmp_path: Path) -> None:
    assert _compile(80, NM(2, 4), BRAIN, Tile(256, 128, 64, 4, 2), True, tmp_path).spills


@pytest.mark.parametrize(
    ("pattern", "out", "columns", "batch", "dtype"),
    [
        ("2:4", 96, 160, 16, BRAIN),
        ("2:4", 70, 133, 3, HALF),
        ("8:16", 80, 176, 70, BRAIN),
        ("2:4", 70, 196, 33, HALF),
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
@pytest.mark.parametrize("quantized", [pytest.param(False, marks=pytest.mark.every_triton), True], ids=["", "int8"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_code_matches_float64(
    capability: int, pattern: str, out: int, columns: int, batch: int, dtype: torch.dtype, quantized: bool
) -> None:
    case = (quantized_case if quantized else random_case)(pattern, out, columns, batch, dtype)
    y, report = _executed(case, capability)
    assert report.races == ()
    assert_close_to_float64(y, case)
    warpgroups = capability == 90 and batch > 32 and dtype != SINGLE and WARPGROUPS
    assert (report.executed["wgmma"] > 0) == warpgroups and (report.executed["mma"] > 0) == (
        dtype != SINGLE and not warpgroups
    )


@pytest.mark.parametrize(("capability", "batch"), [(80, 20), (90, 70)])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_in_compiled_code(activation: str, capability: int, batch: int) -> None:
    case = replace(random_case("2:4", 70, 140, batch, HALF), activation=activation)
    y, report = _executed(case, capability)
    assert report.races == ()
    assert_close_to_float64(y, case)


def _executed(
    case: Case,
    capability: int = 80,
    change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple,
    spoil: tuple[str, str] = ("", ""),
) -> tuple[Tensor, Report]:
    """y and the simulator's report, of a kernel whose weight tensors and PTX may be changed first."""
    packed = pack(case.weight, case.pattern)
    nm = row_nm(packed.pattern)
    assert nm is not None and case.bias is not None
    dtype, (batch, columns), out = case.x.dtype, case.x.shape, case.weight.shape[0]
    kernel = TritonBackend().prepare(quantize(packed) if case.quantized else packed)
    values, positions, *scales = change(kernel.tensors)
    tile = choose_tile(dtype, batch)
    aligned = out % 16 == 0 and columns % 16 == 0
    compiled = compile_kernel(capability, nm, dtype, tile, aligned, case.quantized, case.activation)
    y = torch.empty(batch, out, dtype=dtype)
    blocks = -(-out // tile.out) * -(-batch // tile.batch)
    sizes = (batch, out, columns, kernel.tensors[0].shape[2] // GROUP_BLOCK, columns, out)
    arguments = (case.x, values, positions, scales[0] if scales else torch.empty(1), case.bias, y, *sizes)
    before, after = spoil
    ptx = compiled.asm["ptx"]
    assert not before or re.search(before, ptx), "there is nothing to spoil"
    ptx = re.sub(before, after, ptx) if before else ptx
    return y, run(ptx, arguments, blocks, tile.warps, compiled.metadata.shared)


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
        assert_close_to_float64(_executed(case, change=WRONG[fault])[0], case)


def test_weights_cut_short_are_out_of_bounds() -> None:
    case = random_case("2:4", 96, 160, 16, BRAIN)
    for change in (lambda tensors: (tensors[0][:-1], tensors[1]), lambda tensors: (tensors[0], tensors[1][:-1])):
        with pytest.raises(SimulationError, match="out of bounds"):
            _executed(case, change=change)


@pytest.mark.parametrize("spoil", [r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\w+;"], ids=["barriers", "waits"])
def test_a_pipeline_without_them_has_races(spoil: str) -> None:
    assert _executed(random_case("2:4", 96, 512, 16, BRAIN), spoil=(spoil, ""))[1].races != ()


FAULTLESS = random_case("2:4", 64, 512, 64, BRAIN)
FAULTS = {
    "no barriers": (r"bar\.sync", "// bar.sync"),
    "too weak a wait for copies": (r"cp\.async\.wait_group", "cp.async.wait_group 9; //"),
    "no wait for products": (r"wgmma\.wait_group", "// wgmma.wait_group"),
    "no fence of memory": (r"fence\.proxy\.async", "// fence.proxy.async"),
    "no fence of registers": (r"wgmma\.fence", "// wgmma.fence"),
    "the next columns": (", 4611686293305294850;", ", 4611686293305294852;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_code_for_hopper_are_noticed(fault: str) -> None:
    with pytest.raises((AssertionError, SimulationError), match=r"^(?!there is nothing)"):
        y, report = _executed(FAULTLESS, 90, spoil=FAULTS[fault])
        assert report.races == ()
        assert_close_to_float64(y, FAULTLESS)


def test_without_a_fault_that_code_passes() -> None:
    y, report = _executed(FAULTLESS, 90)
    assert report.executed["wgmma"] > 0 and report.races == ()
    assert_close_to_float64(y, FAULTLESS)
