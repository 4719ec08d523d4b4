"""Packing for the decompressing kernel, and unpacking, on the GPU against torch: interpreted, and the PTX executed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu_cases import random_weight

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.backends.gpu.triton import TritonBackend
from sparsecomp.kernels import pack_planes
from sparsecomp.kernels.nm_decompress import plane_bits
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import NM, parse, row_nm
from tests.kernels.gluon_simulator import Simulator, compile_kernel
from tests.kernels.packing_interpreter import interpret_planes
from tests.kernels.ptxsim import SimulationError
from tests.kernels.triton_compiler import machine_code

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN, SINGLE, BYTE = torch.float16, torch.bfloat16, torch.float32, torch.int8


def _weight(pattern: str, out: int, columns: int, dtype: torch.dtype) -> Tensor:
    weight = random_weight(pattern, out, columns, SINGLE, seed=out + columns)
    # every other group has free slots, and zeros are of both signs
    weight[:, : columns // 2 : 3] = 0
    weight = torch.where(weight == 0, -0.0, weight)
    return (weight * 20).clamp(-127, 127).to(dtype) if dtype == BYTE else weight.to(dtype)


KINDS = [
    ("2:4", BRAIN),
    ("2:4", BYTE),
    ("1:2", SINGLE),
    ("4:8", HALF),
    ("5:16", BRAIN),
    ("16:16", HALF),
    ("3:8", SINGLE),
]
SHAPES = [(1, 1), (3, 33), (2, 2100)]
WEIGHTS = {
    f"{pattern} {dtype} {out}x{columns}": (_weight(pattern, out, columns, dtype), pattern)
    for pattern, dtype in KINDS
    for out, columns in (*SHAPES, *([(0, 16), (4, 0)] if pattern == "2:4" else []))
}
SHARED = {
    f"{pattern} {dtype}": (_weight(pattern, 7, 90, dtype), pattern)
    for pattern, dtype in (("2:4@v4", BRAIN), ("4:8@v3", BYTE), ("4:2:8", HALF))
}


def _nm(pattern: str) -> NM:
    nm = row_nm(parse(pattern))
    assert nm is not None
    return nm


def _planes(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    return pack_planes.pack_planes(packed.values, packed.metadata, _nm(str(packed.pattern)), packed.shape[1])


def _twin(packed: PackedWeight) -> tuple[Tensor, ...]:
    """What torch makes of it on the CPU."""
    kernel = TritonBackend().prepare(packed if packed.values.dtype != BYTE else _as_half(packed))
    planes, octets = kernel.tensors
    return planes.to(packed.values.dtype), octets


def _as_half(packed: PackedWeight) -> PackedWeight:
    # the backend knows int8 with scales alone; fp16 holds every int8
    return PackedWeight(packed.values.to(HALF), packed.metadata, packed.pattern, packed.shape)


def _same(ours: tuple[Tensor, ...], twin: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, twin, strict=True))


@pytest.mark.parametrize("name", [*WEIGHTS, *SHARED])
def test_the_canonical_form_is_reordered_as_torch_does_it(name: str, simulator: Simulator) -> None:
    packed = pack(*{**WEIGHTS, **SHARED}[name])
    assert _same(_planes(packed), _twin(packed))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_dense_weight_is_compressed_as_torch_does_it(name: str, simulator: Simulator) -> None:
    weight, pattern = WEIGHTS[name]
    *made, broken = pack_planes.pack_planes_dense(weight, _nm(pattern))
    assert _same(tuple(made), _twin(pack(weight, pattern)))
    assert not broken.any()


@pytest.mark.parametrize("name", [*WEIGHTS, *SHARED])
def test_a_canonical_weight_is_unpacked_as_torch_does_it(name: str, simulator: Simulator) -> None:
    weight, pattern = {**WEIGHTS, **SHARED}[name]
    packed = pack(weight, pattern)
    dense = pack_planes.unpack(packed.values, packed.metadata, _nm(pattern), packed.shape[1])
    assert torch.equal(dense, packed.unpack()) and torch.equal(dense, weight)


def test_rows_of_a_dense_weight_may_lie_apart(simulator: Simulator) -> None:
    weight = _weight("2:4", 5, 100, HALF)
    wide = torch.full((5, 107), torch.nan, dtype=HALF)
    wide[:, :100] = weight
    wanted = _twin(pack(weight, "2:4"))
    assert _same(pack_planes.pack_planes_dense(wide[:, :100], _nm("2:4"))[:2], wanted)
    assert _same(pack_planes.pack_planes_dense(weight.t().contiguous().t(), _nm("2:4"))[:2], wanted)


@pytest.mark.parametrize(("pattern", "dtype"), [("2:4", HALF), ("3:8", BRAIN), ("1:2", SINGLE), ("2:4", BYTE)])
def test_a_group_that_breaks_the_pattern_is_noticed(pattern: str, dtype: torch.dtype, simulator: Simulator) -> None:
    nm = _nm(pattern)
    weight = _weight(pattern, 3, 300 * nm.m, dtype)
    weight[2, 299 * nm.m : 299 * nm.m + nm.n + 1] = 1
    broken = pack_planes.pack_planes_dense(weight, nm)[2]
    assert broken[2, 1] == 1 and int(broken.sum()) == 1


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_a_number_that_is_none_is_noticed(number: float, dtype: torch.dtype, simulator: Simulator) -> None:
    weight = _weight("2:4", 3, 40, dtype)
    weight[1, 17] = number
    broken = pack_planes.pack_planes_dense(weight, _nm("2:4"))[2]
    assert broken.flatten().tolist() == [0, 1, 0]


def test_the_interpreter_agrees() -> None:
    given = [*WEIGHTS.values(), *SHARED.values()]
    for (weight, pattern), (canonical, dense, unpacked) in zip(given, interpret_planes(given), strict=True):
        twin = _twin(pack(weight, pattern))
        assert _same(canonical, twin) and torch.equal(unpacked, weight)
        assert dense is None or _same(dense, twin)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("pattern", "dtype"), [("2:4", BRAIN), ("8:16", BRAIN), ("2:4", BYTE), ("3:8", SINGLE)])
def test_machine_code(pattern: str, dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    nm, size = _nm(pattern), dtype.itemsize
    integers = {1: "*i8", 2: "*i16", 4: "*i32"}[size]
    exponent = {1: 0, 2: 0x7F80, 4: 0x7F800000}[size]
    bits = {"INDEX_BITS": nm.index_bits, "BITS": plane_bits(nm)}
    shared = {"N": nm.n, **bits, "MASK_ROWS": 1, "GROUPS": 256}
    elements = {"N": nm.n, "M": nm.m, "BITS": plane_bits(nm), "BYTES": size, "EXPONENT": exponent, "GROUPS": 256}
    layout = {"N": nm.n, "M": nm.m, "INDEX_BITS": nm.index_bits, "MASK_ROWS": 1, "COLUMNS": 1024}
    pair = (integers, "*u8", integers)
    for kernel, types, constants in (
        (pack_planes.pack_planes_kernel, (*pair, "*u8", *["i32"] * 3), shared),
        (pack_planes.pack_planes_dense_kernel, (integers, integers, "*u8", "*i32", *["i32"] * 5), elements),
        (pack_planes.unpack_kernel, (*pair, *["i32"] * 3), layout),
    ):
        code = machine_code(compile_kernel(kernel, capability, types, constants, 4), tmp_path)
        assert not code.spills and code.registers <= 128
        assert code.instructions["STG"] > 0


# --- faults that must be noticed ------------------------------------------------------------------------------------


def test_other_positions_give_another_layout(simulator: Simulator) -> None:
    packed = pack(_weight("2:4", 4, 128, HALF), "2:4")
    made = pack_planes.pack_planes(packed.values, packed.metadata.flip(1), _nm("2:4"), 128)
    twin = _twin(packed)
    assert torch.equal(made[0], twin[0]) and not torch.equal(made[1], twin[1])


def test_metadata_cut_short_is_out_of_bounds(simulator: Simulator) -> None:
    packed = pack(_weight("2:4", 8, 128, HALF), "2:4")
    with pytest.raises(SimulationError, match="out of bounds"):
        pack_planes.pack_planes(packed.values, packed.metadata[:6], _nm("2:4"), 128)
    with pytest.raises(SimulationError, match="out of bounds"):
        pack_planes.unpack(packed.values, packed.metadata[:6], _nm("2:4"), 128)
