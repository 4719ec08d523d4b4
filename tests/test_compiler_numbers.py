"""Whole models in integers: what compile packs in which numbers, with and without a plan, and what it says."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.errors import ModelError, PatternError
from sparsecomp.patterns.numbers import FLOAT, INT8, INT8_A8


class Outlier(nn.Module):
    """Two layers; the inputs of the second have an outlier, which its weight does not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.sensitive = nn.Linear(32, 32), nn.Linear(32, 32)
        self.sensitive.weight.data[:, 5] = 0

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.plain(x))
        wide = torch.cat([wide[:, :5], torch.full_like(wide[:, :1], 300.0), wide[:, 6:]], dim=1)
        out: Tensor = self.sensitive(wide)
        return out


def calibration() -> sc.Calibration:
    return sc.calibrate(Outlier(), [torch.randn(256, 32)], show_progress=False)


def test_every_layer_is_packed_in_the_numbers_asked_for() -> None:
    for asked in ({"quantize": "int8", "activations": "int8"}, {}):
        model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
        pattern = "8:16" if asked else "8:16+int8@a8"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sc.compile(model, pattern, method="magnitude", where="everywhere", **asked)
        assert model[0].numbers == model[2].numbers == INT8_A8 and str(model[0].pattern) == "8:16"
        assert model(torch.randn(3, 32)).shape == (3, 8)


def test_dense_integers_need_no_pruning() -> None:
    model = nn.Sequential(nn.Linear(33, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(64, 33)
    with torch.no_grad():
        want = model(x)
        sc.compile(model, "16:16+int8@a8", where="everywhere")
        assert float((model(x) - want).norm() / want.norm()) < 0.03
    assert all(model[i].numbers == INT8_A8 for i in (0, 2))


@pytest.mark.parametrize("method", [None, "magnitude"])
def test_sensitive_layers_step_back_and_are_named(method: str | None) -> None:
    model = Outlier()
    if method is None:
        sc.prune(model, "8:16")
    with pytest.warns(UserWarning, match=r'1 layer did not .*"sensitive": int8@a8 would move .* as 8:16\+int8;'):
        sc.compile(model, "8:16+int8@a8", where="everywhere", method=method, calibration=calibration())
    assert model.plain.numbers == INT8_A8 and model.sensitive.numbers == INT8

    model = Outlier()
    with pytest.warns(UserWarning, match=r"2 layers did not .* int8 would move its output .* as 8:16;"):
        sc.compile(
            model, "8:16+int8@a8", where="everywhere", method="magnitude", calibration=calibration(), max_rounding=1e-5
        )
    assert model.plain.numbers == model.sensitive.numbers == FLOAT


def test_sensitive_layers_of_dense_integers_stay_as_they_are() -> None:
    model = Outlier()
    sensitive = model.sensitive
    with pytest.warns(UserWarning, match=r"int8@a8 would move its output by .* so it stays dense"):
        sc.compile(model, "16:16+int8@a8", where="everywhere", calibration=calibration())
    assert model.plain.numbers == INT8_A8 and model.sensitive is sensitive
    with pytest.warns(UserWarning, match=r"packed 0 of 2 layers, the first because int8@a8 would move its output"):
        sc.compile(Outlier(), "16:16+int8@a8", where="everywhere", calibration=calibration(), max_rounding=1e-5)


def test_a_plan_of_integers_is_followed() -> None:
    model = Outlier()
    made = sc.plan(model, "8:16+int8@a8", batch=1, calibration=calibration(), measure=False)
    sc.compile(model, made, method="magnitude")
    for name, layer in made.sparse.items():
        assert layer.choice is not None and model.get_submodule(name).choice == layer.choice
    with pytest.raises(ModelError, match="the plan has decided in what numbers"):
        sc.compile(Outlier(), made, quantize="int8")


def test_words_that_make_no_sense_are_refused_before_any_work() -> None:
    model = Outlier()
    with pytest.raises(PatternError, match='activations="int8" multiplies integers'):
        sc.compile(model, "8:16", activations="int8", where="everywhere", method="magnitude")
    assert type(model.plain) is nn.Linear


@pytest.mark.parametrize("most", [-0.01, math.nan, "0.05", None])
def test_a_limit_that_no_error_can_meet_is_refused(most) -> None:
    for run in (sc.plan, sc.compile):
        with pytest.raises(ModelError, match=r"max_rounding=.* is no relative error of an output; use a number from 0"):
            run(Outlier(), "8:16+int8@a8", max_rounding=most)


def test_prune_takes_names_with_numbers_and_leaves_floats() -> None:
    model = Outlier()
    report = sc.prune(model, {"plain": "4:16+int8@a8", "*": "8:16"})
    assert [str(layer.pattern) for layer in report.layers.values()] == ["4:16", "8:16"]
    assert model.plain.weight.dtype == torch.float32
    sc.compile(model, {"plain": "4:16+int8@a8", "*": "8:16"}, where="everywhere")
    assert model.plain.numbers == INT8_A8 and model.sensitive.numbers == FLOAT
