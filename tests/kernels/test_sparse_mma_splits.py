"""The mma.sp kernel with the columns split among blocks, for decoding: executed on the CPU, and faults noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.gpu_cases import (
    Case,
    assert_close_to_float64,
    assert_close_to_integer_product,
    random_case,
    rounded_to_tf32,
    with_every_triton,
)

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.activations import activate
from sparsecomp.kernels import launching, sparse_mma
from sparsecomp.kernels.add_splits import add_splits, add_splits_kernel
from sparsecomp.kernels.quantize_rows import quantize_rows_kernel, quantize_rows_slowly
from sparsecomp.kernels.sparse_mma_config import SPLIT_CONFIGS, Config, candidates
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.fragments import to_fragments
from sparsecomp.packing.quantize import quantize
from tests.kernels.gluon_simulator import Simulator, SpoilingSimulator, compile_kernel, compile_sparse_mma
from tests.kernels.ptxsim import SimulationError
from tests.kernels.triton_compiler import machine_code

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SMALL = SPLIT_CONFIGS[1]


def _product(case: Case, packed: PackedWeight, config: Config, activation: str = "none") -> Tensor:
    fragments, metadata = to_fragments(packed)
    out = packed.shape[0]
    return sparse_mma.sparse_mma_linear(
        case.x, fragments, metadata, case.bias, out, activation, config, scales=packed.scales
    )


# the last share is partial, or empty where the steps do not go round; the last block of outputs and tokens is not full
@pytest.mark.parametrize("more", [1, 5])
@pytest.mark.parametrize("config", SPLIT_CONFIGS, ids=str)
def test_every_configuration_matches_float64(config: Config, more: int, simulator: Simulator) -> None:
    steps = config.splits + more
    out, tokens = config.out + 40, config.tokens + 3
    case = random_case("2:4", out, config.depth * steps - 40, tokens, BRAIN)
    used = functional.pad(case.weight != 0, (0, -case.weight.shape[1] % 4)).view(-1, 4)
    assert len(torch.unique(used[used.sum(1) == 2], dim=0)) == 6
    assert_close_to_float64(_product(case, pack(case.weight, "2:4"), config), case)
    case = random_case("2:4", out, 2 * config.depth * steps - 80, tokens, HALF)
    packed = quantize(pack(case.weight, "2:4"))
    assert_close_to_integer_product(_product(case, packed, config), case, *quantize_rows_slowly(case.x), packed)
    case = random_case("1:2", out, config.depth // 2 * steps - 20, tokens, SINGLE)
    rounded = Case(rounded_to_tf32(case.weight), "1:2", rounded_to_tf32(case.x), case.bias)
    assert_close_to_float64(_product(case, pack(case.weight, "1:2"), config), rounded)
    assert simulator.reports["add_splits_kernel"].executed["st"] > 0


@pytest.mark.parametrize(
    ("out", "columns", "tokens", "with_bias"),
    [(1, 300, 1, True), (77, 1000, 2, True), (300, 257, 9, False), (64, 640, 0, True), (40, 4000, 16, True)],
)
@pytest.mark.every_triton
def test_any_shape(out: int, columns: int, tokens: int, with_bias: bool, simulator: Simulator) -> None:
    case = random_case("2:4", out, columns, tokens, HALF, with_bias, row_gap=3)
    assert_close_to_float64(_product(case, pack(case.weight, "2:4"), SMALL), case)


def test_a_single_step_is_not_split(simulator: Simulator) -> None:
    case = random_case("2:4", 40, 128, 3, HALF)
    assert_close_to_float64(_product(case, pack(case.weight, "2:4"), SMALL), case)
    assert "add_splits_kernel" not in simulator.reports


@pytest.mark.parametrize("activation", sparse_mma.ACTIVATIONS)
def test_sums_are_added_in_order(activation: str, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def noted(partial: Tensor, *others: object) -> None:
        given.append(partial)
        add_splits(partial, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(sparse_mma, "add_splits", noted)
    case = random_case("2:4", 72, 1000, 3, BRAIN)
    y = _product(case, pack(case.weight, "2:4"), SMALL, activation)
    assert case.bias is not None and given[0].shape == (4, 3, 72)
    total = case.bias.float().expand(3, 72).clone()
    for part in given[0]:
        total += part
    wanted = activate(total, activation)
    if activation in ("none", "relu"):
        assert torch.equal(y, wanted.to(BRAIN))
    else:
        torch.testing.assert_close(y.float(), wanted, rtol=2.0**-8, atol=3e-6)


@pytest.mark.parametrize("dtype", [BRAIN, torch.int8, SINGLE], ids=str)
@pytest.mark.parametrize("capability", with_every_triton((each,) for each in (80, 86, 89, 90)))
def test_machine_code(capability: int, dtype: torch.dtype, tmp_path: Path) -> None:
    for config in {Config(*list(vars(config).values())[:-1]) for config in SPLIT_CONFIGS}:
        variant = sparse_mma.constants(config, dtype, False, "none", 8, split=True)
        sums, opcode = (torch.int32, "IMMA.SP") if dtype == torch.int8 else (SINGLE, "HMMA.SP")
        code = machine_code(compile_sparse_mma(capability, variant, config.warps, sums), tmp_path)
        assert code.instructions[opcode] == config.row_tiles * config.token_tiles * config.depth // 32
        assert not code.spills and code.shared == config.shared_bytes
        # four blocks or more at a time on one multiprocessor, so that copies of others run while one waits
        assert 4 * code.registers * 32 * config.warps <= 65536 and 4 * code.shared <= 166912


@pytest.mark.parametrize("capability", with_every_triton((each,) for each in (80, 86, 89, 90)))
def test_machine_code_around_the_product(capability: int, tmp_path: Path) -> None:
    constants = {"HAS_BIAS": True, "ACTIVATION": "gelu", "OUT_UNIT": 8, "BLOCK": 256}
    for sums, out in (("*fp32", "*bf16"), ("*i32", "*fp16"), ("*fp32", "*fp32")):
        types = (sums, out, "*fp32", "*fp32", out, "i32", "i32", "i32")
        assert not machine_code(compile_kernel(add_splits_kernel, capability, types, constants, 2), tmp_path).spills
    for x in ("*fp16", "*bf16", "*fp32"):
        types = (x, "*i8", "*fp32", "i32", "i32", "i32")
        for unit in (1, 8):
            compiled = compile_kernel(quantize_rows_kernel, capability, types, {"UNIT": unit, "BLOCK": 1024}, 4)
            assert not machine_code(compiled, tmp_path).spills


def test_splits_are_offered_when_decoding_only() -> None:
    for tokens in (1, 8, 16):
        found = candidates(4096, tokens, 90, 132)
        assert len(found) == len(set(found)) == 8
        assert [config.splits > 1 for config in found] == [False] * 4 + [True] * 4
    assert candidates(4096, 1, 90, 132)[4].tokens == 8 and candidates(4096, 16, 90, 132)[4].tokens == 16
    assert all(config.splits == 1 for config in candidates(4096, 17, 90, 132))


# --- faults that must be noticed ------------------------------------------------------------------------------------


@pytest.mark.every_triton
def test_shares_that_are_all_stored_in_one_place_are_races(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled = SpoilingSimulator(r"(mov\.u32\s+%r\d+), %ctaid\.y;", r"\1, 0;")
    monkeypatch.setattr(launching, "launch", spoiled.launch)
    case = random_case("2:4", 40, 1024, 3, HALF)
    _product(case, pack(case.weight, "2:4"), SMALL)
    races = spoiled.reports["sparse_mma_kernel"].races
    assert any("stored by two threads" in race for race in races), races


@pytest.mark.parametrize("shares", [3, 5])
def test_sums_of_too_few_or_too_many_shares_are_noticed(
    shares: int, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = simulator.launch

    def miscounting(kernel, arguments, constants, grid, warps) -> None:  # type: ignore[no-untyped-def]
        if kernel.__name__ == "add_splits_kernel":
            assert arguments[5] == 4
            arguments = (*arguments[:5], shares, *arguments[6:])
        launch(kernel, arguments, constants, grid, warps)

    monkeypatch.setattr(launching, "launch", miscounting)
    case = random_case("2:4", 40, 1024, 3, HALF)
    with pytest.raises(AssertionError if shares < 4 else SimulationError, match=r"exceeds its bound|out of bounds"):
        assert_close_to_float64(_product(case, pack(case.weight, "2:4"), SMALL), case)
