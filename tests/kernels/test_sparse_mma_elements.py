"""The mma.sp kernel on int8 and tf32: its PTX executed on the CPU, and faults that must be noticed."""

from __future__ import annotations

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
)

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.activations import activate
from sparsecomp.kernels import launching, sparse_mma
from sparsecomp.kernels.quantize_rows import quantize_rows, quantize_rows_slowly
from sparsecomp.kernels.sparse_mma_config import CONFIGS, Config, configs
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.fragments import to_fragments
from sparsecomp.packing.quantize import quantize
from tests.kernels.gluon_simulator import Simulator, SpoilingSimulator
from tests.kernels.ptxsim import SimulationError

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SMALL = CONFIGS[7]


def _product(case: Case, packed: PackedWeight, config: Config, activation: str = "none") -> Tensor:
    fragments, metadata = to_fragments(packed)
    out = packed.shape[0]
    return sparse_mma.sparse_mma_linear(
        case.x, fragments, metadata, case.bias, out, activation, config, scales=packed.scales
    )


def _check_int8(case: Case, config: Config) -> None:
    packed = quantize(pack(case.weight, case.pattern))
    y = _product(case, packed, config)
    assert_close_to_integer_product(y, case, *quantize_rows_slowly(case.x), packed)


def _check_tf32(case: Case, config: Config) -> None:
    y = _product(case, pack(case.weight, case.pattern), config)
    rounded = Case(rounded_to_tf32(case.weight), case.pattern, rounded_to_tf32(case.x), case.bias)
    assert_close_to_float64(y, rounded)


