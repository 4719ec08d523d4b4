"""Packing on the GPU against the torch packer: in Triton's interpreter, and the compiled PTX executed on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu_cases import random_weight

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.kernels import pack_fragments
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.fragments import to_fragments
from sparsecomp.patterns import row_nm
from tests.kernels.gluon_simulator import Simulator, compile_kernel
from tests.kernels.packing_interpreter import interpret_packing
from tests.kernels.ptxsim import SimulationError
from tests.kernels.triton_compiler import machine_code

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN, SINGLE, BYTE = torch.float16, torch.bfloat16, torch.float32, torch.int8
SHAPES = [(1, 1), (7, 33), (64, 128), (65, 130), (100, 250), (130, 66), (0, 16)]


def _weight(pattern: str, out: int, columns: int, dtype: torch.dtype) -> Tensor:
    weight = random_weight(pattern, out, columns, SINGLE, seed=out + columns)
    weight = torch.where(weight == 0, -0.0, weight)  # packed as +0
    return (weight * 20).clamp(-127, 127).to(dtype) if dtype == BYTE else weight.to(dtype)


WEIGHTS = {
    f"{pattern} {out}x{columns} {dtype}": (_weight(pattern, out, columns, dtype), pattern)
    for pattern, dtype in (("2:4", HALF), ("2:4", BRAIN), ("2:4", BYTE), ("1:2", SINGLE))
    for out, columns in SHAPES
}
SHARED = {
    f"{pattern} {dtype}": (_weight(pattern, 70, 90, dtype), pattern)
    for pattern, dtype in (("2:4@v4", BRAIN), ("2:4@v3", BYTE), ("1:2@v4", SINGLE))
}


def _packed_by_kernel(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    nm = row_nm(packed.pattern)
    assert nm is not None
    return pack_fragments.pack_fragments(packed.values, packed.metadata, nm, packed.shape[1])


def _same(ours: tuple[Tensor, ...], twin: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, twin, strict=True))


def test_all_choices_of_positions_occur() -> None:
    for name, kinds in (("2:4 100x250 torch.bfloat16", 6), ("1:2 100x250 torch.float32", 2)):
        weight, pattern = WEIGHTS[name]
        positions = pack(weight, pattern).positions().flatten(0, 1)
        assert len(torch.unique(positions, dim=0)) == kinds


@pytest.mark.parametrize("name", [*WEIGHTS, *SHARED])
def test_the_canonical_form_is_reordered_as_torch_does_it(name: str, simulator: Simulator) -> None:
    packed = pack(*{**WEIGHTS, **SHARED}[name])
    assert _same(_packed_by_kernel(packed), to_fragments(packed))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_dense_weight_is_compressed_as_torch_does_it(name: str, simulator: Simulator) -> None:
    weight, pattern = WEIGHTS[name]
    *made, broken = pack_fragments.pack_dense(weight)
    assert _same(tuple(made), to_fragments(pack(weight, pattern)))
    assert not broken.any()


@pytest.mark.every_triton
def test_rows_of_a_dense_weight_may_lie_apart(simulator: Simulator) -> None:
    weight = _weight("2:4", 66, 100, HALF)
    wide = torch.full((66, 107), torch.nan, dtype=HALF)
    wide[:, :100] = weight
    wanted = to_fragments(pack(weight, "2:4"))
    assert _same(pack_fragments.pack_dense(wide[:, :100])[:2], wanted)
    assert _same(pack_fragments.pack_dense(weight.t().contiguous().t())[:2], wanted)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, BYTE, SINGLE], ids=str)
@pytest.mark.every_triton
def test_a_group_with_too_many_nonzeros_is_noticed(dtype: torch.dtype, simulator: Simulator) -> None:
    weight = _weight("1:2" if dtype == SINGLE else "2:4", 70, 300, dtype)
    weight[69, 296:300] = torch.tensor([1, 1, 1, 0])
    broken = pack_fragments.pack_dense(weight)[2]
    assert broken[1, -1] == 1 and int(broken.sum()) == 1


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_a_group_with_a_number_that_is_none_is_noticed(number: float, dtype: torch.dtype, simulator: Simulator) -> None:
    weight = _weight("1:2" if dtype == SINGLE else "2:4", 65, 40, dtype)
    largest = weight.clone().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    largest[largest > 0] = torch.finfo(dtype).max
    assert not pack_fragments.pack_dense(largest)[2].any()
    weight[64, 17] = number
    broken = pack_fragments.pack_dense(weight)[2]
    assert not broken[0].any() and int(broken[1].sum()) == 1


def test_the_interpreter_agrees() -> None:
    found = interpret_packing(list(WEIGHTS.values()))
    for (weight, pattern), (canonical, dense, broken) in zip(WEIGHTS.values(), found, strict=True):
        twin = to_fragments(pack(weight, pattern))
        assert _same(canonical, twin) and _same(dense, twin) and not broken


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("dtype", [pytest.param(BRAIN, marks=pytest.mark.every_triton), BYTE, SINGLE], ids=str)
def test_machine_code(dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    size = dtype.itemsize
    integers = {1: "*i8", 2: "*i16", 4: "*i32"}[size]
    canonical = compile_kernel(
        pack_fragments.pack_fragments_kernel,
        capability,
        (integers, "*u8", "*i32", "*i32", *["i32"] * 5),
        {"BYTES": size, "MASK_ROWS": 1},
        4,
    )
    dense = compile_kernel(
        pack_fragments.pack_dense_kernel,
        capability,
        (integers, "*i32", "*i32", "*i32", *["i32"] * 4),
        {"BYTES": size, "EXPONENT": {1: 0, 2: 0x7F80, 4: 0x7F800000}[size]},
        4,
    )
    for compiled in (canonical, dense):
        code = machine_code(compiled, tmp_path)
        assert not code.spills and code.registers <= 128
        assert code.instructions["STG"] > 0


# --- faults that must be noticed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BRAIN, BYTE], ids=str)
@pytest.mark.every_triton
def test_other_positions_give_another_layout(dtype: torch.dtype, simulator: Simulator) -> None:
    packed = pack(_weight("2:4", 64, 128, dtype), "2:4")
    nm = row_nm(packed.pattern)
    assert nm is not None
    made = pack_fragments.pack_fragments(packed.values, packed.metadata.flip(1), nm, 128)
    twin = to_fragments(packed)
    assert torch.equal(made[0], twin[0]) and not torch.equal(made[1], twin[1])


def test_values_cut_short_are_out_of_bounds(simulator: Simulator) -> None:
    packed = pack(_weight("2:4", 64, 128, HALF), "2:4")
    nm = row_nm(packed.pattern)
    assert nm is not None
    with pytest.raises(SimulationError, match="out of bounds"):
        pack_fragments.pack_fragments(packed.values, packed.metadata[:40], nm, 128)
