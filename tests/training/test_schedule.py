import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsecomp.errors import MethodError
from sparsecomp.patterns import parse
from sparsecomp.training.schedule import CURVES, Schedule, changes, pattern_at

EVERY_KIND = (
    "1:2",
    "2:4",
    "4:4",
    "8:16",
    "1:16",
    "2:4@v4",
    "1:4@t",
    "64:2:8",
    "4:2:16",
    "block4x4:0.25",
    "unstructured:0.1",
)


@st.composite
def runs(draw):
    steps = draw(st.integers(1, 60))
    warm_up = draw(st.integers(0, steps - 1))
    cool_down = draw(st.integers(0, steps - warm_up - 1))
    return Schedule(draw(st.sampled_from(CURVES)), warm_up, cool_down, draw(st.integers(1, 20))), steps


@settings(max_examples=200, deadline=None)
@given(runs(), st.floats(0.01, 1.0))
def test_density_falls_only_where_masks_may_change_and_ends_at_the_goal(run, goal):
    schedule, steps = run
    schedule.check(steps)
    densities = [schedule.density(step, steps, goal) for step in range(steps + 1)]
    assert all(goal <= each <= 1.0 for each in densities)
    assert all(later <= earlier for earlier, later in itertools.pairwise(densities))
    assert densities[: schedule.warm_up] == [1.0] * schedule.warm_up
    assert set(densities[schedule.last(steps) :]) == {goal}
    for step in range(1, steps + 1):
        if densities[step] != densities[step - 1]:
            assert schedule.acts(step, steps)


@settings(max_examples=200, deadline=None)
@given(runs())
def test_masks_may_change_every_so_often_and_at_the_last_step_but_not_in_the_cool_down(run):
    schedule, steps = run
    acting = [step for step in range(-1, steps + 5) if schedule.acts(step, steps)]
    last = steps - schedule.cool_down
    assert acting[-1] == last == schedule.last(steps)
    assert acting[0] >= max(1, schedule.warm_up)
    gaps = [later - earlier for earlier, later in itertools.pairwise(acting)]
    assert all(gap == schedule.every for gap in gaps[:-1])
    assert all(0 < gap <= schedule.every for gap in gaps)


@settings(max_examples=200, deadline=None)
@given(runs(), st.sampled_from(EVERY_KIND))
def test_changes_are_the_steps_at_which_the_pattern_asked_for_is_another(run, name):
    schedule, steps = run
    goal = parse(name)
    asked = [pattern_at(goal, schedule.density(step, steps, goal.density)) for step in range(steps + 1)]
    assert changes(schedule, steps, goal) == tuple(s for s in range(1, steps + 1) if asked[s] != asked[s - 1])
    assert asked[-1] == goal


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EVERY_KIND), st.floats(0.0, 1.0))
def test_the_pattern_on_the_way_keeps_what_is_asked_to_half_a_weight_of_a_group(name, density):
    goal = parse(name)
    now = pattern_at(goal, density)
    if now is None:
        assert density > goal.density and density >= 1.0 - 0.5 / getattr(goal, "m", float("inf"))
        return
    assert type(now) is type(goal)
    assert now.density >= goal.density
    if name in ("64:2:8", "4:2:16"):
        assert now == goal
    elif hasattr(goal, "m"):
        assert abs(now.density - max(density, goal.density)) <= 0.5 / goal.m + 1e-9
    else:
        assert now.density == max(density, goal.density)


def test_nm_loses_one_weight_of_a_group_at_a_time():
    schedule, goal = Schedule("linear", warm_up=4, every=3), parse("1:4")
    kept = [pattern_at(goal, schedule.density(step, 31, 0.25)) for step in changes(schedule, 31, goal)]
    assert [str(each) for each in kept] == ["3:4", "2:4", "1:4"]


@pytest.mark.parametrize(
    ("curve", "halfway"),
    [("constant", 0.1), ("linear", 0.55), ("cubic", 0.2125), ("exponential", 0.1**0.5), ("cosine", 0.55)],
)
def test_halfway_a_curve_has_its_own_density(curve, halfway):
    assert Schedule(curve, warm_up=10, cool_down=10).density(20, 40, 0.1) == pytest.approx(halfway)


def test_steps_of_whole_periods_make_as_many_changes_each_after_as_many_steps():
    schedule, goal = Schedule("exponential", every=7), parse("unstructured:0.1")
    assert changes(schedule, 4 * 7, goal) == (7, 14, 21, 28)
    assert schedule.density(14, 28, 0.1) == pytest.approx(0.1**0.5)


def test_a_constant_goal_is_asked_for_from_the_first_step_or_the_end_of_the_warm_up():
    goal = parse("2:4")
    assert changes(Schedule("constant"), 10, goal) == ()
    assert Schedule("constant").density(0, 10, 0.5) == 0.5
    assert changes(Schedule("constant", warm_up=4, every=5), 10, goal) == (4,)


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 60))
def test_a_schedule_without_a_step_to_change_masks_is_refused(steps, warm_up, cool_down):
    assume(warm_up + cool_down >= steps)
    with pytest.raises(MethodError, match="shorten them, or train longer"):
        Schedule("cubic", warm_up, cool_down).check(steps)


@pytest.mark.parametrize(
    ("settings_of", "words"),
    [
        ({"curve": "cubix"}, "choose one of constant, linear"),
        ({"warm_up": -1}, "warm_up=-1 is below zero"),
        ({"cool_down": -1}, "cool_down=-1 is below zero"),
        ({"every": 0}, "every=0 would never"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(settings_of, words):
    with pytest.raises(MethodError, match=words):
        Schedule(**settings_of)
