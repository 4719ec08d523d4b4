"""Rounds of rewinding on a toy: densities, start weights and controls are exactly what they are said to be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.errors import MethodError, ModelError, PatternError
from sparsecomp.models.layers import find_layers
from sparsecomp.training.rewind import _OTHER_WEIGHTS, RewindReport, Round

STEPS = 6


def toy(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))


class Loop:
    """A training that notes the state each round begins and ends with."""

    def __init__(self, bake: bool = False) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []
        self.at: list[dict[int, dict[str, Tensor]]] = []
        self.steps: list[int] = []
        self._bake = bake

    def __call__(self, model: nn.Module, now: Round) -> str:
        self.starts.append(copy.deepcopy(model.state_dict()))
        self.at.append({})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        handle = now.sparsify(optimizer, steps=STEPS - now.step)
        generator = torch.Generator().manual_seed(3)
        x, classes = torch.randn(STEPS, 16, 12, generator=generator), torch.randint(5, (STEPS, 16), generator=generator)
        model.train()
        self.steps.append(now.step)
        for step in range(now.step, STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[step]), classes[step]).backward()
            optimizer.step()
            self.at[-1][step + 1] = copy.deepcopy(model.state_dict())
        self.ends.append(copy.deepcopy(model.state_dict()))
        if self._bake:
            handle.bake()
        return f"round {now.number}"


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(state[name], each) for name, each in other.items())


def under(state: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with dropped weights at zero; all layers here are linear."""
    return {
        name: each * masks[name.removesuffix(".weight")] if name.removesuffix(".weight") in masks else each
        for name, each in state.items()
    }


def kept(masks: dict[str, Tensor]) -> int:
    return sum(int(each.sum()) for each in masks.values())


TOTAL = 12 * 20 + 20 * 5


@pytest.mark.parametrize("early", [0, 2])
@pytest.mark.parametrize("bake", [False, True])
def test_each_round_begins_with_the_snapshot_under_the_mask(early, bake):
    model, loop = toy(), Loop(bake)
    initial = copy.deepcopy(model.state_dict())
    report = sc.rewind(model, loop, rounds=4, early=early)
    snapshot = loop.at[0][early] if early else initial
    assert same(report.state, snapshot) and report.step == early
    assert same(loop.starts[0], initial) and loop.steps == [0, early, early, early, early]
    for start, now in zip(loop.starts[1:], report.rounds[1:], strict=True):
        # weights, biases, and what the batch norm has seen
        assert same(start, under(snapshot, now.masks))
    assert [each.result for each in report.rounds] == [f"round {each}" for each in range(5)]
    assert same(model.state_dict(), under(loop.ends[-1], report.rounds[-1].masks))


@pytest.mark.parametrize("drop", [0.2, 0.5])
def test_densities_fall_by_the_same_share_and_masks_are_nested(drop):
    report = sc.rewind(toy(), Loop(), rounds=4, drop=drop)
    for number, each in enumerate(report.rounds):
        assert each.density == pytest.approx((1 - drop) ** number)
        assert kept(each.masks) == math.ceil((1 - drop) ** number * TOTAL - 1e-9)
    for before, after in zip(report.rounds, report.rounds[1:], strict=False):
        assert all(bool((before.masks[name] >= each).all()) for name, each in after.masks.items())


def test_what_is_dropped_are_the_smallest_of_what_was_left_in_all_layers_together():
    loop = Loop()
    report = sc.rewind(toy(), loop, rounds=3)
    for before, after, end in zip(report.rounds, report.rounds[1:], loop.ends, strict=False):
        left = torch.cat([end[f"{name}.weight"][each].abs() for name, each in before.masks.items()])
        least = left.sort(descending=True).values[kept(after.masks) - 1]
        for name, each in after.masks.items():
            assert torch.equal(each, before.masks[name] & (end[f"{name}.weight"].abs() >= least))


def test_equal_weights_are_counted_once_and_no_layer_is_cut_through():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 400, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e-9)
        model[1].weight.fill_(1.0)

    def idle(model, now):
        now.sparsify(torch.optim.SGD(model.parameters(), lr=0.0), steps=1)

    report = sc.rewind(model, idle, rounds=3, drop=0.7)
    for number, each in enumerate(report.rounds):
        assert kept(each.masks) == math.ceil(0.3**number * 3264 - 1e-9)
        assert int(each.masks["0"].sum()) >= 1


