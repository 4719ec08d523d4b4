"""From a model to packed layers in place, and never half of it."""

from __future__ import annotations

import copy
import json
import pickle
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsecomp import compiler, swap
from sparsecomp.backends.choice import Choice
from sparsecomp.backends.reference import ReferenceBackend
from sparsecomp.backends.registry import why_no_kernel
from sparsecomp.compiler import compile, report, summary
from sparsecomp.errors import CalibrationError, ModelError, PatternError, SparsecompError
from sparsecomp.files.storage import load, save
from sparsecomp.machine import timings
from sparsecomp.machine.native import native
from sparsecomp.machine.request import Request
from sparsecomp.methods.weight import PrunedWeight, prune_weight
from sparsecomp.models.calibration import calibrate
from sparsecomp.nn import SparseLinear
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT
from sparsecomp.planning import measure as tune
from sparsecomp.planning.planner import plan
from sparsecomp.pruning import prune, solve

needs_kernel = pytest.mark.skipif(isinstance(native(), str), reason="needs the compiled extension")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(timings, "_known", {})
    monkeypatch.setattr(tune, "_BUDGET", 0.0)
    monkeypatch.setattr(tune, "_COPIES_BYTES", 1 << 16)
    torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32, bias=False)
        self.again = self.up  # one module under two names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.down(self.act(self.up(x))))


def untouched(net: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    state = net.state_dict()
    same = state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    return same and not any(isinstance(module, SparseLinear) for module in net.modules())


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "block8x8:0.5"])
def test_pruned_models_compute_the_same_packed(pattern: str) -> None:
    net, x = Net(), torch.randn(5, 32)
    prune(net, pattern)
    with torch.no_grad():
        want = net(x)
        fast = compile(net, pattern, where="everywhere")
        assert fast is net and isinstance(net.up, SparseLinear) and net.again is net.up
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
    assert isinstance(net.down, SparseLinear) and net.down.bias is None and report(net) is None


def test_weights_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    net = Net()
    net.up.weight.data = prune_weight(net.up.weight.data, "2:4").weight
    before = state_of(net)
    with pytest.raises(PatternError, match=r"down: .*row 0, group 0"):
        compile(net, "2:4", where="everywhere")
    assert untouched(net, before)


def test_weights_that_do_not_fit_are_refused_also_where_dense_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "plan", partial(plan, min_speedup=1e9))
    model = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(PatternError, match=r"^0: weight breaks 2:4"):
        compile(model, "2:4", batch=2)
    prune(model, "2:4")
    assert type(compile(model, "2:4", batch=2)[0]) is nn.Linear


def test_a_failure_while_swapping_undoes_what_was_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    before, real = state_of(net), swap.replace_layer

    def failing(model: nn.Module, name: str, module: nn.Module) -> None:
        if name == "down" and isinstance(module, SparseLinear):
            raise ModelError("down: refused")
        real(model, name, module)

    monkeypatch.setattr(swap, "replace_layer", failing)
    with pytest.raises(ModelError, match="refused"):
        compile(net, "2:4", method="magnitude", where="everywhere")
    assert untouched(net, before) and net.again is net.up


def test_a_method_prunes_first() -> None:
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    prune(twin, "2:4")
    compile(net, "2:4", method="magnitude", where="everywhere")
    assert isinstance(net.down, SparseLinear) and torch.equal(net.down.weight, twin.down.weight)


def test_calibrated_methods_use_the_grams() -> None:
    net = Net()
    calibration = calibrate(net, [torch.randn(64, 32)])
    weight = net.down.weight.detach().clone()
    before = state_of(net)
    with pytest.raises(CalibrationError):
        compile(net, "2:4", method="wanda", where="everywhere")
    assert untouched(net, before)
    partial = replace(calibration, layers={"up": calibration["up"]})
    with pytest.raises(CalibrationError, match=r'"wanda" needs calibration data for 1 of 2 layers .* \(down\)'):
        compile(net, "2:4", method="wanda", where="everywhere", calibration=partial)
    assert untouched(net, before)
    compile(net, "2:4", method="wanda", where="everywhere", calibration=calibration)
    assert isinstance(net.down, SparseLinear)
    assert torch.equal(net.down.weight, prune_weight(weight, "2:4", "wanda", calibration["down"].gram).weight)