def _kinds_of_groups(weight: Tensor, group: int) -> int:
    used = functional.pad(weight != 0, (0, -weight.shape[1] % group)).view(-1, group)
    return len(torch.unique(used[used.sum(1) == group // 2], dim=0))


# two blocks of outputs and two of tokens, the second ones nearly empty; more steps than stages, the last one partial
@pytest.mark.parametrize(
    ("config", "dtype"),
    [(config, dtype) for dtype in (BRAIN, SINGLE) for config in configs(90, dtype.itemsize)],
    ids=str,
)
def test_every_configuration_matches_the_integer_product(
    config: Config, dtype: torch.dtype, simulator: Simulator
) -> None:
    columns = 2 * config.depth * (config.stages + 1) + 16 * (1 + dtype.itemsize)
    case = random_case("2:4", config.out + 40, columns, config.tokens + 5, dtype)
    assert _kinds_of_groups(case.weight, 4) == 6
    _check_int8(case, config)
    steps, slices = -(-columns // (2 * config.depth)), config.depth // 32
    products = steps * slices * config.row_tiles * config.token_tiles
    assert simulator.reports["sparse_mma_kernel"].executed["mma"] == products


@pytest.mark.parametrize("config", configs(90, SINGLE.itemsize), ids=str)
def test_every_configuration_matches_float64_of_tf32(config: Config, simulator: Simulator) -> None:
    columns = config.depth // 2 * (config.stages + 1) + 12
    case = random_case("1:2", config.out + 40, columns, config.tokens + 5, SINGLE)
    assert _kinds_of_groups(case.weight, 2) == 2
    _check_tf32(case, config)


SHAPES = {
    "one of each": {"out": 1, "columns": 1, "batch": 1},
    "odd outputs": {"out": 77, "columns": 128, "batch": 20},
    "odd inputs": {"out": 64, "columns": 77, "batch": 9},
    "few inputs": {"out": 130, "columns": 8, "batch": 3},
    "one column over a step": {"out": 96, "columns": 257, "batch": 17},
    "no bias": {"out": 70, "columns": 130, "batch": 8, "with_bias": False},
    "rows of x apart, NaN between": {"out": 64, "columns": 128, "batch": 6, "row_gap": 8},
    "rows of x apart, misaligned": {"out": 64, "columns": 130, "batch": 6, "row_gap": 3},
    "no token": {"out": 8, "columns": 16, "batch": 0},
    "a batch": {"out": 64, "columns": 64, "batch": 64},
}


@pytest.mark.parametrize("name", SHAPES)
def test_any_shape(name: str, simulator: Simulator) -> None:
    for dtype in (HALF, SINGLE):
        _check_int8(random_case("2:4", dtype=dtype, **SHAPES[name]), SMALL)
    _check_tf32(random_case("1:2", dtype=SINGLE, **SHAPES[name]), SMALL)


@pytest.mark.every_triton
def test_rows_that_share_a_mask(simulator: Simulator) -> None:
    _check_int8(random_case("2:4@v4", 65, 96, 5, BRAIN), SMALL)
    _check_tf32(random_case("1:2@v4", 65, 96, 5, SINGLE), SMALL)


@pytest.mark.parametrize("activation", sparse_mma.ACTIVATIONS)
@pytest.mark.parametrize(("pattern", "dtype"), [("2:4", HALF), ("2:4", SINGLE), ("1:2", SINGLE)])
def test_activations_are_fused(pattern: str, dtype: torch.dtype, activation: str, simulator: Simulator) -> None:
    case = random_case(pattern, 72, 64, 24, dtype)
    packed = pack(case.weight, pattern) if pattern == "1:2" else quantize(pack(case.weight, pattern))
    plain, got = (_product(case, packed, SMALL, name).double() for name in ("none", activation))
    # slopes are at most 1.13, and the plain product was rounded to the dtype as well
    unit = 2.0**-11 if dtype == HALF else 2.0**-23
    assert bool(((got - activate(plain, activation)).abs() <= 3 * unit * plain.abs() + 3e-6).all())


def test_the_error_of_rounded_activations_is_what_rounding_makes(simulator: Simulator) -> None:
    case = random_case("2:4", 96, 256, 12, SINGLE)
    packed = quantize(pack(case.weight, "2:4"))
    assert case.bias is not None
    exact = functional.linear(case.x.double(), packed.unpack().double(), case.bias.double())
    halves = case.x.double().abs().amax(1, keepdim=True) / 254
    allowed = halves * packed.unpack().double().abs().sum(1) + 1e-4
    assert bool(((_product(case, packed, SMALL).double() - exact).abs() <= allowed).all())


def test_a_token_with_infinity_or_nan_gives_nan_and_no_other_does(simulator: Simulator) -> None:
    case = random_case("2:4", 64, 128, 6, BRAIN)
    case.x[1, 3], case.x[4, 7] = torch.inf, torch.nan
    y = _product(case, quantize(pack(case.weight, "2:4")), SMALL)
    assert y.isnan().all(dim=1).tolist() == [False, True, False, False, True, False]
    assert not y[[0, 2, 3, 5]].isnan().any()


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize(("rows", "columns", "gap"), [(3, 1, 0), (2, 1024, 0), (5, 1037, 0), (4, 2050, 6), (1, 16, 0)])
@pytest.mark.every_triton
def test_rows_are_quantised_as_torch_does_it(
    dtype: torch.dtype, rows: int, columns: int, gap: int, simulator: Simulator
) -> None:
    x = random_case("2:4", 4, columns, rows, dtype, row_gap=gap).x
    x[0, 0] = 0.0
    x[-1] *= 2.0**-12
    integers, scales = quantize_rows(x)
    wanted, wanted_scales = quantize_rows_slowly(x)
    assert integers.shape == (rows, -(-columns // 16) * 16)
    assert torch.equal(integers[:, :columns], wanted) and torch.equal(scales, wanted_scales)
    assert not integers[:, columns:].any()
    assert bool((integers.abs().amax(dim=1)[1:-1] == 127).all())


def test_a_row_of_zeros_has_no_integers(simulator: Simulator) -> None:
    integers, scales = quantize_rows(torch.zeros(2, 24, dtype=HALF))
    assert not integers.any() and bool((scales > 0).all())


# --- faults that must be noticed ------------------------------------------------------------------------------------


@pytest.mark.every_triton
def test_numbers_not_rounded_to_tf32_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled = SpoilingSimulator(r"cvt\.rna\.tf32\.f32", "mov.b32")
    monkeypatch.setattr(launching, "launch", spoiled.launch)
    with pytest.raises(SimulationError, match="bits that tf32 does not have"):
        _check_tf32(random_case("1:2", 64, 64, 8, SINGLE), SMALL)


@pytest.mark.parametrize(("pattern", "check"), [("2:4", _check_int8), ("1:2", _check_tf32)], ids=["int8", "tf32"])
def test_missing_barriers_are_races(pattern: str, check, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    spoiled = SpoilingSimulator(r"bar\.sync\s+0;", "")
    monkeypatch.setattr(launching, "launch", spoiled.launch)
    # lockstep hides most such faults from the result, so that it may be right
    try:
        check(random_case(pattern, 64, 512, 32, SINGLE), CONFIGS[5])
    except AssertionError as error:
        assert "exceeds its bound" in str(error)
    assert any("warp's" in race for race in spoiled.reports["sparse_mma_kernel"].races)


@pytest.mark.parametrize(("pattern", "check"), [("2:4", _check_int8), ("1:2", _check_tf32)], ids=["int8", "tf32"])
def test_metadata_of_another_lane_gives_a_wrong_product(  # type: ignore[no-untyped-def]
    pattern: str, check, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = to_fragments

    def swapped(packed: PackedWeight) -> tuple[Tensor, Tensor]:
        fragments, metadata = right(packed)
        return fragments, metadata.view(-1, 2, 4).flip(1).contiguous().view_as(metadata)

    monkeypatch.setitem(globals(), "to_fragments", swapped)
    with pytest.raises(AssertionError, match="exceeds its bound"):
        check(random_case(pattern, 64, 128, 8, SINGLE), SMALL)


def test_scales_of_other_tokens_give_a_wrong_product(simulator: Simulator) -> None:
    case = random_case("2:4", 64, 128, 8, HALF)
    packed = quantize(pack(case.weight, "2:4"))
    integers, scales = quantize_rows_slowly(case.x)
    with pytest.raises(AssertionError, match="exceeds its bound"):
        assert_close_to_integer_product(_product(case, packed, SMALL), case, integers, scales.flip(0), packed)
