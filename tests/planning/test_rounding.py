"""Which numbers a layer bears: the error of rounding against products that are rounded, and the steps back."""

from __future__ import annotations

import math

import pytest
import torch

import sparsecomp as sc
from sparsecomp.backends.choice import Choice
from sparsecomp.backends.reference import ReferenceBackend
from sparsecomp.methods.weight import prune_weight
from sparsecomp.models.calibration import LayerStatistics
from sparsecomp.models.gram import GramSum
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8, INT8_A8
from sparsecomp.planning.rounding import borne, rounding_error


def statistics(x: torch.Tensor) -> LayerStatistics:
    total = GramSum(x.shape[1], torch.float32, x.device).add_rows(x)
    return LayerStatistics(total.finish(), total.tokens, total.rounding)


def weight(pattern: str, out: int = 32, columns: int = 96) -> torch.Tensor:
    return prune_weight(torch.randn(out, columns), pattern).weight


def rows(outlier: float = 1.0) -> torch.Tensor:
    """Correlated rows, one input of which may be far larger than the others."""
    x = torch.randn(600, 96) @ (torch.eye(96) + 0.1 * torch.randn(96, 96))
    x[:, 5] *= outlier
    return x


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("numbers", [INT8, INT8_A8], ids=str)
@pytest.mark.parametrize("outlier", [1.0, 100.0])
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "16:16"])
def test_the_error_is_that_of_rounded_products(pattern, outlier, numbers):
    w, x = weight(pattern), rows(outlier)
    w[:, 5] = 0.0 if outlier > 1 else w[:, 5]  # or the output would hang on the outlier alone
    backend = ReferenceBackend()
    y = backend.run(backend.prepare(in_numbers(sc.pack(w, pattern), numbers)), x, None).double()
    exact = x.double() @ w.double().T
    error = rounding_error(w, parse(pattern), numbers, statistics(x))
    assert error == pytest.approx(float((y - exact).norm() / exact.norm()), rel=0.05)
    assert (error > 0.05) == (outlier > 1 and numbers == INT8_A8)


def test_without_statistics_inputs_are_normal():
    w, x = weight("8:16"), torch.randn(2000, 96)
    for numbers in (INT8, INT8_A8):
        known = rounding_error(w, parse("8:16"), numbers, statistics(x))
        assert rounding_error(w, parse("8:16"), numbers) == pytest.approx(known, rel=0.2)
    assert rounding_error(w, parse("8:16"), FLOAT) == 0.0
    # made by an older version, or by hand: the Gram is known, rounding is not
    older = LayerStatistics(statistics(x).gram, len(x))
    assert rounding_error(w, parse("8:16"), INT8_A8, older) == pytest.approx(known, rel=0.2)


def test_weights_of_zeros_and_empty_ones_move_nothing():
    for shape in ((8, 16), (0, 16), (8, 0)):
        assert rounding_error(torch.zeros(shape), parse("8:16"), INT8_A8) == 0.0
    x = torch.zeros(4, 16)
    assert rounding_error(torch.ones(8, 16), parse("16:16"), INT8_A8, statistics(x)) == 0.0


@pytest.mark.parametrize("pattern", ["8:16", "16:16"])
def test_a_layer_without_outliers_bears_what_is_asked_for(pattern):
    for numbers in (FLOAT, INT8, INT8_A8):
        asked = Choice(parse(pattern), numbers, "cpu", 7)
        first = next(borne(weight(pattern), asked, statistics(rows())))
        assert first.choice == asked and first.refused == () and (first.error > 0) == numbers.has_scales


def test_layers_with_outliers_step_back_with_the_reason():
    w, known = weight("8:16"), statistics(rows(300.0))
    w[:, 5] = 0.0
    asked = Choice(parse("8:16"), INT8_A8)
    steps = list(borne(w, asked, known))
    assert [each.choice.numbers for each in steps if each.choice is not None] == [INT8, FLOAT]
    (said,) = steps[0].refused
    assert said.startswith("int8@a8 would move its output by ") and said.endswith("above 5.0%")
    assert 0 < steps[0].error < 0.05
    (last,) = borne(w, asked, known, most=0.0001)
    assert last.choice == Choice(parse("8:16")) and last.error == 0.0
    assert [each.partition(" would move its output by")[0] for each in last.refused] == ["int8@a8", "int8"]
    assert [each.choice.numbers for each in borne(w, asked, known, most=math.inf)] == [INT8_A8, INT8, FLOAT]


def test_dense_groups_in_floats_are_worth_nothing():
    w, known = weight("16:16"), statistics(rows(300.0))
    w[:, 5] = 0.0
    (only,) = borne(w, Choice(parse("16:16"), INT8_A8), known)
    assert only.choice is None and only.refused[0].startswith("int8@a8 would move its output by ")
    first, *rest = borne(w, Choice(parse("16:16"), INT8_A8), known, most=1.0)
    assert first.choice is not None and first.choice.numbers == INT8_A8 and len(rest) == 1


def test_an_error_that_is_no_number_is_not_borne():
    known = statistics(rows())
    broken = LayerStatistics(known.gram, known.tokens, known.rounding * math.nan)
    first = next(borne(weight("8:16"), Choice(parse("8:16"), INT8_A8), broken))
    assert first.choice is not None and first.choice.numbers == INT8
