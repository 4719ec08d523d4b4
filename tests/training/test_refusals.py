"""Bad input to a training: one sentence each, and nothing is changed by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp import training
from sparsecomp.errors import MethodError, ModelError, PatternError
from tests.training import small
from tests.training.small import made, tensors, train

METHODS = ("fixed", "sr-ste", "step")


def other_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(small.model().parameters(), lr=0.1)


def half_an_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model[0].parameters(), lr=0.1)  # type: ignore[index, arg-type]


FITS = torch.tensor([True, True, False, False])
BAD: list[tuple[str, type[Exception], Callable[[nn.Module], Any]]] = [
    (
        r'does not hold the weights of 2 of 2 layers \("0", "2"\)',
        ModelError,
        lambda model: sc.sparsify(model, "2:4", other_optimizer(), steps=1),
    ),
    (
        r'does not hold the weights of 1 of 2 layers \("2"\)',
        ModelError,
        lambda model: sc.sparsify(model, "2:4", half_an_optimizer(model), steps=1),
    ),
    ("optimizer is a str", ModelError, lambda model: sc.sparsify(model, "2:4", "adam", steps=1)),  # type: ignore[arg-type]
    (
        "LBFGS calls the model several times",
        ModelError,
        lambda model: sc.sparsify(model, "2:4", torch.optim.LBFGS(model.parameters()), steps=1),
    ),
    ("steps=0 trains nothing", MethodError, lambda model: sc.sparsify(model, "2:4", steps=0)),
    ("steps=1.5 trains nothing", MethodError, lambda model: sc.sparsify(model, "2:4", steps=1.5)),  # type: ignore[arg-type]
    (
        'unknown method of sparse training "sr_ste".*did you mean "sr-ste"',
        MethodError,
        lambda model: sc.sparsify(model, "2:4", method="sr_ste", steps=1),
    ),
    (
        'a schedule "steep" is not known; choose one of constant',
        MethodError,
        lambda model: sc.sparsify(model, "2:4", schedule="steep", steps=1),
    ),
    (
        "schedule is a int; give a curve's name",
        MethodError,
        lambda model: sc.sparsify(model, "2:4", schedule=3, steps=1),  # type: ignore[arg-type]
    ),
    (
        "leave none of 4 steps",
        MethodError,
        lambda model: sc.sparsify(model, "2:4", schedule=sc.Schedule(warm_up=4), steps=4),
    ),
    (
        'scope="model" is not known',
        PatternError,
        lambda model: sc.sparsify(model, "2:4", scope="model", steps=1),  # type: ignore[arg-type]
    ),
    (
        'scope="global" has nothing to share out',
        PatternError,
        lambda model: sc.sparsify(model, "2:4", scope="global", steps=1),
    ),
    (
        'start="best_of_all" is not known',
        MethodError,
        lambda model: sc.sparsify(model, "2:4", start="best_of_all", steps=1),
    ),
    (
        'method "sr-ste" begins dense and chooses its own masks',
        MethodError,
        lambda model: sc.sparsify(model, "2:4", method="sr-ste", start="magnitude", steps=1),
    ),
    (
        r'mask of "0" has shape \(16, 24\); its weight has \(24, 16\)',
        ModelError,
        lambda model: sc.sparsify(model, "2:4", start=given(torch.ones(16, 24).bool()), steps=1),
    ),
    (
        'mask of "0" is torch.float32; give a torch.bool tensor',
        ModelError,
        lambda model: sc.sparsify(model, "2:4", start=given(torch.ones(24, 16)), steps=1),
    ),
    (
        'start has no mask for "2"',
        ModelError,
        lambda model: sc.sparsify(model, "2:4", start={"0": FITS.repeat(24, 4)}, steps=1),
    ),
    (
        'a mask is given for "9", which is not trained sparse',
        ModelError,
        lambda model: sc.sparsify(model, "2:4", start={"9": torch.ones(24, 16).bool()}, steps=1),
    ),
    (
        "0: ",
        PatternError,
        lambda model: sc.sparsify(model, "2:4", start=given(torch.ones(24, 16).bool()), steps=1),
    ),
    (
        "2: |0: ",
        PatternError,
        lambda model: sc.sparsify(model, "2:4", start="zeros", steps=1),
    ),
    ("start is a int; give", MethodError, lambda model: sc.sparsify(model, "2:4", start=3, steps=1)),  # type: ignore[arg-type]
    ("the model is a str", ModelError, lambda _: sc.sparsify("model", "2:4", steps=1)),  # type: ignore[arg-type]
]


def given(mask: Tensor) -> dict[str, Tensor]:
    return {"0": mask, "2": FITS.repeat(8, 6)}


@pytest.mark.parametrize(("sentence", "error", "call"), BAD, ids=[each[0][:40] for each in BAD])
def test_bad_input_is_one_sentence_and_leaves_the_model_alone(
    sentence: str, error: type[Exception], call: Callable[[nn.Module], Any]
) -> None:
    model = small.model()
    with pytest.raises(error, match=sentence):
        call(model)
    assert small.equal(model, small.model())
    assert sc.masks(model) == {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sc.sparsify(model, "2:4", optimizer, steps=1)  # nothing is left behind
    train(model, optimizer, 1)
    handle.bake()


def test_a_second_training_of_the_same_weights_is_refused() -> None:
    model, optimizer, handle = made()
    with pytest.raises(ModelError, match="0: its weight is in a training that is still live; bake that one first"):
        sc.sparsify(model, "2:4", optimizer, steps=1)
    with pytest.raises(ModelError, match="2: its weight is in a training"):
        sc.sparsify(model, "2:4", optimizer, steps=1, only="2")
    train(model, optimizer, 1)
    small.obeys(handle)
    handle.bake()
    again = sc.sparsify(model, "2:4", optimizer, start="zeros", steps=1)
    train(model, optimizer, 1)
    small.obeys(again)


def test_two_trainings_of_other_layers_share_an_optimizer() -> None:
    model = small.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    one = sc.sparsify(model, "2:4", optimizer, steps=3, only="0")
    other = sc.sparsify(model, "1:4", optimizer, "sr-ste", steps=3, only="2")
    train(model, optimizer, 3)
    small.obeys(one)
    small.obeys(other)
    one.bake()
    assert list(sc.masks(model)) == ["2"]


def test_a_training_without_an_optimizer_takes_it_later() -> None:
    model = small.model()
    handle = sc.sparsify(model, "2:4", steps=2)
    assert "no optimizer yet" in str(handle)
    with pytest.raises(ModelError, match="does not hold the weights"):
        handle.attach(other_optimizer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer)
    train(model, optimizer, 1)
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    handle.attach(other)  # the first is let go
    train(model, other, 1)
    assert handle.step == 2 and "no optimizer" not in str(handle)
    small.obeys(handle)


def test_a_layer_that_is_added_after_the_start_is_named_at_the_end() -> None:
    model, _, handle = made(steps=1)
    model.append(nn.Linear(small.OUT, small.OUT))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer)
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match=r'1 layers were added to the model after sparsify.*\("3"\)'):
        handle.bake()


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_replaced_after_the_start_is_named(method: str) -> None:
    model, optimizer, handle = made(method)
    train(model, optimizer, 5)
    before = model[0].weight.detach().clone()
    model[2].weight = nn.Parameter(torch.ones(small.OUT, small.HIDDEN))
    small.loss_of(model, next(small.batches(1))).backward()
    with pytest.raises(ModelError, match="2: its weight was replaced after sparsify"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)  # what was learned behind the mask does not show
    assert handle.step == 5


def test_baking_twice_and_what_comes_after() -> None:
    model, optimizer, handle = made(steps=1)
    train(model, optimizer, 1)
    state = handle.state_dict()
    handle.bake()
    for call in (handle.bake, lambda: handle.attach(optimizer), lambda: handle.load_state_dict(state)):
        with pytest.raises(ModelError, match="this training was baked"):
            call()
    assert repr(handle) == "<SparseTraining fixed, baked, step 1 of 1>" and "baked" in str(handle)


def test_a_weight_that_no_longer_fits_is_named_at_the_end() -> None:
    model = small.model()
    handle = sc.sparsify(model, "2:4", steps=1)
    handle.bake()
    assert sc.masks(model) == {} and float((model[0].weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.update(method="step"), 'the state is of "step" over 8 steps; this is "sr-ste" over 8'),
        (lambda state: state.update(steps=9), 'the state is of "sr-ste" over 9 steps'),
        (lambda state: state["layers"].pop("2"), 'the state lacks it, where this training has "2" in 2:4'),
        (lambda state: state["layers"]["0"].update(pattern="1:4"), "the state has it in 1:4"),
        (
            lambda state: state["layers"]["0"].update(mask=torch.ones(2, 4).bool()),
            r"the state has it in the shape \(2, 4\)",
        ),
        (lambda state: state["layers"].update(more=state["layers"]["0"]), 'the state has "more"'),
        (lambda state: state.clear(), "this is no state of a sparse training"),
    ],
)
def test_the_state_of_another_training_is_refused(change: Callable[[Any], Any], sentence: str) -> None:
    model, optimizer, handle = made("sr-ste")
    train(model, optimizer, 2)
    state = handle.state_dict()
    change(state)
    before = copy.deepcopy([model.state_dict(), handle.state_dict()])
    with pytest.raises(ModelError, match=sentence):
        handle.load_state_dict(state)
    now = [model.state_dict(), handle.state_dict()]
    assert all(torch.equal(*pair) for pair in zip(tensors(before), tensors(now), strict=True))


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("SrSte", {"decay": -1e-4}),
    ("SrSte", {"decay": float("nan")}),
    ("SrSte", {"decay": "2e-4"}),
    ("Gradient", {"momentum": None}),
    ("Gradient", {"momentum": 1.5}),
    ("Movement", {"betas": 0.9}),
    ("Movement", {"betas": (0.9,)}),
    ("Movement", {"betas": (0.9, 1.0)}),
    ("Movement", {"lr": float("inf")}),
    ("Obd", {"gradients": 2.5}),
    ("Obs", {"gradients": 0}),
    ("Obs", {"block": float("nan")}),
    ("Obs", {"damp": "small"}),
    ("RigL", {"alpha": True}),
    ("SoftMovement", {"quadratic": float("nan")}),
    ("Step", {"settled": None}),
    ("Step", {"latest": "0.5"}),
    ("Schedule", {"every": 2.5}),
    ("Schedule", {"warm_up": float("nan")}),
    ("Schedule", {"cool_down": None}),
]


@pytest.mark.parametrize(("name", "settings"), WRONG, ids=str)
def test_wrong_settings_are_one_sentence(name: str, settings: dict[str, Any]) -> None:
    ((setting, value),) = settings.items()
    with pytest.raises(MethodError, match=rf"^{setting}=.*; give ") as caught:
        getattr(training, name)(**settings)
    assert str(value) in str(caught.value) or name == "Step"


@pytest.mark.parametrize("pattern", ["2:4", "2:4@v4", "unstructured:0.3", "block4x4:0.5"])
@pytest.mark.parametrize("method", ["fixed", "gradual", "obd", "obs", "gradient", "movement", "sr-ste", "step", "rigl"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights_are_no_hindrance(method: str, pattern: str) -> None:
    model = nn.Sequential(nn.Linear(16, 0), nn.Linear(0, 16), nn.Linear(16, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    handle = sc.sparsify(model, pattern, optimizer, method, steps=6)
    for _ in range(6):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    handle.bake()
    assert 0.2 < handle.density < 0.6