def test_a_kept_weight_of_zero_is_not_taken_for_a_dropped_one():
    model = nn.Sequential(nn.Linear(10, 10, bias=False))

    def cleared(model, now):
        now.sparsify(torch.optim.SGD(model.parameters(), lr=0.0), steps=1)
        with torch.no_grad():
            model[0].weight.zero_()

    report = sc.rewind(model, cleared, rounds=3)
    for before, after in zip(report.rounds, report.rounds[1:], strict=False):
        assert bool((before.masks["0"] >= after.masks["0"]).all())


def test_with_the_learning_rate_weights_stay_and_the_schedule_begins_again():
    model, loop = toy(), Loop()
    report = sc.rewind(model, loop, rounds=3, to="learning-rate", early=2)
    assert loop.steps == [0, 2, 2, 2] and same(report.state, loop.at[0][2])
    for start, end, now in zip(loop.starts[1:], loop.ends, report.rounds[1:], strict=False):
        assert same(start, under(end, now.masks))


def test_rounds_may_begin_at_a_state_of_the_users():
    model, loop, given = toy(), Loop(), toy(9).state_dict()
    report = sc.rewind(model, loop, rounds=2, early=given)
    assert report.step == 0 and loop.steps == [0, 0, 0] and same(loop.starts[0], given)
    assert same(loop.starts[2], under(given, report.rounds[2].masks))


def found(early: int = 2, **settings: Any) -> tuple[nn.Sequential, Loop, RewindReport]:
    model, loop = toy(), Loop()
    return model, loop, sc.rewind(model, loop, rounds=3, early=early, **settings)


def test_the_ticket_trained_again_is_its_round():
    model, loop, report = found()
    again = report.train(model, loop)
    assert again.result == "round 3" and same(loop.ends[-1], loop.ends[3]) and loop.steps[-1] == 2
    second = report.train(model, loop, number=2)
    assert second.number == 2 and same(loop.ends[-1], loop.ends[2])


def test_a_random_mask_differs_in_its_places_alone():
    model, _, report = found()
    last = report.rounds[-1]
    one, same_seed, other = (report.begin(model, "random", seed=seed) for seed in (1, 1, 2))
    for name, mask in last.masks.items():
        assert int(one.masks[name].sum()) == int(mask.sum()) and not torch.equal(one.masks[name], mask)
        assert torch.equal(one.masks[name], same_seed.masks[name])
    assert any(not torch.equal(one.masks[name], each) for name, each in other.masks.items())
    assert same(model.state_dict(), under(report.state, other.masks))
    assert (other.density, other.step, other.number) == (last.density, 2, 3)


def test_a_reinitialised_ticket_differs_in_its_weights_alone():
    model, loop, report = found()
    masks = report.rounds[-1].masks
    again = report.begin(model, "reinitialised", seed=4)
    assert again.step == 0 and all(torch.equal(again.masks[name], each) for name, each in masks.items())
    before = torch.random.get_rng_state()
    fresh = toy()
    torch.manual_seed(_OTHER_WEIGHTS + 4)
    for each in fresh:
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()
    assert same(model.state_dict(), under(fresh.state_dict(), masks))
    # whatever seed the model was made with
    report.begin(model, "reinitialised")
    assert not torch.equal(model[0].weight, toy(0)[0].weight * masks["0"])
    torch.random.set_rng_state(before)
    report.begin(model, "reinitialised", seed=5)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers stay"
    report.begin(model, "reinitialised", initialise=lambda model: model.load_state_dict(toy(7).state_dict()))
    assert same(model.state_dict(), under(toy(7).state_dict(), masks))
    done = report.train(model, loop, "reinitialised")
    assert loop.steps[-1] == 0 and done.result == "round 3"


def test_whole_blocks_and_chosen_layers():
    model, loop, report = found(early=0, pattern="block2x4", only="0")
    last = report.rounds[-1]
    blocks = last.masks["0"].view(10, 2, 3, 4).sum(dim=(1, 3))
    assert set(last.masks) == {"0"} and set(blocks.flatten().tolist()) == {0, 8}
    assert int((blocks > 0).sum()) == math.ceil(0.8**3 * 30)
    random = report.begin(model, "random").masks["0"].view(10, 2, 3, 4).sum(dim=(1, 3))
    assert sorted(random.flatten().tolist()) == sorted(blocks.flatten().tolist()) and not torch.equal(random, blocks)
    assert bool((loop.ends[-1]["3.weight"] != 0).all())