@needs_kernel
def test_one_dense_result_of_pruning_lives_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def watching(*given: Any) -> PrunedWeight:
        assert not [each for each in made if each() is not None]
        result = prune_weight(*given)
        made.extend((weakref.ref(result.weight), weakref.ref(result.mask)))
        return result

    monkeypatch.setattr(solve, "prune_weight", watching)
    compile(Net(), "2:4", method="magnitude", where="everywhere")
    assert len(made) == 4


def test_a_method_that_cannot_run_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "plan", lambda *_, **__: pytest.fail("measured"))
    for method, statistics, says in (
        ("guess", None, 'method "guess"'),
        ("wanda", None, '"wanda" needs calibration data'),
        ("magnitude", 5, "calibration is a int"),
    ):
        with pytest.raises(SparsecompError, match=says):
            compile(Net(), "2:4", method=method, calibration=statistics)  # type: ignore[arg-type]
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="calibration is a int"):
        plan(Net(), "2:4", calibration=5)  # type: ignore[arg-type]


def test_any_mapping_of_statistics_calibrates_a_plan_as_it_does_prune() -> None:
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    statistics = dict(calibrate(net, [torch.randn(400, 32)]))
    prune(twin, "2:4", "wanda", statistics)
    made = plan(net, "2:4", measure=False, calibration=statistics)  # type: ignore[arg-type]
    compile(net, made, method="wanda", calibration=statistics)  # type: ignore[arg-type]
    assert isinstance(net.down, SparseLinear) and torch.equal(net.down.weight, twin.down.weight)


def test_a_plan_is_followed_layer_by_layer() -> None:
    net = Net()
    made = plan(net, "2:4", measure=False)
    layers = (
        replace(made["up"], choice=Choice(parse("8:16"), dense_above=64)),
        replace(made["down"], choice=None, reason="dense is faster"),
    )
    made = replace(made, layers=layers)
    dense = net.down.weight.detach().clone()
    compile(net, made, method="magnitude")
    assert isinstance(net.up, SparseLinear) and net.up.pattern == parse("8:16") and net.up.dense_above == 64
    assert isinstance(net.down, nn.Linear) and torch.equal(net.down.weight, dense)
    assert report(net) is made
    shown = summary(net, batch=(1, 64))
    assert [row.name for row in shown.rows] == ["up"] and shown.stayed_dense["down"] == "dense is faster"
    assert "stayed dense: down: dense is faster" in str(shown) and "dense product from 64 rows on" in str(shown)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert report(twin) == made


@needs_kernel
def test_a_plan_of_another_model_is_refused() -> None:
    net = nn.Sequential(nn.Linear(32, 48))
    made = plan(Net(), "2:4", measure=False)
    before = state_of(net)
    with pytest.raises(ModelError, match='"up"'):
        compile(net, made, method="magnitude")
    assert untouched(net, before)


@needs_kernel
def test_skip_wins_over_the_plan() -> None:
    net = Net()
    compile(net, plan(net, "2:4", measure=False), method="magnitude", skip="down")
    assert isinstance(net.up, SparseLinear) and isinstance(net.down, nn.Linear)


@needs_kernel
def test_a_pattern_is_planned_and_the_report_is_complete() -> None:
    net = Net()
    compile(net, ["2:4", "8:16"], method="magnitude", batch=(1, 16))
    made = report(net)
    assert made is not None and made.batches == (1, 16) and {layer.name for layer in made} == {"up", "down"}
    for layer in made:
        assert isinstance(net.get_submodule(layer.name), SparseLinear) == (layer.pattern is not None)


def test_summary_adds_up() -> None:
    net = Net()
    compile(net, "2:4", method="magnitude", where="everywhere")
    shown = summary(net, batch=(1, 4))
    assert [row.name for row in shown.rows] == ["up", "down"]
    assert shown.dense_bytes == 2 * 32 * 48 * 4
    assert shown.bytes == sum(net.get_submodule(row.name).kernel.nbytes for row in shown.rows) < shown.dense_bytes
    for batch in (1, 4):
        total = sum(row.dense[batch] for row in shown.rows) / sum(row.sparse[batch] for row in shown.rows)
        assert shown.speedup(batch) == pytest.approx(total)
    text = str(shown)
    assert "total" in text and "2:4" in text and "48x32" in text
    assert len(json.loads(json.dumps(shown.to_dict()))["layers"]) == 2


