"""The machine code of the V:N:M kernel, and its PTX executed on the CPU. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.activations import ACTIVATIONS
from sparsecomp.backends.gpu import triton_vnm
from sparsecomp.backends.gpu.triton_vnm import TritonVnmBackend
from sparsecomp.kernels.triton_compat import WARPGROUPS, narrow_tiles
from sparsecomp.kernels.vnm_gather import GROUP_BLOCK, choose_tile
from sparsecomp.packing.format import pack
from sparsecomp.patterns import VNM, parse
from tests.kernels.gluon_simulator import run
from tests.kernels.gpu_cases import Case, assert_close_to_float64, random_case, with_every_triton
from tests.kernels.ptxsim import Report, SimulationError
from tests.kernels.triton_compiler import compile_kernel, compile_vnm_kernel, machine_code

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN = torch.float16, torch.bfloat16
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
MATRIX = [
    *((VNM(v, 2, 8), batch, True) for v in (16, 64, 128) for batch in (1, 32, 128)),
    (VNM(32, 2, 16), 128, True),
    *((VNM(v, 2, 16), 128, False) for v in (64, 128)),
]


def _widest(pattern: VNM, batch: int, aligned: bool) -> bool:
    return pattern.v == 64 and batch > 1


@pytest.mark.parametrize(
    ("capability", "pattern", "batch", "aligned"),
    with_every_triton(
        # of sm_86 what takes the most registers: it is sm_89 without FP8
        ((capability, *case) for case in MATRIX for capability in SHARED if capability != 86 or _widest(*case)),
        lambda capability, *case: _widest(*case),
    ),
    ids=str,
)
def test_machine_code(capability: int, pattern: VNM, batch: int, aligned: bool, tmp_path: Path) -> None:
    tile = choose_tile(pattern.v, batch, narrow_tiles(capability))
    assert pattern.v % tile.out == 0, "rows of a program must share their columns"
    # the activation with the most temporaries
    code = machine_code(compile_vnm_kernel(capability, pattern, BRAIN, tile, aligned, "gelu"), tmp_path)
    assert not code.spills and code.shared <= SHARED[capability]
    tensor_core = {op for op in ("HMMA", "HGMMA") if code.instructions[op] > 0}
    assert tensor_core == ({"HGMMA"} if capability == 90 and tile.batch >= 64 else {"HMMA"})


def test_products_fall_with_m() -> None:
    # of 256 columns the dense kernel runs 4 steps of 64, the gathering one 2 for M = 8 and 1 for M = 16
    counts = [_executed(random_case(f"64:2:{m}", 64, 256, 64, HALF), 80).executed["mma"] for m in (8, 16)]
    tile = choose_tile(64, 64)
    each = compile_kernel(80, VNM(64, 2, 8).row_pattern, HALF, tile, True).asm["ptx"].count("mma.sync")
    assert counts == [2 * each, each]


@pytest.mark.every_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("pattern", "out", "columns", "batch", "dtype"),
    [
        ("16:2:8", 40, 160, 16, BRAIN),
        ("32:2:16", 70, 133, 3, HALF),
        ("64:2:8", 150, 300, 70, HALF),
        ("64:2:16", 96, 1040, 64, BRAIN),
        ("128:2:8", 140, 90, 33, BRAIN),
        ("48:2:8", 100, 72, 20, HALF),
        ("256:2:16", 300, 7, 1, HALF),
    ],
)
def test_compiled_code_matches_float64(
    capability: int, pattern: str, out: int, columns: int, batch: int, dtype: torch.dtype
) -> None:
    report = _executed(random_case(pattern, out, columns, batch, dtype), capability)
    warpgroups = capability == 90 and batch > 32 and WARPGROUPS
    assert (report.executed["wgmma"] > 0) == warpgroups and (report.executed["mma"] > 0) == (not warpgroups)


@pytest.mark.parametrize(("capability", "batch"), [(80, 20), (90, 70)])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_in_compiled_code(activation: str, capability: int, batch: int) -> None:
    _executed(replace(random_case("64:2:8", 70, 140, batch, HALF), activation=activation), capability)


def _executed(case: Case, capability: int, spoil: Callable[[str], str] = lambda ptx: ptx) -> Report:
    """What the simulator reports of the compiled kernel, whose result was compared with float64."""
    pattern, (batch, columns), out = parse(case.pattern), case.x.shape, case.weight.shape[0]
    assert isinstance(pattern, VNM) and case.bias is not None
    values, kept, positions = triton_vnm._parts(TritonVnmBackend().prepare(pack(case.weight, pattern)))
    tile = choose_tile(pattern.v, batch, narrow_tiles(capability))
    aligned = out % 16 == 0 and columns % 16 == 0
    compiled = compile_vnm_kernel(capability, pattern, case.x.dtype, tile, aligned, case.activation)
    y = torch.empty(batch, out, dtype=case.x.dtype)
    blocks = -(-out // tile.out) * -(-batch // tile.batch)
    sizes = (batch, out, columns, values.shape[2] // GROUP_BLOCK, columns, out)
    # tensors of their own, since the simulator takes buffers by their first address
    arguments = (case.x, values, positions.clone(), kept.clone(), case.bias, y, *sizes)
    report = run(spoil(compiled.asm["ptx"]), arguments, blocks, tile.warps, compiled.metadata.shared)
    assert report.races == ()
    assert_close_to_float64(y, case)
    return report


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
        _executed(random_case("64:2:8", 64, 640, 64, HALF), capability, spoil)


def test_columns_of_another_tile_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = triton_vnm._parts

    def swapped(kernel: triton_vnm.Kernel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, kept, positions = parts(kernel)
        return values, kept.flip(0), positions

    monkeypatch.setattr(triton_vnm, "_parts", swapped)
    with pytest.raises(AssertionError, match="exceeds its bound"):
        _executed(random_case("32:2:8", 64, 64, 8, HALF), 80)
