"""Decisions follow measurements, bounds and errors, and each has its reason."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsecomp.engines.peers import Peers
from sparsecomp.errors import BackendError, ModelError, PatternError
from sparsecomp.machine import bound as cost
from sparsecomp.machine import timings
from sparsecomp.machine.device import detect
from sparsecomp.machine.native import native
from sparsecomp.machine.request import Request
from sparsecomp.machine.timings import DENSE, SPARSE, UNPACKED, WIDENED, Measurement
from sparsecomp.methods.weight import prune_weight
from sparsecomp.models.calibration import calibrate
from sparsecomp.patterns import parse
from sparsecomp.planning import measure as tune
from sparsecomp.planning.planner import Plan, plan

needs_kernel = pytest.mark.skipif(isinstance(native(), str), reason="needs the compiled extension")
Seconds = Callable[[Request], dict[str, float]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(timings, "_known", {})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seconds], list[Request]]:
    """Replace the clock: times are a function of the request. Gives the list of requests that were measured."""
    asked: list[Request] = []

    def use(seconds: Seconds) -> list[Request]:
        def measure(request: Request, backend: str, **longer: object) -> Measurement:
            asked.append(request)
            times = seconds(request)
            assert backend == "cpu"
            return Measurement("cpu", times, dict.fromkeys(times, 0.0), False)

        monkeypatch.setattr(tune, "measure", measure)
        monkeypatch.setattr("sparsecomp.backends.registry.choose", lambda request: "cpu")
        monkeypatch.setattr("sparsecomp.backends.registry.sparse_backends", lambda request: ["cpu"])
        return asked

    return use


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.Linear(32, 48), nn.Conv1d(4, 4, 1))


def test_faster_layers_go_sparse_and_slower_ones_stay_dense(timed: Callable[[Seconds], list[Request]]) -> None:
    asked = timed(lambda request: {DENSE: 2e-5, SPARSE: 1e-5 if request.shape == (48, 32) else 4e-5})
    made = plan(model(), "2:4", batch=(1, 8))
    assert list(made.sparse) == ["0", "3"] and made["0"].pattern == parse("2:4")
    assert made["2"].pattern is None and "dense is faster" in made["2"].reason and "0.50x" in made["2"].reason
    assert made["0"].speedup == {1: 2.0, 8: 2.0} and "2.00x" in made["0"].reason
    assert made["2"].dense == {1: 2e-5, 8: 2e-5} and made["2"].sparse == {1: 4e-5, 8: 4e-5}
    assert len(asked) == 4  # two shapes at two batches: equal shapes are measured once
    assert "4" in made.skipped
    with pytest.raises(KeyError):
        made["nothing"]


def test_slower_at_one_batch_is_enough_to_stay_dense(timed: Callable[[Seconds], list[Request]]) -> None:
    timed(lambda request: {DENSE: 1e-5, SPARSE: 0.2e-5 if request.batch == 1 else 1.1e-5})
    made = plan(model(), "2:4", batch=(1, 8))
    assert not made.sparse and "at batch 8" in made["0"].reason


def test_noise_is_forgiven_where_the_mean_is_faster(timed: Callable[[Seconds], list[Request]]) -> None:
    timed(lambda request: {DENSE: 1e-5, SPARSE: 0.5e-5 if request.batch == 1 else 1.02e-5})
    assert len(plan(model(), "2:4", batch=(1, 8)).sparse) == 3
    assert not plan(model(), "2:4", batch=(8,)).sparse
    assert not plan(model(), "2:4", batch=(1, 8), min_speedup=1.5).sparse


def test_unpacking_is_used_from_the_batch_where_it_wins(timed: Callable[[Seconds], list[Request]]) -> None:
    def seconds(request: Request) -> dict[str, float]:
        return {DENSE: 1e-5, SPARSE: 0.5e-5 if request.batch < 8 else 2e-5, UNPACKED: 1.01e-5}

    timed(seconds)
    made = plan(model(), "2:4", batch=(1, 4, 8, 64))
    assert made["0"].dense_above == 8 and made["0"].pattern is not None
    assert made["0"].sparse == {1: 0.5e-5, 4: 0.5e-5, 8: 1.01e-5, 64: 1.01e-5}
    timed(lambda request: {**seconds(request), UNPACKED: 0.4e-5 if request.batch == 4 else 3e-5})
    assert plan(model(), "2:4", batch=(1, 4, 8))["0"].dense_above is None  # not at every batch above


def test_ties_are_measured_twice_and_a_layer_under_098_stays_dense(timed: Callable[[Seconds], list[Request]]) -> None:
    asked = timed(lambda request: {DENSE: 0.975e-5 if request.batch == 8 else 3e-5, SPARSE: 1e-5})
    made = plan(model(), "2:4", batch=(1, 8), only="0")["0"]
    assert made.pattern is None and made.reason == "dense is faster at batch 8: 2:4 reaches 0.97x"
    assert [request.batch for request in asked] == [1, 8, 8]
    seen = iter([0.975e-5, 0.985e-5])
    timed(lambda request: {DENSE: next(seen) if request.batch == 8 else 3e-5, SPARSE: 1e-5})
    made = plan(model(), "2:4", batch=(1, 8), only="0")["0"]
    assert made.pattern is not None and made.dense[8] == 0.985e-5


class Several:
    """Three sparse backends whose seconds are given by name and batch; what is no number is raised."""

    def __init__(self, seconds: dict[str, dict[int, float | Exception]]) -> None:
        self.seconds = seconds
        self.asked: list[tuple[str, int]] = []

    def measure(self, request: Request, backend: str | None = None, **longer: object) -> Measurement:
        name = backend or next(iter(self.seconds))
        self.asked.append((name, request.batch))
        taken = self.seconds[name][request.batch]
        if isinstance(taken, Exception):
            raise taken
        return Measurement(name, {DENSE: 1e-5, SPARSE: taken}, {DENSE: 0.0, SPARSE: 0.0}, False)


def _use(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(several.seconds)
    monkeypatch.setattr(tune, "measure", several.measure)
    monkeypatch.setattr("sparsecomp.backends.registry.choose", lambda request: names[0])
    monkeypatch.setattr("sparsecomp.backends.registry.sparse_backends", lambda request: names)


def test_every_backend_is_measured_and_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    several = Several(
        {"cpu": {1: 0.9e-5, 8: 0.9e-5}, "dense": {1: 2e-5, 8: 0.1e-5}, "reference": {1: 0.6e-5, 8: 0.7e-5}}
    )
    _use(several, monkeypatch)
    made = plan(model(), "2:4", batch=(1, 8), only="0")
    layer = made["0"]
    assert sorted(several.asked) == [(name, size) for name in sorted(several.seconds) for size in (1, 8)]
    # "dense" has the best mean, and would be slower than dense at batch 1
    assert layer.backend == "reference" and layer.sparse == {1: 0.6e-5, 8: 0.7e-5}
    assert layer.others == {"cpu": {1: 0.9e-5, 8: 0.9e-5}, "dense": {1: 2e-5, 8: 0.1e-5}}
    assert "reference" in str(made)
    (row,) = json.loads(json.dumps(made.to_dict()))["layers"]
    assert row["backend"] == "reference" and row["other_backends"]["cpu"] == {"1": 0.9e-5, "8": 0.9e-5}


def test_a_backend_that_cannot_be_measured_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = RuntimeError("out of memory\nand more")
    several = Several({"cpu": {1: broken}, "reference": {1: 0.5e-5}})
    _use(several, monkeypatch)
    with pytest.warns(
        UserWarning, match="2:4: cpu could not be measured: out of memory; the layer is planned without it"
    ):
        assert plan(model(), "2:4", batch=1, only="0")["0"].backend == "reference"
    _use(Several({"cpu": {1: broken}, "reference": {1: broken}}), monkeypatch)
    layer = plan(model(), "2:4", batch=1, only="0")["0"]
    assert layer.pattern is None and layer.backend is None
    assert layer.reason == "; ".join(f"{name} could not be measured: out of memory" for name in ("cpu", "reference"))
    _use(Several({"cpu": {1: TypeError("a bug")}, "reference": {1: 0.5e-5}}), monkeypatch)
    with pytest.raises(TypeError, match="a bug"):
        plan(model(), "2:4", batch=1, only="0")
    _use(Several({"cpu": {1: broken}}), monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        plan(model(), "2:4", batch=1, only="0")


def test_the_fastest_pattern_within_the_error_is_taken(timed: Callable[[Seconds], list[Request]]) -> None:
    rates = {"1:4": 4.0, "2:4": 2.0, "3:4": 1.3}
    timed(lambda request: {DENSE: 1e-5, SPARSE: 1e-5 / rates[str(request.pattern)]})
    net = model()
    weight = net[0].weight
    errors = {name: prune_weight(weight, name).error for name in rates}
    assert errors["1:4"] > errors["2:4"] > errors["3:4"]
    names = list(rates)
    assert str(plan(net, names)["0"].pattern) == "1:4"
    middle = plan(net, names, max_error=(errors["1:4"] + errors["2:4"]) / 2)
    assert str(middle["0"].pattern) == "2:4" and middle["0"].error == pytest.approx(errors["2:4"])
    assert "2:4" in str(middle) and f"{errors['2:4']:.3f}" in str(middle)
    none = plan(net, names, max_error=1e-6)["0"]
    assert none.pattern is None and "above 1e-06" in none.reason


def test_calibrated_errors_are_those_of_wanda(timed: Callable[[Seconds], list[Request]]) -> None:
    timed(lambda request: {DENSE: 2e-5, SPARSE: 1e-5})
    net = nn.Sequential(nn.Linear(32, 48))
    calibration = calibrate(net, [torch.randn(200, 32)])
    made = plan(net, "2:4", calibration=calibration, max_error=1.0)
    want = prune_weight(net[0].weight, "2:4", "wanda", calibration["0"].gram).error
    assert made["0"].error == pytest.approx(want)


@needs_kernel
def test_without_measuring_the_bound_stands_in_and_says_so() -> None:
    made = plan(model(), "2:4", batch=4, measure=False)
    assert set(made.sparse) == {"0", "2", "3"} and "not measured" in made["0"].reason
    assert made["0"].sparse == {} and set(made["0"].bound) == {4}
    assert not plan(model(), "16:16", measure=False).sparse


def test_layers_without_a_kernel_stay_dense_with_the_reason() -> None:
    net = nn.Sequential(nn.Linear(32, 32).double(), nn.Linear(32, 32))
    made = plan(net, "block3x3:0.5", measure=False)
    assert "float64 has no sparse kernel" in made["0"].reason
    assert "no sparse kernel for block3x3:0.5" in made["1"].reason
    assert set(made.stayed_dense) == {"0", "1"}


@needs_kernel
def test_automatic_pattern_is_the_natural_one() -> None:
    made = plan(model(), "auto", measure=False)
    tried = made["0"].tried
    assert tried is not None and tried.pattern == detect("cpu").natural_pattern(0.5)


def test_only_and_skip_select_layers() -> None:
    made = plan(model(), "2:4", only=["0", "2"], skip="2", measure=False)
    assert [layer.name for layer in made] == ["0"] and {"2", "3"} <= set(made.skipped)


@needs_kernel
def test_a_real_plan_touches_no_weight_and_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_BUDGET", 0.0)
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = plan(net, ["2:4", "8:16"], batch=(1, 4))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for width in (80, 400):
        text = " ".join(made.text(width).split())
        assert all(f"{layer.shape[0]}x{layer.shape[1]}" in text and layer.reason in text for layer in made)
        assert 'skipped: "4": Conv1d layers stay dense' in text and made.device.describe() in text
    data = json.loads(json.dumps(made.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == ["0", "2", "3"] and data["batches"] == [1, 4]
    for layer in made:
        assert set(layer.dense) == set(layer.sparse) == {1, 4}
        assert all(isinstance(limit, cost.Bound) for limit in layer.bound.values())
        assert (layer.pattern is not None) == (layer.name in made.sparse)


def deep(layers: int = 3) -> nn.Module:
    """A model of equal layers, each with an up and a down projection, under a head of its own shape."""
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}) for _ in range(layers)]
    model = nn.ModuleDict({"encoder": nn.ModuleList(blocks), "a_head_of_a_rather_long_name": nn.Linear(32, 8)})
    model.encoder[1].up.double()  # has no kernel
    return model


def test_a_mapping_gives_each_layer_its_pattern_as_prune_does(timed: Callable[[Seconds], list[Request]]) -> None:
    asked = timed(lambda request: {DENSE: 2e-5, SPARSE: 1e-5})
    made = plan(model(), {"0": "1:4", "[02]": "2:4"}, batch=1)
    assert {layer.name: str(layer.pattern) for layer in made} == {"0": "1:4", "2": "2:4"}
    assert made.skipped["3"] == "no pattern was given for it"
    assert {str(request.pattern) for request in asked} == {"1:4", "2:4"}
    natural = str(detect("cpu").natural_pattern())
    assert str(plan(model(), {"*": "auto"}, batch=1)["3"].pattern) == natural
    for wrong, words in (
        ({"5": "2:4"}, "matches no layer"),
        ({"*": "unstructured:0.5"}, "mask-only"),
        ({}, "no layer"),
    ):
        with pytest.raises((ModelError, PatternError), match=words):
            plan(model(), wrong, batch=1)


def test_layers_decided_and_timed_alike_share_a_row(timed: Callable[[Seconds], list[Request]]) -> None:
    timed(lambda request: {DENSE: 3e-5, SPARSE: 1e-5 if request.shape != (8, 32) else 4e-5})
    net = deep()
    net.encoder[1].up.float()
    made = plan(net, "2:4", batch=(1, 8))
    rows = made.text(300).splitlines()
    assert [row.split("  ")[0].strip() for row in rows[4:7]] == [
        "3 x encoder.*.up",
        "3 x encoder.*.down",
        "a_head_of_a_rather_long_name",
    ]
    assert len(made.text(300, every=True).splitlines()) == len(rows) + 4
    assert "encoder.2.down" in made.text(300, every=True)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("every", [True, False])
def test_a_plan_fits_its_width(timed: Callable[[Seconds], list[Request]], width: int, every: bool) -> None:
    timed(lambda request: {DENSE: 3e-2, SPARSE: 1e-2 if request.shape != (8, 32) else 4e-2})
    made = plan(deep(12), ["2:4", "8:16"], batch=(1, 128, 1024))
    assert max(map(len, made.text(width, every).splitlines())) <= width


def test_the_text_of_a_plan_follows_columns(
    timed: Callable[[Seconds], list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(lambda request: {DENSE: 3e-5, SPARSE: 1e-5})
    made = plan(deep(), "2:4", batch=(1, 8))
    for columns in ("80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert str(made) == made.text(int(columns))
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())  # no terminal
    assert str(made) == made.text(80)


def test_a_plan_says_what_dense_is_and_marks_what_is_above_its_bound(
    timed: Callable[[Seconds], list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(lambda request: {DENSE: 1e-5 * (5 if request.batch == 1 else 1), SPARSE: 1e-5 / 1.5})
    limit = cost.Bound(2.0, "compute", 2.0, 1.0)
    monkeypatch.setattr(
        "sparsecomp.planning.planner.known_bounds", lambda requests, device, warm: dict.fromkeys(requests, limit)
    )
    made = plan(model(), "2:4", batch=(1, 8), only="0")
    wide = made.text(300)
    assert "torch fp32 b1" in wide and "torch fp32 b8" in wide and "dense b" not in wide
    assert "7.50x*" in wide and "1.50x " in wide and "*: above its bound" in wide
    assert "7.50x*" in made.text(80) and "torch fp32" in made.text(80)
    assert "above its bound" not in plan(model(), "2:4", batch=8, only="0").text(300)


def test_a_bf16_layer_is_compared_with_torch_in_float32_as_well(timed: Callable[[Seconds], list[Request]]) -> None:
    # as on a processor that does not multiply bf16: 7.6 times as fast as torch bf16, and slower than torch fp32
    timed(lambda request: {DENSE: 7.6e-5, WIDENED: 0.8e-5 if request.batch == 8 else 9e-5, SPARSE: 1e-5})
    net = model().bfloat16()
    made = plan(net, "2:4", batch=(1, 8), only="0")
    layer = made["0"]
    how = "in torch fp32, to be had with model.float()"
    assert layer.pattern is None and layer.reason == f"dense is faster at batch 8 {how}: 2:4 reaches 0.80x"
    assert layer.dense == {1: 7.6e-5, 8: 0.8e-5} and layer.baseline == {1: "torch bf16", 8: "torch fp32"}
    assert layer.planned == {1: 7.6e-5, 8: 7.6e-5}  # it stays what it is
    for width in (80, 300):
        text = made.text(width)
        assert "76 us bf16" in text and "8 us fp32" in text and "0.80x" in text
        assert "8 us in dense torch fp32, 76 us as planned, 0.11x" in " ".join(text.split())
    alone = plan(net, "2:4", batch=1, only="0")
    assert alone["0"].pattern is not None and "torch bf16" in alone.text(80) and "7.60x" in alone.text(80)


def test_other_engines_stand_beside_the_plan_and_decide_nothing(
    timed: Callable[[Seconds], list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(lambda request: {DENSE: 4e-5, SPARSE: 2e-5 if request.shape == (48, 32) else 8e-5})
    asked: list[tuple[tuple[int, int], torch.dtype, Sequence[int]]] = []

    def seconds(
        self: Peers, shape: tuple[int, int], dtype: torch.dtype, batches: Sequence[int], copies: int
    ) -> dict[str, dict[int, float]]:
        asked.append((shape, dtype, batches))
        self.missing["torch int8"] = "it was built without"
        return {"OpenVINO fp32": {1: 3e-5, 8: 3e-5}, "ONNX Runtime int8": {1: 1e-5, 8: 2.5e-5}}

    monkeypatch.setattr(Peers, "seconds", seconds)
    made = plan(model(), "2:4", batch=(1, 8), engines=True)
    assert list(made.sparse) == ["0", "3"] and len(asked) == 2  # equal shapes once
    assert made["0"].engines["ONNX Runtime int8"] == {1: 1e-5, 8: 2.5e-5}
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    for width in (60, 80, 200):
        assert max(map(len, made.text(width).splitlines())) <= width
    text = " ".join(made.text(200).split())
    assert "2 x * 1 2:4 20 us 30 us OpenVINO fp32 10 us ONNX Runtime int8 (2.00x)" in text
    assert "2 x * 8 2:4 20 us 30 us OpenVINO fp32 25 us ONNX Runtime int8" in text
    assert "2 8 dense 40 us 30 us OpenVINO fp32 (1.33x)" in text
    assert "not measured: torch int8: it was built without" in text
    assert "Dense engines" not in plan(model(), "2:4", batch=(1, 8)).text(200)


def test_other_engines_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(detect("cpu"), kind="cuda")
    monkeypatch.setattr("sparsecomp.planning.planner.detect", lambda kind: gpu)
    with pytest.raises(ModelError, match="measures dense engines of the CPU, and the plan is for cuda:0; leave it out"):
        plan(model(), "2:4", engines=True)


def test_the_totals_are_those_of_the_whole_model(timed: Callable[[Seconds], list[Request]]) -> None:
    timed(lambda request: {DENSE: 4e-5, SPARSE: 1e-5 if request.shape == (48, 32) else 8e-5})
    net = model()  # two layers of 48x32 go sparse, one of 32x48 does not
    made = plan(net, "2:4", batch=(1, 8))
    totals = made.totals()
    every = sum(each.numel() for each in net.parameters())
    assert totals["sparse_weights"] == 2 * 48 * 32 and totals["weights"] == every
    assert totals["share"] == pytest.approx(2 * 48 * 32 / every)
    assert totals["torch_seconds"] == {"1": pytest.approx(12e-5), "8": pytest.approx(12e-5)}
    assert totals["planned_seconds"] == {"1": pytest.approx(6e-5), "8": pytest.approx(6e-5)}
    text = " ".join(str(made).split())
    assert f"2 of 3 layers go sparse, which hold {2 * 48 * 32 / every:.1%} of the model's weights" in text
    assert "batch 8: these layers take 120 us in dense torch fp32, 60 us as planned, 2.00x" in text
    json.dumps(totals, allow_nan=False)


def test_wrong_requests_are_named() -> None:
    with pytest.raises(ModelError, match="batch"):
        plan(model(), "2:4", batch=(0,))
    for batch in ((), "1", (1.5,), None):
        with pytest.raises(ModelError, match="names no batch sizes"):
            plan(model(), "2:4", batch=batch)  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="mask-only"):
        plan(model(), "unstructured:0.5")
    with pytest.raises(PatternError, match="no pattern"):
        plan(model(), [])
    with pytest.raises(PatternError, match="not understood"):
        plan(model(), "two of four")
    with pytest.raises(ModelError, match="no layer"):
        plan(nn.Sequential(nn.ReLU()), "2:4")
    with pytest.raises(BackendError, match="tpu"):
        plan(model(), "2:4", device="tpu")


def test_an_empty_plan_is_a_plan() -> None:
    made = Plan(detect("cpu"), (1,), (), {})
    assert len(made) == 0 and not made.sparse and "layer" in str(made)


def test_batches_are_ints_that_a_file_gives_back() -> None:
    made = plan(nn.Sequential(nn.Linear(32, 32)), "2:4", measure=False, batch=(True, 4))
    assert [type(size) for size in made.batches] == [int, int] and made.batches == (1, 4)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