def test_convolutions_take_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    x, y = torch.randn(8, 3, 4, 4), torch.randint(2, (8,))

    def train(model, now):
        optimizer = torch.optim.Adam(model.parameters())
        now.sparsify(optimizer, steps=2)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    initial = copy.deepcopy(model.state_dict())
    report = sc.rewind(model, train, rounds=2, drop=0.5)
    masks = report.rounds[-1].masks
    assert kept(masks) == (108 + 32) // 4
    report.begin(model)
    stored = find_layers(model)["0"].from_matrix(masks["0"])
    assert torch.equal(model[0].weight, initial["0.weight"] * stored)


def test_the_report_has_a_line_for_each_round():
    lines = str(found()[2]).splitlines()
    assert len(lines) == 4 and lines[3] == "round 3: 51.2% kept, round 3"


def careless(model: nn.Module, now: Round) -> None:
    """Trains nothing and keeps no mask."""


def filling(model: nn.Module, now: Round) -> None:
    now.sparsify(torch.optim.SGD(model.parameters(), lr=0.1), steps=1).bake()
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[3].weight.add_(1.0)


def breaking(model: nn.Module, now: Round) -> None:
    now.sparsify(torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan


def stopping(model: nn.Module, now: Round) -> None:
    now.sparsify(torch.optim.SGD(model.parameters(), lr=0.1), steps=9)


def twice(model: nn.Module, now: Round) -> None:
    for _ in range(2):
        now.sparsify(torch.optim.SGD(model.parameters(), lr=0.1), steps=9)


@pytest.mark.parametrize(
    ("train", "early", "error", "words"),
    [
        (careless, 0, MethodError, "did not call sparsify in round 0"),
        (filling, 0, ModelError, "that round 1 had dropped are not zero"),
        (breaking, 0, ModelError, "not finite after round 0"),
        (stopping, 3, MethodError, "round 0 ended after step 0"),
        (stopping, 10, MethodError, "has only 9 steps"),
        (twice, 0, MethodError, "twice in round 0"),
    ],
)
def test_a_training_that_keeps_no_masks_is_told_so(
    train: Callable[..., None], early: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        sc.rewind(toy(), train, rounds=2, early=early)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rounds": 0}, MethodError, "rounds=0"),
        ({"rounds": True}, MethodError, "rounds=True"),
        ({"drop": 1.0}, MethodError, r"drop=1\.0"),
        ({"drop": 1}, MethodError, "drop=1 "),
        ({"to": "weight"}, MethodError, 'to="weight"'),
        ({"early": -1}, MethodError, "early=-1"),
        ({"early": 0.5}, MethodError, r"early=0\.5"),
        ({"early": {"a": torch.ones(1)}}, ModelError, "state_dict of this one"),
        ({"pattern": "2:4"}, PatternError, 'pattern="2:4"'),
        ({"pattern": "unstructured:0.5"}, PatternError, 'pattern="unstructured:0.5"'),
        ({"only": "nowhere"}, ModelError, "nowhere"),
    ],
)
def test_what_makes_no_rounds_is_refused_in_a_sentence(settings, error, words):
    with pytest.raises(error, match=words):
        sc.rewind(toy(), Loop(), **settings)


def test_controls_that_are_none():
    model, _, report = found()
    with pytest.raises(MethodError, match='control="dense"'):
        report.begin(model, "dense")
    with pytest.raises(MethodError, match="there is no round 9; there are 0 to 3"):
        report.begin(model, number=9)
    with pytest.raises(ModelError, match="another model"):
        report.begin(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(MethodError, match="round 3 is over"):
        report.rounds[3].sparsify(torch.optim.SGD(model.parameters(), lr=0.1), steps=1)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x * self.scale)


def test_parameters_that_nothing_draws_anew_are_named():
    model = Own()
    report = sc.rewind(model, stopping, rounds=1)
    with pytest.raises(ModelError, match=r"is a Own, which has no reset_parameters .* pass initialise"):
        report.begin(model, "reinitialised")
