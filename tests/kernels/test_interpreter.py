"""The decompressing, the V:N:M and the block-sparse kernel against float64, run by Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.gpu_cases import Case, assert_close_to_float64, moved, quantized_case, random_case, strided_columns

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.activations import ACTIVATIONS
from tests.kernels.triton_interpreter import interpret

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES = {
    **{
        f"{pattern}-{dtype}".replace("torch.", ""): random_case(pattern, 40, 144, 3, dtype)
        for pattern in ("2:4", "1:4", "4:8", "8:16", "5:16")
        for dtype in (HALF, BRAIN, SINGLE)
    },
    **{
        f"{pattern}-patterns": random_case(pattern, 33, 70, 5, HALF)
        for pattern in ("1:2", "2:2", "3:4", "4:4", "1:8", "7:8", "1:16", "15:16", "16:16", "2:4@v4", "4:2:8", "8:2:16")
    },
    "batch 1": random_case("2:4", 96, 256, 1, BRAIN),
    "batch 17 fills part of a wider tile": random_case("2:4", 65, 130, 17, HALF),
    "batch 70 fills two tiles": random_case("8:16", 70, 90, 70, BRAIN),
    "batch 0": random_case("2:4", 8, 16, 0, HALF),
    "one weight": random_case("2:4", 1, 1, 1, SINGLE),
    "in 7, less than a group of 8": random_case("4:8", 5, 7, 2, SINGLE),
    "in 257, one column over a step": random_case("2:4", 31, 257, 4, HALF),
    "fp32 in wide batches": random_case("5:16", 70, 100, 33, SINGLE),
    "no bias": random_case("2:4", 32, 64, 16, HALF, with_bias=False),
    "rows of x apart": random_case("2:4", 32, 64, 6, HALF, row_gap=5),
    "rows of x apart, NaN inside a step": random_case("2:4", 32, 70, 6, HALF, row_gap=200),
    **{
        f"{pattern}-int8-{dtype}".replace("torch.", ""): quantized_case(pattern, 40, 150, batch, dtype)
        for pattern, batch, dtype in (("2:4", 3, HALF), ("8:16", 20, BRAIN), ("4:8@v2", 70, HALF), ("1:4", 1, SINGLE))
    },
    "columns of x apart": strided_columns(random_case("2:4", 32, 70, 6, HALF)),
    "columns of x apart, int8": strided_columns(quantized_case("8:16", 33, 70, 5, BRAIN)),
    "one column of x": strided_columns(random_case("2:4", 8, 1, 5, HALF)),
    "int8, batch 0": quantized_case("2:4", 8, 16, 0, HALF),
    **{
        f"{pattern}-{dtype}".replace("torch.", ""): random_case(pattern, 150, 170, 3, dtype)
        for pattern in ("block16x16:0.5", "block32x64:0.3", "block128x128:0.5")
        for dtype in (HALF, BRAIN, SINGLE)
    },
    **{
        f"{pattern}-{dtype}".replace("torch.", ""): random_case(pattern, 150, 173, 3, dtype)
        for pattern in ("16:2:8", "32:2:16", "48:2:8", "64:2:8", "64:2:16", "128:2:8", "256:2:8")
        for dtype in (HALF, BRAIN)
    },
    "V:N:M in fp32, which triton runs": random_case("16:2:8", 40, 70, 3, SINGLE),
    "V:N:M, batch 0": random_case("16:2:8", 20, 40, 0, HALF),
    "V:N:M, one weight": random_case("16:2:8", 1, 1, 1, HALF),
    "V:N:M, less than a group": random_case("16:2:16", 7, 5, 17, BRAIN),
    "V:N:M, batch 17, a column over a step": random_case("32:2:8", 70, 129, 17, HALF),
    "V:N:M, batch 70 fills two tiles": random_case("128:2:16", 130, 600, 70, BRAIN),
    "V:N:M, rows of x apart, no bias": random_case("64:2:8", 70, 100, 20, HALF, with_bias=False, row_gap=90),
    "V:N:M, columns of x apart": strided_columns(random_case("64:2:8", 70, 100, 5, BRAIN)),
    **{
        f"{pattern}-{activation}": replace(random_case(pattern, 70, 100, 20, dtype), activation=activation)
        for pattern, dtype in (("2:4", SINGLE), ("8:16", BRAIN), ("block16x32:0.5", HALF), ("32:2:8", HALF))
        for activation in ACTIVATIONS[1:]
    },
    "silu of int8 weights": replace(quantized_case("2:4", 40, 100, 5, HALF), activation="silu"),
    "block rows of 128, columns of 16": random_case("block128x16:0.4", 200, 50, 70, HALF),
    "block, whole tiles of 128 tokens": random_case("block64x32:0.5", 64, 64, 130, BRAIN),
    "block, nothing beside one": random_case("block16x16:0.1", 33, 40, 1, HALF),
    "block, rows of x apart, no bias": random_case("block16x32:0.5", 40, 70, 6, HALF, with_bias=False, row_gap=9),
    "block, columns of x apart": strided_columns(random_case("block16x32:0.5", 40, 70, 6, BRAIN)),
    "block, batch 0": random_case("block16x16:0.5", 8, 16, 0, HALF),
    "block, fp32 in wide batches": random_case("block64x64:0.5", 70, 100, 33, SINGLE),
}


@pytest.fixture(scope="module")
def results() -> dict[str, torch.Tensor]:
    return dict(zip(CASES, interpret(list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str, results: dict[str, torch.Tensor]) -> None:
    assert_close_to_float64(results[name], CASES[name])


def test_the_bound_notices_a_nan(results: dict[str, torch.Tensor]) -> None:
    y = results["2:4-float16"].clone()
    y[1, 2] = torch.nan
    with pytest.raises(AssertionError, match="exceeds its bound"):
        assert_close_to_float64(y, CASES["2:4-float16"])


def test_the_bound_notices_one_lost_weight(results: dict[str, torch.Tensor]) -> None:
    case = CASES["2:4-float16"]
    weight = case.weight.clone()
    weight[0, weight[0].abs().argmax()] = 0
    with pytest.raises(AssertionError, match="exceeds its bound"):
        assert_close_to_float64(results["2:4-float16"], Case(weight, case.pattern, case.x, case.bias))


def test_cases_keep_their_strides_on_the_way_to_a_device() -> None:
    for name in ("rows of x apart", "columns of x apart", "batch 0"):
        x = CASES[name].x
        elsewhere = moved(x, "cpu")
        assert elsewhere.stride() == x.stride() and torch.equal(elsewhere, x)
