"""``compile(method=...)`` prunes as ``prune`` does, bit for bit; a layer that fails leaves the model as it was."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.backends.choice import Choice
from sparsecomp.errors import CalibrationError, MethodError, ModelError, PatternError
from sparsecomp.methods.registry import _METHODS, Method, Problem, Solution, methods
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import SparseLinear
from sparsecomp.patterns import parse
from sparsecomp.patterns.project import project

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
METHODS = methods()
MIXED = {"up": "2:4", "mix": "8:16", "down": "block8x8:0.5"}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """nn.Linear and Conv1D, one layer under two names, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(32, 48), Conv1D(32, 48), nn.Linear(32, 32, bias=False)
        self.again = self.up

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.down(self.mix(self.up(x).relu())))


def made(dtype: torch.dtype = torch.float32) -> tuple[Net, Any]:
    net = Net()
    nn.init.normal_(net.mix.weight)
    calibration = sc.calibrate(net, [torch.randn(200, 32)], show_progress=False)
    return net.to(dtype), calibration


def parts(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def both_ways(net: nn.Module, pattern: Any, method: str, calibration: Any) -> tuple[nn.Module, nn.Module]:
    """The model pruned by compile, and a copy pruned first."""
    twin = copy.deepcopy(net)
    report = sc.prune(twin, pattern, method, calibration, show_progress=False)
    where = {"where": "everywhere"} if not isinstance(pattern, sc.Plan) else {}
    sc.compile(twin, pattern, **where)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pruning noted")
        sc.compile(net, pattern, method=method, calibration=calibration, **where)
    packed = {name for name, each in net.named_modules() if isinstance(each, SparseLinear)}
    assert packed == set(report.layers) > set()
    return net, twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_compile_prunes_as_prune_does_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    net, calibration = made(dtype)
    net, twin = both_ways(net, MIXED, method, calibration)
    assert same(net, twin) and net.again is net.up


@pytest.mark.parametrize("pattern", ["2:4", "2:4@v2", "2:4@t", "16:2:8", "block8x8:0.5"])
def test_of_every_kind_of_pattern(pattern: str) -> None:
    assert same(*both_ways(made()[0], pattern, "magnitude", None))
    net, calibration = made()
    assert same(*both_ways(net, pattern, "fast", calibration))


def test_as_a_plan_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    net, calibration = made()
    plan = sc.plan(net, "2:4", measure=False)
    layers = tuple(
        replace(each, choice=None if each.name == "mix" else Choice(parse(MIXED[each.name])), reason="here")
        for each in plan
    )
    net, twin = both_ways(net, replace(plan, layers=layers), "obs", calibration)
    assert same(net, twin) and isinstance(net.mix, Conv1D)


@pytest.mark.parametrize("method", METHODS)
def test_int8_layers_are_pruned_as_prune_does(method: str) -> None:
    linear = nn.Linear(32, 48)
    gram = sc.calibrate(linear, [torch.randn(200, 32)], show_progress=False)[""].gram
    pruned = copy.deepcopy(linear)
    pruned.weight.data = prune_weight(linear.weight, "2:4", method, gram).weight
    one = SparseLinear.from_linear(linear, "2:4", method, gram, quantized=True)
    assert one.quantized and same(one, SparseLinear.from_linear(pruned, "2:4", quantized=True))


def _random(problem: Problem) -> Solution:
    return Solution(problem.weight, project(torch.rand(problem.weight.shape), problem.pattern), ("drawn by lot",))


def test_a_method_that_draws_numbers_gets_the_seed_of_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_METHODS, "random", Method("random", _random, False, "for this test"))
    torch.manual_seed(17)
    net, _ = made()
    before = torch.random.get_rng_state()
    net, twin = both_ways(net, "2:4", "random", None)
    assert same(net, twin) and torch.equal(torch.random.get_rng_state(), before)


def test_what_a_method_notes_reaches_the_user_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_METHODS, "random", Method("random", _random, False, "for this test"))
    with pytest.warns(UserWarning, match=r"drawn by lot \(3 layers, the first up\); sc.prune returns") as caught:
        sc.compile(made()[0], "2:4", method="random", where="everywhere")
    assert len(caught) == 1 and caught[0].filename == __file__
    net, calibration = made()
    with pytest.warns(UserWarning, match=r"no held-out tokens were given, .* takes held_out and example batches"):
        sc.compile(net, "2:4", method="best", calibration=calibration, where="everywhere")


def test_thin_statistics_are_warned_of() -> None:
    net, _ = made()
    calibration = sc.calibrate(net, [torch.randn(50, 32)], show_progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sc.compile(net, "2:4", method="wanda", calibration=calibration, where="everywhere")
    (warning,) = caught
    assert "3 of 3 pruned layers have fewer than 4 calibration rows" in str(warning.message)
    assert warning.filename == __file__


class _Stop(Exception):
    pass


def _stopping(problem: Problem) -> Solution:
    if problem.weight.shape == (32, 32):
        raise _Stop
    return Solution(torch.zeros_like(problem.weight), project(problem.weight.abs(), problem.pattern))


def _overflowing(problem: Problem) -> Solution:
    weight = problem.weight if problem.weight.shape != (32, 32) else torch.full_like(problem.weight, torch.inf)
    return Solution(weight, project(problem.weight.abs(), problem.pattern))


@pytest.mark.parametrize(
    ("solve", "error", "words"), [(_stopping, _Stop, "^$"), (_overflowing, MethodError, "^down: .*overflow")]
)
def test_a_layer_that_cannot_be_solved_leaves_the_model_untouched(
    solve: Any, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_METHODS, "failing", Method("failing", solve, False, "for this test"))
    net, _ = made()
    before, modules = parts(net), dict(net.named_modules(remove_duplicate=False))
    with pytest.raises(error, match=words):
        sc.compile(net, "2:4", method="failing", where="everywhere")
    assert dict(net.named_modules(remove_duplicate=False)) == modules
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_can_never_be_packed_is_refused_before_any_layer_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    def solve(problem: Problem) -> Solution:
        raise AssertionError("solved")

    monkeypatch.setitem(_METHODS, "late", Method("late", solve, False, "for this test"))
    with pytest.raises(PatternError, match=r'^up: "unstructured:0.5" is a mask-only pattern'):
        sc.compile(made()[0], "unstructured:0.5", method="late", where="everywhere")
    net = made()[0]
    net.down.double()
    with pytest.raises(ModelError, match=r"^down: the weight is torch.float64"):
        sc.compile(net, "2:4", method="late", where="everywhere")
    with pytest.raises(CalibrationError, match=r"calibration is a list, not statistics by layer"):
        sc.compile(made()[0], "2:4", method="late", where="everywhere", calibration=[1])  # type: ignore[arg-type]
