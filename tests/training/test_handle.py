"""The handle: what it leaves alone, what it saves, and what it says of bad input."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.errors import MethodError, ModelError, PatternError
from tests.training import small

METHODS = ("fixed", "sr-ste", "step")
Made = tuple[nn.Sequential, torch.optim.Optimizer, sc.SparseTraining]


def made(method: str = "fixed", steps: int = 8, **options: Any) -> Made:
    model = small.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, sc.sparsify(model, "2:4", optimizer, method, steps=steps, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> None:
    for batch in small.batches(count, seed):
        optimizer.zero_grad()
        small.loss_of(model, batch).backward()
        optimizer.step()


# --- what it leaves alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_keys_copies_and_pickles(method: str) -> None:
    keys = list(small.model().state_dict())
    model, optimizer, _ = made(method)
    train(model, optimizer, 6)
    assert list(model.state_dict()) == keys
    x = torch.randn(3, small.IN)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and type(other) is type(model)
        assert sc.masks(other) == {}
        # a copy is nobody's: its optimizer fills the zeros, and the original is not touched
        before = {key: value.clone() for key, value in model.state_dict().items()}
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), 1)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pickle.dumps(optimizer)
    copy.deepcopy(optimizer)


def test_hooks_of_the_users_modules_and_parameters_still_run() -> None:
    model = small.model()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].weight.register_hook(lambda _: calls.append("gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sc.sparsify(model, "2:4", optimizer, "sr-ste", steps=1)
    train(model, optimizer, 1)
    assert calls == ["forward", "gradient", "accumulated"]


def test_training_that_nobody_holds_goes_on() -> None:
    model = small.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sc.sparsify(model, "2:4", optimizer, steps=2)
    train(model, optimizer, 2)
    assert all(float((layer.weight == 0).float().mean()) == 0.5 for layer in (model[0], model[2]))
    assert list(sc.masks(model)) == ["0", "2"]


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_the_owner_writes_in_place_count(method: str) -> None:
    model, optimizer, handle = made(method)
    train(model, optimizer, 5)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizer, 1, seed=5)
    model.load_state_dict(saved)
    optimizer.zero_grad()
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    train(model, optimizer, 1, seed=6)
    small.obeys(handle)
    both = handle.masks["0"] & (saved["0.weight"] != 0)
    assert torch.equal(model[0].weight[both], saved["0.weight"][both])


# --- saved and resumed ----------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("done", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_in_mid_schedule_bit_for_bit(method: str, done: int) -> None:
    model, optimizer, handle = made(method)
    train(model, optimizer, done)
    file = through_a_file([model.state_dict(), optimizer.state_dict(), handle.state_dict()])
    train(model, optimizer, 8 - done, seed=2)

    again, its_optimizer, its_handle = made(method, seed=3)
    train(again, its_optimizer, 1, seed=9)
    for each, state in zip((again, its_optimizer, its_handle), file, strict=True):
        each.load_state_dict(state)
    assert its_handle.step == done
    train(again, its_optimizer, 8 - done, seed=2)
    assert small.equal(model, again) and handle.history == its_handle.history
    assert str(handle) == str(its_handle)
    assert small.equal(handle.bake(), its_handle.bake())


@pytest.mark.parametrize("method", METHODS)
def test_resumed_in_the_middle_of_gradient_accumulation(method: str) -> None:
    parts = list(small.batches(10, seed=4))

    def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for index in range(first, last):
            small.loss_of(model, parts[index]).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()

    model, optimizer, handle = made(method)
    accumulate(model, optimizer, 0, 5)
    gradients = {name: each.grad for name, each in model.named_parameters()}
    file = through_a_file([model.state_dict(), optimizer.state_dict(), handle.state_dict(), gradients])
    accumulate(model, optimizer, 5, 10)

    again, its_optimizer, its_handle = made(method)
    for each, state in zip((again, its_optimizer, its_handle), file[:3], strict=True):
        each.load_state_dict(state)
    for name, each in again.named_parameters():
        each.grad = file[3][name]
    accumulate(again, its_optimizer, 5, 10)
    assert small.equal(model, again)


def test_the_state_is_a_copy() -> None:
    model, optimizer, handle = made("sr-ste")
    state = handle.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, 2)
    assert all(torch.equal(state["layers"][name]["dense"], before["layers"][name]["dense"]) for name in ("0", "2"))
    handle.load_state_dict(state)
    train(model, optimizer, 2)
    assert torch.equal(state["layers"]["0"]["mask"], before["layers"]["0"]["mask"])


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
def test_sr_ste_gradient_is_that_of_a_masked_forward(parts: int, scaled: bool) -> None:
    """W gets g + decay (1 - M) W, g being the gradient by W * M, of all parts of a batch; SGD without momentum."""
    torch.manual_seed(0)
    layer, (x, y) = nn.Linear(8, 4, dtype=torch.float64), (torch.randn(8, 8).double(), torch.randn(8, 4).double())
    dense, bias, rate, decay = layer.weight.detach().clone(), layer.bias.detach().clone(), 0.25, 0.125
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    handle = sc.sparsify(layer, "2:4", optimizer, sc.training.SrSte(decay=decay), steps=3)
    for _ in range(3):
        mask = handle.masks[""]
        leaf = (dense * mask).requires_grad_()
        its_bias = bias.clone().requires_grad_()
        assert torch.equal(layer.weight.detach(), dense * mask)
        for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.linear(some, leaf, its_bias) - wanted).square().sum().backward()
            scaler.scale((layer(some) - wanted).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert leaf.grad is not None and its_bias.grad is not None
        dense = dense - rate * (leaf.grad + decay * torch.where(mask, 0.0, dense))
        bias = bias - rate * its_bias.grad
        learned = handle.state_dict()["layers"][""]["dense"]
        torch.testing.assert_close(learned, dense, rtol=1e-13, atol=1e-13)
        assert torch.equal(handle.masks[""], sc.prune_weight(learned, "2:4").mask)
        dense = learned


def test_fixed_masks_take_masked_gradients() -> None:
    model, optimizer, handle = made(steps=1)
    (batch,) = small.batches(1)
    small.loss_of(model, batch).backward()
    want = model[0].weight.grad * handle.masks["0"]  # type: ignore[operator]
    optimizer.step()
    assert torch.equal(model[0].weight.grad, want)  # type: ignore[arg-type]


# --- a loss that is no number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_leaves_weights_and_the_optimizer_untouched_and_training_goes_on(
    method: str, fused: bool, poison: float
) -> None:
    model = small.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    handle = sc.sparsify(model, "2:4", optimizer, method, steps=8)
    train(model, optimizer, 5)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), handle.state_dict()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            (small.loss_of(model, next(small.batches(1))) * poison).backward()
            optimizer.step()
    assert len(said) == 1 and "gradients are not finite at step 6" in str(said[0].message)
    now = [model.state_dict(), optimizer.state_dict(), handle.state_dict()]
    assert all(torch.equal(*pair) for pair in zip(tensors(before), tensors(now), strict=True))
    assert all(float(each["step"]) == 5 for each in optimizer.state.values())
    train(model, optimizer, 3)
    assert handle.step == 8
    small.obeys(handle)
    handle.bake()


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for part in parts for tensor in tensors(part)]


# --- bad input ------------------------------------------------------------------------------------------------------


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


# --- what it tells --------------------------------------------------------------------------------------------------


def test_flip_rates_are_those_of_the_masks() -> None:
    model, optimizer, handle = made("sr-ste", steps=4)
    assert handle.flip_rate == 0.0 and "masks have not changed yet" in str(handle)
    rates = []
    for seed in range(4):
        before = handle.masks
        optimizer.param_groups[0]["lr"] = 0.1
        train(model, optimizer, 1, seed)
        changed = sum(int((mask != before[name]).sum()) for name, mask in handle.masks.items())
        rates.append(changed / (small.IN * small.HIDDEN + small.HIDDEN * small.OUT))
        assert handle.flip_rate == rates[-1]
    assert max(rates) > 0 and [each.step for each in handle.history] == [1, 2, 3, 4]
    assert [each.flip_rate for each in handle.history] == rates
    assert all(each.density == 0.5 for each in handle.history)
    assert str(handle).splitlines() == [
        "sr-ste: step 4 of 4, 2 layers keep 50.0% of their weights, schedule constant",
        f"the last change of masks flipped {rates[-1]:.2%} of their entries",
    ]
    assert repr(handle) == "<SparseTraining sr-ste, live, step 4 of 4>"


def test_masks_stay_after_the_last_step() -> None:
    model, optimizer, handle = made("sr-ste", steps=2)
    train(model, optimizer, 2)
    before = handle.masks
    optimizer.param_groups[0]["lr"] = 0.5
    train(model, optimizer, 3)
    assert handle.step == 5 and all(torch.equal(mask, before[name]) for name, mask in handle.masks.items())
    small.obeys(handle)
    handle.bake()


def test_empty_weights() -> None:
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sc.sparsify(model, "2:4", optimizer, "sr-ste", steps=1)
    model(torch.ones(1, 0)).sum().backward()
    optimizer.step()
    small.obeys(handle)
    handle.bake()
