"""The mma.sp kernel: its compiled PTX, executed on the CPU, against float64; and faults that must be noticed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.kernels.gpu_cases import Case, assert_close_to_float64, random_case

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.kernels import launching, sparse_mma
from sparsecomp.kernels.sparse_mma_config import CONFIGS, Config
from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.fragments import to_fragments
from tests.kernels.gluon_simulator import Simulator, SpoilingSimulator
from tests.kernels.ptxsim import SimulationError

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN = torch.float16, torch.bfloat16
SMALL = CONFIGS[7]


def _product(case: Case, config: Config | None, activation: str = "none") -> torch.Tensor:
    fragments, metadata = to_fragments(pack(case.weight, case.pattern))
    return sparse_mma.sparse_mma_linear(
        case.x, fragments, metadata, case.bias, case.weight.shape[0], activation, config
    )


def _pairs_of_positions(weight: torch.Tensor) -> int:
    used = functional.pad(weight != 0, (0, -weight.shape[1] % 4)).view(-1, 4)
    return len(torch.unique(used[used.sum(1) == 2], dim=0))


# two blocks of outputs and two of tokens, the second ones nearly empty; more steps than stages, the last one partial
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_matches_float64(config: Config, dtype: torch.dtype, simulator: Simulator) -> None:
    columns = config.depth * (config.stages + 1) + 8 * (1 + dtype.itemsize)
    case = random_case("2:4", config.out + 40, columns, config.tokens + 5, dtype)
    assert _pairs_of_positions(case.weight) == 6
    assert_close_to_float64(_product(case, config), case)
    steps, slices = -(-columns // config.depth), config.depth // 32
    products = steps * slices * config.row_tiles * config.token_tiles
    assert simulator.reports["sparse_mma_kernel"].executed["mma"] == products


RAGGED = {
    "one of each": random_case("2:4", 1, 1, 1, HALF),
    "odd outputs": random_case("2:4", 77, 64, 20, BRAIN),
    "odd inputs, which are copied": random_case("2:4", 64, 77, 9, HALF),
    "inputs of 8 and no more": random_case("2:4", 130, 8, 3, BRAIN),
    "one column over a step": random_case("2:4", 96, 136, 17, HALF),
    "no bias": random_case("2:4", 70, 130, 8, BRAIN, with_bias=False),
    "rows of x apart": random_case("2:4", 64, 128, 6, HALF, row_gap=8),
    "rows of x apart, misaligned, NaN between": random_case("2:4", 64, 128, 6, HALF, row_gap=3),
    "rows that share a mask": random_case("2:4@v4", 65, 96, 5, BRAIN),
    "no token": random_case("2:4", 8, 16, 0, HALF),
    "a batch": random_case("2:4", 64, 64, 64, BRAIN),
}


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.every_triton
def test_any_shape(name: str, simulator: Simulator) -> None:
    assert_close_to_float64(_product(RAGGED[name], SMALL), RAGGED[name])


def test_what_lies_behind_x_is_not_read(simulator: Simulator) -> None:
    # columns 72 to 79 of each row are there, but belong to somebody else
    case = random_case("2:4", 64, 72, 5, HALF, row_gap=8)
    assert_close_to_float64(_product(case, SMALL), case)


ACTIVATIONS = {
    "none": lambda v: v,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
    "silu": functional.silu,
}


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("activation", sparse_mma.ACTIVATIONS)
def test_activations_are_fused(activation: str, dtype: torch.dtype, simulator: Simulator) -> None:
    case = random_case("2:4", 72, 64, 24, dtype)
    # one weight a row, and large: the product is exact, so that only the activation is judged
    weight = torch.zeros(72, 64, dtype=dtype)
    weight[:, 5] = torch.linspace(-14, 14, 72).to(dtype)
    bias = torch.zeros(72, dtype=dtype)
    got = _product(Case(weight, "2:4", case.x, bias), SMALL, activation).double()
    exact = ACTIVATIONS[activation](case.x.double()[:, 5:6] @ weight.double()[:, 5:6].T)
    rounding = {HALF: 2.0**-11, BRAIN: 2.0**-8}[dtype]
    # fp32 arithmetic, exp2 of the hardware, and erf to 1.5e-7
    assert bool(((got - exact).abs() <= rounding * exact.abs() + 2e-6 + 1e-6 * exact.abs()).all())


@pytest.mark.parametrize("activation", sparse_mma.ACTIVATIONS)
def test_activations_of_infinities_and_nan(activation: str, simulator: Simulator) -> None:
    x = torch.zeros(3, 8, dtype=BRAIN)
    x[:, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    weight = torch.zeros(1, 8, dtype=BRAIN)
    weight[0, :2] = 1
    got = _product(Case(weight, "2:4", x, None), SMALL, activation).flatten()
    assert got[0] == torch.inf and got[2].isnan()
    limit = {"none": -torch.inf, "relu": 0.0}.get(activation)
    assert got[1] == limit if limit is not None else bool(got[1].isnan() or got[1] == 0)


# --- faults that must be noticed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "replacement", "race"),
    [
        (r"bar\.sync\s+0;", "", "warp's"),
        (r"cp\.async\.wait_group\s+[1-9];", "cp.async.wait_group 3;", "a read meets a copy in flight"),
        (r"cp\.async\.commit_group;", "", "a read meets a copy in flight"),
    ],
    ids=["barriers left out", "waiting too little", "groups not closed"],
)
def test_a_broken_pipeline_is_noticed(
    pattern: str, replacement: str, race: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[5]
    assert config.stages == 4
    spoiled = SpoilingSimulator(pattern, replacement)
    monkeypatch.setattr(launching, "launch", spoiled.launch)
    _product(random_case("2:4", config.out, config.depth * 6, config.tokens, HALF), config)
    races = spoiled.reports["sparse_mma_kernel"].races
    assert any(race in found for found in races), races


@pytest.mark.every_triton
def test_the_other_selector_gives_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "launch", SpoilingSimulator(r"(mma\.sp.*), 0x1;", r"\1, 0x0;").launch)
    case = random_case("2:4", 64, 128, 8, HALF)
    with pytest.raises(AssertionError, match="exceeds its bound"):
        assert_close_to_float64(_product(case, SMALL), case)


def test_metadata_of_another_tile_gives_a_wrong_product(simulator: Simulator) -> None:
    case = random_case("2:4", 64, 128, 8, HALF)
    fragments, metadata = to_fragments(pack(case.weight, "2:4"))
    swapped = metadata.view(-1, 2).flip(1).contiguous().view_as(metadata)
    y = sparse_mma.sparse_mma_linear(case.x, fragments, swapped, case.bias, 64, "none", SMALL)
    with pytest.raises(AssertionError, match="exceeds its bound"):
        assert_close_to_float64(y, case)


def test_metadata_cut_short_is_out_of_bounds(simulator: Simulator) -> None:
    case = random_case("2:4", 64, 128, 8, HALF)
    fragments, metadata = to_fragments(pack(case.weight, "2:4"))
    with pytest.raises(SimulationError, match="out of bounds"):
        sparse_mma.sparse_mma_linear(case.x, fragments, metadata[:, :1].contiguous(), case.bias, 64, "none", SMALL)


def test_weights_cut_short_are_out_of_bounds(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = simulator.launch

    def cut(kernel, arguments, constants, grid, warps) -> None:  # type: ignore[no-untyped-def]
        launch(kernel, (arguments[0][:-1], *arguments[1:]), constants, grid, warps)

    monkeypatch.setattr(launching, "launch", cut)
    case = random_case("2:4", 64, 128, 8, HALF)
    with pytest.raises(SimulationError, match="out of bounds"):
        _product(case, SMALL)