def test_wrong_requests_are_named() -> None:
    net = Net()
    before = state_of(net)
    wrong: list[tuple[object, dict[str, object], str]] = [
        ("2:4", {"where": "nowhere"}, "everywhere"),
        (["2:4", "8:16"], {"where": "everywhere"}, "one pattern"),
        ("auto", {"where": "everywhere"}, "auto"),
        ("2:4", {"only": "missing.*"}, "missing"),
        ("2:4", {"where": "everywhere", "method": "guess"}, "guess"),
    ]
    for pattern, options, words in wrong:
        with pytest.raises(SparsecompError, match=words):
            compile(net, pattern, **options)  # type: ignore[arg-type]
        assert untouched(net, before)
    with pytest.raises(ModelError, match="no sparse layer"):
        summary(net)


def test_summary_measures_the_backend_that_was_asked_for() -> None:
    linear = nn.Linear(256, 256)
    layers = [
        SparseLinear.from_linear(linear, "2:4", "magnitude", backend=name) for name in (None, "reference", "dense")
    ]
    preferred, reference, dense = summary(nn.Sequential(*layers), batch=(2,)).rows
    assert preferred.sparse != reference.sparse and reference.sparse != dense.sparse
    assert reference.kernel == "reference" and reference.why == dense.why == "asked for by name"
    assert layers[1].explain(2).seconds == pytest.approx(
        {**tune.measure(_request(layers[1]), backend="reference").seconds}
    )
    assert layers[1].explain(2).seconds != layers[0].explain(2).seconds


@pytest.mark.parametrize(("pattern", "backend"), [("block8x8:0.5", "triton_block"), ("5:8", "triton")])
def test_the_reason_is_of_the_backend_that_comes_nearest(pattern: str, backend: str) -> None:
    on_gpu = Request(parse(pattern), (64, 64), torch.float32, "cuda", 1)
    assert why_no_kernel(on_gpu).startswith(f"{backend}: ")
    assert why_no_kernel(replace(on_gpu, device="cpu")).startswith("cpu: ")


def _request(layer: SparseLinear) -> Request:
    return Request(layer.pattern, (layer.out_features, layer.in_features), layer.dtype, "cpu", 2)


def test_the_backend_of_the_plan_is_taken_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(32, 48)), torch.randn(5, 32)
    prune(net, "2:4")
    with torch.no_grad():
        want = net(x)
    decided = plan(net, "2:4", batch=1, measure=False)
    (layer,) = decided
    fastest = replace(decided, layers=(replace(layer, choice=Choice(parse("2:4"), FLOAT, "reference")),))
    fast = compile(net, fastest)[0]
    with torch.no_grad():
        torch.testing.assert_close(net(x), want)
    for each in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast.to(torch.bfloat16)):
        assert isinstance(each, SparseLinear) and each.kernel.backend == "reference"
        explanation = each.explain()
        assert explanation.reason.startswith("the fastest of the backends that run it")
        assert dict(explanation.rejected)["dense"] == "runs it too, was not the fastest"
    assert "fastest of the backends" in str(summary(net, batch=(1,)))
    # where it cannot run, another one is taken: a preference is no pin
    monkeypatch.setattr(ReferenceBackend, "supports", lambda self, request: "cannot")
    assert copy.deepcopy(fast).kernel.backend != "reference"


def test_models_that_torch_compile_wrapped_are_packed_inside(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(3, 16)
    prune(net, "2:4", show_progress=False)
    wrapped = torch.compile(net, backend="eager")
    want = wrapped(x).detach()
    assert list(plan(wrapped, "2:4", measure=False).sparse) == ["0", "2"]
    assert compile(wrapped, "2:4", where="everywhere") is wrapped and isinstance(net[0], SparseLinear)
    torch.testing.assert_close(wrapped(x).detach(), want)
    save(wrapped, tmp_path / "m.safetensors")
    fresh = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), backend="eager")
    assert load(tmp_path / "m.safetensors", into=fresh) is fresh
    torch.testing.assert_close(fresh(x).detach(), want)
