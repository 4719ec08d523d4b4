"""Plans of integers: which numbers each layer gets, by times and by what calibration says, and how the plan tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsecomp.errors import FormatError, PatternError
from sparsecomp.machine import timings
from sparsecomp.machine.request import Request
from sparsecomp.machine.timings import DENSE, SPARSE, Measurement
from sparsecomp.models.calibration import Calibration, calibrate
from sparsecomp.patterns.numbers import FLOAT, INT8, INT8_A8, Numbers
from sparsecomp.planning import measure as tune
from sparsecomp.planning.planner import Plan, plan

Seconds = Callable[[Request], float]


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Seconds], list[Request]]:
    """Sparse seconds as a function of the request, where dense takes one. Gives the list of what was measured."""
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(timings, "_known", {})
    asked: list[Request] = []

    def use(seconds: Seconds) -> list[Request]:
        def measure(request: Request, backend: str, **longer: object) -> Measurement:
            asked.append(request)
            return Measurement("cpu", {DENSE: 1.0, SPARSE: seconds(request)}, {DENSE: 0.0, SPARSE: 0.0}, False)

        monkeypatch.setattr(tune, "measure", measure)
        monkeypatch.setattr("sparsecomp.backends.registry.sparse_backends", lambda request: ["cpu"])
        return asked

    return use


class Outlier(nn.Module):
    """Two layers of one shape; the inputs of the second have an outlier, which its weight does not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.sensitive = nn.Linear(32, 32), nn.Linear(32, 32)
        self.sensitive.weight.data[:, 5] = 0

    def forward(self, x: Tensor) -> Tensor:
        wide = x.clone()
        wide[:, 5] = 300.0
        return self.plain(x) + self.sensitive(wide)


def calibrated(model: nn.Module) -> Calibration:
    return calibrate(model, [torch.randn(256, 32)], show_progress=False)


def numbers_of(made: Plan) -> dict[str, Numbers | None]:
    return {layer.name: None if layer.choice is None else layer.choice.numbers for layer in made}


@pytest.mark.parametrize("given", [("8:16+int8@a8", None, None), ("8:16", "int8", "int8"), (["8:16"], "int8", "int8")])
def test_sensitive_layers_step_back_with_the_reason(given: tuple[str, str | None, str | None], timed) -> None:  # type: ignore[no-untyped-def]
    asked = timed(lambda request: 0.5)
    model = Outlier()
    pattern, quantize, activations = given
    made = plan(model, pattern, quantize=quantize, activations=activations, batch=1, calibration=calibrated(model))
    assert numbers_of(made) == {"plain": INT8_A8, "sensitive": INT8}
    assert {request.numbers for request in asked} == {INT8_A8, INT8}
    reason = made["sensitive"].reason
    assert reason.startswith("int8@a8 would move its output by ") and reason.endswith("above 5.0%; 2.00x in the mean")
    assert made["plain"].reason == "2.00x in the mean"
    errors = made["plain"].rounding, made["sensitive"].rounding
    assert all(error is not None and 0 < error < 0.05 for error in errors)
    said = made.text(width=200)
    assert "8:16+int8@a8" in said and "8:16+int8 " in said and "on calibration inputs" in said
    assert Plan.from_dict(made.to_dict()) == made


def test_the_limit_is_the_callers(timed) -> None:  # type: ignore[no-untyped-def]
    timed(lambda request: 0.5)
    model = Outlier()
    known = calibrated(model)
    facts = {"quantize": "int8", "activations": "int8", "batch": 1, "calibration": known}
    assert set(numbers_of(plan(model, "8:16", max_rounding=10.0, **facts)).values()) == {INT8_A8}
    strict = plan(model, "8:16", max_rounding=1e-6, **facts)
    assert set(numbers_of(strict).values()) == {FLOAT} and strict["plain"].rounding is None
    assert "int8 would move its output by" in strict["plain"].reason


def test_dense_groups_stay_dense_where_integers_are_not_borne(timed) -> None:  # type: ignore[no-untyped-def]
    timed(lambda request: 0.5)
    model = Outlier()
    made = plan(model, "16:16+int8@a8", batch=1, calibration=calibrated(model))
    assert numbers_of(made) == {"plain": INT8_A8, "sensitive": None}
    assert "int8@a8 would move its output" in made.stayed_dense["sensitive"]


def test_numbers_that_are_slower_give_way_as_well(timed) -> None:  # type: ignore[no-untyped-def]
    timed(lambda request: 2.0 if request.numbers == INT8_A8 else 0.5)
    made = plan(nn.Sequential(nn.Linear(32, 32)), "8:16+int8@a8", batch=1)
    assert numbers_of(made) == {"0": INT8}
    assert made["0"].reason == "dense is faster at batch 1: 8:16+int8@a8 reaches 0.50x; 2.00x in the mean"
    timed(lambda request: 2.0)
    (reason,) = plan(nn.Sequential(nn.Linear(32, 16)), "8:16+int8@a8", batch=1).stayed_dense.values()
    assert all(f"{name} reaches 0.50x" in reason for name in ("8:16+int8@a8", "8:16+int8", "8:16"))


def test_without_calibration_the_plan_says_what_it_assumes(timed) -> None:  # type: ignore[no-untyped-def]
    timed(lambda request: 0.5)
    made = plan(Outlier(), "8:16+int8@a8", batch=1)
    assert set(numbers_of(made).values()) == {INT8_A8} and made["plain"].rounding is None
    assert "taken to be normally distributed" in made.text(width=2000)
    for other in ("8:16+int8", "8:16"):
        assert "normally distributed" not in plan(Outlier(), other, batch=1).text(width=2000)


def test_numbers_by_layer(timed) -> None:  # type: ignore[no-untyped-def]
    timed(lambda request: 0.5)
    made = plan(Outlier(), {"plain": "16:16+int8@a8", "*": "8:16+int8"}, batch=1)
    assert numbers_of(made) == {"plain": INT8_A8, "sensitive": INT8}
    assert [str(layer.pattern) for layer in made] == ["16:16", "8:16"]


def test_what_makes_no_sense_is_refused_and_named(timed) -> None:  # type: ignore[no-untyped-def]
    timed(lambda request: 0.5)
    with pytest.raises(PatternError, match='give quantize="int8" with it'):
        plan(Outlier(), "8:16", activations="int8")
    with pytest.raises(PatternError, match="row scales need an N:M"):
        plan(Outlier(), {"plain": "block4x4:0.5"}, quantize="int8")
    broken = Outlier()
    broken.plain.weight.data[3, 4] = float("nan")
    with pytest.raises(PatternError, match=r"^plain: weight\[3, 4\] is nan"):
        plan(broken, "8:16+int8@a8", batch=1)
    values = plan(Outlier(), "8:16+int8@a8", batch=1).to_dict()
    values["layers"][0]["numbers"] = "int4@a8"
    with pytest.raises(FormatError, match='no kernel computes numbers "int4@a8" yet'):
        Plan.from_dict(values)
